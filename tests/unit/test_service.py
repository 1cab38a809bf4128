"""packaging/netfenced.service as systemd reads it, and as the daemon needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from netfence.config import Config
from netfence.dataplane import probe

UNIT = Path(__file__).parents[2] / "packaging" / "netfenced.service"
MOST_EXPOSURE = 3.0
"""What `systemd-analyze security` may make of it, of 10: root, in the host's network, with some capabilities."""


def analyze(*arguments: str) -> str:
    try:
        done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False, timeout=50)
    except FileNotFoundError:
        pytest.fail("systemd-analyze is missing: apt install systemd")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def values(key: str) -> list[str]:
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]


def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    installed = tmp_path / UNIT.name
    (program,) = values("ExecStart")
    text = UNIT.read_text(encoding="utf-8")
    installed.write_text(text.replace(program.split()[0], sys.executable))  # what is there for sure
    said = analyze("verify", "--man=no", "--recursive-errors=no", str(installed))
    assert [line for line in said.splitlines() if UNIT.name in line] == []


def test_it_is_as_closed_as_it_was() -> None:
    threshold = str(round(MOST_EXPOSURE * 10))
    assert "Overall exposure level" in analyze("security", "--offline=true", f"--threshold={threshold}", str(UNIT))


def test_systemd_waits_for_what_the_daemon_says_and_starts_it_again() -> None:
    assert (values("Type"), values("NotifyAccess")) == (["notify"], ["main"])
    assert 0 < int(values("WatchdogSec")[0]) <= 60  # test_a_life_under_systemd has a shorter one
    assert (values("WatchdogSignal"), values("Restart")) == (["SIGABRT"], ["always"])


def test_its_capabilities_are_what_the_daemon_asks_for() -> None:
    (told,) = values("CapabilityBoundingSet")
    assert set(told.split()) == {*probe.ALWAYS_NEEDED, "CAP_NET_BIND_SERVICE"}
    explained = [line.split()[1] for line in UNIT.read_text(encoding="utf-8").splitlines() if line.startswith("# CAP_")]
    assert explained == [*told.split(), "CAP_DAC_OVERRIDE"]


def test_what_it_may_write_is_where_the_defaults_are() -> None:
    config = Config()
    assert str(config.data_dir) == f"/var/lib/{values('StateDirectory')[0]}"
    assert values("ReadWritePaths") == [f"-{config.bpffs_dir}"]
    assert any(value.endswith(f" {config.bpffs_dir}") for value in values("ExecStartPre"))
    (environment,) = values("Environment")
    assert environment == f"NETFENCE_SOCKET=/run/{values('RuntimeDirectory')[0]}/netfence.sock"
    link = str(config.socket).removeprefix("/var")
    assert any(value.endswith(f" netfence/netfence.sock {link}") for value in values("ExecStartPre"))
