"""What the tests of the daemon itself want of a `Netfenced` beyond the harness's: waits for reloads, and clsact."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from harness.daemon import Netfenced
from harness.spawn import spawn
from harness.topology import Topology

# Runs the command line on a kernel that says it has no tcx.
WITHOUT_TCX = """
import sys
from netfence.dataplane import probe
probe.kernel_features()["tcx"] = "no: switched off by the test"
from netfence.cli import main
sys.argv[0] = "netfenced"
main()
"""


class Fenced(Netfenced):
    """A daemon whose topology may get more workloads while it runs; `tcx` False makes it use clsact."""

    def __init__(self, topology: Topology, directory: Path, *, tcx: bool = True, **arguments: Any) -> None:
        super().__init__(topology.host, directory, **arguments)
        self._tcx = tcx

    def launch(self) -> None:
        """Start the process, on a kernel without tcx if asked for."""
        if self._tcx:
            super().launch()
            return
        env = {key: value for key, value in os.environ.items() if not key.startswith("NETFENCE_")} | self._env
        command = [sys.executable, "-c", WITHOUT_TCX, "start", "--config", str(self.config_file)]
        with self.log_file.open("ab") as log:
            self._process = spawn(command, netns=self.netns, cgroup=self._cgroup, env=env, stdout=log, stderr=log)

    def leftovers(self) -> dict[str, Any]:
        """Tell what is left; of interfaces only the daemon's own counts, the test may have added others."""
        left = super().leftovers()
        interfaces = [name for name in left.pop("interfaces", []) if name == "netfence0"]
        return left | ({"interfaces": interfaces} if interfaces else {})

    def own_events(self, name: str, attachment_id: str) -> list[dict[str, Any]]:
        """Give the events of that name about one attachment."""
        return [entry for entry in self.events(name) if entry.get("attachment") == attachment_id]

    def ended_saying(self) -> str:
        """Wait for a daemon that was launched to end by itself with status 1; return what it said last."""
        assert self.wait() == 1, self.log_tail()
        return self.log_file.read_text().splitlines()[-1]


Start = Callable[..., Fenced]


@contextmanager
def starting(directory: Path) -> Any:
    """Give a function that starts daemons, each of which ends (and must leave nothing) with the block."""
    with ExitStack() as stack:
        made = 0

        def start(topology: Topology, **arguments: Any) -> Fenced:
            nonlocal made
            made += 1
            return stack.enter_context(Fenced(topology, directory / f"daemon{made}", **arguments))

        yield start


def as_yaml(policy: Mapping[str, Any], note: str) -> str:
    """Write a policy as YAML with a comment, for files that differ and say the same."""
    return f"{json.dumps(policy)}\n# {note}\n"
