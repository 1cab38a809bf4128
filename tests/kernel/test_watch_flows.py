"""`Watch` of a real daemon: what is told of drops, would-drops and queries, to whom, until when, and what it costs."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from daemons import Fenced
from flood import flood
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.daemon import PROGRAM
from harness.deadline import SLOWNESS, wait_for
from harness.packets import TCP4_SYN, UDP4, UDP6
from harness.spawn import spawn, stop
from harness.topology import Topology, Workload
from harness.unbound import Unbound
from harness.wire import Tag
from netfence.api.client import RefusedError, UnreachableError
from netfence.dataplane.compile import map_specs
from netfence.dataplane.layout import Layout
from netfence.dataplane.links import obj_get
from netfence.dataplane.maps import Map
from netfence.flows import MAX_WATCHERS
from netfence.v1 import daemon_pb2
from watching import Watching

pytestmark = pytest.mark.userspace

OUTSIDE4, OUTSIDE6, ALLOWED4 = "203.0.113.99", "2001:db8:77::1", "203.0.113.50"
POLICY: dict[str, Any] = {
    "mode": "allowlist",
    "allow_cidrs": [f"{ALLOWED4}/32"],
    "deny_cidrs": ["203.0.113.96/29"],
    "dns": {"mode": "allowlist", "allow": ["*.good.test", "good.test"], "deny": ["bad.good.test"]},
}


@pytest.fixture(scope="module")
def daemon(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fenced]:
    """Give a daemon that lives as long as the test module; a test detaches what it attached."""
    with Fenced(topology, tmp_path_factory.mktemp("netfenced"), policy={"default": POLICY}) as running:
        yield running


@pytest.fixture
def fenced(daemon: Fenced, workload: Workload) -> Iterator[str]:
    """Give the id of the workload's attachment."""
    daemon.set_policy({"default": POLICY})
    attached = daemon.attach(interface=workload.host_if, metadata={"tenant": "acme"})
    yield attached.id
    if any(info.id == attached.id for info in daemon.attachments()):
        daemon.detach(attached.id)


@contextmanager
def running(daemon: Fenced, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of the command line beside the test."""
    command = [str(PROGRAM), "--socket", str(daemon.socket), *arguments]
    client = spawn(command, netns=daemon.netns, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield client
    finally:
        client.kill()
        stop(client)


def lines_of(client: subprocess.Popen[bytes]) -> list[str]:
    assert client.stdout is not None
    return client.stdout.read().decode().splitlines()


def is_packet(event: daemon_pb2.FlowEvent) -> bool:
    return event.kind == "packet"


def is_query(event: daemon_pb2.FlowEvent) -> bool:
    return event.kind == "dns"


def told(event: daemon_pb2.FlowEvent) -> tuple[str, ...]:
    return event.verdict, event.reason, event.protocol, event.source, event.destination, event.domain, event.rule


# -- packets -----------------------------------------------------------------------------------------------------------


def test_drops_are_told_with_all_that_is_known_of_them(
    daemon: Fenced, topology: Topology, workload: Workload, fenced: str
) -> None:
    with Watching(daemon) as watching:
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)
        topology.arrived(workload, UDP6, OUTSIDE6, count=1)
        topology.arrived(workload, TCP4_SYN, "192.0.2.200", count=1)
        denied, unknown, tcp = watching.of(is_packet, 3)
    assert {event.id for event in watching.told} == {fenced}
    by_rule, default = ("drop", "deny_rule"), ("drop", "default_drop")
    assert told(denied) == (*by_rule, "udp", f"{workload.address4}:40000", f"{OUTSIDE4}:9", "", "deny 203.0.113.96/29")
    assert told(unknown) == (*default, "udp", f"[{ip_address(workload.address6)}]:40000", f"[{OUTSIDE6}]:9", "", "")
    assert told(tcp) == (*default, "tcp", f"{workload.address4}:40000", "192.0.2.200:443", "", "")
    assert sum(event.lost for event in watching.told) == 0


def test_times_are_the_wall_clocks(
    daemon: Fenced, topology: Topology, workload: Workload, agent: Agent, names: Unbound, fenced: str
) -> None:
    names.replace([])
    dns = dns_of(daemon, fenced)
    with Watching(daemon, fenced) as watching:
        before = daemon_pb2.FlowEvent().time
        before.GetCurrentTime()
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)
        agent.query(dns, "other.test")
        told = [*watching.of(is_packet), *watching.of(is_query)]
        after = daemon_pb2.FlowEvent().time
        after.GetCurrentTime()
    slack_ms = 500  # the kernel counts in jiffies, and the daemon looks at two clocks, one after the other
    earliest, latest = before.ToMilliseconds() - slack_ms, after.ToMilliseconds() + slack_ms
    assert [event.kind for event in told if earliest <= event.time.ToMilliseconds() <= latest] == ["packet", "dns"]


def test_of_a_burst_that_ends_everything_is_told_or_counted(
    daemon: Fenced, topology: Topology, workload: Workload, fenced: str
) -> None:
    """Nothing comes behind it that could tell what was kept back; and the next who watch are told nothing of it."""
    count = 1000

    def sent() -> int:
        before = sum(daemon.counters(fenced).packets)
        frame = workload.bytes_of(UDP4, OUTSIDE4, Tag())
        for _ in range(count):
            workload.sender.send(frame)
        wait_for(lambda: sum(daemon.counters(fenced).packets) - before >= count, "all to be judged")
        return sum(daemon.counters(fenced).packets) - before

    def told() -> int:
        return len(list(filter(is_packet, watching.told))) + sum(event.lost for event in watching.told)

    with Watching(daemon, fenced, ["drop"]) as watching:
        dropped = sent()
        wait_for(lambda: told() >= dropped, "the loss to be told")
        assert told() == dropped
        assert [event.kind for event in watching.told][-1] == "lost"
        assert watching.told[-1].id == fenced
    with Watching(daemon, fenced, ["drop"]) as watching:
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)
        (event,) = watching.of(is_packet)
        assert event.lost == 0


def test_passed_packets_make_no_event(daemon: Fenced, topology: Topology, workload: Workload, fenced: str) -> None:
    with Watching(daemon, fenced) as watching:
        assert topology.arrived(workload, UDP4, ALLOWED4, count=20) == 20
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)
        watching.of(is_packet)
        assert [event.destination for event in watching.told] == [f"{OUTSIDE4}:9"]


def test_what_audit_lets_through_is_told(daemon: Fenced, topology: Topology, workload: Workload, fenced: str) -> None:
    daemon.set_policy({"default": {**POLICY, "audit": True}})
    with Watching(daemon, fenced, ["would_drop"]) as watching, Watching(daemon, fenced, ["drop"]) as other:
        assert topology.arrived(workload, UDP4, OUTSIDE4, count=2) == 2
        found = watching.of(is_packet, 2)
        daemon.set_policy({"default": POLICY})
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)
        (dropped,) = other.of(is_packet)
    assert {told(event)[:2] for event in found} == {("would_drop", "deny_rule")}
    assert {event.rule for event in found} == {"deny 203.0.113.96/29"}
    assert dropped.verdict == "drop"
    assert {event.verdict for event in watching.told} == {"would_drop"}


def test_a_dropped_packet_is_told_with_the_name_of_its_lease(
    daemon: Fenced, topology: Topology, workload: Workload, agent: Agent, names: Unbound, fenced: str
) -> None:
    names.replace([f"www.good.test. 300 IN A {OUTSIDE4}"])
    dns = dns_of(daemon, fenced)
    agent.query(dns, "www.good.test")
    with Watching(daemon, fenced, ["drop"]) as watching:
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)  # a deny rule counts for more than a lease
        (event,) = watching.of(is_packet)
    assert (event.reason, event.domain) == ("deny_rule", "www.good.test")


def test_what_audit_lets_through_is_told_with_the_name_that_audit_answered(
    daemon: Fenced, topology: Topology, workload: Workload, agent: Agent, names: Unbound, fenced: str
) -> None:
    names.replace([f"unlisted.test. 300 IN A {OUTSIDE4}"])
    daemon.set_policy({"default": {"mode": "allowlist", "audit": True, "dns": {"mode": "allowlist"}}})
    with Watching(daemon, fenced, ["would_drop"]) as watching:
        agent.query(dns_of(daemon, fenced), "unlisted.test")
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)
        (event,) = watching.of(is_packet)
    assert (event.reason, event.domain) == ("default_drop", "unlisted.test")


def test_a_refused_connect_of_a_cgroup_is_told_with_its_rule(
    daemon: Fenced, topology: Topology, cgroups: Callable[[str], Cgroup]
) -> None:
    daemon.set_policy({"default": POLICY})
    group = cgroups("watched")
    attached = daemon.attach(cgroup=group)
    with Watching(daemon, attached.id) as watching, Agent(netns=topology.host, cgroup=group) as inside:
        with pytest.raises(PermissionError):
            inside.connect(OUTSIDE4, 443)
        with pytest.raises(PermissionError):
            inside.udp(socket.AF_INET6).sendto(b"x", (OUTSIDE6, 9))
        by_rule, default = watching.of(is_packet, 2)
    assert told(by_rule) == ("drop", "connect", "tcp", "", f"{OUTSIDE4}:443", "", "deny 203.0.113.96/29")
    assert told(default) == ("drop", "connect", "udp", "", f"[{OUTSIDE6}]:9", "", "")
    daemon.detach(attached.id)


# -- queries -----------------------------------------------------------------------------------------------------------


def dns_of(daemon: Fenced, attachment_id: str) -> tuple[str, int]:
    host, _, port = daemon.info(attachment_id).dns_address.rpartition(":")
    return host, int(port)


def test_queries_are_told_with_their_decisions(
    daemon: Fenced, workload: Workload, agent: Agent, names: Unbound, fenced: str
) -> None:
    names.replace([f"www.good.test. 300 IN A {ALLOWED4}", "to.good.test. 300 IN CNAME bad.good.test."])
    dns = dns_of(daemon, fenced)
    agent.query(dns, "www.good.test")  # from here on its reply is kept ready
    with Watching(daemon, fenced) as watching:
        for name, qtype in (
            ("www.good.test", "A"),
            ("www.good.test", "A"),
            ("bad.good.test", "AAAA"),
            ("other.test", "HTTPS"),
            ("to.good.test", "A"),
        ):
            agent.query(dns, name, qtype)
        agent.query(dns, "other.test", tcp=True)
        found = watching.of(is_query, 6)
    words = [(event.verdict, event.reason, event.protocol, event.destination, event.domain) for event in found]
    assert words == [
        ("pass", "allow_rule", "udp", "A", "www.good.test"),
        ("pass", "allow_rule", "udp", "A", "www.good.test"),
        ("drop", "deny_rule", "udp", "AAAA", "bad.good.test"),
        ("drop", "default_drop", "udp", "HTTPS", "other.test"),
        ("drop", "chain", "udp", "A", "to.good.test"),
        ("drop", "default_drop", "tcp", "A", "other.test"),
    ]
    assert [event.rule for event in found] == [
        *(["allow *.good.test"] * 2), "deny bad.good.test", "", "deny bad.good.test", ""
    ]  # fmt: skip
    assert all(event.source.startswith(f"{workload.address4}:") for event in found)
    info = daemon.info(fenced)
    assert (info.dns_queries_allowed, info.dns_queries_blocked) == (3, 4)


def test_verdicts_are_chosen(
    daemon: Fenced, topology: Topology, workload: Workload, agent: Agent, names: Unbound, fenced: str
) -> None:
    names.replace([f"www.good.test. 300 IN A {ALLOWED4}"])
    dns = dns_of(daemon, fenced)
    with Watching(daemon, fenced, ["pass"]) as passes, Watching(daemon, fenced, ["drop"]) as drops:
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)
        agent.query(dns, "other.test")
        agent.query(dns, "www.good.test")
        passes.of(is_query)
        drops.of(is_packet)
        drops.of(is_query)
        assert [event.domain for event in passes.told] == ["www.good.test"]
        assert {(event.kind, event.verdict) for event in drops.told} == {("packet", "drop"), ("dns", "drop")}


# -- who is told, and until when ---------------------------------------------------------------------------------------


def test_two_watch_and_each_sees_what_it_asked_for(
    daemon: Fenced, topology: Topology, workload: Workload, fenced: str
) -> None:
    neighbour = topology.add_veth()
    other = daemon.attach(interface=neighbour.host_if).id
    with Watching(daemon, fenced) as one, Watching(daemon) as both:
        topology.arrived(workload, UDP4, OUTSIDE4, count=2)
        topology.arrived(neighbour, UDP4, OUTSIDE4, count=3)
        both.of(lambda event: event.id == other, 3)
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)
        one.of(is_packet, 3)
        both.of(is_packet, 6)
    assert {event.id for event in one.told} == {fenced}
    assert sorted(event.id for event in both.told) == sorted([fenced] * 3 + [other] * 3)
    daemon.detach(other)


def test_attachments_that_come_later_are_seen_too(daemon: Fenced, topology: Topology, fenced: str) -> None:
    neighbour = topology.add_veth()
    with Watching(daemon) as watching:
        other = daemon.attach(interface=neighbour.host_if).id
        wait_for(
            lambda: (
                topology.arrived(neighbour, UDP4, OUTSIDE4, count=1) == 0
                and any(event.id == other for event in watching.told)
            ),
            "a drop of the new attachment",
        )
        daemon.detach(other)
        assert not watching.over
    assert fenced != other


def test_a_stream_ends_when_its_attachment_leaves(
    daemon: Fenced, topology: Topology, workload: Workload, fenced: str
) -> None:
    with Watching(daemon, fenced) as watching, Watching(daemon) as other:
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)
        watching.of(is_packet)
        daemon.detach(fenced)
        assert watching.ended() is None
        assert not other.over
    with (
        pytest.raises(RefusedError, match=f"watch: no attachment {fenced}; see `netfenced list`"),
        Watching(daemon, fenced) as watching,
    ):
        raise watching.ended() or AssertionError("it was let in")


def test_streams_are_limited_and_given_back(daemon: Fenced, fenced: str) -> None:
    with ExitStack() as stack:
        for _ in range(MAX_WATCHERS):
            stack.enter_context(Watching(daemon, fenced))
        with Watching(daemon) as beyond:
            assert str(beyond.ended()).startswith(f"watch: {MAX_WATCHERS} streams are open already")

    def one_more() -> bool:
        with Watching(daemon) as watching:
            daemon.info(fenced)
            return not watching.over

    wait_for(one_more, "a stream to be free again")


def watched_slots(daemon: Fenced) -> set[int]:
    """Read from the kernel's own map whose drops it reports."""
    layout = Layout.load(next((daemon.directory / "data").glob("layout-*.json")))
    spec = next(spec for spec in map_specs(layout, 1) if spec.name == "config")
    flags, bit = layout.fields["config"]["flags"].offset, layout.constants["FLAG_WATCH"]
    with closing(Map(obj_get(next(daemon.pins.glob("maps-*")) / spec.name), spec)) as pinned:
        memory = pinned.memory()
        stride = (layout.sizes["config"] + 7) // 8 * 8
        return {
            slot
            for slot in range(layout.constants["SLOTS"])
            if int.from_bytes(memory[slot * stride + flags : slot * stride + flags + 4], "little") & bit
        }


def test_a_client_that_is_killed_leaves_nothing(
    daemon: Fenced, topology: Topology, workload: Workload, fenced: str
) -> None:
    slot = daemon.slot(fenced)
    assert watched_slots(daemon) == set()
    with running(daemon, "watch", "--json") as client:
        wait_for(lambda: watched_slots(daemon) == {slot}, "the kernel to report")
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)
        assert client.stdout is not None
        assert json.loads(client.stdout.readline())["target"] == workload.host_if
        client.kill()
        wait_for(lambda: watched_slots(daemon) == set(), "the kernel to report no more")


def test_a_reader_that_does_not_read_holds_no_memory(
    daemon: Fenced, topology: Topology, workload: Workload, fenced: str
) -> None:
    """Stopped, not killed: its events wait in bounded queues, and are lost beyond."""
    with running(daemon, "watch", "--json") as client:
        wait_for(lambda: watched_slots(daemon), "the kernel to report")
        client.send_signal(signal.SIGSTOP)
        before_kb = daemon.memory_kb()
        topology.arrived(workload, UDP4, OUTSIDE4, count=5000)
        with Watching(daemon, fenced) as watching:  # others see what happens all the same
            wait_for(
                lambda: topology.arrived(workload, UDP4, OUTSIDE4, count=1) == 0 and watching.told, "a drop to be told"
            )
        assert daemon.memory_kb() - before_kb < 20_000
    wait_for(lambda: watched_slots(daemon) == set(), "the kernel to report no more")


LOOKS, LOOK_S = 3, 1.5
MOST_OF_A_CORE = 0.2
FLOOD_PER_S = 100_000 / SLOWNESS


@pytest.mark.serial
def test_a_flood_that_four_watch_costs_the_daemon_a_fraction_of_a_core(
    daemon: Fenced, topology: Topology, workload: Workload, fenced: str, record_property: Callable[[str, object], None]
) -> None:
    """As many drops as one CPU sends, a hundred thousand a second: what is told of them is bounded, however many."""
    shares, rates = [], []
    with ExitStack() as stack:
        watching = [stack.enter_context(Watching(daemon)) for _ in range(4)]
        stack.enter_context(flood(workload, workload.bytes_of(UDP4, OUTSIDE4, Tag())))
        watching[0].of(is_packet, 100)
        for _ in range(LOOKS):
            began, cpu, dropped = time.monotonic(), on_cpu(daemon), sum(daemon.counters(fenced).packets)
            wait_for(lambda: time.monotonic() > began + LOOK_S, "some time of the flood")  # noqa: B023
            took = time.monotonic() - began
            shares.append((on_cpu(daemon) - cpu) / took)
            rates.append((sum(daemon.counters(fenced).packets) - dropped) / took)
    record_property("drops_per_s", [round(rate) for rate in rates])
    record_property("of_a_core", [round(share, 3) for share in shares])
    assert any(event.lost for event in watching[0].told)
    # The least: other work here makes the same cost more. Of the looks that saw such a flood.
    floods = [share for share, rate in zip(shares, rates, strict=True) if rate >= FLOOD_PER_S]
    assert floods, f"no look saw {FLOOD_PER_S} drops a second: {rates}"
    assert min(floods) < MOST_OF_A_CORE, (shares, rates)


def on_cpu(daemon: Fenced) -> float:
    """Return for how many seconds all threads of the daemon have run so far."""
    threads = Path(f"/proc/{daemon.pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in threads) / 1e9


# -- the daemon goes and comes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_daemon_that_goes_is_told_and_watched_again_when_it_is_back(
    daemon: Fenced, topology: Topology, workload: Workload, fenced: str, how: str
) -> None:
    with running(daemon, "watch") as client:
        wait_for(lambda: watched_slots(daemon), "the kernel to report")
        with Watching(daemon) as watching:
            if how == "stopped":
                assert daemon.stop() == 0
            else:
                daemon.kill()
            assert isinstance(watching.ended(), UnreachableError)
        _, stderr = client.communicate(timeout=30)
    assert client.returncode == 3, stderr
    said = "watch: the daemon is stopping" if how == "stopped" else "the daemon closed the connection"
    assert said in stderr.decode()
    assert stderr.count(b"\n") == 1
    daemon.start()
    assert watched_slots(daemon) == set()
    with Watching(daemon, fenced) as watching:
        topology.arrived(workload, UDP4, OUTSIDE4, count=1)
        (event,) = watching.of(is_packet)
    assert (event.id, event.rule) == (fenced, "deny 203.0.113.96/29")


# -- the commands ------------------------------------------------------------------------------------------------------


def test_the_commands_show_it(
    daemon: Fenced, topology: Topology, workload: Workload, agent: Agent, names: Unbound, fenced: str
) -> None:
    names.replace([])
    dns = dns_of(daemon, fenced)
    with (
        running(daemon, "watch", "--verdict", "drop", "--count", "2") as watch,
        running(daemon, "top", "--once", "--interval", "3", "--json") as top,
    ):

        def both() -> bool:
            """Go on until both have seen enough: when they begin to watch nobody can tell."""
            topology.arrived(workload, UDP4, OUTSIDE4, count=1)
            agent.query(dns, "other.test")
            return watch.poll() is not None and top.poll() is not None

        wait_for(both, "both to end")
        lines, shown_top = lines_of(watch), lines_of(top)
    assert len(lines) == 2
    assert all(f"{fenced[:8]} {workload.host_if} tenant=acme" in line for line in lines)
    assert watch.returncode == top.returncode == 0
    document = json.loads("\n".join(shown_top))
    (shown,) = document["attachments"]
    assert (shown["id"], shown["metadata"]) == (fenced, {"tenant": "acme"})
    assert shown["packets_blocked_per_s"] > 0
    assert shown["dns_queries_blocked_per_s"] > 0
    assert document["destinations"][0]["destination"] == f"{OUTSIDE4}:9"
    assert document["names"][0]["domain"] == "other.test"


def test_an_unknown_id_is_an_error_of_the_operation(daemon: Fenced, workload: Workload, fenced: str) -> None:
    done = daemon.cli("watch", "--id", "nope", check=False)
    assert done.returncode == 1
    assert done.stderr == "netfenced: watch: no attachment nope; see `netfenced list`\n"
    for near in (workload.host_if, f"{fenced[:-1]}x"):
        done = daemon.cli("watch", "--id", near, check=False)
        assert done.returncode == 1
        assert f"did you mean {fenced} ({workload.host_if})?" in done.stderr
