"""A daemon driven by a scripted control plane, in a topology: the words that tests of the stream are written in.

`Stage.do` sends a command and waits for its CommandResult; `Stage.good` also checks that it is what the daemon then
says everywhere; `Stage.reach` counts what of three packets of each family gets out.
"""

from __future__ import annotations

import itertools
import socket
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import dnslib
import grpc

from control_commands import ack, set_mode
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.controlplane import Command, ControlPlaneProcess
from harness.daemon import Attached, Netfenced
from harness.deadline import wait_for
from harness.packets import UDP4, UDP6
from harness.topology import Topology, Workload
from netfence.api.client import RefusedError
from netfence.api.messages import attach_request
from netfence.api.views import AttachSpec
from netfence.dataplane.compile import map_specs
from netfence.dataplane.layout import Layout
from netfence.dataplane.links import obj_get
from netfence.dataplane.maps import Map
from netfence.store import DATABASE
from netfence.v1 import daemon_pb2_grpc, types_pb2

OUT4, OUT6 = "203.0.113.99", "2001:db8:77::1"
NET4, NET6 = "203.0.113.0/24", "2001:db8:77::/48"
BOTH, ONLY4, ONLY6, NONE = (3, 3), (3, 0), (0, 3), (0, 0)
NOERROR, SERVFAIL, REFUSED = 0, 2, 5
RECONNECT_S = 40.0  # the first tries come within 3 s; after streams that were short, within 30
ERROR, REMOVED, DETACHED = (
    types_pb2.UNSUBSCRIBE_REASON_ERROR,
    types_pb2.UNSUBSCRIBE_REASON_REMOVED,
    types_pb2.UNSUBSCRIBE_REASON_DETACHED,
)


class Stage:
    """The topology, the control plane and the daemon of a test."""

    def __init__(self, topology: Topology, plane: ControlPlaneProcess, daemon: Netfenced) -> None:
        self.topology = topology
        self.plane = plane
        self.daemon = daemon
        self._nonces = (f"nonce-{number}" for number in itertools.count())

    # -- attach --------------------------------------------------------------------------------------------------------

    def attach(self, target: Workload | Cgroup, *answer: Command, **metadata: str) -> Attached:
        """Attach; the control plane answers this target with `answer` (none: by the rules that it has)."""
        name = target.host_if if isinstance(target, Workload) else str(target.path)
        if answer:
            self.plane.on_subscribed(*answer, target=name)
        if isinstance(target, Workload):
            return self.daemon.attach(interface=target.host_if, metadata=metadata)
        return self.daemon.attach(cgroup=target, metadata=metadata)

    @contextmanager
    def attaching(self, workload: Workload) -> Iterator[tuple[Any, Future[Attached]]]:
        """Begin an attach that is not answered; give its Subscribed and what will come of it."""
        self.plane.on_subscribed()
        since = len(self.plane.seen)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self.daemon.attach, interface=workload.host_if)
            yield self.plane.wait_event("subscribed", since=since, target=workload.host_if), future

    def detach_all(self) -> None:
        """Detach everything."""
        for info in self.daemon.attachments():
            self.daemon.detach(info.id)

    # -- commands ------------------------------------------------------------------------------------------------------

    def do(self, command: Command) -> Any:
        """Send a command under a nonce and return its CommandResult."""
        command.nonce = command.nonce or next(self._nonces)
        self.plane.send(command)
        result = self.plane.wait_event("command_result", nonce=command.nonce)
        assert result.id == command.id
        return result

    def good(self, command: Command) -> Any:
        """Send a command that must be applied, and see that result and List agree about what is in force."""
        result = self.do(command)
        assert (result.ok, list(result.errors)) == (True, []), command
        info = self.daemon.info(command.id)
        assert (result.version, result.policy_hash) == (command.version, info.policy_hash)
        assert info.policy_version == command.version
        return result

    def refused(self, command: Command) -> list[str]:
        """Send a command that must be refused and change nothing of what the daemon says; return its faults."""
        before = self.daemon.info(command.id)
        result = self.do(command)
        assert not result.ok, command
        after = self.daemon.info(command.id)
        told = ("policy_hash", "policy_version", "mode", "dns_mode")
        assert [getattr(after, field) for field in told] == [getattr(before, field) for field in told]
        assert (result.version, result.policy_hash) == (before.policy_version, before.policy_hash)
        return list(result.errors)

    # -- packets -------------------------------------------------------------------------------------------------------

    def reach(self, workload: Workload, to4: str = OUT4, to6: str = OUT6) -> tuple[int, int]:
        """Send three packets of each family and count those that get out."""
        return self.topology.arrived(workload, UDP4, to4), self.topology.arrived(workload, UDP6, to6)

    # -- the stream --------------------------------------------------------------------------------------------------

    def connected(self, timeout_s: float = RECONNECT_S) -> None:
        """Wait until the daemon itself says that it is connected."""
        wait_for(lambda: self.state == types_pb2.CONNECTION_STATE_CONNECTED, "the daemon to be connected", timeout_s)

    @property
    def state(self) -> int:
        """What the daemon says of its connection."""
        return self.daemon.status().control_plane_state

    def anew(self) -> None:
        """Start the daemon again, so that the first tries come soon: streams lost before make it ever more patient."""
        self.daemon.restart()
        self.connected()

    def hurry(self, spare: Workload) -> None:
        """Have it connected soon: an attach that waits for that shortens the pause between tries to 3 s."""
        self.plane.on_subscribed(ack(mode="block_all"), target=spare.host_if)
        with suppress(RefusedError):
            self.daemon.detach(self.daemon.attach(interface=spare.host_if).id)
        self.connected()

    def still_works(self, workload: Workload, attachment_id: str) -> None:
        """See that the daemon still enforces, answers its API, and takes good commands: pass, drop, pass."""
        for mode, reach in (("disabled", BOTH), ("block_all", NONE), ("disabled", BOTH)):
            self.good(set_mode(attachment_id, mode))
            assert self.reach(workload) == reach
        defects = [entry for entry in self.daemon.events() if "exception" in entry or entry["level"] == "critical"]
        assert not defects, defects


@contextmanager
def staged(topology: Topology, directory: Path, **control_plane: Any) -> Iterator[Stage]:
    """Run a control plane in the topology's host and a daemon that connects to it; keywords configure the latter."""
    with ControlPlaneProcess(topology.host) as plane, daemon_of(plane, topology, directory, **control_plane) as daemon:
        plane.wait_event("sync", timeout_s=RECONNECT_S)
        yield Stage(topology, plane, daemon)


def daemon_of(
    plane: ControlPlaneProcess, topology: Topology, directory: Path, more: Any = None, **control_plane: Any
) -> Netfenced:
    """Prepare a daemon that connects to `plane`; `more` is configuration beside `control_plane`."""
    config = {**plane.config(**control_plane), **(more or {})}
    return Netfenced(topology.host, directory, policy=None, config=config)


def refused_attach(daemon: Netfenced, interface: str) -> tuple[str, str]:
    """Attach where that must fail; return the status code's name and what was said."""
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        try:
            daemon_pb2_grpc.DaemonServiceStub(channel).Attach(
                attach_request(AttachSpec(interface, None, {}, "auto", "auto")), timeout=30
            )
        except grpc.RpcError as error:
            call: Any = error
            return str(call.code().name), str(call.details())
    message = f"{interface} was attached"
    raise AssertionError(message)


def ask(agent: Agent, server: tuple[str, int], name: str, qtype: str = "A") -> tuple[int, list[str]]:
    """Query a name server; return the rcode and the addresses."""
    answer: dnslib.DNSRecord = agent.query(server, name, qtype)
    wanted = getattr(dnslib.QTYPE, qtype)
    return answer.header.rcode, [str(record.rdata) for record in answer.rr if record.rtype == wanted]


def nothing_left(stage: Stage, workload: Workload, dns: tuple[str, int]) -> None:
    """See that an attach that failed left nothing: no attachment, row, pin, map entry or port; packets pass."""
    daemon = stage.daemon
    assert daemon.attachments() == []
    assert daemon.link_pins() == []
    with closing(sqlite3.connect(f"file:{daemon.directory / 'data' / DATABASE}?mode=ro", uri=True)) as database:
        assert database.execute("SELECT count(*) FROM attachments").fetchone() == (0,)
    assert _entries(daemon, stage.topology.host.ifindex(workload.host_if)) == []
    with stage.topology.host.inside(), ExitStack() as stack:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            stack.enter_context(closing(socket.socket(socket.AF_INET, kind))).bind(dns)
    assert stage.reach(workload) == BOTH


def _entries(daemon: Netfenced, ifindex: int) -> Sequence[str]:
    """Name the kernel's maps that still know the interface, or any lease or DNS server."""
    specs = {
        spec.name: spec for spec in map_specs(Layout.load(next((daemon.directory / "data").glob("layout-*.json"))), 1)
    }
    found = []
    for name in ("if_slot", "if_slot_far", "leases", "dns_endpoints"):
        with closing(Map(obj_get(next(daemon.pins.glob("maps-*")) / name), specs[name])) as pinned:
            if name == "if_slot":
                slot = pinned.lookup(ifindex.to_bytes(4, sys.byteorder))
                known = slot is not None and any(slot)
            else:
                known = any(True for _ in pinned.keys())  # noqa: SIM118 - a Map is no mapping
            if known:
                found.append(name)
    return found
