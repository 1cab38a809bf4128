"""The metrics of a real daemon: what it did is what a scrape tells, no more and no less."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from dnslib import RCODE, DNSRecord

import control_commands as commands
from control_stage import RECONNECT_S, Stage, daemon_of
from daemons import Start
from dashboards import named
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.controlplane import ControlPlaneProcess
from harness.daemon import Netfenced, host_port
from harness.deadline import SLOWNESS, wait_for
from harness.fence import packed
from harness.fresh import Fresh
from harness.packets import UDP4, UDP6
from harness.topology import Topology, Workload
from harness.unbound import Unbound
from harness.wire import Tag
from hooktools import TCX_NEXT, needs_tcx, take_off
from netfence import metrics_http
from netfence.audited import MAX_NAMES
from netfence.dataplane import links, rawprog
from netfence.dataplane.layout import Layout
from netfence.dataplane.links import AttachType
from netfence.dataplane.rawprog import ProgType
from netfence.dns.limits import MAX_OUTSTANDING, MAX_TCP_CONNECTIONS
from netfence.flows import MAX_WATCHERS
from netfence.lifecycle import TIMES_AHEAD
from netfence.metrics import FAMILIES
from netfence.policy.modes import Reason
from scraping import CONFIG, Scrape, get, place_of, scrape, scrape_until
from watching import Watching

pytestmark = pytest.mark.userspace

OUTSIDE4, OTHER4, OUTSIDE6 = "203.0.113.99", "203.0.113.98", "2001:db8:77::1"
POLICY: dict[str, Any] = {
    "default": {
        "mode": "allowlist",
        "allow_cidrs": [OUTSIDE4, "10.0.0.0/8"],
        "deny_cidrs": ["2001:db8:77::/48"],
        "dns": {"mode": "allowlist", "allow": ["good.test", "two.test", "gone.test"]},
    }
}
OWN = {"metrics": {"listen": "127.0.0.1:9101"}}  # of daemons beside the module's
AUDIT = {"default": POLICY["default"] | {"audit": True}}


@pytest.fixture(scope="module")
def daemon(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Netfenced]:
    """Give a daemon with metrics."""
    where = tmp_path_factory.mktemp("netfenced")
    with Netfenced(topology.host, where, policy=POLICY, config=CONFIG) as running:
        yield running


@pytest.fixture
def attached(daemon: Netfenced, workload: Workload) -> Iterator[str]:
    daemon.set_policy(POLICY)
    one = daemon.attach(interface=workload.host_if).id
    yield one
    daemon.detach(one)


def packets(page: Scrape, one: str) -> dict[tuple[str, str], float]:
    """Give the packets of an attachment by verdict and reason, those that the interface's own chatter makes apart."""
    chatter = {"arp", "neighbour", "dns"}
    series = page.series("netfence_packets_total", attachment=one)
    return {
        (of["verdict"], of["reason"]): page.sum("netfence_packets_total", **of)
        for of in series
        if of["reason"] not in chatter
    }


# -- packets -----------------------------------------------------------------------------------------------------------


def test_packets_and_bytes_are_what_was_sent(
    daemon: Netfenced, topology: Topology, workload: Workload, attached: str
) -> None:
    assert packets(scrape(daemon), attached) == {}
    assert topology.arrived(workload, UDP4, OUTSIDE4, count=3) == 3
    assert topology.arrived(workload, UDP4, OTHER4, count=4) == 0
    assert topology.arrived(workload, UDP6, OUTSIDE6, count=2) == 0
    expected = {("pass", "allow_rule"): 3, ("drop", "default_drop"): 4, ("drop", "deny_rule"): 2}
    page = scrape_until(daemon, lambda page: packets(page, attached) == expected, "the packets to be counted")
    kernel = daemon.counters(attached)
    assert page.sum("netfence_bytes_total", attachment=attached) == sum(kernel.bytes) > 0

    daemon.set_policy(AUDIT)
    assert topology.arrived(workload, UDP4, OTHER4, count=5) == 5
    audited = expected | {("would_drop", "default_drop"): 5}
    page = scrape_until(daemon, lambda page: packets(page, attached) == audited, "would-drops to be counted")
    assert page.sum("netfence_bytes_total", attachment=attached, verdict="would_drop") == sum(
        daemon.counters(attached).would_bytes
    )

    # The kernel counts on while there is no daemon, and the next one tells it.
    daemon.kill()
    assert topology.arrived(workload, UDP4, OUTSIDE4, count=6) == 6
    daemon.start()
    expected = audited | {("pass", "allow_rule"): 9}
    scrape_until(daemon, lambda page: packets(page, attached) == expected, "the packets of meanwhile")


def test_cgroups_count_too(daemon: Netfenced, topology: Topology, cgroups: Callable[[str], Cgroup]) -> None:
    daemon.set_policy(POLICY)
    group = cgroups("metered")
    one = daemon.attach(cgroup=group).id
    with Agent(netns=topology.host, cgroup=group) as agent:
        agent.udp().sendto(b"x", (OUTSIDE4, 9))
        with pytest.raises(PermissionError):
            agent.udp().sendto(b"x", (OTHER4, 9))
    expected = {("pass", "allow_rule"): 1, ("drop", "connect"): 1}
    page = scrape_until(daemon, lambda page: packets(page, one) == expected, "the packets to be counted")
    (info,) = page.series("netfence_attachment_info", attachment=one)
    assert (info["target"], info["kind"], info["hook"]) == (str(group.path), "cgroup", "cgroup")
    daemon.detach(one)
    scrape_until(daemon, lambda page: one not in page.text, "its series to be gone")


# -- DNS ---------------------------------------------------------------------------------------------------------------


def dns(page: Scrape, one: str) -> dict[str, float]:
    """Give what a page tells of DNS."""
    found = {
        of["decision"]: page.sum("netfence_dns_queries_total", **of)
        for of in page.series("netfence_dns_queries_total", attachment=one)
    }
    found |= {
        of["rcode"]: page.sum("netfence_dns_replies_total", **of)
        for of in page.series("netfence_dns_replies_total", attachment=one)
    }
    found |= {
        of["result"]: page.sum("netfence_dns_cache_lookups_total", **of)
        for of in page.series("netfence_dns_cache_lookups_total", attachment=one)
    }
    found["timed"] = page.sum("netfence_dns_query_duration_seconds_count")
    found["asked"] = page.sum("netfence_dns_upstream_queries_total")
    found["timeout"] = page.sum("netfence_dns_upstream_failures_total", reason="timeout")
    found["leases"] = page.sum("netfence_leases", attachment=one)
    return {name: count for name, count in found.items() if count}


def test_queries_are_counted_once_each(start: Start, topology: Topology, names: Unbound, workload: Workload) -> None:
    names.replace(["good.test. 300 IN A 203.0.113.80", "two.test. 300 IN A 203.0.113.81"])
    daemon = start(topology, policy=POLICY, config=OWN)
    attached = daemon.attach(interface=workload.host_if)
    with Agent(netns=workload.netns) as agent:

        def ask(name: str, count: int = 1, *, tcp: bool = False) -> None:
            for _ in range(count):
                agent.query(attached.dns, name, tcp=tcp)

        def told(expected: Mapping[str, float]) -> None:
            page = wait_for(lambda: dns(scrape(daemon), attached.id) == expected or None, f"{expected}")
            assert page

        ask("good.test")
        one = {"allowed": 1, "noerror": 1, "miss": 1, "timed": 1, "asked": 1, "leases": 1}
        told(one)
        ask("good.test", 7)  # ready-made, over both transports
        ask("good.test", 2, tcp=True)
        told(one | {"allowed": 10, "noerror": 10, "ready": 9, "timed": 10})
        ask("bad.test", 4)  # one judged, three ready-made
        blocked = one | {"allowed": 10, "noerror": 10, "blocked": 4, "refused": 4, "ready": 12, "timed": 14}
        told(blocked)
        ask("gone.test")
        missing = blocked | {"allowed": 11, "nxdomain": 1, "miss": 2, "asked": 2, "timed": 15}
        told(missing)
        before = scrape(daemon)
        daemon.restart()  # what the daemon itself counts begins again, and says so by beginning at 0
        after = scrape_until(daemon, lambda page: page.sum("netfence_attachments") == 1, "the attachment")
        assert dns(after, attached.id) == {"leases": 1}
        started = "process_start_time_seconds"
        assert after.sum(started) > before.sum(started)


def test_what_dns_keeps_and_what_audit_alone_answered(
    start: Start, topology: Topology, names: Unbound, workload: Workload
) -> None:
    names.replace(["good.test. 300 IN A 203.0.113.80", "unlisted.test. 300 IN A 203.0.113.81"])
    daemon = start(topology, policy=AUDIT, config=OWN)
    attached = daemon.attach(interface=workload.host_if)
    with Agent(netns=workload.netns) as agent:
        for name in ("good.test", "unlisted.test", "unlisted.test"):
            agent.query(attached.dns, name)
    page = scrape_until(
        daemon,
        lambda page: page.sum("netfence_dns_would_block_total", attachment=attached.id) == 2,
        "what only audit answered",
    )
    lookups = page.series("netfence_dns_cache_lookups_total", attachment=attached.id)
    assert {of["result"]: page.sum("netfence_dns_cache_lookups_total", **of) for of in lookups} == {"miss": 2, "hit": 1}
    assert page.sum("netfence_dns_cache_entries") == 2
    assert page.sum("netfence_lease_table_used") == page.sum("netfence_leases") == 1


def test_queries_that_are_too_many(start: Start, topology: Topology, names: Unbound, workload: Workload) -> None:
    names.replace(["good.test. 300 IN A 203.0.113.80"])
    daemon = start(topology, policy=POLICY, config=OWN | {"dns": {"max_qps": 1}})
    attached = daemon.attach(interface=workload.host_if)
    with Agent(netns=workload.netns) as agent:
        rcodes = [agent.query(attached.dns, "good.test").header.rcode for _ in range(10)]
    assert 0 < rcodes.count(RCODE.REFUSED) < len(rcodes)
    over = rcodes.count(RCODE.REFUSED)
    scrape_until(
        daemon, lambda page: page.sum("netfence_dns_over_limit_total", limit="max_qps") == over, "the refused queries"
    )


def test_queries_that_wait_for_too_long_a_queue(start: Start, topology: Topology, workload: Workload) -> None:
    dead, beyond = "203.0.113.82", 5
    policy = {"default": {"mode": "allowlist", "dns": {"mode": "allowlist", "allow": ["*.good.test"]}}}
    config = OWN | {"dns": {"upstreams": [dead], "timeout": 5, "attempts": 1}}
    daemon = start(topology, policy=policy, config=config)
    attached = daemon.attach(interface=workload.host_if)
    # A socket that takes the questions and says nothing.
    with Agent(netns=topology.internet) as deaf, Agent(netns=workload.netns) as agent:
        silent, client = deaf.udp(), agent.udp()
        silent.bind((dead, 53))
        client.connect(attached.dns)
        for number in range(MAX_OUTSTANDING + beyond):
            client.send(DNSRecord.question(f"n{number}.good.test").pack())
        scrape_until(
            daemon, lambda page: page.sum("netfence_dns_over_limit_total", limit="waiting") == beyond, "those too many"
        )


def test_dead_upstreams_are_told(start: Start, topology: Topology, workload: Workload) -> None:
    dead = "203.0.113.82"
    config = OWN | {"dns": {"upstreams": [dead], "timeout": 0.1, "attempts": 2}}
    daemon = start(topology, policy=POLICY, config=config)
    attached = daemon.attach(interface=workload.host_if)
    # A socket that takes the question and says nothing.
    with Agent(netns=topology.internet) as deaf, Agent(netns=workload.netns) as agent:
        silent = deaf.udp()
        silent.bind((dead, 53))
        agent.query(attached.dns, "good.test")
    page = scrape_until(daemon, lambda page: dns(page, attached.id).get("servfail") == 1, "the SERVFAIL")
    assert page.sum("netfence_dns_upstream_queries_total", upstream=f"{dead}:53") == 2
    assert page.sum("netfence_dns_upstream_failures_total", upstream=f"{dead}:53", reason="timeout") == 2
    assert page.sum("netfence_dns_query_duration_seconds_bucket", le="0.05") == 0
    # Two time-outs, by the loop's timers, which count milliseconds.
    assert page.sum("netfence_dns_query_duration_seconds_sum") >= 2 * 0.1 - 0.002


# -- limits and failures -----------------------------------------------------------------------------------------------


def test_limits_that_were_hit(start: Start, topology: Topology, names: Unbound, workload: Workload) -> None:
    names.replace(["good.test. 300 IN A 203.0.113.80", "two.test. 300 IN A 203.0.113.81"])
    daemon = start(topology, policy=POLICY, config=OWN | {"dns": {"max_leases": 1}})
    attached = daemon.attach(interface=workload.host_if)
    refused = daemon.cli("attach", "--interface", workload.host_if, check=False)
    assert refused.returncode == 1
    with Agent(netns=workload.netns) as agent:
        for name in ("good.test", "two.test"):
            agent.query(attached.dns, name)
    page = scrape_until(daemon, lambda page: page.sum("netfence_lease_refusals_total") == 1, "the refused lease")
    assert page.sum("netfence_leases", attachment=attached.id) == page.sum("netfence_leases_limit") == 1
    assert page.sum("netfence_attaches_total", result="ok") == 1
    assert page.sum("netfence_attaches_total", result="already_exists") == 1
    rules = {of["kind"]: page.sum("netfence_rules", **of) for of in page.series("netfence_rules")}
    assert rules == {"ipv4": 2, "ipv6": 1, "domain": 3}
    assert page.sum("netfence_policy_commands_total", result="ok") == 1
    assert page.sum("netfence_policy_switch_duration_seconds_count") >= 1


def test_connections_beyond_the_limit(daemon: Netfenced, workload: Workload, attached: str) -> None:
    before = scrape(daemon).sum("netfence_dns_over_limit_total", limit="connections")
    assert workload.netns is not None
    with ExitStack() as stack, workload.netns.inside():
        for _ in range(MAX_TCP_CONNECTIONS + 3):
            stack.enter_context(socket.create_connection(host_port(daemon.info(attached).dns_address), 5))
        beyond = before + 3
        scrape_until(
            daemon,
            lambda page: page.sum("netfence_dns_over_limit_total", limit="connections") == beyond,
            "connections to be counted",
        )


def test_names_that_audit_mode_had_to_forget(
    daemon: Netfenced, names: Unbound, workload: Workload, attached: str
) -> None:
    names.replace(["*.many.test. 300 IN A 203.0.113.80"])
    daemon.set_policy(AUDIT)
    beyond = 2
    server = host_port(daemon.info(attached).dns_address)
    with Agent(netns=workload.netns) as agent:
        for number in range(MAX_NAMES + beyond):
            agent.query(server, f"h{number}.many.test")
    page = scrape(daemon)
    assert page.sum("netfence_audit_not_remembered_total", attachment=attached, kind="names") == beyond
    assert page.sum("netfence_dns_would_block_total", attachment=attached) == MAX_NAMES + beyond


def test_packets_that_audit_mode_had_no_room_for(daemon: Netfenced, workload: Workload, attached: str) -> None:
    daemon.set_policy(AUDIT)
    layout = Layout.load(next((daemon.directory / "data").glob("layout-*.json")))
    beyond = 7
    many = layout.constants["SEEN_PER_SLOT"] + beyond
    frame = workload.bytes_of(UDP4, "172.16.0.0", Tag())
    for number in range(many):
        workload.sender.send(frame[:30] + packed(f"172.16.{number >> 8}.{number & 255}") + frame[34:])
    wait_for(lambda: daemon.counters(attached).would_packets[Reason.DEFAULT_DROP] >= many, "all to be judged")
    scrape_until(
        daemon,
        lambda page: page.sum("netfence_audit_not_remembered_total", attachment=attached, kind="packets") == beyond,
        "packets to be missed",
    )


def test_streams_of_watch_and_those_refused(daemon: Netfenced, attached: str) -> None:
    before = scrape(daemon).sum("netfence_watch_refusals_total")
    with ExitStack() as stack:
        for _ in range(MAX_WATCHERS):
            stack.enter_context(Watching(daemon, attached))
        with Watching(daemon) as beyond:
            assert beyond.ended() is not None
        page = scrape_until(
            daemon, lambda page: page.sum("netfence_watch_refusals_total") == before + 1, "the refused stream"
        )
        assert page.sum("netfence_watch_streams") == page.sum("netfence_watch_streams_limit") == MAX_WATCHERS
    scrape_until(daemon, lambda page: page.sum("netfence_watch_streams") == 0, "the streams to end")


def test_a_hook_that_was_put_back(daemon: Netfenced, topology: Topology, workload: Workload, attached: str) -> None:
    before = scrape(daemon).sum("netfence_hooks_put_back_total")
    (pin,) = (daemon.pins / "links").glob(f"{attached}-main")
    take_off(pin)
    scrape_until(
        daemon, lambda page: page.sum("netfence_hooks_put_back_total") == before + 1, "the hook to be put back", 30
    )


@needs_tcx
@pytest.mark.timeout(180)
@pytest.mark.nightly  # the daemon looks every ten seconds, and has to see it four times
def test_programs_in_front(daemon: Netfenced, topology: Topology, workload: Workload, attached: str) -> None:
    assert scrape(daemon).series("netfence_programs_in_front") == []
    program = rawprog.load_raw(ProgType.SCHED_CLS, rawprog.returning(TCX_NEXT), name="somebody")
    before = len(daemon.events("hook_moved_ahead"))

    def insist() -> int:
        with topology.host.inside():
            return links.link_create_tcx(program, socket.if_nametoindex(workload.host_if), AttachType.TCX_INGRESS)

    for turn in range(1, TIMES_AHEAD + 1):  # then it is let be
        link = insist()
        wait_for(lambda: len(daemon.events("hook_moved_ahead")) == before + turn, "ours to be first", 30)  # noqa: B023
        assert scrape(daemon).series("netfence_programs_in_front") == []
        os.close(link)
    link = insist()
    scrape_until(
        daemon, lambda page: page.sum("netfence_programs_in_front", attachment=attached) == 1, "it to be seen", 30
    )
    for each in (link, program):
        os.close(each)


def test_commands_of_the_control_plane(topology: Topology, workload: Workload, tmp_path: Path) -> None:
    settings = {"max_stale": 1, "stale_action": "block_all"}
    with ControlPlaneProcess(topology.host) as plane, daemon_of(plane, topology, tmp_path, OWN, **settings) as daemon:
        plane.wait_event("sync", timeout_s=RECONNECT_S)
        stage = Stage(topology, plane, daemon)
        attached = stage.attach(workload, commands.ack())
        page = scrape_until(daemon, lambda page: page.sum("netfence_control_plane_commands_total") == 1, "the first")
        assert page.sum("netfence_control_plane_commands_total", kind="subscribed_ack", result="applied") == 1
        assert page.sum("netfence_control_plane_state", state="connected") == 1
        assert page.sum("netfence_control_plane_state") == page.sum("netfence_control_plane_connects_total") == 1
        assert page.sum("netfence_control_plane_stale") == page.sum("netfence_control_plane_events_waiting") == 0

        stage.good(commands.allow_cidr(attached.id, "203.0.113.0/24"))
        plane.send(commands.allow_cidr("nobody", "203.0.113.0/24"))
        stage.refused(commands.allow_cidr(attached.id, "not an address"))
        page = scrape_until(daemon, lambda page: page.sum("netfence_control_plane_commands_total") == 4, "all of them")
        counts = {
            (of["kind"], of["result"]): page.sum("netfence_control_plane_commands_total", **of)
            for of in page.series("netfence_control_plane_commands_total", kind="allow_cidr")
        }
        assert counts == {("allow_cidr", "applied"): 1, ("allow_cidr", "refused"): 1, ("allow_cidr", "unknown"): 1}
        assert page.sum("netfence_control_plane_command_duration_seconds_count") == 3  # an unknown one is not queued
        plane.kill()
        scrape_until(daemon, lambda page: page.sum("netfence_control_plane_losses_total") == 1, "the loss")
        page = scrape_until(
            daemon, lambda page: page.sum("netfence_control_plane_connect_failures_total") >= 1, "a failed try"
        )
        assert page.sum("netfence_control_plane_state", state="connected") == 0
        scrape_until(daemon, lambda page: page.sum("netfence_control_plane_stale") == 1, "it to be stale")
        daemon.detach(attached.id)
        scrape_until(daemon, lambda page: page.sum("netfence_control_plane_events_waiting") > 0, "an event to wait")


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_has_every_family_and_no_other(daemon: Netfenced, attached: str) -> None:
    page = scrape(daemon)
    ours = {name for name in page.types if name.startswith("netfence_")}
    assert ours == {family.exposed if family.kind == "info" else family.name for family in FAMILIES}
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds"} <= set(page.types)
    (build,) = page.series("netfence_build_info")
    assert build["version"] == daemon.status().version
    assert build["build"] in {pin.name.removeprefix("maps-") for pin in daemon.pins.glob("maps-*")}
    status = daemon.status()
    tc = "tcx" if status.features["tcx"] == "yes" else "clsact"
    assert page.series("netfence_kernel_info") == [{"release": status.kernel_release, "tc": tc}]
    features = {
        of["feature"]: page.sum("netfence_kernel_feature", **of) for of in page.series("netfence_kernel_feature")
    }
    words = {name: said.partition(":")[0] for name, said in status.features.items()}
    assert features == {name: word == "yes" for name, word in words.items() if word in ("yes", "no")}
    assert any(features.values())
    assert page.sum("netfence_attachments") == 1
    assert page.sum("netfence_control_plane_state", state="connected") == 1  # a policy file is always there


def test_the_examples_ask_for_what_there_is(daemon: Netfenced, attached: str) -> None:
    page = scrape(daemon)
    histograms = {name for name, kind in page.types.items() if kind == "histogram"}
    there = page.names | {f"{name}_{suffix}" for name in histograms for suffix in ("bucket", "sum", "count")}
    assert named() <= there
    assert len(named()) > 25


def test_labels_hold_nothing_that_workloads_choose(
    daemon: Netfenced, names: Unbound, workload: Workload, attached: str
) -> None:
    names.replace(["good.test. 300 IN A 203.0.113.80"])
    where = next(info for info in daemon.attachments() if info.id == attached)
    host, _, port = where.dns_address.rpartition(":")
    with Agent(netns=workload.netns) as agent:
        for name in ("good.test", "evil.test"):
            agent.query((host, int(port)), name)
    page = scrape_until(daemon, lambda page: page.sum("netfence_dns_queries_total") >= 2, "the queries")
    for word in ("good.test", "evil.test", "203.0.113.80", workload.address4):
        assert word not in page.text


# -- the server --------------------------------------------------------------------------------------------------------


def test_only_the_page_is_served(daemon: Netfenced) -> None:
    assert get(daemon, "/")[0] == 200
    assert get(daemon, "/metrics?name=x")[0] == 200
    assert get(daemon, "/other")[0] == 404
    status, headers, _ = get(daemon, method="POST")
    assert (status, headers["allow"], headers["connection"]) == (405, "GET", "close")


def test_clients_that_hang_or_do_not_read_keep_nobody_out(
    daemon: Netfenced, names: Unbound, workload: Workload, attached: str
) -> None:
    names.replace(["good.test. 300 IN A 203.0.113.80"])
    info = daemon.info(attached)
    dns_host, _, dns_port = info.dns_address.rpartition(":")
    with ExitStack() as stack:
        for number in range(4 * metrics_http.MAX_CONNECTIONS):
            with daemon.netns.inside():
                sock = stack.enter_context(closing(socket.socket()))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            sock.connect(place_of(daemon))
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + (b"" if number % 2 else b"\r\n"))
        assert scrape(daemon).sum("netfence_attachments") == 1
        with Agent(netns=workload.netns) as agent:
            assert agent.query((dns_host, int(dns_port)), "good.test").rr
        settled = 2 * metrics_http.MAX_CONNECTIONS
        wait_for(lambda: len(connections(daemon)) <= settled, "those that are too many to be closed")
    wait_for(lambda: not connections(daemon), "all of them to be closed")


def connections(daemon: Netfenced) -> list[str]:
    """List the connections that the daemon has on its metrics' port."""
    _, port = place_of(daemon)
    lines = daemon.netns.run("ss", "-Htnp", "state", "established", f"sport = :{port}").stdout.splitlines()
    return [line for line in lines if f"pid={daemon.pid}," in line]


def test_a_port_that_is_taken_is_told_at_the_start(fresh: Fresh, start: Start) -> None:
    topology = fresh.topology()
    daemon = start(topology, config=CONFIG)
    daemon.stop()
    host, port = place_of(daemon)
    with Agent(netns=topology.host) as other:
        sock = other.tcp()
        sock.bind((host, port))
        sock.listen()
        daemon.launch()
        assert daemon.ended_saying() == (
            f"netfenced: metrics.listen: listen on {host}:{port}: Address already in use; "
            "stop what listens there, or set metrics.listen to another port"
        )
    daemon.start()
    assert scrape(daemon).sum("netfence_attachments") == 0


def test_whoever_takes_the_port_meanwhile_keeps_no_daemon_from_starting(
    fresh: Fresh, start: Start, cgroups: Callable[[str], Cgroup]
) -> None:
    """A workload in a cgroup shares the host's ports."""
    topology, cgroup = fresh.topology(), cgroups("squatter")
    daemon = start(topology, policy=POLICY, config=CONFIG)
    attached = daemon.attach(cgroup=cgroup)
    daemon.kill()
    with Agent(netns=topology.host, cgroup=cgroup) as other:
        sock = other.tcp()
        sock.bind(place_of(daemon))
        sock.listen()
        daemon.start()
        assert [one.id for one in daemon.attachments()] == [attached.id]
        (told,) = daemon.events("metrics_not_served")
        assert "Address already in use" in told["error"]
        sock.close()

    def served() -> bool:
        with suppress(ConnectionRefusedError):
            return scrape(daemon).sum("netfence_attachments") == 1
        return False

    wait_for(served, "the metrics to be served")


@pytest.mark.parametrize("listen", ["[::1]:9100", "localhost:9100", "[::]:9100"])
def test_it_listens_where_it_is_told(fresh: Fresh, start: Start, listen: str) -> None:
    topology = fresh.topology()
    daemon = start(topology, config={"metrics": {"listen": listen}})
    assert scrape(daemon).sum("netfence_attachments") == 0
    assert bool(daemon.events("metrics_on_every_address")) == ("[::]" in listen)


# -- many attachments --------------------------------------------------------------------------------------------------

LONGEST_S = 0.2
MANY = 1000
ROUNDS = 5


@pytest.mark.parametrize(
    ("attachments", "longest_s"),
    [
        pytest.param(60, LONGEST_S * SLOWNESS, id="60"),
        pytest.param(
            MANY, LONGEST_S, id="1000", marks=[pytest.mark.nightly, pytest.mark.serial, pytest.mark.timeout(900)]
        ),
    ],
)
def test_how_long_a_scrape_takes(
    fresh: Fresh, start: Start, record_property: Callable[[str, object], None], attachments: int, longest_s: float
) -> None:
    topology = fresh.topology()
    names = [f"many{number}" for number in range(attachments)]
    far = topology.internet
    topology.host.ip(*[f"link add {name} type veth peer name p{name} netns {far.path}" for name in names])
    topology.host.ip(*[f"link set {name} up" for name in names])
    far.ip(*[f"link set p{name} up" for name in names])
    daemon = start(topology, policy=POLICY, config=CONFIG | {"log_level": "warning"})
    for name in names:
        daemon.attach(interface=name)
    page = scrape_until(daemon, lambda page: page.sum("netfence_attachments") == attachments, "all of them")
    assert len(page.series("netfence_attachment_info")) == attachments
    taken = [made_anew(daemon) for _ in range(ROUNDS)]
    record_property("scrape_s", [round(wall, 3) for wall, _ in taken])
    record_property("scrape_cpu_s", [round(cpu, 3) for _, cpu in taken])
    record_property("lines", len(page.text.splitlines()))
    # The daemon's own time: what else runs here makes a scrape take longer, and is none of it.
    assert min(cpu for _, cpu in taken) <= longest_s, taken
    if attachments == MANY:  # nothing else runs
        assert min(wall for wall, _ in taken) <= longest_s, taken


def made_anew(daemon: Netfenced) -> tuple[float, float]:
    """Get a page that was made for it, one made before may be handed out for a moment; return time and CPU time."""
    last = get(daemon)[2]

    def timed() -> tuple[float, float] | None:
        began, cpu = time.monotonic(), on_cpu(daemon)
        body = get(daemon)[2]
        took = time.monotonic() - began, on_cpu(daemon) - cpu
        return took if body != last else None  # the daemon's CPU time is on it: no two are the same

    found = wait_for(timed, "another page")
    assert found is not None
    return found


def on_cpu(daemon: Netfenced) -> float:
    """Return for how many seconds the daemon's event loop has run so far."""
    return int(Path(f"/proc/{daemon.pid}/task/{daemon.pid}/schedstat").read_text().split()[0]) / 1e9
