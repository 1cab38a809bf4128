"""The matrix hook × family × mode × rule kind, with real packets; each step is bracketed by the one before and after.

A `Story` is a list of steps: do something to the policy, then packets to one address are counted under one reason in
allowlist and in denylist mode. In `block_all` and `disabled` the same steps change nothing. In every step the packets
that arrive are counted, and the reason's counter, packets and bytes, must move by exactly what was sent.

For the cgroup the sockets are connected before the attach, so that `cgroup_skb` itself decides and not `connect`.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import packets
from harness.agent import Agent, RemoteSocket
from harness.cgroup import Cgroup
from harness.fence import Attachment, Fence
from harness.topology import Topology, Workload
from harness.wire import Tag, arp_sentinel
from netfence.attachment import start_policy
from netfence.dataplane.target import Direction
from netfence.policy.commands import CidrSpec
from netfence.policy.limits import MAX_TTL_NESTING
from netfence.policy.modes import Mode, Reason, is_drop
from shape_paths import bridged_port
from xdp_tools import XDP_MTU, fenced_by_xdp

COUNT = 3
LONG_S, SHORT_S = 3600.0, 0.05
HOOKS = ["tcx-ingress", "tcx-egress", "clsact-ingress", "clsact-egress", "xdp-native", "xdp-generic", "cgroup"]
MODES = {mode.name.lower(): mode for mode in Mode}
SHAPES = {"ipv4": packets.UDP4, "ipv6": packets.UDP6}


@dataclass(frozen=True)
class Net:
    """The address the packets go to, and prefixes around it."""

    host: str
    exact: str
    near: str
    wide: str
    wider: str
    widest: str
    elsewhere: str


NETS = {
    "ipv4": Net(
        "203.0.113.80", "203.0.113.80/32", "203.0.113.0/24", "203.0.0.0/16", "203.0.0.0/9", "0.0.0.0/0", "192.0.2.0/24"
    ),
    "ipv6": Net(
        "2001:db8:b::80", "2001:db8:b::80/128", "2001:db8:b::/64", "2001:db8::/32", "2001::/16", "::/0", "2001:db9::/32"
    ),
}


@dataclass
class Gate:
    """One fenced way out: sends packets and counts what arrives."""

    attachment: Attachment
    send: Callable[[str], tuple[int, int]]  # family → arrived packets, bytes sent

    sentinels: int = 0  # that pass the fence with each sending, ARP: in mode disabled they count like everything else

    def expect(self, family: str, reason: Reason) -> None:
        extra = self.sentinels if reason is Reason.DISABLED else 0
        before = self.attachment.counters()
        with self.attachment.counts(reason, COUNT + extra):
            arrived, octets = self.send(family)
        counted = self.attachment.counters().bytes[reason] - before.bytes[reason]
        assert arrived == (0 if is_drop(reason) else COUNT), reason.name
        assert counted == octets + extra * len(arp_sentinel(Tag())), reason.name


def _packet_sender(topology: Topology, workload: Workload) -> Callable[[str], tuple[int, int]]:
    def send(family: str) -> tuple[int, int]:
        shape, to = SHAPES[family], NETS[family].host
        size = len(workload.bytes_of(shape, to, Tag()))
        return topology.arrived(workload, shape, to, COUNT), COUNT * size

    return send


def _socket_sender(topology: Topology, sockets: dict[str, RemoteSocket]) -> Callable[[str], tuple[int, int]]:
    def send(family: str) -> tuple[int, int]:
        tag = Tag()
        for _ in range(COUNT):
            with contextlib.suppress(PermissionError):
                sockets[family].send(tag.payload)
        headers = 28 if family == "ipv4" else 48
        return topology.meter().arrived(tag), COUNT * (headers + len(tag.payload))

    return send


@pytest.fixture(scope="module")
def gate(
    request: pytest.FixtureRequest,
    topology: Topology,
    workload: Workload,
    agent: Agent,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gate]:
    """Fence the way that the parameter names, for as long as tests with it run."""
    mechanism, _, side = request.param.partition("-")
    tcx = {"tcx": True, "clsact": False}.get(mechanism)
    with contextlib.ExitStack() as stack:
        fence = stack.enter_context(Fence(topology, tmp_path_factory.mktemp(mechanism), tcx=tcx))
        if mechanism == "cgroup":
            yield stack.enter_context(_cgroup_gate(topology, fence, workload))
        elif mechanism == "xdp":
            # Bridged, so that the sentinel goes through the fence: native XDP of a veth has a queue of its own.
            sender = bridged_port(topology, mtu=XDP_MTU)
            attachment = stack.enter_context(fenced_by_xdp(fence, sender.host_if, side))
            yield Gate(attachment, _packet_sender(topology, sender), sentinels=1)
        else:
            direction = Direction.WORKLOAD if side == "ingress" else Direction.HOST
            sender = workload if side == "ingress" else topology.host_workload()
            attachment = stack.enter_context(fence.interface(sender.host_if, direction))
            assert attachment.mechanism == mechanism
            yield Gate(attachment, _packet_sender(topology, sender), sentinels=int(side == "egress"))


@contextlib.contextmanager
def _cgroup_gate(topology: Topology, fence: Fence, workload: Workload) -> Iterator[Gate]:
    group = Cgroup("verdict")
    with topology.internet.inside():
        sink = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)  # else the answer "port unreachable" fails a send
    try:
        sink.bind(("::", 9))
        with Agent(netns=workload.netns, cgroup=group) as inside:
            sockets = {"ipv4": inside.udp(), "ipv6": inside.udp(socket.AF_INET6)}
            for family, sock in sockets.items():
                sock.connect((NETS[family].host, 9))
            with fence.cgroup(group) as attachment:
                yield Gate(attachment, _socket_sender(topology, sockets))
    finally:
        sink.close()
        group.remove()


Do = Callable[[Attachment, Net], float | None]  # a monotonic time returned: wait until the kernel's clock is past it


@dataclass(frozen=True)
class Step:
    """What is done, and the reason after it in each list mode."""

    do: Do
    allowlist: Reason
    denylist: Reason


def _default(do: Do) -> Step:
    return Step(do, Reason.DEFAULT_DROP, Reason.DEFAULT_PASS)


def _both(reason: Reason, do: Do) -> Step:
    return Step(do, reason, reason)


def _runs_out(change: Callable[[Attachment, Net], None]) -> Do:
    """Make a step that ends when the TTL it gave is over."""

    def do(attachment: Attachment, net: Net) -> float:
        change(attachment, net)
        return time.monotonic() + SHORT_S

    return do


def _deny_nested(attachment: Attachment, net: Net, ttl_s: float) -> None:
    """Deny prefixes inside one another, as deep as TTLs may nest, all inside one that is allowed for ever."""
    nested = [CidrSpec(each, ttl_s) for each in (net.wider, net.wide, net.near, net.exact)]
    assert len(nested) == MAX_TTL_NESTING
    assert attachment.policy is not None
    attachment.replace(attachment.policy.mode, allow=[net.widest], deny=nested)


ALLOWED, DENIED, LEASED = Reason.ALLOW_RULE, Reason.DENY_RULE, Reason.LEASE
NOTHING = _default(lambda _, __: None)

STORIES: dict[str, list[Step]] = {
    "allow_rule": [
        NOTHING,
        _both(ALLOWED, lambda a, net: a.allow(net.near)),
        _default(lambda a, net: a.remove(net.near)),
        _default(lambda a, net: a.allow(net.elsewhere)),
    ],
    "allow_everything": [
        NOTHING,
        _both(ALLOWED, lambda a, net: a.allow(net.widest)),
        _default(lambda a, net: a.remove(net.widest)),
    ],
    "deny_rule": [
        NOTHING,
        _both(DENIED, lambda a, net: a.deny(net.near)),
        _default(lambda a, net: a.remove(net.near)),
        _default(lambda a, net: a.deny(net.elsewhere)),
    ],
    "lease": [
        NOTHING,
        _both(LEASED, lambda a, net: a.lease(net.host) and None),
        _default(lambda a, net: a.revoke(net.host)),
    ],
    "lease_runs_out": [
        NOTHING,
        _default(lambda a, net: a.lease(net.host, ttl_s=SHORT_S)),
        _both(LEASED, lambda a, net: a.lease(net.host) and None),
        _default(lambda a, net: a.revoke(net.host)),
    ],
    "ttl_allow": [
        NOTHING,
        _both(ALLOWED, lambda a, net: a.allow(net.near, LONG_S)),
        _default(_runs_out(lambda a, net: a.allow(net.near, SHORT_S))),
        _both(ALLOWED, lambda a, net: a.allow(net.near)),
    ],
    "ttl_deny": [
        NOTHING,
        _both(DENIED, lambda a, net: a.deny(net.near, LONG_S)),
        _default(_runs_out(lambda a, net: a.deny(net.near, SHORT_S))),
        _both(DENIED, lambda a, net: a.deny(net.near)),
    ],
    "same_prefix": [
        _both(ALLOWED, lambda a, net: a.allow(net.near)),
        _both(DENIED, lambda a, net: a.deny(net.near)),
        _default(lambda a, net: a.remove(net.near)),
    ],
    "same_prefix_deny_runs_out": [
        _both(ALLOWED, lambda a, net: a.allow(net.near)),
        _both(DENIED, lambda a, net: a.deny(net.near, LONG_S)),
        _both(ALLOWED, _runs_out(lambda a, net: a.deny(net.near, SHORT_S))),
    ],
    "allow_inside_deny": [
        _both(DENIED, lambda a, net: a.deny(net.wide)),
        _both(ALLOWED, lambda a, net: a.allow(net.near)),
        _both(DENIED, lambda a, net: a.deny(net.exact)),
        _both(ALLOWED, lambda a, net: a.remove(net.exact)),
        _both(DENIED, lambda a, net: a.remove(net.near)),
        _default(lambda a, net: a.remove(net.wide)),
    ],
    "deny_inside_allow": [
        _both(ALLOWED, lambda a, net: a.allow(net.wide)),
        _both(DENIED, lambda a, net: a.deny(net.near)),
        _both(ALLOWED, lambda a, net: a.remove(net.near)),
        _default(lambda a, net: a.remove(net.wide)),
    ],
    "deny_over_lease": [
        _both(LEASED, lambda a, net: a.lease(net.host) and None),
        _both(DENIED, lambda a, net: a.deny(net.wide)),
        _both(LEASED, lambda a, net: a.remove(net.wide)),
        _default(lambda a, net: a.revoke(net.host)),
    ],
    "lease_inside_default": [
        _both(LEASED, lambda a, net: a.lease(net.host) and None),
        _both(ALLOWED, lambda a, net: a.allow(net.wide)),
        _both(LEASED, lambda a, net: a.remove(net.wide)),
        _default(lambda a, net: a.revoke(net.host)),
    ],
    "expired_deny_over_live_allow": [
        _both(ALLOWED, lambda a, net: a.allow(net.wide)),
        _both(DENIED, lambda a, net: a.deny(net.exact, LONG_S)),
        _both(ALLOWED, _runs_out(lambda a, net: a.deny(net.exact, SHORT_S))),
    ],
    "expired_allow_over_live_deny": [
        _both(DENIED, lambda a, net: a.deny(net.wide)),
        _both(ALLOWED, lambda a, net: a.allow(net.exact, LONG_S)),
        _both(DENIED, _runs_out(lambda a, net: a.allow(net.exact, SHORT_S))),
    ],
    "expired_nested_deepest": [
        _both(ALLOWED, lambda a, net: a.allow(net.widest)),
        _both(DENIED, lambda a, net: _deny_nested(a, net, LONG_S)),
        _both(ALLOWED, _runs_out(lambda a, net: _deny_nested(a, net, SHORT_S))),
    ],
    "expired_over_lease": [
        _both(LEASED, lambda a, net: a.lease(net.host) and None),
        _both(DENIED, lambda a, net: a.deny(net.exact, LONG_S)),
        _both(LEASED, _runs_out(lambda a, net: a.deny(net.exact, SHORT_S))),
        _default(lambda a, net: a.revoke(net.host)),
    ],
}


@pytest.mark.parametrize("start_mode", [Mode.BLOCK_ALL, Mode.DISABLED], ids=["block_all", "disabled"])
def test_start_mode_holds_until_the_first_policy(
    topology: Topology, workload: Workload, tmp_path: Path, start_mode: Mode
) -> None:
    reason = Reason.START if start_mode is Mode.BLOCK_ALL else Reason.DISABLED
    with Fence(topology, tmp_path, start_mode=start_mode) as fence, fence.interface(workload.host_if) as attachment:
        gate = Gate(attachment, _packet_sender(topology, workload))
        for family in SHAPES:
            gate.expect(family, reason)
        # As the next daemon does where nobody has given a policy yet.
        fence.run(fence.plane.apply(attachment.slot, start_policy(start_mode), None, start=True))
        gate.expect("ipv4", reason)
        attachment.replace(Mode.ALLOWLIST, audit=True)
        with attachment.counts(Reason.DEFAULT_DROP, COUNT, would=True):
            assert gate.send("ipv4")[0] == COUNT
        attachment.replace(Mode.ALLOWLIST)
        gate.expect("ipv4", Reason.DEFAULT_DROP)


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("gate", HOOKS, indirect=True)
def test_verdict(gate: Gate, family: str, mode: str, story: str) -> None:
    attachment, net = gate.attachment, NETS[family]
    attachment.revoke(net.host)
    attachment.replace(MODES[mode])
    for step in STORIES[story]:
        over = step.do(attachment, net)
        if over is not None:
            attachment.fence.wait_until(over)
        reasons = {
            "disabled": Reason.DISABLED,
            "block_all": Reason.BLOCK_ALL,
            "allowlist": step.allowlist,
            "denylist": step.denylist,
        }
        gate.expect(family, reasons[mode])
    attachment.revoke(net.host)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("gate", HOOKS, indirect=True)
def test_mode_changes_bite_at_once(gate: Gate, family: str, mode: str) -> None:
    attachment, net = gate.attachment, NETS[family]
    first = {"disabled": Reason.DISABLED, "block_all": Reason.BLOCK_ALL, "allowlist": ALLOWED, "denylist": ALLOWED}
    attachment.replace(MODES[mode], allow=[net.near])
    gate.expect(family, first[mode])
    for other, number in MODES.items():
        attachment.mode(number)
        gate.expect(family, first[other])
    attachment.mode(MODES[mode])
    gate.expect(family, first[mode])


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("gate", HOOKS, indirect=True)
def test_audit_drops_nothing_and_counts_what_would_be(gate: Gate, family: str) -> None:
    attachment, net = gate.attachment, NETS[family]
    cases: list[tuple[Mode, list[str], Reason]] = [
        (Mode.BLOCK_ALL, [], Reason.BLOCK_ALL),
        (Mode.ALLOWLIST, [], Reason.DEFAULT_DROP),
        (Mode.ALLOWLIST, [net.near], Reason.DENY_RULE),
        (Mode.DENYLIST, [net.near], Reason.DENY_RULE),
    ]
    for mode, deny, reason in cases:
        attachment.replace(mode, deny=deny, audit=True)
        with attachment.counts(reason, COUNT, would=True):
            assert gate.send(family)[0] == COUNT
        attachment.replace(mode, deny=deny)
        gate.expect(family, reason)
    attachment.replace(Mode.ALLOWLIST, allow=[net.near], audit=True)
    gate.expect(family, ALLOWED)
