"""What a control plane says, in readable form: builders of ControlCommand and DnsQueryResponse.

Modes are the words of the policy file (``allowlist``). `stamp` is `version` and `nonce`. A CIDR is a text, or a text
and its TTL in seconds; a domain is a text, or a text and `include_subdomains`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

from google.protobuf import duration_pb2

from harness.controlplane import SYNC_ACK
from netfence.v1 import control_pb2, types_pb2

Cidr: TypeAlias = str | tuple[str, float]
Domain: TypeAlias = str | tuple[str, bool]
Command = control_pb2.ControlCommand

__all__ = ["SYNC_ACK"]


def mode_of(word: str) -> types_pb2.PolicyMode:
    """Give the number of a packet mode."""
    return cast("types_pb2.PolicyMode", types_pb2.PolicyMode.Value(f"POLICY_MODE_{word.upper()}"))


def dns_mode_of(word: str) -> types_pb2.DnsMode:
    """Give the number of a DNS mode."""
    return cast("types_pb2.DnsMode", types_pb2.DnsMode.Value(f"DNS_MODE_{word.upper()}"))


def duration(seconds: float) -> duration_pb2.Duration:
    """Make a Duration; of a negative one both parts are negative, as duration.proto wants it."""
    whole = int(seconds)
    return duration_pb2.Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))


def cidr_entry(cidr: Cidr) -> control_pb2.CIDREntry:
    """Make an entry of a CIDR list."""
    text, ttl_s = (cidr, None) if isinstance(cidr, str) else cidr
    return control_pb2.CIDREntry(cidr=text, ttl=None if ttl_s is None else duration(ttl_s))


def domain_entry(domain: Domain) -> control_pb2.DomainEntry:
    """Make an entry of a domain list."""
    text, below = (domain, False) if isinstance(domain, str) else domain
    return control_pb2.DomainEntry(domain=text, include_subdomains=below)


def dns(
    mode: str, allow: Iterable[Domain] = (), deny: Iterable[Domain] = (), upstreams: Iterable[str] = ()
) -> control_pb2.DnsConfig:
    """Make the DNS half of a policy."""
    return control_pb2.DnsConfig(
        mode=dns_mode_of(mode),
        allow_domains=map(domain_entry, allow),
        deny_domains=map(domain_entry, deny),
        upstream_servers=upstreams,
    )


def _policy(
    mode: str, allow: Iterable[Cidr], deny: Iterable[Cidr], dns: control_pb2.DnsConfig | None, audit: bool
) -> dict[str, Any]:
    return {
        "mode": mode_of(mode),
        "allow_cidrs": list(map(cidr_entry, allow)),
        "deny_cidrs": list(map(cidr_entry, deny)),
        "dns": dns,
        "audit": audit,
    }


def ack(
    attachment_id: str = "", mode: str = "allowlist", allow: Iterable[Cidr] = (), deny: Iterable[Cidr] = (),
    dns: control_pb2.DnsConfig | None = None, *, audit: bool = False, **stamp: Any,
) -> Command:  # fmt: skip
    """Answer Subscribed; `on_subscribed` fills in an empty id."""
    policy = _policy(mode, allow, deny, dns, audit)
    return Command(id=attachment_id, subscribed_ack=control_pb2.SubscribedAck(**policy), **stamp)


def bulk(
    attachment_id: str, mode: str = "allowlist", allow: Iterable[Cidr] = (), deny: Iterable[Cidr] = (),
    dns: control_pb2.DnsConfig | None = None, *, audit: bool = False, **stamp: Any,
) -> Command:  # fmt: skip
    """Replace the whole policy."""
    policy = _policy(mode, allow, deny, dns, audit)
    return Command(id=attachment_id, bulk_update=control_pb2.BulkUpdate(**policy), **stamp)


def set_mode(attachment_id: str, mode: str, **stamp: Any) -> Command:
    """Change the packet mode."""
    return Command(id=attachment_id, set_mode=control_pb2.SetMode(mode=mode_of(mode)), **stamp)


def set_dns_mode(attachment_id: str, mode: str, **stamp: Any) -> Command:
    """Change the DNS mode."""
    return Command(id=attachment_id, set_dns_mode=control_pb2.SetDnsMode(mode=dns_mode_of(mode)), **stamp)


def allow_cidr(attachment_id: str, cidr: str, ttl: float | None = None, **stamp: Any) -> Command:
    """Add to the allow list."""
    entry = cidr_entry(cidr if ttl is None else (cidr, ttl))
    return Command(id=attachment_id, allow_cidr=entry, **stamp)


def deny_cidr(attachment_id: str, cidr: str, ttl: float | None = None, **stamp: Any) -> Command:
    """Add to the deny list."""
    entry = cidr_entry(cidr if ttl is None else (cidr, ttl))
    return Command(id=attachment_id, deny_cidr=entry, **stamp)


def remove_cidr(attachment_id: str, cidr: str, **stamp: Any) -> Command:
    """Remove from both CIDR lists."""
    return Command(id=attachment_id, remove_cidr=cidr, **stamp)


def allow_domain(attachment_id: str, domain: str, include_subdomains: bool = False, **stamp: Any) -> Command:
    """Add to the allowed names."""
    return Command(id=attachment_id, allow_domain=domain_entry((domain, include_subdomains)), **stamp)


def deny_domain(attachment_id: str, domain: str, include_subdomains: bool = False, **stamp: Any) -> Command:
    """Add to the denied names."""
    return Command(id=attachment_id, deny_domain=domain_entry((domain, include_subdomains)), **stamp)


def remove_domain(attachment_id: str, domain: str, **stamp: Any) -> Command:
    """Remove from both lists of names."""
    return Command(id=attachment_id, remove_domain=domain, **stamp)


def decision(
    allow: bool = True, *, learn: bool = False, ips: Sequence[str] = (), ttl_s: int = 0
) -> control_pb2.DnsQueryResponse:
    """Decide about one name."""
    return control_pb2.DnsQueryResponse(allow=allow, add_to_filter=learn, ips=ips, ttl_seconds=ttl_s)


def policy_hash(
    mode: str = "block_all", allow: Iterable[str] = (), deny: Iterable[str] = (), *, audit: bool = False,
    dns_mode: str = "disabled", more: Iterable[str] = (),
) -> str:  # fmt: skip
    """Compute `policy_hash` by docs/policy-hash.md: CIDRs masked, `more` whole lines of domains and upstreams."""
    lines = [
        f"mode=POLICY_MODE_{mode.upper()}",
        f"audit={int(audit)}",
        f"dns_mode=DNS_MODE_{dns_mode.upper()}",
        *[f"allow {cidr}" for cidr in allow],
        *[f"deny {cidr}" for cidr in deny],
        *more,
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
