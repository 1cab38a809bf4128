"""`on_shutdown: detach` is about clean stops alone: a start that fails, and a defect, leave every fence in force."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import netfence
from daemons import Fenced, Start
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.packets import UDP4
from netfence.api.client import UnreachableError
from netfence.dataplane.links import obj_pin
from netfence.dataplane.maps import Map, MapSpec, MapType

pytestmark = pytest.mark.userspace

OUTSIDE4 = "203.0.113.99"
DETACH: dict[str, Any] = {"enforcement": {"on_shutdown": "detach"}}
SOURCES = Path(netfence.__file__).parents[1]

# What Python runs before the daemon: something of it breaks, or hangs.
NO_WATCHERS = """
from netfence import targets
from netfence.errors import ExhaustedError
def fail(self): raise ExhaustedError("watch interfaces: no inotify instance is left")
targets.Watchers.open = fail
"""
NO_STATE = """
from netfence import store
from netfence.errors import NetfenceError
async def fail(self): raise NetfenceError("load state: disk I/O error")
store.Store.load = fail
"""
DEFECT_AT_START = """
from netfence import daemon
async def fail(*_): raise RuntimeError("a defect")
daemon.restore = fail
"""
DEFECT = """
from netfence import daemon
def fail(*lines): raise RuntimeError("a defect")
daemon.notify = fail
"""
HANGS = """
from netfence import daemon
async def hang(*_):
    daemon.events.info("hangs")
    await daemon.asyncio.Event().wait()
daemon.restore = hang
"""

Way = Callable[[Fenced], AbstractContextManager[str]]


@contextmanager
def a_socket_in_use(daemon: Fenced) -> Iterator[str]:
    daemon.socket.unlink()
    with closing(socket.socket(socket.AF_UNIX)) as other:
        other.bind(str(daemon.socket))
        other.listen()
        yield "another process is listening on it"
    daemon.socket.unlink()


@contextmanager
def pins_of_nobody(daemon: Fenced) -> Iterator[str]:
    stranger = daemon.pins / "links" / "stranger-main"
    with closing(Map.create(MapSpec("stranger", MapType.HASH, 4, 4, 1))) as made:
        obj_pin(made.fd, stranger)
    yield "stranger is one); they stay in force"
    stranger.unlink()


def broken(code: str, says: str) -> Way:
    """Give a way in which something of the daemon itself does not work."""

    @contextmanager
    def way(daemon: Fenced) -> Iterator[str]:
        (daemon.directory / "sitecustomize.py").write_text(code)
        daemon._env = {"PYTHONPATH": f"{daemon.directory}:{SOURCES}"}
        yield says
        daemon._env = {}

    return way


WAYS: dict[str, Way] = {
    "socket": a_socket_in_use,
    "pins": pins_of_nobody,
    "watchers": broken(NO_WATCHERS, "no inotify instance is left"),
    "state": broken(NO_STATE, "disk I/O error"),
    "defect-at-start": broken(DEFECT_AT_START, "a defect"),
    "defect": broken(DEFECT, "a defect"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_daemon_that_fails_takes_no_fence_off(
    fresh: Fresh, start: Start, cgroups: Callable[[str], Cgroup], way: Way
) -> None:
    topology = fresh.topology()
    workload, group = topology.add_veth(), cgroups("failed")
    daemon = start(topology, config=DETACH)
    ids = {daemon.attach(interface=workload.host_if).id, daemon.attach(cgroup=group).id}
    daemon.kill()
    with way(daemon) as says:
        pins = set(daemon.link_pins())
        daemon.launch()
        assert says in daemon.ended_saying()
        assert pins <= set(daemon.link_pins())  # replies get theirs behind the attach
    assert bool(daemon.events("ready")[1:]) == (way is WAYS["defect"])
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    with Agent(netns=topology.host, cgroup=group) as agent:
        with pytest.raises(PermissionError):
            agent.udp().sendto(b"x", (OUTSIDE4, 9))
        daemon.start()
        assert {info.id for info in daemon.attachments()} == ids
        assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
        assert daemon.stop() == 0  # and that one was clean
        agent.udp().sendto(b"x", (OUTSIDE4, 9))
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3


def test_a_daemon_that_is_stopped_while_it_starts_takes_no_fence_off(fresh: Fresh, start: Start) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    daemon = start(topology, config=DETACH)
    attached = daemon.attach(interface=workload.host_if)
    daemon.kill()
    with broken(HANGS, "")(daemon):
        daemon.launch()
        daemon.wait_event("hangs")
        assert daemon.stop() == 0
    assert daemon.events("stopped_while_starting")
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    daemon.start()
    assert [info.id for info in daemon.attachments()] == [attached.id]


ROW_STAYS = """
import asyncio
from netfence import store
async def hang(*_): await asyncio.Event().wait()
store.Store.remove = hang
"""
NAMED4 = "203.0.113.80"
NAMES: dict[str, Any] = {"default": {"mode": "allowlist", "dns": {"mode": "allowlist", "allow": ["good.test"]}}}


@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_a_detach_that_is_cut_short_is_undone_with_its_leases_and_counts(
    fresh: Fresh, start: Start, *, tcx: bool
) -> None:
    topology = fresh.topology()
    fresh.names(topology, f"good.test. 300 IN A {NAMED4}")
    workload = topology.add_veth()
    daemon = start(topology, policy=NAMES, tcx=tcx)
    daemon.stop()
    with broken(ROW_STAYS, "")(daemon), ThreadPoolExecutor(1) as pool:
        daemon.start()
        attached = daemon.attach(interface=workload.host_if)
        with Agent(netns=workload.netns) as agent:
            assert agent.query(attached.dns, "good.test").rr
        assert topology.arrived(workload, UDP4, NAMED4) == 3
        assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
        before = daemon.info(attached.id)
        assert before.packets_blocked >= 3
        cut = pool.submit(daemon.detach, attached.id)
        wait_for(lambda: topology.arrived(workload, UDP4, OUTSIDE4) == 3, "the hooks to be off")
        daemon.kill()
        with pytest.raises(UnreachableError):
            cut.result()
    daemon.start()
    after = daemon.info(attached.id)
    assert after.packets_allowed >= before.packets_allowed
    assert after.packets_blocked >= before.packets_blocked
    assert topology.arrived(workload, UDP4, NAMED4) == 3
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    daemon.detach(attached.id)
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
    again = daemon.attach(interface=workload.host_if)  # in the same slot, of which nothing is left
    assert daemon.info(again.id).packets_blocked == 0
    assert topology.arrived(workload, UDP4, NAMED4) == 0
