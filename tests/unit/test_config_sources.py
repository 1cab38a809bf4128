"""Reading the sources of configuration: places, bad files, the environment's forms, unknown keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from netfence.config import KEYS
from netfence.config_sources import MAX_FILE, Given, from_environ, from_file, from_flags


def read(tmp_path: Path, data: str | bytes) -> tuple[dict[str, Given], list[str]]:
    path = tmp_path / "f.yaml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    faults: list[str] = []
    values = from_file(path, KEYS, faults)
    return values, [fault.replace(str(path), "F") for fault in faults]


def test_values_know_their_lines(tmp_path: Path) -> None:
    values, faults = read(
        tmp_path, "log_level: info\ndns:\n  # here\n  upstreams:\n    - 192.0.2.1\n    - '~'\n    - ~\n"
    )
    assert faults == []
    assert values["log_level"] == Given("info", f"file {tmp_path / 'f.yaml'}:1")
    assert values["dns.upstreams"] == Given(["192.0.2.1", "~", None], f"file {tmp_path / 'f.yaml'}:4")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        pytest.param("a: [", "file F:1: not YAML: ", id="open-list"),
        pytest.param("dns:\n\tport_min: 1\n", "file F:2: not YAML: ", id="tab"),
        pytest.param("- 1\n", "file F:1: a list: allowed is a mapping of keys", id="a-list"),
        pytest.param("hello\n", "file F:1: hello: allowed is a mapping of keys", id="a-text"),
        pytest.param("dns: 3\n", "file F:1: dns: 3: allowed is a mapping of keys", id="section-is-text"),
        pytest.param("socket: /a\nsocket: /b\n", "file F:2: socket: stands twice", id="key-twice"),
        pytest.param("dns: {port_min: 1}\ndns: {port_max: 2}\n", "file F:2: dns: stands twice", id="section-twice"),
        pytest.param("dns: {port_min: 1, port_min: 2}\n", "file F:1: dns.port_min: stands twice", id="inner-twice"),
        pytest.param("metadata: {a: 1, a: 2}\n", "file F:1: metadata: 'a' stands twice", id="metadata-twice"),
        pytest.param("metadata: {[a]: 1}\n", "file F:1: metadata: a key must be a text", id="metadata-list-key"),
        pytest.param("? [a]\n: 1\n", "file F:1: the file: a key must be a text", id="list-key"),
        pytest.param("a: 1\n---\nb: 2\n", "file F:2: not YAML: ", id="two-documents"),
        pytest.param("metadata: &a [*a]\n", "file F:1: ", id="holds-itself"),
        pytest.param("metadata: " + "[" * 5000, "file F:1: not YAML: ", id="deep"),
        pytest.param(b"\xff\xff\xff", "file F:1: not YAML: ", id="not-utf8"),
        pytest.param("a: \0\n", "file F:1: not YAML: ", id="control-character"),
        pytest.param("a: *b\n", "file F:1: not YAML: ", id="alias"),
        pytest.param("#" * (MAX_FILE + 1), f"file F: larger than {MAX_FILE} bytes", id="huge"),
    ],
)
def test_bad_files(tmp_path: Path, data: str | bytes, fault: str) -> None:
    _, faults = read(tmp_path, data)
    assert len(faults) == 1
    assert faults[0].startswith(fault)


def test_a_tag_makes_nothing_happen(tmp_path: Path) -> None:
    values, faults = read(tmp_path, "socket: !!python/object/apply:os.system ['true']\n")
    assert (values["socket"].value, faults) == (["true"], [])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    faults: list[str] = []
    assert from_file(tmp_path / "missing.yaml", KEYS, faults) == {}
    assert from_file(tmp_path, KEYS, faults) == {}
    assert [fault.partition("cannot be read: ")[2].partition(";")[0] for fault in faults] == [
        "No such file or directory",
        "Is a directory",
    ]


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        pytest.param("dns.upstream", "did you mean dns.upstreams?", id="plural"),
        pytest.param("listen_addr", "did you mean dns.listen_addr?", id="section-forgotten"),
        pytest.param("dns.allow_dhcp", "did you mean enforcement.allow_dhcp?", id="wrong-section"),
        pytest.param("enforcment", "did you mean enforcement?", id="section-misspelt"),
        pytest.param("enforcment.allow_dhcp", "did you mean enforcement.allow_dhcp?", id="in-a-misspelt-section"),
        pytest.param("control_plane.tls.crt", "did you mean control_plane.tls.cert?", id="deep"),
        pytest.param("metrics.zzz", "known in metrics are listen", id="nothing-near"),
        pytest.param("zzz.yyy", "known at the top are bpffs_dir, control_plane, ", id="nothing-near-at-all"),
    ],
)
def test_the_nearest_key_is_suggested(path: str, hint: str) -> None:
    assert hint in KEYS.unknown("flag", path, "v")


def test_a_long_value_is_cut() -> None:
    assert len(KEYS.unknown("flag", "dns.zzz", "v" * 100_000)) < 1000


def environ(**variables: str) -> tuple[dict[str, object], list[str]]:
    faults: list[str] = []
    return {path: given.value for path, given in from_environ(variables, KEYS, faults).items()}, faults


def test_environment_forms() -> None:
    assert environ(
        NETFENCE_DNS__UPSTREAMS="['192.0.2.1', 192.0.2.2]",
        NETFENCE_METADATA="{a: 'b,c'}",
        NETFENCE_DNS__ALLOW_PRIVATE="10.0.0.0/8,fd00::/8",
        NETFENCE_POLICY_FILE=" ",
        netfence_log_level="info",
        NETFENCE_METRICS__LISTEN="[::1]:9100",
        OTHER="x",
    ) == (
        {
            "dns.upstreams": ["192.0.2.1", "192.0.2.2"],
            "metadata": {"a": "b,c"},
            "dns.allow_private": "10.0.0.0/8,fd00::/8",
            "policy_file": None,
            "log_level": "info",
            "metrics.listen": "[::1]:9100",
        },
        [],
    )


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        pytest.param(
            {"NETFENCE_LISTEN_ADDR": "x"},
            "environment NETFENCE_LISTEN_ADDR: listen_addr: unknown key (value 'x'); did you mean dns.listen_addr?",
            id="unknown",
        ),
        pytest.param(
            {"NETFENCE_DNS": "{port_min: 1}"},
            "environment NETFENCE_DNS: dns: a section; set its keys one by one, as NETFENCE_DNS__NAME",
            id="section",
        ),
        pytest.param(
            {"NETFENCE_SOCKET": "/a", "netfence_socket": "/b"},
            "environment netfence_socket: socket: given twice, also as environment NETFENCE_SOCKET",
            id="twice",
        ),
        pytest.param(
            {"NETFENCE_METADATA": "{a: [}"}, "environment NETFENCE_METADATA: metadata: '{a: [}': not YAML", id="yaml"
        ),
        pytest.param(
            {"NETFENCE_METADATA": "{a: 1, a: 2}"},
            "environment NETFENCE_METADATA: metadata: '{a: 1, a: 2}': 'a' stands twice",
            id="key-twice",
        ),
    ],
)
def test_environment_faults(variables: dict[str, str], fault: str) -> None:
    _, faults = environ(**variables)
    assert len(faults) == 1
    assert faults[0].startswith(fault)


def test_flags() -> None:
    faults: list[str] = []
    assert from_flags({"socket": "/x", "policy_file": None, "sokcet": 1}, KEYS, faults) == {
        "socket": Given("/x", "flag")
    }
    assert faults == ["flag: sokcet: unknown key (value '1'); did you mean socket?"]
