"""CommandResult, versions and hashes; commands that are refused whole, with every fault told (wire.md 3, 7)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from google.protobuf import duration_pb2

import control_commands as commands
from control_stage import BOTH, NET4, NET6, NONE, ONLY4, Stage, ask, staged
from harness.agent import Agent
from harness.controlplane import Command
from harness.daemon import Attached
from harness.topology import Topology, Workload
from netfence.policy.commands import BulkUpdate, DnsSpec, DomainSpec, apply
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY
from netfence.v1 import control_pb2

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

RICH_DNS = commands.dns("allowlist", [("Good.Test", True), "*.any.test"], ["bad.good.test"], ["192.0.2.53"])
RICH = commands.bulk("", "allowlist", [NET4, (NET6, 3600)], ["203.0.113.7", "2001:DB8::1/32"], RICH_DNS, version="rich")


@pytest.fixture(scope="module")
def stage(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(topology, tmp_path_factory.mktemp("netfenced")) as stage:
        yield stage


@pytest.fixture(scope="module")
def fenced(stage: Stage, workload: Workload) -> Attached:
    """Give the workload attached for all tests of the module; each sets its policy first."""
    return stage.attach(workload, commands.ack(allow=[NET4], version="first"))


def rich(attachment_id: str) -> Command:
    made = Command()
    made.CopyFrom(RICH)
    made.id = attachment_id
    return made


# -- versions and hashes -----------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_policy(stage: Stage, fenced: Attached) -> None:
    result = stage.good(rich(fenced.id))
    dns = DnsSpec(
        DnsMode.ALLOWLIST,
        [DomainSpec("good.test", True), DomainSpec("*.any.test")],
        [DomainSpec("bad.good.test")],
        ["192.0.2.53:53"],
    )
    policy = apply(EMPTY, BulkUpdate(Mode.ALLOWLIST, [NET4], ["203.0.113.7", "2001:db8::/32"], dns), 0.0)
    assert result.policy_hash == policy.hash()
    assert result.policy_hash == commands.policy_hash(
        "allowlist", [NET4], ["203.0.113.7/32", "2001:db8::/32"], dns_mode="allowlist",
        more=["allow_domain good.test 1", "allow_domain *.any.test 0", "deny_domain bad.good.test 0",
              "upstream=0:192.0.2.53:53"],
    )  # fmt: skip


def test_the_version_is_the_last_commands(stage: Stage, fenced: Attached) -> None:
    for version in ("v1", "ü and spaces", "", "v2"):
        assert stage.good(commands.set_mode(fenced.id, "allowlist", version=version)).version == version


def test_version_and_hash_are_told_on_every_connect_and_survive_the_daemon(
    stage: Stage, workload: Workload, fenced: Attached
) -> None:
    expected = stage.good(rich(fenced.id))
    assert stage.reach(workload) == BOTH
    for lose in ([stage.plane.end], [stage.daemon.stop, stage.daemon.start], [stage.daemon.kill, stage.daemon.start]):
        stream = stage.plane.stream
        for step in lose:
            step()
        (told,) = stage.plane.wait_event("sync", stream=stream + 1).attachments
        assert (told.id, told.policy_version, told.policy_hash) == (fenced.id, "rich", expected.policy_hash)
        assert (told.mode, told.dns_mode) == (commands.mode_of("allowlist"), commands.dns_mode_of("allowlist"))
        info = stage.daemon.info(fenced.id)
        assert (info.policy_version, info.policy_hash) == ("rich", expected.policy_hash)
        assert stage.reach(workload) == BOTH


# -- results -----------------------------------------------------------------------------------------------------------


def test_only_a_nonce_gets_a_result(stage: Stage, workload: Workload, fenced: Attached) -> None:
    since = len(stage.plane.seen)
    stage.plane.send(
        commands.set_mode(fenced.id, "block_all"),
        commands.set_mode(fenced.id, "unspecified"),
        commands.set_mode("nobody", "disabled"),
    )
    stage.good(commands.bulk(fenced.id, "disabled", nonce="asked"))
    assert [seen.body.nonce for seen in stage.plane.events("command_result", since=since)] == ["asked"]
    assert stage.reach(workload) == BOTH


def test_commands_take_effect_in_order_and_each_has_its_result(
    stage: Stage, workload: Workload, fenced: Attached
) -> None:
    """Version and hash of a result belong together: the command's own, or a later one's that was applied with it."""
    since = len(stage.plane.seen)
    stage.good(commands.bulk(fenced.id, "allowlist", version="begin"))
    rules: dict[str, set[str]] = {"allow": set(), "deny": set()}
    hashes = {"begin": commands.policy_hash("allowlist")}
    sent = []
    for number in range(60):
        cidr, kind = NET4 if number % 2 else NET6, ("deny", "allow", "remove")[number % 3]
        bad = number % 7 == 6
        make = {"deny": commands.deny_cidr, "allow": commands.allow_cidr, "remove": commands.remove_cidr}[kind]
        sent.append(make(fenced.id, "bad" if bad else cidr, version=str(number), nonce=f"order-{number}"))
        if bad:
            continue
        for name, listed in rules.items():
            if name == kind:
                listed.add(cidr)
            elif kind == "remove":
                listed.discard(cidr)
        hashes[str(number)] = commands.policy_hash("allowlist", rules["allow"], rules["deny"])
    stage.plane.send(*sent)
    stage.plane.wait_event("command_result", nonce="order-59")
    results = [seen.body for seen in stage.plane.events("command_result", since=since)][1:]
    assert [result.nonce for result in results] == [command.nonce for command in sent]
    versions = list(hashes)
    at = 0
    for number, result in enumerate(results):
        assert result.ok == (number % 7 != 6)
        assert result.policy_hash == hashes[result.version], number
        assert versions.index(result.version) >= at
        at = versions.index(result.version)
        if result.ok:
            assert at >= versions.index(str(number))
    assert results[-1].version == "59"
    stage.good(commands.bulk(fenced.id, "allowlist", [NET4], version="end"))
    assert stage.reach(workload) == ONLY4


def test_an_unknown_id(stage: Stage, workload: Workload, fenced: Attached) -> None:
    stage.good(commands.bulk(fenced.id, "disabled"))
    for command in (
        commands.set_mode("nobody", "block_all"),
        commands.set_mode("", "block_all"),
        commands.ack("nobody", "block_all"),
    ):
        result = stage.do(command)
        assert (result.ok, result.version, result.policy_hash) == (False, "", "")
        (error,) = result.errors
        assert command.id in error
    assert stage.reach(workload) == BOTH


# -- refusals ----------------------------------------------------------------------------------------------------------

Kind = control_pb2.ControlCommand


def _bulk_with_three_bad(attachment_id: str) -> Command:
    good = [f"10.{number // 250}.{number % 250}.0/24" for number in range(1000)]
    good[17], good[500], good[999] = "10.0.0.0/33", "nonsense", "2001:db8::/129"
    return commands.bulk(attachment_id, "denylist", good)


BAD: dict[str, tuple[Command, list[str]]] = {
    "no-command": (Kind(), ["command"]),
    "unknown-command": (Kind.FromString(b"\xfa\x06\x02hi"), ["command"]),
    "allow-cidr": (commands.allow_cidr("", "203.0.113.0/33"), ["allow_cidr", "'203.0.113.0/33'"]),
    "allow-cidr-empty": (commands.allow_cidr("", ""), ["allow_cidr", "''"]),
    "deny-cidr": (commands.deny_cidr("", "203.0.113.256"), ["deny_cidr", "'203.0.113.256'"]),
    "remove-cidr": (commands.remove_cidr("", "everything"), ["remove_cidr", "'everything'"]),
    "negative-ttl": (commands.allow_cidr("", NET6, ttl=-0.5), ["ttl", "negative"]),
    "ttl-too-long": (commands.allow_cidr("", NET6, ttl=11 * 365 * 86400), ["TTL", "315360000"]),
    "ttl-nanos": (
        Kind(allow_cidr={"cidr": NET6, "ttl": duration_pb2.Duration(seconds=1, nanos=2_000_000_000)}),
        ["nanos"],
    ),
    "cidr-and-ttl": (commands.deny_cidr("", "x", ttl=-1), ["'x'", "negative"]),
    "mode-unspecified": (commands.set_mode("", "unspecified"), ["set_mode", "UNSPECIFIED"]),
    "mode-empty": (Kind(set_mode={}), ["set_mode", "UNSPECIFIED"]),
    "mode-unknown": (Kind.FromString(b"\x1a\x02\x08\x63"), ["set_mode", "99"]),
    "dns-mode-unspecified": (commands.set_dns_mode("", "unspecified"), ["set_dns_mode", "UNSPECIFIED"]),
    "dns-mode-unknown": (Kind.FromString(b"\x42\x02\x08\x63"), ["set_dns_mode", "99"]),
    "star-inside": (commands.allow_domain("", "a.*.test"), ["allow_domain", "a.*.test"]),
    "label-empty": (commands.deny_domain("", "a..test"), ["deny_domain", "a..test"]),
    "label-long": (commands.allow_domain("", "x" * 64 + ".test"), ["allow_domain"]),
    "domain-empty": (commands.remove_domain("", ""), ["remove_domain"]),
    "bulk-mode": (commands.bulk("", "unspecified"), ["mode", "UNSPECIFIED"]),
    "bulk-three-of-1000": (_bulk_with_three_bad(""), ["allow_cidrs[17]", "allow_cidrs[500]", "allow_cidrs[999]"]),
    "bulk-everything": (
        commands.bulk("", "unspecified", ["x"], [("10.0.0.0/8", -1)],
                      commands.dns("unspecified", ["a.*"], ["b..c"], ["not-an-address", "192.0.2.53"])),
        ["mode", "allow_cidrs[0]", "deny_cidrs[0]", "dns.mode", "dns.allow_domains[0]", "dns.deny_domains[0]",
         "dns.upstream_servers[0]"],
    ),
    "upstreams-many": (
        commands.bulk("", "disabled", dns=commands.dns("disabled", upstreams=["192.0.2.53"] * 9)), ["upstream_servers"]
    ),
    "ttls-nested-too-deep": (
        commands.bulk("", "disabled", [(f"10.0.0.0/{length}", 60) for length in range(8, 20)]), ["10.0.0.0"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_command_changes_nothing(stage: Stage, workload: Workload, fenced: Attached, name: str) -> None:
    stage.good(commands.bulk(fenced.id, "allowlist", [NET4], version=f"before {name}"))
    assert stage.reach(workload) == ONLY4
    bad, faults = BAD[name]
    command = Command()
    command.CopyFrom(bad)
    command.id, command.version = fenced.id, "never"
    errors = stage.refused(command)
    for fault in faults:
        assert fault in " ".join(errors)
    if name.startswith("bulk-") and len(faults) > 2:
        assert len(errors) == len(faults)
    assert stage.reach(workload) == ONLY4


def test_refusals_without_a_nonce_are_logged(stage: Stage, workload: Workload, agent: Agent, fenced: Attached) -> None:
    stage.anew()  # it logs but one within a while; the count tells of the others
    known = len(stage.daemon.events("command_refused"))
    stage.good(commands.bulk(fenced.id, "block_all"))
    stage.plane.send(commands.allow_cidr(fenced.id, "no-such-cidr"))
    stage.good(commands.set_mode(fenced.id, "block_all"))
    (entry,) = stage.daemon.events("command_refused")[known:]
    assert "no-such-cidr" in str(entry)
    assert entry["attachment"] == fenced.id
    assert stage.reach(workload) == NONE
    assert ask(agent, fenced.dns, "any.test")[1] == []
