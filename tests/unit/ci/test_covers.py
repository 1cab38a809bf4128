"""What tests/kernel says it covers, over its whole collection: the matrix must neither miss tests nor invent any."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

import matrix_results
from harness import covers as told
from harness.covers import FAMILIES, HOOKS, MODES, MODULES, NEITHER, Covers, covers
from shape_cases import CASES

ROOT = Path(__file__).resolve().parents[3]
COLLECT = """
import json, sys, pytest
class Told:
    def pytest_collection_finish(self, session):
        with open(sys.argv[1], "w") as out:
            json.dump([[item.path.stem, item.nodeid, item.originalname, item.cls and item.cls.__name__,
                        dict(item.user_properties)] for item in session.items], out)
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "tests/kernel"], plugins=[Told()]))
"""
DRIVES = re.compile(
    r"^from (harness\.fence import .*\bFence|connection_places|cgroup_inside|shape_paths)\b", re.MULTILINE
)
DATA_PLANE = {"test_verdict", "test_shapes", "test_shape_settings", "test_differential", "test_big_packets"} | {
    name for name, each in MODULES.items() if each.hooks and each.modes and each.families and "::" not in name
}
WHOLLY_NIGHTLY = {"test_soak", "test_start_up", "test_vm_outcomes"}
NIGHTLY = WHOLLY_NIGHTLY | {
    "test_commands_property", "test_crash", "test_differential", "test_dns_fuzz", "test_fair_share", "test_faults",
}  # fmt: skip

Item = tuple[str, str, str, str | None, dict[str, str]]  # module, node id, test, class, properties


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Collect tests/kernel, as a run does."""
    out = tmp_path_factory.mktemp("collected") / "items.json"
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return [tuple(each) for each in json.loads(out.read_text())]


@pytest.fixture(scope="module")
def nightly() -> set[str]:
    """List what `-m nightly` selects."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/kernel"]
    done = subprocess.run([*command, "-m", "nightly"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    return {line for line in done.stdout.splitlines() if "::" in line}


def values(properties: dict[str, str], name: str) -> set[str]:
    return set(filter(None, properties.get(name, "").split(", ")))


def test_every_test_of_the_data_plane_says_all_three(collected: list[Item]) -> None:
    seen: Counter[str] = Counter()
    for module, node, _, _, properties in collected:
        if module in DATA_PLANE:
            seen[module] += 1
            assert set(properties) >= {"hook", "mode", "family"}, node
    assert set(seen) == DATA_PLANE
    assert seen["test_verdict"] > 700
    assert seen["test_shapes"] > 600


def test_what_is_said_is_in_the_matrix(collected: list[Item]) -> None:
    for _, node, _, _, properties in collected:
        assert values(properties, "hook") <= set(HOOKS), node
        assert values(properties, "mode") <= set(MODES), node
        assert values(properties, "family") <= {*FAMILIES, *NEITHER}, node


def test_parameters_and_properties_agree(collected: list[Item]) -> None:
    """Every id of test_verdict names the hook, the family and the mode: nothing of them may get lost."""
    for module, node, test, _, properties in collected:
        if (module, test) == ("test_verdict", "test_verdict"):
            words = set(node.partition("[")[2].rstrip("]").split("-"))
            assert values(properties, "mode") == words & set(MODES), node
            assert values(properties, "family") == words & set(FAMILIES), node
            for hook in values(properties, "hook"):
                assert set(hook.split()) - {"native"} <= words, node


def test_the_cells_of_the_matrix_are_filled(collected: list[Item]) -> None:
    """Each mode and family of each hook has verdicts of its own, whatever other modules name it too."""
    cells = {
        (hook, mode, family)
        for module, _, _, _, properties in collected
        if module == "test_verdict"
        for hook in values(properties, "hook")
        for mode in values(properties, "mode")
        for family in values(properties, "family")
    }
    assert cells == set(product(HOOKS, MODES, FAMILIES))


def test_what_takes_long_is_nightly(nightly: set[str], collected: list[Item]) -> None:
    """`-m nightly` has the modules that soak, crash and fuzz, and all of some."""
    modules = {module for module, node, *_ in collected if node in nightly}
    assert modules >= NIGHTLY
    assert {node for module, node, *_ in collected if module in WHOLLY_NIGHTLY} <= nightly


def test_daemon_and_control_plane_fill_no_cell(collected: list[Item]) -> None:
    for module, node, _, _, properties in collected:
        if module not in {name.partition("::")[0] for name in MODULES}:
            assert not {"hook", "mode", "family"} & set(properties), node


def test_modules_with_a_fence_are_in_the_table() -> None:
    """Who drives packets through a data plane without a daemon says what that shows."""
    for path in (ROOT / "tests/kernel").glob("test_*.py"):
        if DRIVES.search(path.read_text()):
            assert path.stem in MODULES, path.name


def test_the_table_names_what_exists(collected: list[Item]) -> None:
    names = set()
    for module, _, test, inside, _ in collected:
        names |= {module, f"{module}::{test}", f"{module}::{inside}", f"{module}::{inside}::{test}"}
    assert set(MODULES) <= names


def test_the_matrix_has_the_same_rows_and_columns() -> None:
    for name in ("HOOKS", "MODES", "FAMILIES"):
        assert getattr(matrix_results, name) == getattr(told, name)


@pytest.mark.parametrize(
    ("module", "test", "test_id", "expected"),
    [
        ("test_verdict", "test_verdict", "tcx-ingress-ipv6-allowlist-x", Covers(("tcx",), ("allowlist",), ("ipv6",))),
        ("test_verdict", "test_verdict", "xdp-native-ipv4-audit-x", Covers(("xdp native",), ("audit",), ("ipv4",))),
        ("test_verdict", "test_verdict", "xdp-generic-ipv4-audit-x", Covers(("xdp generic",), ("audit",), ("ipv4",))),
        ("test_replies", "test_x", "ipv4-interface-disabled", Covers(("tc",), ("disabled",), ("ipv4",))),
        ("test_cgroup", "test_x", "", Covers(("cgroup",), ("allowlist",), FAMILIES)),
        ("test_hooks", "TestClsact::test_x", "ingress", Covers(("clsact",))),
        ("test_probe", "test_every_feature_is_as_old_as_we_say", "tcx", Covers()),
    ],
)  # fmt: skip
def test_the_order_of_what_is_believed(module: str, test: str, test_id: str, expected: Covers) -> None:
    assert covers(module, test, test_id) == expected


def test_a_packet_is_believed_before_the_name_of_its_shape() -> None:
    shapes = {each.shape.name: each for each in CASES}
    for name, family in (("ipv4-mapped", "ipv6"), ("ipv6-as-ipv4", NEITHER[0]), ("udp4", "ipv4")):
        assert covers("test_shapes", "test_shape", name, [shapes[name]]).families == (family,), name


def test_the_chosen_hook_is_told_by_the_kernel() -> None:
    one = Covers(("tc",), MODES[:2], ("ipv4",))
    assert one.properties(has_tcx=True)[0] == ("hook", "tcx")
    assert one.properties(has_tcx=False) == [("hook", "clsact"), ("mode", ", ".join(MODES[:2])), ("family", "ipv4")]
    assert Covers().properties(has_tcx=True) == []
