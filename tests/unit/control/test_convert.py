"""What a control plane's commands mean, and that every fault of one is told."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration

from netfence.control.convert import command_of, duration_s
from netfence.errors import InvalidError
from netfence.policy.commands import (
    AllowCidr,
    AllowDomain,
    BulkUpdate,
    CidrSpec,
    Command,
    DenyCidr,
    DenyDomain,
    DnsSpec,
    DomainSpec,
    RemoveCidr,
    RemoveDomain,
    SetDnsMode,
    SetMode,
    apply,
)
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY
from netfence.v1 import control_pb2, types_pb2
from netfence.v1.control_pb2 import CIDREntry, ControlCommand, DnsConfig, DomainEntry

HOUR = Duration(seconds=3600)
DOMAIN = DomainEntry(domain="pypi.org", include_subdomains=True)

COMMANDS: dict[str, tuple[ControlCommand, Command]] = {
    "set_mode": (ControlCommand(set_mode={"mode": types_pb2.POLICY_MODE_DENYLIST}), SetMode(4)),
    "set_dns_mode": (ControlCommand(set_dns_mode={"mode": types_pb2.DNS_MODE_PROXY}), SetDnsMode(4)),
    "allow_cidr": (ControlCommand(allow_cidr=CIDREntry(cidr="10.0.0.0/8")), AllowCidr("10.0.0.0/8", 0.0)),
    "allow_cidr-ttl": (ControlCommand(allow_cidr=CIDREntry(cidr="::/0", ttl=HOUR)), AllowCidr("::/0", 3600.0)),
    "deny_cidr": (
        ControlCommand(deny_cidr=CIDREntry(cidr="192.0.2.7", ttl=Duration(seconds=1, nanos=500_000_000))),
        DenyCidr("192.0.2.7", 1.5),
    ),
    "remove_cidr": (ControlCommand(remove_cidr="10.0.0.0/8"), RemoveCidr("10.0.0.0/8")),
    "remove_cidr-empty": (ControlCommand(remove_cidr=""), RemoveCidr("")),
    "allow_domain": (ControlCommand(allow_domain=DOMAIN), AllowDomain("pypi.org", include_subdomains=True)),
    "deny_domain": (
        ControlCommand(deny_domain=DomainEntry(domain="*.evil.example")),
        DenyDomain("*.evil.example", include_subdomains=False),
    ),
    "remove_domain": (ControlCommand(remove_domain="*.pypi.org"), RemoveDomain("*.pypi.org")),
}


@pytest.mark.parametrize(("message", "command"), COMMANDS.values(), ids=COMMANDS)
def test_command(message: ControlCommand, command: Command) -> None:
    assert command_of(ControlCommand.FromString(message.SerializeToString())) == command


@pytest.mark.parametrize("field", ["bulk_update", "subscribed_ack"])
def test_whole_policy(field: str) -> None:
    kind = control_pb2.BulkUpdate if field == "bulk_update" else control_pb2.SubscribedAck
    whole = kind(
        mode=types_pb2.POLICY_MODE_ALLOWLIST,
        allow_cidrs=[CIDREntry(cidr="10.0.0.0/8"), CIDREntry(cidr="192.0.2.7", ttl=HOUR)],
        deny_cidrs=[CIDREntry(cidr="10.13.0.0/16", ttl=Duration())],
        dns=DnsConfig(
            mode=types_pb2.DNS_MODE_ALLOWLIST,
            allow_domains=[DOMAIN],
            deny_domains=[DomainEntry(domain="internal.pypi.org")],
            upstream_servers=["192.0.2.53"],
        ),
        audit=True,
    )
    command = command_of(ControlCommand(**{field: whole}))  # type: ignore[arg-type]
    assert command == BulkUpdate(
        mode=2,
        allow_cidrs=["10.0.0.0/8", CidrSpec("192.0.2.7", 3600.0)],
        deny_cidrs=[CidrSpec("10.13.0.0/16", 0.0)],
        dns=DnsSpec(2, [DomainSpec("pypi.org", True)], [DomainSpec("internal.pypi.org", False)], ["192.0.2.53"]),
        audit=True,
    )
    policy = apply(EMPTY, command, 0.0)
    assert (policy.mode, policy.audit, policy.dns.mode) == (Mode.ALLOWLIST, True, DnsMode.ALLOWLIST)


def test_absent_dns_stays_absent() -> None:
    command = command_of(ControlCommand(bulk_update=control_pb2.BulkUpdate(mode=types_pb2.POLICY_MODE_DISABLED)))
    assert command == BulkUpdate(mode=1, allow_cidrs=[], deny_cidrs=[], dns=None, audit=False)


def test_empty_dns_is_not_absent_dns() -> None:
    command = command_of(ControlCommand(bulk_update=control_pb2.BulkUpdate(mode=1, dns=DnsConfig())))  # type: ignore[arg-type]
    with pytest.raises(InvalidError, match="dns"):
        apply(EMPTY, command, 0.0)


@pytest.mark.parametrize(
    "message",
    [
        ControlCommand(set_mode={}),
        ControlCommand(set_dns_mode={}),
        ControlCommand(subscribed_ack={}),
        ControlCommand(bulk_update={}),
        ControlCommand(set_mode={"mode": 77}),
    ],
    ids=["set_mode", "set_dns_mode", "empty-ack", "empty-bulk", "unknown"],
)
def test_unspecified_and_unknown_modes_are_refused(message: ControlCommand) -> None:
    with pytest.raises(InvalidError, match="not allowed"):
        apply(EMPTY, command_of(message), 0.0)


@pytest.mark.parametrize(
    ("message", "said"),
    [(ControlCommand(id="x"), "command: none"), (ControlCommand(sync_ack={}), "sync_ack")],
    ids=["none", "sync_ack"],
)
def test_what_is_no_policy_command(message: ControlCommand, said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        command_of(message)


def test_a_command_of_a_newer_control_plane_is_refused() -> None:
    with pytest.raises(InvalidError, match="does not know"):
        command_of(ControlCommand.FromString(b"\x0a\x01x\xaa\x06\x00"))  # id, and a message as field 101+


DURATIONS = {
    "zero": (Duration(), 0.0),
    "nano": (Duration(nanos=1), 1e-9),
    "both": (Duration(seconds=2, nanos=250_000_000), 2.25),
    "longest": (Duration(seconds=315_576_000_000), 315_576_000_000.0),
}


@pytest.mark.parametrize(("duration", "seconds"), DURATIONS.values(), ids=DURATIONS)
def test_duration(duration: Duration, seconds: float) -> None:
    assert duration_s(duration) == seconds


BAD_DURATIONS = {
    "negative": (Duration(seconds=-1), "-1s is negative"),
    "negative-nanos": (Duration(nanos=-500_000_000), "-0.5s is negative"),
    "negative-both": (Duration(seconds=-1, nanos=-500_000_000), "-1.5s is negative"),
    "mixed": (Duration(seconds=1, nanos=-1), "nanos are -1"),
    "too-many-nanos": (Duration(seconds=1, nanos=1_000_000_000), "nanos are 1000000000"),
}


@pytest.mark.parametrize(("duration", "said"), BAD_DURATIONS.values(), ids=BAD_DURATIONS)
def test_bad_duration(duration: Duration, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        duration_s(duration)
    for field in ("allow_cidr", "deny_cidr"):
        with pytest.raises(InvalidError) as raised:
            command_of(ControlCommand(**{field: CIDREntry(cidr="10.0.0.0/8", ttl=duration)}))  # type: ignore[arg-type]
        assert len(raised.value.errors) == 1
        assert raised.value.errors[0].startswith(f"{field}: ttl: {said}")


def test_every_fault_is_told_the_wires_and_the_policys() -> None:
    bad = Duration(seconds=-1)
    update = control_pb2.BulkUpdate(
        allow_cidrs=[
            CIDREntry(cidr="10.0.0.0/8", ttl=bad),
            CIDREntry(cidr="10.0.0.0/33"),
            CIDREntry(cidr="no", ttl=bad),
        ],
        deny_cidrs=[CIDREntry(cidr="::1", ttl=Duration(nanos=2_000_000_000))],
        dns=DnsConfig(mode=9, allow_domains=[DomainEntry(domain="a..b")]),  # type: ignore[arg-type]
    )
    with pytest.raises(InvalidError) as raised:
        command_of(ControlCommand(bulk_update=update))
    places = [
        *("allow_cidrs[0]: ttl:", "allow_cidrs[2]: ttl:", "deny_cidrs[0]: ttl:"),
        *("mode:", "allow_cidrs[1]:", "allow_cidrs[2]:", "dns.mode:", "dns.allow_domains[0]:"),
    ]
    assert len(raised.value.errors) == len(places)
    for place in places:
        assert any(error.startswith(place) for error in raised.value.errors), place
