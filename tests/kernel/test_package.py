"""What users install works without this repository: the wheel of the source distribution, and the Debian package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from booted import ROOT
from daemons import Fenced
from harness.deadline import SLOWNESS, wait_for
from harness.fresh import Fresh
from harness.packets import UDP4
from harness.spawn import spawn
from harness.topology import Topology, Workload
from installed import Installed, build
from netfence import __version__
from netfence.dataplane import probe

pytestmark = pytest.mark.userspace

OUTSIDE4, OTHER4 = "10.0.1.1", "192.0.2.8"
"""What packaging/policy.yaml lets veths reach, and what it does not."""
COMPLETE = """
source {script}
COMP_WORDS=(netfenced {words}) COMP_CWORD={number}
_netfenced_completion {program}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
"""bash, where somebody types `words` and presses the tab key; `program` is what it would run."""


def completed(script: str, program: str, *words: str) -> list[str]:
    """Give the command line of a bash that sources the script and completes the last of the words."""
    told = COMPLETE.format(script=script, program=program, words=" ".join(words), number=len(words))
    return ["bash", "--norc", "-eu", "-c", told]


def passed(topology: Topology, workload: Workload) -> list[int]:
    return [topology.arrived(workload, UDP4, where) for where in (OUTSIDE4, OTHER4)]


# -- the wheel ---------------------------------------------------------------------------------------------------------


class FromWheel(Fenced):
    """A daemon of another environment than ours, whose programs are not loaded yet: it has to compile its own.

    It is started in a directory with files that it must not take for its own.
    """

    def __init__(self, topology: Topology, directory: Path, environment: Path, **arguments: Any) -> None:
        super().__init__(topology, directory, cold=True, **arguments)
        self._program = environment / "bin" / "netfenced"

    def launch(self) -> None:
        """Start the process."""
        trap = self.directory / "trap"
        trap.mkdir()
        (trap / "layout.h").write_text("#error taken from where the daemon was started\n")
        (trap / "bcc.py").write_text("raise RuntimeError('taken from where the daemon was started')\n")
        start = [str(self._program), "start", "--config", str(self.config_file)]
        with self.log_file.open("ab") as log:
            self._process = spawn(
                ["env", "--chdir", str(trap), *start], netns=self.netns, cgroup=self._cgroup, stdout=log, stderr=log
            )


def environment_of_wheel(directory: Path) -> Path:
    """Make a virtual environment with a wheel that was built from the source distribution; dependencies are ours."""
    hatch = [sys.executable, "-m", "hatchling", "build", "--directory", str(directory), "--target"]
    subprocess.run([*hatch, "sdist"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-xzf", f"netfence-{__version__}.tar.gz"], cwd=directory, check=True)
    subprocess.run([*hatch, "wheel"], cwd=directory / f"netfence-{__version__}", check=True, capture_output=True)
    environment, (wheel,) = directory / "environment", directory.glob("*.whl")
    python = environment / "bin" / "python"
    without_pip = ["/usr/bin/python3", "-m", "venv", "--system-site-packages", "--without-pip", str(environment)]
    subprocess.run(without_pip, check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    where = "from netfence.dataplane.loader import bpf_sources; print(bpf_sources())"
    said = subprocess.run([python, "-c", where], cwd=directory, check=True, capture_output=True, text=True).stdout
    assert said == f"{site}/netfence/bpf\n"
    return environment


@pytest.mark.timeout(180)
def test_a_wheel_from_the_source_distribution(fresh: Fresh, tmp_path: Path) -> None:
    """It says its version, compiles its programs, fences; and completes ids of the running daemon."""
    environment = environment_of_wheel(tmp_path)
    program = environment / "bin" / "netfenced"
    said = subprocess.run([program, "--version"], cwd="/", check=True, capture_output=True, text=True)
    assert said.stdout == f"netfenced {__version__}\n"
    topology = fresh.topology()
    workload = topology.add_veth()
    policy = {"default": {"mode": "allowlist", "allow_cidrs": [f"{OUTSIDE4}/32"]}}
    assert passed(topology, workload) == [3, 3]
    with FromWheel(topology, tmp_path / "netfenced", environment, policy=policy) as daemon:
        attached = daemon.attach(interface=workload.host_if)
        assert passed(topology, workload) == [3, 0]
        script = tmp_path / "completion.bash"
        source = {"_NETFENCED_COMPLETE": "bash_source", "PATH": "/usr/bin:/bin"}
        script.write_bytes(subprocess.run([program], env=source, check=True, stdout=subprocess.PIPE).stdout)

        def completes(*words: str) -> list[str]:
            return topology.host.run(*completed(str(script), str(program), *words)).stdout.split()

        assert completes("--socket", str(daemon.socket), "detach", "--id", attached.id[:2]) == [attached.id]
        assert completes("--socket", str(tmp_path / "nobody"), "detach", "--id", "''") == []
        assert completes("det") == ["detach"]


# -- the Debian package ------------------------------------------------------------------------------------------------


def content(package: Path) -> dict[str, str]:
    """List the package's files: path → mode and owner."""
    listed = subprocess.run(["dpkg-deb", "--contents", package], check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in listed.splitlines()]
    return {words[5].removeprefix("."): f"{words[0]} {words[1]}" for words in lines}


def field(package: Path, name: str) -> str:
    """Give a field of the package's control file."""
    command = ["dpkg-deb", "--field", str(package), name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def holds_what_an_administrator_expects(package: Path) -> None:
    """Compare what is in the package with what is in the repository and with how Debian has it."""
    files = content(package)
    assert {owner.split()[1] for owner in files.values()} == {"root/root"}
    writable = [path for path, mode in files.items() if mode[0] != "l" and "w" in (mode[5], mode[8])]
    assert not writable
    site = f"/usr/lib/netfence/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    sources = [path.relative_to(ROOT) for path in (ROOT / "bpf").rglob("*.[ch]")]
    wanted = {f"{site}/netfence/{path}" for path in sources} | {
        "/usr/sbin/netfenced",
        "/etc/netfence/netfence.yaml",
        "/lib/systemd/system/netfenced.service",
        "/usr/share/man/man8/netfenced.8.gz",
        "/usr/share/bash-completion/completions/netfenced",
        "/usr/share/zsh/vendor-completions/_netfenced",
        "/usr/share/fish/vendor_completions.d/netfenced.fish",
        "/usr/share/doc/netfence/README.Debian",
        "/usr/share/doc/netfence/copyright",
        "/usr/share/doc/netfence/examples/policy.yaml",
    }
    assert wanted <= {path.replace("/usr/lib/systemd", "/lib/systemd") for path in files}
    assert not [path for path in files if "__pycache__" in path or path.endswith("/direct_url.json")]
    assert field(package, "Version").startswith(f"{__version__}-1~")
    depends = field(package, "Depends")
    assert {"python3-bpfcc", "libbpf1", "linux-libc-dev"} <= set(re.split(r", | \([^)]*\)(?:, )?", depends))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the package, built as an administrator builds it."""
    return build(tmp_path_factory.mktemp("package"))


class Life:
    """A machine on which the package is installed, and a workload behind a veth."""

    def __init__(self, topology: Topology, machine: Installed, package: Path) -> None:
        self.machine, self._topology, self._package = machine, topology, package
        self._workload = topology.add_veth()

    def install(self) -> str:
        """Install the package, for the first time or again, and wait for the service; return what was said."""
        said = self.machine.dpkg("--install", f"/mnt/package/{self._package.name}")
        self.active()
        return said

    def active(self) -> None:
        """Wait for the service."""
        wait_for(lambda: self.machine.shows("ActiveState") == "active", "the service", 120 * SLOWNESS)

    def follow_readme(self) -> None:
        """Take the example of a policy, as README.Debian has it."""
        self.machine.run("cp", "/usr/share/doc/netfence/examples/policy.yaml", "/etc/netfence/policy.yaml")
        self.machine.netfenced("policy", "check", "/etc/netfence/policy.yaml")
        set_policy = "s|^policy_file: null|policy_file: /etc/netfence/policy.yaml|"
        self.machine.run("sed", "-i", set_policy, "/etc/netfence/netfence.yaml")
        self.machine.run("systemctl", "restart", "netfenced.service", timeout_s=120)

    def attach(self) -> str:
        """Fence the workload; return the id."""
        self.machine.netfenced("attach", "--interface", self._workload.host_if)
        (attached,) = self.attachments()
        return attached

    def open_by_hand(self) -> None:
        """Take all fences off as the package says when it is removed."""
        self.machine.run("rm", "-r", "/sys/fs/bpf/netfence/links")
        if not probe.supports("tcx"):
            self.machine.run("tc", "qdisc", "del", "dev", self._workload.host_if, "clsact")

    def attachments(self) -> list[str]:
        return [one["id"] for one in json.loads(self.machine.netfenced("list", "--json"))["attachments"]]

    def passed(self) -> list[int]:
        return passed(self._topology, self._workload)

    def there(self, *paths: str) -> list[str]:
        """Tell which of these files and directories exist."""
        return self.machine.run("ls", "--directory", *paths, check=False).split()


@pytest.fixture
def life(fresh: Fresh, tmp_path: Path, package: Path) -> Iterator[Life]:
    topology = fresh.topology()
    with Installed(topology, tmp_path, package.parent) as machine:
        yield Life(topology, machine, package)


@pytest.mark.registry
@pytest.mark.timeout(900)
def test_the_debian_package(life: Life, package: Path) -> None:
    """Installed and used under systemd, as README.Debian has it; and its removal opens no fence."""
    holds_what_an_administrator_expects(package)
    machine = life.machine
    life.install()
    assert machine.shows("UnitFileState") == "enabled"
    assert machine.netfenced("--version") == f"netfenced {__version__}\n"
    unit = machine.run("systemctl", "cat", "netfenced.service")
    ours = (ROOT / "packaging" / "netfenced.service").read_text()
    assert ours.replace("/opt/netfence/bin/netfenced", "/usr/sbin/netfenced") in unit
    assert machine.run("cat", "/etc/netfence/netfence.yaml") == (ROOT / "src/netfence/netfence.yaml").read_text()
    life.follow_readme()
    assert life.passed() == [3, 3]
    attached = life.attach()
    assert life.passed() == [3, 0]
    script = "/usr/share/bash-completion/completions/netfenced"
    assert machine.run(*completed(script, "netfenced", "detach", "--id", attached[:2])) == f"{attached}\n"

    assert "fences of 1 attachments STAY IN FORCE" in machine.dpkg("--remove", "netfence")
    assert life.passed() == [3, 0]
    assert machine.run("pgrep", "--full", "netfenced start", check=False) == ""
    kept = ["/etc/netfence/netfence.yaml", "/etc/netfence/policy.yaml", "/var/lib/netfence/state.db"]
    assert life.there(*kept, "/usr/lib/netfence", "/usr/sbin/netfenced", "/run/netfence.sock") == kept
    life.open_by_hand()
    wait_for(lambda: life.passed() == [3, 3], "the fence to be off")


@pytest.mark.nightly
@pytest.mark.registry
@pytest.mark.timeout(900)
def test_upgrade_and_purge_of_the_debian_package(life: Life) -> None:
    """What is in force stays in force, and the next daemon finds it; nothing is left of what fences nothing."""
    machine = life.machine
    life.install()
    life.follow_readme()
    attached = life.attach()
    assert life.passed() == [3, 0]

    # The same again is what an upgrade does: another process, nothing else.
    process = machine.shows("MainPID")
    assert "STAY IN FORCE" not in life.install()
    assert machine.shows("MainPID") not in {process, "0"}
    assert (life.attachments(), life.passed()) == ([attached], [3, 0])

    assert "fences of 1 attachments STAY IN FORCE" in machine.dpkg("--purge", "netfence")
    assert life.passed() == [3, 0]
    own = "/etc/netfence/policy.yaml"
    assert life.there("/var/lib/netfence", "/etc/netfence/netfence.yaml", own) == [own]

    life.install()
    assert (life.attachments(), life.passed()) == ([attached], [3, 0])
    machine.run("sed", "-i", "s/on_shutdown: keep/on_shutdown: detach/", "/etc/netfence/netfence.yaml")
    machine.run("systemctl", "restart", "netfenced.service", timeout_s=120)
    assert life.passed() == [3, 0]
    machine.run("systemctl", "stop", "netfenced.service", timeout_s=60)
    assert life.passed() == [3, 3]
    assert "STAY IN FORCE" not in machine.dpkg("--purge", "netfence")
    assert life.there("/sys/fs/bpf/netfence", "/var/lib/netfence") == []
