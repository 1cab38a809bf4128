"""A data plane inside a topology's host, driven from a benchmark."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from harness import warm
from harness.topology import Topology
from netfence.config import Dns
from netfence.dataplane.plane import DataPlane
from netfence.policy.modes import Mode

T = TypeVar("T")
MAX_LEASES = Dns().max_leases_total
"""The product's default, so that its programs can be handed on to a daemon of the harness and back."""


class Plane:
    """A data plane in the topology's host, driven from a test: `run` a coroutine of it there."""

    def __init__(self, topology: Topology, directory: Path, *, tcx: bool | None = None) -> None:
        self._topology = topology
        self._runner = asyncio.Runner()
        self._stack = contextlib.ExitStack()
        self.bpffs = self._stack.enter_context(warm.bpffs(directory / "bpf", directory / "data", MAX_LEASES))
        opened = DataPlane.open(
            self.bpffs / warm.PINS, directory / "data", Mode.BLOCK_ALL, max_leases_total=MAX_LEASES, tcx=tcx
        )
        self.plane: DataPlane = self.run(opened)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine where the host's interfaces are."""
        with self._topology.host.inside():
            return self._runner.run(work)

    def close(self) -> None:
        """Hand the programs on to the next one, if nothing is attached; else they go with the bpffs."""
        self.run(self.plane.close(detach=False))
        self._runner.close()
        self._stack.close()
