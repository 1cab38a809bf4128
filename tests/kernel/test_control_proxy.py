"""DNS mode proxy: the control plane decides about names, by real queries and packets (semantics.md 14)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import dnslib
import pytest

import control_commands as commands
from control_stage import NOERROR, NONE, ONLY4, ONLY6, OUT4, OUT6, REFUSED, SERVFAIL, Stage, ask, staged
from harness.agent import Agent
from harness.controlplane import HANG, DnsDecision
from harness.daemon import Attached
from harness.deadline import wait_for
from harness.topology import Topology, Workload
from harness.unbound import Unbound

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

QUERY_S = 2.0
SO_RCVBUFFORCE = 33
MAX_LEASE_S = 86_400
GIVEN4, GIVEN6 = "203.0.113.81", "2001:db8:b::81"
PROXY = commands.dns("proxy")
ALLOWED, LEARNED, DENIED = commands.decision(), commands.decision(learn=True), commands.decision(False)


@pytest.fixture(scope="module")
def stage(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(topology, tmp_path_factory.mktemp("netfenced"), query_timeout=QUERY_S) as stage:
        yield stage


@pytest.fixture(scope="module", autouse=True)
def _records(names: Unbound) -> None:
    names.replace([f"good.test. 60 IN A {OUT4}", f"good.test. 60 IN AAAA {OUT6}"])


@pytest.fixture
def fenced(stage: Stage, workload: Workload) -> Iterator[Attached]:
    attached = stage.attach(workload, commands.ack(dns=PROXY))
    yield attached
    stage.plane.on_query({})
    stage.plane.release()
    stage.daemon.detach(attached.id)


def asked(stage: Stage, name: str) -> int:
    """Count the questions about a name that the control plane got."""
    stage.plane.settle()
    return len([seen for seen in stage.plane.queries if seen.request.domain == f"{name}."])


@contextmanager
def asking(agent: Agent, server: tuple[str, int], names: list[str]) -> Iterator[Callable[[int], list[int]]]:
    """Send a query for each name at once; give what waits for so many answers and returns their rcodes."""
    with agent.udp() as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        sock.connect(server)
        for name in names:
            sock.send(dnslib.DNSRecord.question(name).pack())
        yield lambda count: [
            dnslib.DNSRecord.parse(sock.recv(timeout_s=QUERY_S + 3)).header.rcode for _ in range(count)
        ]


# -- decisions ---------------------------------------------------------------------------------------------------------


def test_a_name_is_allowed_without_its_addresses(
    stage: Stage, workload: Workload, agent: Agent, fenced: Attached
) -> None:
    stage.plane.on_query({"good.test.": ALLOWED})
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])
    assert stage.reach(workload) == NONE


def test_a_name_is_allowed_with_its_addresses(stage: Stage, workload: Workload, agent: Agent, fenced: Attached) -> None:
    stage.plane.on_query({"good.test.": LEARNED})
    assert stage.reach(workload) == NONE
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])
    assert stage.reach(workload) == ONLY4
    stage.good(commands.set_dns_mode(fenced.id, "allowlist"))
    assert stage.reach(workload) == NONE


def test_a_name_is_denied(stage: Stage, agent: Agent, fenced: Attached, names: Unbound) -> None:
    before = names.asked("good.test")
    stage.plane.on_query({"good.test.": DENIED})
    assert ask(agent, fenced.dns, "good.test") == (REFUSED, [])
    assert names.asked("good.test") == before
    stage.plane.on_query({"good.test.": ALLOWED})
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])


@pytest.mark.parametrize("learn", [True, False])
def test_addresses_are_given(
    stage: Stage, workload: Workload, agent: Agent, fenced: Attached, names: Unbound, learn: bool
) -> None:
    """Answer with those of the query's family, special-purpose ones too; upstream is not asked."""
    ips = [OUT4, GIVEN4, OUT6, GIVEN6]
    stage.plane.on_query({"made.test.": commands.decision(learn=learn, ips=ips)})
    assert ask(agent, fenced.dns, "made.test") == (NOERROR, [OUT4, GIVEN4])
    assert stage.reach(workload) == (ONLY4 if learn else NONE)
    assert stage.reach(workload, GIVEN4) == (ONLY4 if learn else NONE)
    assert ask(agent, fenced.dns, "made.test", "AAAA") == (NOERROR, [OUT6, GIVEN6])
    assert stage.reach(workload, GIVEN4, GIVEN6) == ((3, 3) if learn else NONE)
    assert ask(agent, fenced.dns, "made.test", "TXT") == (NOERROR, [])
    assert names.asked("made.test") == 0


def test_addresses_of_the_other_family_only(stage: Stage, workload: Workload, agent: Agent, fenced: Attached) -> None:
    stage.plane.on_query({"six.test.": commands.decision(learn=True, ips=[OUT6])})
    assert ask(agent, fenced.dns, "six.test") == (NOERROR, [])
    assert ask(agent, fenced.dns, "six.test", "AAAA") == (NOERROR, [OUT6])
    assert stage.reach(workload) == ONLY6


def test_the_ttl_of_given_addresses(stage: Stage, agent: Agent, fenced: Attached) -> None:
    given = {name: commands.decision(ips=[OUT4], ttl_s=ttl_s) for name, ttl_s in (("d.test.", 0), ("t.test.", 77))}
    stage.plane.on_query(given)
    for name, ttl_s in (("d.test", 300), ("t.test", 77)):
        assert [record.ttl for record in agent.query(fenced.dns, name).rr] == [ttl_s]


def test_what_the_control_plane_is_asked(stage: Stage, agent: Agent, fenced: Attached) -> None:
    stage.plane.on_query({}, DENIED)
    since = len(stage.plane.queries)
    for name, qtype in (("MiXed.Test", "A"), ("good.test", "AAAA"), ("good.test", "HTTPS"), ("_a._tcp.test", "SRV")):
        ask(agent, fenced.dns, name, qtype)
    stage.plane.settle()
    requests = [seen.request for seen in stage.plane.queries[since:]]
    assert {request.id for request in requests} == {fenced.id}
    assert [(request.domain, request.query_type) for request in requests] == [
        ("mixed.test.", "A"), ("good.test.", "AAAA"), ("good.test.", "HTTPS"), ("_a._tcp.test.", "SRV"),
    ]  # fmt: skip


def test_what_else_a_decision_may_say(stage: Stage, workload: Workload, agent: Agent, fenced: Attached) -> None:
    far = 2**32 - 1
    stage.plane.on_query(
        {
            "mapped.test.": commands.decision(learn=True, ips=[f"::ffff:{OUT4}"]),
            "denied.test.": commands.decision(False, learn=True, ips=[OUT6]),
            "far.test.": commands.decision(ips=[OUT4], ttl_s=far),
            "many.test.": commands.decision(learn=True, ips=[f"2001:db8:77::{number:x}" for number in range(2000)]),
        }
    )
    assert ask(agent, fenced.dns, "mapped.test") == (NOERROR, [OUT4])
    assert stage.reach(workload) == ONLY4
    assert ask(agent, fenced.dns, "denied.test", "AAAA") == (REFUSED, [])
    assert ask(agent, fenced.dns, "many.test", "AAAA") == (SERVFAIL, [])
    assert stage.reach(workload) == ONLY4
    (record,) = agent.query(fenced.dns, "far.test").rr
    assert record.ttl <= MAX_LEASE_S


def test_block_all_does_not_ask(stage: Stage, agent: Agent, fenced: Attached) -> None:
    stage.plane.on_query({"blocked.test.": commands.decision(ips=[OUT4])})
    stage.good(commands.set_mode(fenced.id, "block_all"))
    assert ask(agent, fenced.dns, "blocked.test") == (REFUSED, [])
    assert asked(stage, "blocked.test") == 0
    stage.good(commands.set_mode(fenced.id, "allowlist"))
    assert ask(agent, fenced.dns, "blocked.test") == (NOERROR, [OUT4])


def test_audit_answers_what_is_denied(stage: Stage, workload: Workload, agent: Agent, fenced: Attached) -> None:
    """It is resolved and counted as denied, and nothing opens."""
    stage.plane.on_query({"good.test.": DENIED})
    stage.good(commands.bulk(fenced.id, dns=PROXY, audit=True))
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])
    stage.good(commands.bulk(fenced.id, dns=PROXY))
    assert stage.reach(workload) == NONE
    assert ask(agent, fenced.dns, "good.test") == (REFUSED, [])


# -- how long a decision holds -----------------------------------------------------------------------------------------


def test_a_decision_holds_for_its_ttl(stage: Stage, agent: Agent, fenced: Attached) -> None:
    stage.plane.on_query({"held.test.": commands.decision(ips=[OUT4], ttl_s=1)})
    begun = time.monotonic()
    assert ask(agent, fenced.dns, "held.test") == (NOERROR, [OUT4])
    stage.plane.on_query({"held.test.": DENIED})
    assert ask(agent, fenced.dns, "held.test") == (NOERROR, [OUT4])
    assert agent.query(fenced.dns, "held.test", edns=False).short() == OUT4  # other bytes: no ready-made reply
    assert time.monotonic() - begun < 1, "too slow to tell"
    assert asked(stage, "held.test") == 1
    wait_for(lambda: ask(agent, fenced.dns, "held.test")[0] == REFUSED, "the decision to end", 2)
    assert time.monotonic() - begun > 0.9


def test_a_decision_without_a_ttl_is_asked_for_each_time(stage: Stage, agent: Agent, fenced: Attached) -> None:
    stage.plane.on_query({"once.test.": commands.decision(ips=[OUT4])})
    for number in range(1, 4):
        assert ask(agent, fenced.dns, "once.test") == (NOERROR, [OUT4])
        assert asked(stage, "once.test") == number


def test_any_command_empties_the_cache_of_decisions(stage: Stage, agent: Agent, fenced: Attached) -> None:
    stage.plane.on_query({"kept.test.": commands.decision(ips=[OUT4], ttl_s=3600)})
    steps = [
        commands.set_mode(fenced.id, "allowlist"), commands.allow_cidr(fenced.id, "192.0.2.0/24"),
        commands.remove_domain(fenced.id, "nobody.test"), commands.bulk(fenced.id, dns=PROXY),
    ]  # fmt: skip
    for number, command in enumerate(steps, 1):
        for _ in range(2):
            assert ask(agent, fenced.dns, "kept.test") == (NOERROR, [OUT4])
        assert asked(stage, "kept.test") == number
        stage.good(command)
    assert ask(agent, fenced.dns, "kept.test") == (NOERROR, [OUT4])
    assert asked(stage, "kept.test") == len(steps) + 1


# -- many at once ------------------------------------------------------------------------------------------------------


def test_equal_questions_are_one(stage: Stage, agent: Agent, fenced: Attached) -> None:
    stage.plane.on_query({"slow.test.": HANG})
    with asking(agent, fenced.dns, ["slow.test"] * 20) as answers:
        wait_for(lambda: asked(stage, "slow.test"), "the question")
        stage.plane.on_query({"slow.test.": commands.decision(ips=[OUT4])})
        stage.plane.release()
        assert answers(20) == [NOERROR] * 20
    assert asked(stage, "slow.test") == 1


def test_a_flood_leaves_the_others_room(stage: Stage, topology: Topology) -> None:
    """Names that the control plane does not answer, from four attachments, keep no fifth from asking."""
    workloads = [topology.add_veth() for _ in range(5)]
    attached = [stage.attach(each, commands.ack(dns=PROXY)) for each in workloads]
    stage.plane.on_query({"quick.test.": commands.decision(ips=[OUT4])}, HANG)
    since = len(stage.plane.queries)
    with ExitStack() as stack:
        agents = [stack.enter_context(Agent(netns=each.netns)) for each in workloads]
        floods = [
            stack.enter_context(asking(agent, one.dns, [f"hang{number}.of-{one.id}.test" for number in range(500)]))
            for agent, one in zip(agents[:4], attached, strict=False)
        ]
        stage.plane.wait_queries(since + 500)
        begun = time.monotonic()
        assert ask(agents[4], attached[4].dns, "quick.test") == (NOERROR, [OUT4])
        assert time.monotonic() - begun < QUERY_S / 2
        for flood in floods:
            assert flood(200) == [SERVFAIL] * 200  # of a burst the kernel may drop some
    stage.plane.settle()
    assert max(seen.asked for seen in stage.plane.queries[since:]) <= 1024
    for one in attached:
        stage.daemon.detach(one.id)


# -- failures ----------------------------------------------------------------------------------------------------------


FAILURES: dict[str, DnsDecision] = {
    "error": "INTERNAL",
    "unimplemented": "UNIMPLEMENTED",
    "not-found": "NOT_FOUND",
    "no-address": commands.decision(learn=True, ips=[OUT4, "203.0.113.300"]),
    "empty-address": commands.decision(learn=True, ips=[""]),
    "a-network": commands.decision(learn=True, ips=["203.0.113.0/24"]),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_servfail_and_opens_nothing(
    stage: Stage, workload: Workload, agent: Agent, fenced: Attached, name: str
) -> None:
    stage.plane.on_query({"good.test.": FAILURES[name]})
    assert ask(agent, fenced.dns, "good.test") == (SERVFAIL, [])
    assert stage.reach(workload) == NONE
    stage.plane.on_query({"good.test.": LEARNED})
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])
    assert stage.reach(workload) == ONLY4


def test_no_answer_in_time(stage: Stage, workload: Workload, agent: Agent, fenced: Attached) -> None:
    stage.plane.on_query({"good.test.": HANG})
    begun = time.monotonic()
    assert ask(agent, fenced.dns, "good.test") == (SERVFAIL, [])
    assert QUERY_S * 0.9 <= time.monotonic() - begun < QUERY_S + 1
    assert stage.reach(workload) == NONE
    stage.plane.on_query({"good.test.": LEARNED})
    stage.plane.release()
    assert stage.reach(workload) == NONE


def test_no_control_plane(stage: Stage, topology: Topology, workload: Workload, agent: Agent, fenced: Attached) -> None:
    stage.plane.on_query({"good.test.": LEARNED, "held.test.": commands.decision(ips=[OUT4], ttl_s=3600)})
    assert ask(agent, fenced.dns, "held.test") == (NOERROR, [OUT4])
    stage.plane.kill()
    begun = time.monotonic()
    assert ask(agent, fenced.dns, "good.test") == (SERVFAIL, [])
    assert time.monotonic() - begun < QUERY_S + 1
    assert ask(agent, fenced.dns, "held.test") == (NOERROR, [OUT4])
    assert stage.reach(workload) == NONE
    stage.plane.start()
    stage.hurry(topology.add_veth())
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])
    assert stage.reach(workload) == ONLY4
