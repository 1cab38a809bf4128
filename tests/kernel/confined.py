"""A daemon confined as packaging/netfenced.service confines it, by what that file says; see confined_main.py."""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from daemons import WITHOUT_TCX, Fenced
from harness.daemon import PROGRAM
from harness.spawn import spawn
from harness.topology import Topology
from netfence.dataplane import probe

TRIED = ["io_uring_setup"]
"""System calls that libraries try and do without; any other that the unit does not allow ends the daemon in tests."""

UNIT = Path(__file__).parents[2] / "packaging" / "netfenced.service"
CONFINE = Path(__file__).with_name("confined_main.py")


@functools.cache
def unit() -> dict[str, list[str]]:
    """Read the unit: key → its values in order, blanks between words of one line."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def capabilities() -> list[str]:
    """Name the capabilities that the unit leaves."""
    (value,) = unit()["CapabilityBoundingSet"]
    return value.split()


@functools.cache
def groups() -> dict[str, frozenset[str]]:
    """Ask systemd which system calls its groups have: "@name" → members, which may be groups again."""
    try:
        done = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.fail("systemd-analyze is missing: apt install systemd")
    found: dict[str, set[str]] = {}
    group = ""
    for line in done.stdout.splitlines():
        word = line.strip()
        if line.startswith("@"):
            group = word
        elif word and not word.startswith("#"):
            found.setdefault(group, set()).add(word)
    return {name: frozenset(members) for name, members in found.items()}


def members(name: str) -> set[str]:
    """Name the system calls of a group, or the one system call."""
    if not name.startswith("@"):
        return {name}
    return {call for member in groups()[name] for call in members(member)}


def system_calls() -> set[str]:
    """Name the system calls that the unit allows."""
    allowed = members("@default")  # systemd.exec(5): always permitted
    for value in unit()["SystemCallFilter"]:
        named = {call for name in value.removeprefix("~").split() for call in members(name)}
        allowed = allowed - named if value.startswith("~") else allowed | named
    return allowed


class Confined(Fenced):
    """A daemon with no more than the unit gives, less what is in `without`: capabilities and system calls.

    `groups`: as SupplementaryGroups= of the unit.
    """

    def __init__(
        self,
        topology: Topology,
        directory: Path,
        *,
        without: Collection[str] = (),
        groups: Collection[int] = (),
        tcx: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(topology, directory, tcx=tcx, **arguments)
        told = unit()
        self._confinement = {
            "capabilities": [probe.CAPABILITIES[name] for name in capabilities() if name not in without],
            "groups": list(groups),
            "limits": {
                "RLIMIT_NOFILE": int(told["LimitNOFILE"][0]),
                "RLIMIT_MEMLOCK": {"infinity": resource.RLIM_INFINITY}[told["LimitMEMLOCK"][0]],
            },
            "system_calls": sorted(system_calls().difference(without)),
            "tried": TRIED,
            "families": told["RestrictAddressFamilies"][0].split(),
        }

    def launch(self) -> None:
        """Start the process, confined."""
        start = ["start", "--config", str(self.config_file)]
        program = [str(PROGRAM), *start] if self._tcx else [sys.executable, "-c", WITHOUT_TCX, *start]
        env = {key: value for key, value in os.environ.items() if not key.startswith("NETFENCE_")} | self._env
        command = [sys.executable, str(CONFINE), json.dumps(self._confinement), *program]
        with self.log_file.open("ab") as log:
            self._process = spawn(command, netns=self.netns, cgroup=self._cgroup, env=env, stdout=log, stderr=log)
