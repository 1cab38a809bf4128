"""`fleet-*`: one control plane made with the kit, and a fleet of simulated daemons, each with a stream of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import pytest

from harness.deadline import wait_for
from harness.spawn import spawn, stop
from measure import FULL, Series, report

HERE = Path(__file__).parent
DAEMONS = 1000 if FULL else 30
ATTACHMENTS = 20
ALL = DAEMONS * ATTACHMENTS
CONNECT_S = 120.0
PUSH_LIMIT_S, RECONNECT_LIMIT_S = 10.0, 30.0
UPDATES = 5 if FULL else 3


class Program:
    """A program that answers each line with a line of JSON."""

    def __init__(self, name: str, *arguments: object) -> None:
        argv = [sys.executable, str(HERE / name), *map(str, arguments)]
        self._process = spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, word: str = "state") -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())
        self._process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        stop(self._process)


@pytest.mark.timeout(600)
def test_push_to_a_fleet_and_restart(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/plane.sock"
    with Program("fleet.py", address, DAEMONS, ATTACHMENTS) as fleet, Program("fleet_plane.py", address) as first:
        first.hear()

        def all_in_sync(plane: Program) -> bool:
            return bool(plane.ask()["states"].get("in sync", 0) == ALL)

        wait_for(lambda: all_in_sync(first), "every attachment to be in sync", CONNECT_S)
        pushes = Series("s")
        for number in range(1, UPDATES + 1):
            done = first.ask("update")
            assert done["outcomes"] == {"applied": ALL}
            pushes.values.append(done["seconds"])
            assert fleet.ask()["versions"] == {f"v{number}": ALL}
        report("fleet-push-to-all", {"netfence": pushes}, daemons=DAEMONS, attachments=ALL)
        memory = Series("MB", [first.ask()["rss_mb"]] * 2)
        report("fleet-control-plane-memory", {"netfence": memory}, daemons=DAEMONS, attachments=ALL)
        first.kill()
        wait_for(lambda: fleet.ask()["connected"] == 0, "the fleet to notice")
        # The new one decides anew from v0, so that everything differs and is sent.
        with Program("fleet_plane.py", address) as second:
            second.hear()
            began = time.monotonic()
            wait_for(lambda: second.ask()["daemons"] == DAEMONS, "all daemons to be back", CONNECT_S)
            connected = time.monotonic() - began
            wait_for(lambda: all_in_sync(second), "everything to be in sync", CONNECT_S)
            synced = time.monotonic() - began
        times = {"connected": Series("s", [connected] * 2), "in-sync": Series("s", [synced] * 2)}
        report("fleet-reconnect", times, daemons=DAEMONS, attachments=ALL)
    assert pushes.median < PUSH_LIMIT_S
    assert connected < RECONNECT_LIMIT_S
