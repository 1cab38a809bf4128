"""control.proto → policy commands: what a control plane's message means.

Owns only what the wire adds to a command: the oneof, Durations, absent fields. Modes, prefixes, domains and bounds are
checked by `netfence.policy.commands.apply`, for every source of commands alike. Plain code without I/O: run it in a
thread for large updates, 100,000 entries take about a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from google.protobuf import duration_pb2

from netfence.errors import ExhaustedError, InvalidError
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
    refuse_too_many,
)
from netfence.policy.policy import EMPTY
from netfence.v1 import control_pb2

_NANO: Final = 1_000_000_000


def command_of(message: control_pb2.ControlCommand) -> Command:
    """Return the policy command that `message` carries; a SubscribedAck is a bulk update (wire.md behaviour 2).

    Raises ExhaustedError for too many rules; InvalidError listing every fault, those that `apply` would find included
    where there is one of the wire's own; also for no command, an unknown one, and sync_ack, which is the stream's
    business and changes no policy.
    """
    faults: list[str] = []
    command = _command(message, faults)
    if not faults:
        return command
    try:  # `command` has 0 in place of every bad Duration: let it tell its other faults, so that all are told at once
        apply(EMPTY, command, 0.0)
    except InvalidError as error:
        faults += error.errors
    except ExhaustedError as error:
        faults.append(str(error))
    raise InvalidError(faults)


def _command(message: control_pb2.ControlCommand, faults: list[str]) -> Command:  # noqa: PLR0911 - one line per command
    match message.WhichOneof("command"):
        case "set_mode":
            return SetMode(message.set_mode.mode)
        case "set_dns_mode":
            return SetDnsMode(message.set_dns_mode.mode)
        case "allow_cidr":
            return AllowCidr(message.allow_cidr.cidr, _ttl_s(message.allow_cidr, "allow_cidr", faults))
        case "deny_cidr":
            return DenyCidr(message.deny_cidr.cidr, _ttl_s(message.deny_cidr, "deny_cidr", faults))
        case "remove_cidr":
            return RemoveCidr(message.remove_cidr)
        case "allow_domain":
            return AllowDomain(message.allow_domain.domain, message.allow_domain.include_subdomains)
        case "deny_domain":
            return DenyDomain(message.deny_domain.domain, message.deny_domain.include_subdomains)
        case "remove_domain":
            return RemoveDomain(message.remove_domain)
        case "bulk_update":
            return _bulk(message.bulk_update, faults)
        case "subscribed_ack":
            return _bulk(message.subscribed_ack, faults)
        case "sync_ack":
            raise InvalidError("sync_ack: answers SyncRequest and changes no policy; send it first on a stream only")
        case _:
            raise InvalidError("command: none, or one that this daemon does not know; set one of the oneof's fields")


def _bulk(message: control_pb2.BulkUpdate | control_pb2.SubscribedAck, faults: list[str]) -> BulkUpdate:
    cidrs = len(message.allow_cidrs) + len(message.deny_cidrs)
    refuse_too_many(cidrs, len(message.dns.allow_domains) + len(message.dns.deny_domains))
    return BulkUpdate(
        mode=message.mode,
        allow_cidrs=_cidrs(message.allow_cidrs, "allow_cidrs", faults),
        deny_cidrs=_cidrs(message.deny_cidrs, "deny_cidrs", faults),
        dns=_dns(message.dns) if message.HasField("dns") else None,
        audit=message.audit,
    )


def _dns(message: control_pb2.DnsConfig) -> DnsSpec:
    return DnsSpec(
        mode=message.mode,
        allow=[DomainSpec(entry.domain, entry.include_subdomains) for entry in message.allow_domains],
        deny=[DomainSpec(entry.domain, entry.include_subdomains) for entry in message.deny_domains],
        upstreams=list(message.upstream_servers),
    )


def _cidrs(entries: Iterable[control_pb2.CIDREntry], where: str, faults: list[str]) -> list[CidrSpec | str]:
    return [
        CidrSpec(entry.cidr, _ttl_s(entry, f"{where}[{index}]", faults)) if entry.HasField("ttl") else entry.cidr
        for index, entry in enumerate(entries)
    ]


def _ttl_s(entry: control_pb2.CIDREntry, where: str, faults: list[str]) -> float:
    """Return the entry's TTL in seconds, 0 for none; a bad one is noted and 0."""
    if not entry.HasField("ttl"):
        return 0.0
    try:
        return duration_s(entry.ttl)
    except ValueError as fault:
        faults.append(f"{where}: ttl: {fault}")
        return 0.0


def duration_s(duration: duration_pb2.Duration) -> float:
    """Return a Duration in seconds. Raises ValueError for a negative one, or nanos outside 0 to 999,999,999.

    duration.proto wants both parts of one sign; since negative ones are refused anyway, that leaves both >= 0.
    """
    if duration.seconds < 0 or (duration.seconds == 0 and -_NANO < duration.nanos < 0):
        raise ValueError(f"{duration.seconds + duration.nanos / _NANO:g}s is negative; give 0 (for ever) or more")
    if not 0 <= duration.nanos < _NANO:
        raise ValueError(f"nanos are {duration.nanos}; allowed are 0 to {_NANO - 1}")
    return duration.seconds + duration.nanos / _NANO
