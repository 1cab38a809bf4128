"""Every command of the stream by its effect on packets and queries: it passes, is dropped, passes (wire.md, 3)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

import control_commands as commands
from control_commands import policy_hash
from control_stage import (
    BOTH,
    NET4,
    NET6,
    NOERROR,
    NONE,
    ONLY4,
    ONLY6,
    OUT4,
    OUT6,
    REFUSED,
    Stage,
    ask,
    staged,
)
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.daemon import Attached
from harness.deadline import wait_for
from harness.topology import Topology, Workload
from harness.unbound import Unbound
from netfence.policy.modes import Reason

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

FAMILIES = {"ipv4": (NET4, ONLY4, ONLY6), "ipv6": (NET6, ONLY6, ONLY4)}
families = pytest.mark.parametrize(("cidr", "it", "other"), FAMILIES.values(), ids=FAMILIES)
SUBDOMAIN = "a.b.good.test"
TTL_S = 0.8
TICK_S = 0.02  # two of the coarsest kernel's clock
SLACK_S = 0.5  # of a busy machine


@pytest.fixture(scope="module")
def stage(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(topology, tmp_path_factory.mktemp("netfenced")) as stage:
        yield stage


@pytest.fixture
def fenced(stage: Stage, workload: Workload) -> Iterator[Attached]:
    """Give the workload attached, with an allowlist that allows nothing."""
    attached = stage.attach(workload, commands.ack())
    yield attached
    stage.daemon.detach(attached.id)


@pytest.fixture(scope="module", autouse=True)
def _records(names: Unbound) -> None:
    addresses = [f"{kind} {address}" for kind, address in (("A", OUT4), ("AAAA", OUT6))]
    names.replace(f"{name}. 300 IN {address}" for name in ("good.test", SUBDOMAIN) for address in addresses)


# -- CIDRs -------------------------------------------------------------------------------------------------------------


@families
def test_allow_cidr(
    stage: Stage, workload: Workload, fenced: Attached, cidr: str, it: tuple[int, int], other: tuple[int, int]
) -> None:
    assert stage.reach(workload) == NONE
    result = stage.good(commands.allow_cidr(fenced.id, cidr))
    assert result.policy_hash == policy_hash("allowlist", allow=[cidr])
    assert stage.reach(workload) == it != other
    stage.good(commands.remove_cidr(fenced.id, cidr))
    assert stage.reach(workload) == NONE


@families
def test_deny_cidr(
    stage: Stage, workload: Workload, fenced: Attached, cidr: str, it: tuple[int, int], other: tuple[int, int]
) -> None:
    stage.good(commands.set_mode(fenced.id, "denylist"))
    assert stage.reach(workload) == BOTH
    result = stage.good(commands.deny_cidr(fenced.id, cidr))
    assert result.policy_hash == policy_hash("denylist", deny=[cidr])
    assert stage.reach(workload) == other != it
    stage.good(commands.remove_cidr(fenced.id, cidr))
    assert stage.reach(workload) == BOTH


@families
def test_remove_cidr_takes_it_from_both_lists(
    stage: Stage, workload: Workload, fenced: Attached, cidr: str, it: tuple[int, int], other: tuple[int, int]
) -> None:
    stage.good(commands.allow_cidr(fenced.id, cidr))
    assert stage.reach(workload) == it
    stage.good(commands.deny_cidr(fenced.id, cidr))
    assert stage.reach(workload) == NONE
    with_host_bits = cidr.replace(".0/", ".77/").replace("::/", "::77/")
    result = stage.good(commands.remove_cidr(fenced.id, with_host_bits))
    assert result.policy_hash == policy_hash("allowlist")
    assert stage.reach(workload) == NONE
    stage.good(commands.set_mode(fenced.id, "denylist"))
    assert stage.reach(workload) == BOTH != other


def test_the_most_specific_prefix_decides(stage: Stage, workload: Workload, fenced: Attached) -> None:
    stage.good(commands.allow_cidr(fenced.id, "0.0.0.0/0"))
    assert stage.reach(workload) == ONLY4
    stage.good(commands.deny_cidr(fenced.id, NET4))
    assert stage.reach(workload) == NONE
    stage.good(commands.allow_cidr(fenced.id, OUT4))
    assert stage.reach(workload) == ONLY4
    stage.good(commands.remove_cidr(fenced.id, f"{OUT4}/32"))
    assert stage.reach(workload) == NONE
    stage.good(commands.remove_cidr(fenced.id, NET4))
    assert stage.reach(workload) == ONLY4


# -- TTLs --------------------------------------------------------------------------------------------------------------


def test_an_allow_with_a_ttl_ends(stage: Stage, workload: Workload, fenced: Attached) -> None:
    begun = time.monotonic()
    result = stage.good(commands.allow_cidr(fenced.id, NET4, ttl=TTL_S))
    assert result.policy_hash == policy_hash("allowlist")
    assert stage.reach(workload) == ONLY4
    assert time.monotonic() - begun < TTL_S, "too slow to tell"
    wait_for(lambda: stage.reach(workload) == NONE, "the TTL to end")
    assert TTL_S - TICK_S <= time.monotonic() - begun < TTL_S + SLACK_S


def test_a_deny_with_a_ttl_ends_and_what_it_covered_counts_again(
    stage: Stage, workload: Workload, fenced: Attached
) -> None:
    stage.good(commands.bulk(fenced.id, "allowlist", [NET6]))
    begun = time.monotonic()
    stage.good(commands.deny_cidr(fenced.id, NET6, ttl=TTL_S))
    assert stage.reach(workload) == NONE
    assert time.monotonic() - begun < TTL_S, "too slow to tell"
    wait_for(lambda: stage.reach(workload) == ONLY6, "the TTL to end")
    assert TTL_S - TICK_S <= time.monotonic() - begun < TTL_S + SLACK_S


def test_a_new_ttl_replaces_the_old_one(stage: Stage, workload: Workload, fenced: Attached) -> None:
    ends = time.monotonic() + TTL_S
    for ttl in (TTL_S, 3600.0):
        stage.good(commands.allow_cidr(fenced.id, NET4, ttl=ttl))
    stage.good(commands.allow_cidr(fenced.id, NET6, ttl=TTL_S))
    stage.good(commands.allow_cidr(fenced.id, NET6))
    assert time.monotonic() < ends, "too slow to tell"
    wait_for(lambda: time.monotonic() > ends + SLACK_S, "the first TTL to be over")
    assert stage.reach(workload) == BOTH
    stage.good(commands.allow_cidr(fenced.id, NET6, ttl=0.01))
    wait_for(lambda: stage.reach(workload) == ONLY4, "the shorter TTL to end")


# -- modes and whole policies ------------------------------------------------------------------------------------------


def test_set_mode(stage: Stage, workload: Workload, fenced: Attached) -> None:
    """Change nothing but the mode: the rules of both lists count again in the next list mode."""
    stage.good(commands.bulk(fenced.id, "allowlist", [NET4], [NET6]))
    assert stage.reach(workload) == ONLY4
    stage.good(commands.remove_cidr(fenced.id, NET6))
    steps = [("denylist", BOTH), ("block_all", NONE), ("disabled", BOTH), ("allowlist", ONLY4), ("block_all", NONE)]
    for mode, reach in steps:
        result = stage.good(commands.set_mode(fenced.id, mode))
        assert result.policy_hash == policy_hash(mode, allow=[NET4])
        assert stage.reach(workload) == reach, mode
        assert stage.daemon.info(fenced.id).mode == commands.mode_of(mode)


def test_bulk_update_replaces_everything(stage: Stage, workload: Workload, agent: Agent, fenced: Attached) -> None:
    dns = commands.dns("allowlist", allow=["good.test"])
    result = stage.good(commands.bulk(fenced.id, "allowlist", [NET4], dns=dns, version="1"))
    assert result.policy_hash == policy_hash(
        "allowlist", [NET4], dns_mode="allowlist", more=["allow_domain good.test 0"]
    )
    assert stage.reach(workload) == ONLY4
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])
    result = stage.good(commands.bulk(fenced.id, "allowlist", [NET6], dns=commands.dns("allowlist"), version="2"))
    assert result.policy_hash == policy_hash("allowlist", [NET6], dns_mode="allowlist")
    assert stage.reach(workload) == ONLY6
    assert ask(agent, fenced.dns, "good.test") == (REFUSED, [])
    result = stage.good(commands.bulk(fenced.id, "denylist", [], [NET6]))
    assert result.policy_hash == policy_hash("denylist", deny=[NET6])
    assert stage.reach(workload) == ONLY4
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])  # no DNS part: mode disabled


def test_audit_lets_through_and_counts(stage: Stage, workload: Workload, agent: Agent, fenced: Attached) -> None:
    audited = commands.bulk(fenced.id, "block_all", dns=commands.dns("allowlist"), audit=True)
    assert stage.reach(workload) == NONE
    result = stage.good(audited)
    assert result.policy_hash == policy_hash("block_all", audit=True, dns_mode="allowlist")
    before = stage.daemon.counters(fenced.id)
    assert stage.reach(workload) == BOTH
    after = stage.daemon.counters(fenced.id)
    assert after.would_packets[Reason.BLOCK_ALL] - before.would_packets[Reason.BLOCK_ALL] == 6
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])
    stage.good(commands.bulk(fenced.id, "block_all", dns=commands.dns("allowlist")))
    assert stage.reach(workload) == NONE
    assert ask(agent, fenced.dns, "good.test") == (REFUSED, [])


def test_a_cgroup_obeys_too(stage: Stage, topology: Topology, cgroups: Callable[[str], Cgroup]) -> None:
    group = cgroups("stream")
    with Agent(netns=topology.host, cgroup=group) as inside, closing(inside.udp()) as sock:
        attached = stage.attach(group, commands.ack())
        with pytest.raises(PermissionError):
            sock.sendto(b"x", (OUT4, 9))
        stage.good(commands.allow_cidr(attached.id, NET4))
        sock.sendto(b"x", (OUT4, 9))
        stage.good(commands.deny_cidr(attached.id, OUT4))
        with pytest.raises(PermissionError):
            sock.sendto(b"x", (OUT4, 9))
        stage.good(commands.remove_cidr(attached.id, OUT4))
        sock.sendto(b"x", (OUT4, 9))
        stage.daemon.detach(attached.id)


# -- domains: what is asked for, and the addresses that answers open ---------------------------------------------------


def test_allow_domain(stage: Stage, workload: Workload, agent: Agent, fenced: Attached) -> None:
    stage.good(commands.set_dns_mode(fenced.id, "allowlist"))
    assert ask(agent, fenced.dns, "good.test") == (REFUSED, [])
    result = stage.good(commands.allow_domain(fenced.id, "Good.Test."))
    assert result.policy_hash == policy_hash("allowlist", dns_mode="allowlist", more=["allow_domain good.test 0"])
    assert stage.reach(workload) == NONE
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])
    assert stage.reach(workload) == ONLY4
    assert ask(agent, fenced.dns, "good.test", "AAAA") == (NOERROR, [OUT6])
    assert stage.reach(workload) == BOTH
    assert ask(agent, fenced.dns, SUBDOMAIN) == (REFUSED, [])
    stage.good(commands.remove_domain(fenced.id, "good.test"))
    assert stage.reach(workload) == NONE
    assert ask(agent, fenced.dns, "good.test") == (REFUSED, [])


@pytest.mark.parametrize(("domain", "below"), [("good.test", True), ("*.good.test", False), ("*", False)])
def test_allow_domain_with_what_is_below(
    stage: Stage, workload: Workload, agent: Agent, fenced: Attached, domain: str, below: bool
) -> None:
    stage.good(commands.set_dns_mode(fenced.id, "allowlist"))
    assert ask(agent, fenced.dns, SUBDOMAIN) == (REFUSED, [])
    stage.good(commands.allow_domain(fenced.id, domain, below))
    assert ask(agent, fenced.dns, SUBDOMAIN) == (NOERROR, [OUT4])
    assert stage.reach(workload) == ONLY4
    apex = (REFUSED, []) if domain.startswith("*.") else (NOERROR, [OUT4])
    assert ask(agent, fenced.dns, "good.test") == apex
    stage.good(commands.remove_domain(fenced.id, domain))
    assert ask(agent, fenced.dns, SUBDOMAIN) == (REFUSED, [])
    assert stage.reach(workload) == NONE


def test_deny_domain(stage: Stage, workload: Workload, agent: Agent, fenced: Attached) -> None:
    stage.good(commands.set_dns_mode(fenced.id, "denylist"))
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])
    assert ask(agent, fenced.dns, SUBDOMAIN, "AAAA") == (NOERROR, [OUT6])
    assert stage.reach(workload) == BOTH
    result = stage.good(commands.deny_domain(fenced.id, "good.test"))
    assert result.policy_hash == policy_hash("allowlist", dns_mode="denylist", more=["deny_domain good.test 0"])
    assert stage.reach(workload) == ONLY6
    assert ask(agent, fenced.dns, "good.test") == (REFUSED, [])
    stage.good(commands.deny_domain(fenced.id, "good.test", True))
    assert stage.reach(workload) == NONE
    assert ask(agent, fenced.dns, SUBDOMAIN) == (REFUSED, [])
    stage.good(commands.remove_domain(fenced.id, "good.test"))
    assert ask(agent, fenced.dns, "good.test") == (NOERROR, [OUT4])
    assert stage.reach(workload) == ONLY4


def test_set_dns_mode(stage: Stage, workload: Workload, agent: Agent, fenced: Attached) -> None:
    """In mode disabled everything is forwarded and nothing opens; what another mode had opened is shut with it."""
    steps = [
        ("disabled", NOERROR, NONE), ("denylist", NOERROR, ONLY4), ("disabled", NOERROR, NONE),
        ("allowlist", REFUSED, NONE), ("denylist", NOERROR, ONLY4), ("allowlist", REFUSED, NONE),
    ]  # fmt: skip
    for mode, rcode, reach in steps:
        result = stage.good(commands.set_dns_mode(fenced.id, mode))
        assert result.policy_hash == policy_hash("allowlist", dns_mode=mode)
        assert stage.daemon.info(fenced.id).dns_mode == commands.dns_mode_of(mode)
        assert stage.reach(workload) == NONE
        assert ask(agent, fenced.dns, "good.test")[0] == rcode, mode
        assert stage.reach(workload) == reach, mode


def test_block_all_denies_every_name(stage: Stage, agent: Agent, fenced: Attached) -> None:
    stage.good(commands.set_dns_mode(fenced.id, "denylist"))
    for mode, rcode in (("allowlist", NOERROR), ("block_all", REFUSED), ("allowlist", NOERROR)):
        stage.good(commands.set_mode(fenced.id, mode))
        assert ask(agent, fenced.dns, "good.test")[0] == rcode
