"""The single command that makes one policy of another: right where there is one, none where there is not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netfence.control.convert import command_of
from netfence.controlplane import Cidr, Dns, Domain, Policy, diff
from netfence.controlplane.diff import single_command
from netfence.policy.commands import apply
from netfence.v1 import control_pb2

BELOW = Domain("a.example", include_subdomains=True)


def names(mode: str = "allowlist", **lists: list[Domain | str]) -> Dns:
    return Dns(mode, **lists)  # type: ignore[arg-type]


SINGLE = {
    "set_mode": (Policy("allowlist"), Policy("block_all")),
    "set_mode: same rules, new version": (Policy("allowlist", version="1"), Policy("allowlist", version="2")),
    "allow_cidr": (Policy("allowlist"), Policy("allowlist", allow=["10.0.0.0/8"])),
    "allow_cidr: with a TTL": (Policy("allowlist"), Policy("allowlist", allow=[Cidr("10.0.0.0/8", 60)])),
    "allow_cidr: beside a deny": (
        Policy("allowlist", deny=["10.0.0.0/8"]),
        Policy("allowlist", deny=["10.0.0.0/8"], allow=["10.0.0.0/8"]),
    ),
    "allow_cidr: the TTL goes": (
        Policy("allowlist", allow=[Cidr("10.0.0.0/8", 60)]),
        Policy("allowlist", allow=["10.0.0.0/8"]),
    ),
    "deny_cidr": (Policy("denylist"), Policy("denylist", deny=["2001:db8::/32"])),
    "remove_cidr": (Policy("allowlist", allow=["10.0.0.0/8"]), Policy("allowlist")),
    "remove_cidr: from both lists": (
        Policy("allowlist", allow=["10.0.0.0/8"], deny=["10.0.0.0/8"]),
        Policy("allowlist"),
    ),
    "remove_cidr: the only TTL": (
        Policy("allowlist", allow=["11.0.0.0/8", Cidr("10.0.0.0/8", 60)]),
        Policy("allowlist", allow=["11.0.0.0/8"]),
    ),
    "set_dns_mode": (Policy("allowlist", dns=names()), Policy("allowlist", dns=names("proxy"))),
    "allow_domain": (Policy("allowlist", dns=names()), Policy("allowlist", dns=names(allow=[BELOW]))),
    "allow_domain: *": (Policy("allowlist", dns=names()), Policy("allowlist", dns=names(allow=["*"]))),
    "deny_domain": (Policy("allowlist", dns=names()), Policy("allowlist", dns=names(deny=["*.a.example"]))),
    "remove_domain": (Policy("allowlist", dns=names(allow=[BELOW])), Policy("allowlist", dns=names())),
    "remove_domain: exact and below": (
        Policy("allowlist", dns=names(allow=[BELOW, "a.example"], deny=["a.example"])),
        Policy("allowlist", dns=names()),
    ),
    "remove_domain: *.d": (Policy("allowlist", dns=names(allow=["*.a.example"])), Policy("allowlist", dns=names())),
}


@pytest.mark.parametrize(("old", "new"), SINGLE.values(), ids=SINGLE)
def test_single_command(old: Policy, new: Policy, request: pytest.FixtureRequest) -> None:
    body = single_command(old, new)
    assert body is not None
    message = control_pb2.ControlCommand.FromString(body)
    assert message.WhichOneof("command") == request.node.callspec.id.partition(":")[0]
    assert message.version == new.version
    assert apply(old.rules, command_of(message), 0.0) == new.rules


TIMED = [Cidr("10.0.0.0/8", 60)]
WHOLE = {
    "two rules": (Policy("allowlist"), Policy("allowlist", allow=["10.0.0.0/8", "11.0.0.0/8"])),
    "rule replaced": (Policy("allowlist", allow=["10.0.0.0/8"]), Policy("allowlist", allow=["11.0.0.0/8"])),
    "both lists at once": (Policy("allowlist"), Policy("allowlist", allow=["10.0.0.0/8"], deny=["10.0.0.0/8"])),
    "list changed": (Policy("allowlist", allow=["10.0.0.0/8"]), Policy("allowlist", deny=["10.0.0.0/8"])),
    "one of two lists": (
        Policy("allowlist", allow=["10.0.0.0/8"], deny=["10.0.0.0/8"]),
        Policy("allowlist", allow=["10.0.0.0/8"]),
    ),
    "mode and rule": (Policy("allowlist"), Policy("denylist", allow=["10.0.0.0/8"])),
    "rule and domain": (Policy("allowlist"), Policy("allowlist", allow=["10.0.0.0/8"], dns=names(allow=["a.b"]))),
    "mode and DNS mode": (Policy("allowlist"), Policy("denylist", dns=names())),
    "audit": (Policy("allowlist"), Policy("allowlist", audit=True)),
    "upstreams": (Policy("allowlist", dns=names()), Policy("allowlist", dns=Dns("allowlist", upstreams=["192.0.2.1"]))),
    "two domains": (Policy("allowlist", dns=names()), Policy("allowlist", dns=names(allow=["a.b", "c.d"]))),
    "domain replaced": (Policy("allowlist", dns=names(allow=["a.b"])), Policy("allowlist", dns=names(allow=["c.d"]))),
    "exact goes, below stays": (
        Policy("allowlist", dns=names(allow=[BELOW, "a.example"])),
        Policy("allowlist", dns=names(allow=[BELOW])),
    ),
    # A bulk update starts TTLs anew, and single commands must mean the same.
    "another entry has a TTL": (Policy("allowlist", allow=TIMED), Policy("allowlist", allow=[*TIMED, "11.0.0.0/8"])),
    "deny beside an allow with a TTL": (
        Policy("allowlist", allow=TIMED),
        Policy("allowlist", allow=TIMED, deny=["10.0.0.0/8"]),
    ),
    "allow beside a deny with a TTL": (
        Policy("allowlist", deny=TIMED),
        Policy("allowlist", deny=TIMED, allow=["10.0.0.0/8"]),
    ),
    "mode while an entry has a TTL": (Policy("allowlist", allow=TIMED), Policy("denylist", allow=TIMED)),
    "DNS mode while an entry has a TTL": (
        Policy("allowlist", allow=TIMED, dns=names()),
        Policy("allowlist", allow=TIMED, dns=names("proxy")),
    ),
    "domain while an entry has a TTL": (
        Policy("allowlist", allow=TIMED, dns=names()),
        Policy("allowlist", allow=TIMED, dns=names(allow=["a.b"])),
    ),
    "new version while an entry has a TTL": (
        Policy("allowlist", allow=TIMED, version="1"),
        Policy("allowlist", allow=TIMED, version="2"),
    ),
}


@pytest.mark.parametrize(("old", "new"), WHOLE.values(), ids=WHOLE)
def test_no_single_command(old: Policy, new: Policy) -> None:
    assert single_command(old, new) is None


def test_long_lists_of_domains_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "MAX_DOMAINS", 1)
    old, new = (Policy("allowlist", dns=names(allow=list(some)), version="long") for some in (["a.b"], ["a.b", "c.d"]))
    assert single_command(old, new) is None


CIDRS = st.lists(
    st.builds(
        Cidr,
        st.sampled_from(["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3", "2001:db8::/32"]),
        st.sampled_from([0, 0, 0, 60]),
    ),
    max_size=3,
)
DOMAINS = st.lists(
    st.builds(Domain, st.sampled_from(["a.example", "*.a.example", "b.example", "*"]), st.booleans()), max_size=2
)
POLICIES = st.builds(
    Policy,
    st.sampled_from(["allowlist", "denylist"]),
    CIDRS,
    CIDRS,
    st.builds(Dns, st.sampled_from(["allowlist", "proxy"]), DOMAINS, DOMAINS),
)


@settings(max_examples=300, deadline=None)
@given(POLICIES, POLICIES)
def test_single_command_gives_what_the_whole_policy_gives(old: Policy, new: Policy) -> None:
    """TTLs included: both are applied at 100 to a policy in force since 0, as a daemon would."""
    body = single_command(old, new)
    if body is None:
        return
    in_force = apply(old.rules, command_of(control_pb2.ControlCommand.FromString(old.bulk_body)), 0.0)
    by_one = apply(in_force, command_of(control_pb2.ControlCommand.FromString(body)), 30.0)
    by_all = apply(in_force, command_of(control_pb2.ControlCommand.FromString(new.bulk_body)), 30.0)
    assert by_one == by_all


def test_very_long_lists_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "MAX_RULES", 1)
    assert single_command(Policy("allowlist", version="a"), Policy("allowlist", allow=["10.9.0.1"])) is not None
    longer = Policy("allowlist", allow=["10.9.0.1", "10.9.0.2"])
    assert single_command(Policy("allowlist", allow=["10.9.0.1"]), longer) is None


def test_few_differences_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "MAX_PAIRS", 3)
    diff._known.clear()
    for number in range(10):
        assert single_command(Policy("allowlist"), Policy("allowlist", version=f"v{number}"))
    assert len(diff._known) == 3
