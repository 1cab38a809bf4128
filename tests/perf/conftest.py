"""Fixtures of the benchmarks: the kernel tests' sandbox and topology, a data plane, everything pinned to one CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench_plane import Plane
from harness import sandbox
from harness.topology import Topology
from measure import pin


@pytest.fixture(scope="session", autouse=True)
def _sandbox() -> None:
    sandbox.enter()


@pytest.fixture
def pinned() -> Iterator[int]:
    """Pin this process, and what it starts, to one CPU."""
    with pin() as cpu:
        yield cpu


@pytest.fixture(scope="module")
def pinned_module() -> Iterator[int]:
    """Pin this process, and what a module's fixtures start, to one CPU."""
    with pin() as cpu:
        yield cpu


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    made = Topology()
    yield made
    made.close()


@pytest.fixture(scope="module")
def plane(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    one = Plane(topology, tmp_path_factory.mktemp("plane"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def clsact_plane(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    one = Plane(topology, tmp_path_factory.mktemp("plane"), tcx=False)
    yield one
    one.close()
