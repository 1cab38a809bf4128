"""What packages and images are made of says the same as the rest: requirements, the image, the service, paths."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from netfence.api.service import MAX_CALLS
from netfence.config import Config
from netfence.control.policyfile import load_policy_file
from netfence.dns import limits
from netfence.policy.limits import MAX_ATTACHMENTS

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"
CONTAINERFILE = (PACKAGING / "Containerfile").read_text()
OTHERS = 256  # open files: maps and programs, netlink, metrics, the control plane, the store, the loop
SERVICE = (PACKAGING / "netfenced.service").read_text()


def setting(name: str) -> list[str]:
    """Give the words of a setting of the service."""
    (value,) = re.findall(rf"^{name}=(.+)$", SERVICE, re.MULTILINE)
    return str(value).split()


def instructions(name: str) -> list[list[str]]:
    """Give the words of each such instruction of the image."""
    joined = CONTAINERFILE.replace("\\\n", " ")
    return [line.split()[1:] for line in joined.splitlines() if line.startswith(f"{name} ")]


def run_command() -> str:
    """Give the command in the image's head that runs it."""
    head = "\n".join(line[1:] for line in CONTAINERFILE.splitlines() if line.startswith("#"))
    (command,) = re.findall(r"podman run (?:.*\\\n)+.*", head)
    return str(command).replace("\\\n", " ")


def test_what_is_packed_is_what_is_asked_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    text = (PACKAGING / "requirements.txt").read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+) \\$", text, re.MULTILINE))
    for line in asked:
        requirement = Requirement(line)
        assert requirement.name in pinned, f"{requirement.name}: make packaging/requirements.txt anew (see its head)"
        assert requirement.specifier.contains(pinned[requirement.name]), line
    blocks = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(pinned)
    assert all("--hash=sha256:" in block for block in blocks)


def imported() -> Iterator[str]:
    """Yield the modules that netfence's own import, by the names at their top."""
    for path in (ROOT / "src/netfence").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (each.name.partition(".")[0] for each in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def test_what_is_imported_is_asked_for() -> None:
    """Where somebody installs the wheel with pip there is nothing else. bcc is the distribution's package."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {canonicalize_name(Requirement(line).name) for line in asked}
    providers = packages_distributions()
    others = set(imported()) - set(sys.stdlib_module_names) - {"netfence", "bcc"}
    assert len(others) > 10
    missing = {module for module in others if names.isdisjoint(map(canonicalize_name, providers[module]))}
    assert missing == set()


def test_the_example_of_a_policy_is_good() -> None:
    loaded = load_policy_file(PACKAGING / "policy.yaml")
    assert (len(loaded.rules), loaded.warnings) == (2, ())


def test_the_services_paths_are_those_of_the_configuration() -> None:
    config = Config()
    assert config.socket.parent == Path("/var/run")  # which is /run
    assert f"/bin/ln -sfn netfence/netfence.sock /run/{config.socket.name}" in SERVICE
    assert setting("Environment") == ["NETFENCE_SOCKET=/run/netfence/netfence.sock"]
    assert f"/bin/mkdir -p -m 0700 {config.bpffs_dir}" in SERVICE
    assert setting("ReadWritePaths") == [f"-{config.bpffs_dir}"]
    assert f"/var/lib/{setting('StateDirectory')[0]}" == str(config.data_dir)
    postrm = (PACKAGING / "debian/netfence.postrm").read_text()
    assert f"PINS={config.bpffs_dir}\n" in postrm
    assert f"rm -rf {config.data_dir}\n" in postrm


def test_the_image_copies_what_there_is() -> None:
    copied = [words[:-1] for words in instructions("COPY") if not words[0].startswith("--")]
    assert copied
    for path in (path for paths in copied for path in paths):
        assert (ROOT / path).exists(), path
    ours = {path for paths in copied for path in paths}
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert ours >= {"src", *included["force-include"]}


def test_the_image_runs_with_what_the_service_has() -> None:
    command = run_command()
    (capabilities,) = re.findall(r"--cap-add (\S+)", command)
    assert {f"CAP_{name}" for name in capabilities.split(",")} == set(setting("CapabilityBoundingSet"))
    for limit, name in (("LimitNOFILE", "nofile"), ("LimitMEMLOCK", "memlock")):
        (value,) = setting(limit)
        assert f"--ulimit {name}={'-1' if value == 'infinity' else value} " in command
    assert f"--stop-timeout {setting('TimeoutStopSec')[0]} " in command
    for part in ("--network host", "--cgroupns host", "--cap-drop ALL", "--security-opt no-new-privileges"):
        assert part in command
    volumes = dict(volume.split(":", 1) for volume in re.findall(r"--volume (\S+)", command))
    config = Config()
    wanted = (str(config.data_dir), "/run/netfence", "/etc/netfence", "/sys/fs/bpf", "/sys/fs/cgroup")
    assert set(volumes) == set(wanted)
    assert {path for path, where in volumes.items() if where.endswith(":ro")} == {"/etc/netfence", "/sys/fs/cgroup"}
    assert all(where.removesuffix(":ro") == path for path, where in volumes.items())
    assert config.bpffs_dir.is_relative_to("/sys/fs/bpf")


def test_open_files_are_allowed_for_all_that_may_be_open_at_once() -> None:
    each = len(("UDP", "TCP", "cgroup")) + limits.MAX_TCP_CONNECTIONS
    (allowed,) = setting("LimitNOFILE")
    assert int(allowed) >= MAX_ATTACHMENTS * each + limits.MAX_FLIGHTS + MAX_CALLS + OTHERS


def test_the_image_starts_what_the_service_starts() -> None:
    (entry,), (command,) = instructions("ENTRYPOINT"), instructions("CMD")
    words = re.findall(r'"([^"]+)"', " ".join([*entry, *command]))
    program, *arguments = setting("ExecStart")
    assert (words[0], words[1:]) == (Path(program).name, arguments)
    assert f"--volume {Path(arguments[-1]).parent}:" in run_command()
    assert setting("Environment")[0] in instructions("ENV")[0]
    assert f"--start-period={setting('TimeoutStartSec')[0]}s" in instructions("HEALTHCHECK")[0]


@pytest.mark.parametrize("package", ["python3-bpfcc", "libbpf1", "linux-libc-dev"])
def test_what_the_system_provides_is_asked_for_everywhere(package: str) -> None:
    assert re.search(rf"^Depends: .*\b{package}\b", (PACKAGING / "debian/control").read_text(), re.MULTILINE)
    assert package in CONTAINERFILE
