"""`netfenced controlplane` and a daemon, both as an operator runs them: one policy file, packets at the other end."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.daemon import PROGRAM, Netfenced
from harness.deadline import wait_for
from harness.packets import UDP4
from harness.spawn import spawn, stop
from harness.topology import Topology, Workload

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

URL = "127.0.0.1:7443"
OPEN, OTHER = "203.0.113.0/24", "192.0.2.0/24"
ADDRESS = "203.0.113.99"
RECONNECT_S = 40.0


class Plane:
    """The command's process: its policy file, and the documents that it prints."""

    def __init__(self, topology: Topology, directory: Path) -> None:
        self._netns = topology.host
        self._file = directory / "fleet.yaml"
        self._out = directory / "documents"

    def say(self, policy: Mapping[str, Any] | str) -> None:
        """Replace the policy file."""
        new = self._file.with_suffix(".new")
        new.write_text(policy if isinstance(policy, str) else yaml.safe_dump(dict(policy)))
        new.rename(self._file)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the command while inside."""
        argv = [str(PROGRAM), "controlplane", "--policy", str(self._file), "--listen", URL, "--json"]
        with self._out.open("wb") as out:
            process = spawn(argv, netns=self._netns, stdout=out, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            assert stop(process) == 0

    def shown(self) -> dict[str, Any]:
        """Return the newest document."""
        lines = self._out.read_text().splitlines() if self._out.exists() else []
        document: dict[str, Any] = json.loads(lines[-1]) if lines else {"daemons": [], "attachments": []}
        return document

    def wait_in_sync(self, version: str | None = None, *, former: Collection[str] = ()) -> dict[str, Any]:
        """Wait until the only attachment is in sync, at that version, or any but `former`; return what is shown.

        Packets tell of a new policy a moment before the daemon does, and documents are up to a second old.
        """

        def in_sync() -> dict[str, Any] | None:
            attachments = self.shown()["attachments"]
            if len(attachments) != 1 or attachments[0]["state"] != "in sync":
                return None
            seen = attachments[0]["policy_version"]
            return attachments[0] if version in {None, seen} and seen not in former else None

        found = wait_for(in_sync, "the attachment to be in sync", RECONNECT_S)
        assert found is not None
        return found


def rules(*allow: str) -> dict[str, Any]:
    entry = {"match": {"metadata": {"tenant": "acme"}}, "mode": "allowlist", "allow_cidrs": list(allow)}
    return {"attachments": [entry], "default": {"mode": "block_all"}}


def test_a_policy_file_for_a_fleet(topology: Topology, workload: Workload, tmp_path: Path) -> None:
    plane = Plane(topology, tmp_path)
    plane.say(rules(OPEN))
    config = {"control_plane": {"url": URL}}
    with Netfenced(topology.host, tmp_path / "daemon", policy=None, config=config) as daemon:
        with plane.running():
            wait_for(lambda: daemon.status().control_plane_state == 3, "the daemon to be connected", RECONNECT_S)
            attached = daemon.attach(interface=workload.host_if, metadata={"tenant": "acme"})
            assert topology.arrived(workload, UDP4, ADDRESS) == 3
            first = plane.wait_in_sync(daemon.info(attached.id).policy_version)["policy_version"]
            plane.say(rules(OTHER))
            wait_for(lambda: topology.arrived(workload, UDP4, ADDRESS, count=1) == 0, "the new file to be in force")
            assert topology.arrived(workload, UDP4, "192.0.2.53") == 3
            second = plane.wait_in_sync(former={first})["policy_version"]
            plane.say("default: {mode: wide open}\n")  # errors change nothing
            wait_for(lambda: not plane.shown()["policy_file"]["ok"], "the file to be refused")
            assert topology.arrived(workload, UDP4, "192.0.2.53") == 3
            plane.say(rules(OTHER, OPEN))
            wait_for(lambda: topology.arrived(workload, UDP4, ADDRESS, count=1) == 1, "the mended file to be in force")
            version = plane.wait_in_sync(former={first, second})["policy_version"]
            assert daemon.info(attached.id).policy_version == version
        assert topology.arrived(workload, UDP4, ADDRESS) == 3  # nobody decides, and what was decided stays
        applied = len(daemon.events("policy_applied"))
        with plane.running():
            assert plane.wait_in_sync(version)["target"] == workload.host_if
            assert topology.arrived(workload, UDP4, ADDRESS) == 3
        assert len(daemon.events("policy_applied")) == applied  # the same file: nothing was sent
