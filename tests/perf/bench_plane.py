"""A data plane inside a topology's host, driven from a benchmark."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from harness import sandbox
from harness.topology import Topology
from netfence.dataplane.plane import DataPlane
from netfence.policy.modes import Mode

T = TypeVar("T")
MAX_LEASES = 65536


class Plane:
    """A data plane in the topology's host, driven from a test: `run` a coroutine of it there."""

    def __init__(
        self, topology: Topology, directory: Path, *, tcx: bool | None = None, max_leases: int = MAX_LEASES
    ) -> None:
        self._topology = topology
        self.max_leases = max_leases
        self._runner = asyncio.Runner()
        (directory / "data").mkdir()
        self._stack = contextlib.ExitStack()
        self.bpffs = self._stack.enter_context(sandbox.bpffs(directory / "bpf"))
        opened = DataPlane.open(
            self.bpffs / "netfence", directory / "data", Mode.BLOCK_ALL, max_leases_total=max_leases, tcx=tcx
        )
        self.plane: DataPlane = self.run(opened)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine where the host's interfaces are."""
        with self._topology.host.inside():
            return self._runner.run(work)

    def close(self) -> None:
        self.run(self.plane.close(detach=True))
        self._runner.close()
        self._stack.close()
