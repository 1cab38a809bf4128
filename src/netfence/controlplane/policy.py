"""What an attachment gets: an immutable policy, checked when it is made and encoded once for all who share it.

Owns the public form of a policy and its place in messages. What is refused, and the hash, are those of
`netfence.policy`: a policy that can be made here is one that a daemon takes. Refuses to know attachments and streams.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from google.protobuf import duration_pb2

from netfence.errors import ExhaustedError, InvalidError
from netfence.policy.cidr import NEVER
from netfence.policy.commands import BulkUpdate, DnsSpec, apply
from netfence.policy.commands import CidrSpec as Cidr
from netfence.policy.commands import DomainSpec as Domain
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY
from netfence.policy.policy import Policy as Rules
from netfence.policy.prefix import shown
from netfence.v1 import control_pb2

__all__ = ["Cidr", "Dns", "DnsMode", "Domain", "Mode", "Policy"]

MAX_VERSION_BYTES: Final = 256
"""Bytes of a version in UTF-8: it stands in every command, result and status line."""

_NANO: Final = 1_000_000_000

ModeT = TypeVar("ModeT", Mode, DnsMode)


@dataclass(frozen=True, slots=True)
class Dns:
    """The DNS half of a policy: ``Dns("allowlist", allow=["pypi.org", "*.pythonhosted.org"])``.

    `mode` is one of ``disabled``, ``allowlist``, ``denylist``, ``proxy`` (or a `DnsMode`). Domains are texts, or
    `Domain` where subdomains are included. `upstreams` are ``address[:port]`` in the order to try; none means the
    daemon's own. Checked when a `Policy` is made of it.
    """

    mode: DnsMode | str
    allow: Sequence[Domain | str] = ()
    deny: Sequence[Domain | str] = ()
    upstreams: Sequence[str] = ()


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Policy:
    """A whole policy: ``Policy("allowlist", allow=["10.0.0.0/8", Cidr("192.0.2.7", ttl_s=3600)], dns=Dns("proxy"))``.

    `mode` is one of ``disabled``, ``allowlist``, ``block_all``, ``denylist`` (or a `Mode`). `allow` and `deny` are
    prefixes: texts, or `Cidr` where they have a TTL. With `audit` nothing is dropped, only reported. No `dns` means DNS
    mode ``disabled``. `version` is your name of this revision, echoed by the daemons; if you give none it is made of
    the content, so that equal policies have equal versions.

    Making one costs some 40 µs and 4 µs a rule: make it once and return the same object for every attachment that
    gets it, and make one of 100,000 rules in a thread. Raises InvalidError with every fault, ExhaustedError on too many
    rules. Equal are policies with the same content and version.
    """

    mode: Mode | str
    allow: Sequence[Cidr | str] = ()
    deny: Sequence[Cidr | str] = ()
    dns: Dns | None = None
    audit: bool = False
    version: str = ""
    hash: str = field(init=False, repr=False)
    """The `policy_hash` that a daemon reports for it (docs/policy-hash.md): entries with a TTL are not part."""
    rules: Rules = field(init=False, repr=False)
    """What it means, as the daemon's own policy core reads it; expiries are the TTLs in seconds."""
    has_ttl: bool = field(init=False, repr=False)
    """Whether any entry has a TTL; then `hash` does not tell all of it."""
    digest: str = field(init=False, repr=False)
    """As `hash`, with the TTLs."""
    _bulk: bytes = field(init=False, repr=False)
    _ack: bytes = field(init=False, repr=False, default=b"")

    def __post_init__(self) -> None:
        rules = _checked(self)
        timed = _ttl_lines(rules)
        digest = hashlib.sha256("\n".join([rules.hash(), *timed]).encode()).hexdigest() if timed else rules.hash()
        made = {
            "mode": rules.mode,
            "allow": tuple(self.allow),
            "deny": tuple(self.deny),
            "version": self.version or f"policy:{digest[:16]}",
            "hash": rules.hash(),
            "rules": rules,
            "has_ttl": bool(timed),
            "digest": digest,
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)
        bulk = control_pb2.ControlCommand(bulk_update=_bulk_update(self), version=self.version)
        object.__setattr__(self, "_bulk", bulk.SerializeToString())

    @classmethod
    def from_update(cls, update: BulkUpdate, version: str = "") -> Policy:
        """Make one of a bulk update, such as a rule of a policy file has. Raises as the constructor does."""
        dns = update.dns
        return cls(
            mode=_of_number(Mode, update.mode),
            allow=update.allow_cidrs,
            deny=update.deny_cidrs,
            dns=None if dns is None else Dns(_of_number(DnsMode, dns.mode), dns.allow, dns.deny, dns.upstreams),
            audit=update.audit,
            version=version,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Policy):
            return NotImplemented
        return self is other or self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> tuple[str, str]:
        """What tells this policy from others, and keeps none of it."""
        return self.digest, self.version

    @property
    def bulk_body(self) -> bytes:
        """A serialized ControlCommand that puts this policy in place of another; lacks id and nonce."""
        return self._bulk

    @property
    def ack_body(self) -> bytes:
        """A serialized ControlCommand that answers Subscribed with this policy; lacks id and nonce."""
        if not self._ack:
            bulk = control_pb2.ControlCommand.FromString(self._bulk)
            payload = bulk.bulk_update.SerializeToString()  # the two messages have the same fields
            ack = control_pb2.ControlCommand(version=self.version)
            ack.subscribed_ack.MergeFromString(payload)
            object.__setattr__(self, "_ack", ack.SerializeToString())
        return self._ack


def framed(body: bytes, attachment_id: str, nonce: str = "") -> bytes:
    """Return a body with its id and nonce: serialized messages that are joined read as one merged message."""
    return control_pb2.ControlCommand(id=attachment_id, nonce=nonce).SerializeToString() + body


def duration(ttl_s: float) -> duration_pb2.Duration:
    """Return seconds, more than 0, as a Duration; never as none, which would mean for ever."""
    nanos = max(1, round(ttl_s * _NANO))
    return duration_pb2.Duration(seconds=nanos // _NANO, nanos=nanos % _NANO)


def _checked(policy: Policy) -> Rules:
    """Return what the policy means; InvalidError with every fault of it."""
    faults: list[str] = []
    dns = policy.dns
    spec = None
    if isinstance(dns, Dns):
        spec = DnsSpec(
            mode=_number(DnsMode, dns.mode, "dns.mode", faults),
            allow=_domains(dns.allow, "dns.allow", faults),
            deny=_domains(dns.deny, "dns.deny", faults),
            upstreams=_upstreams(dns.upstreams, "dns.upstreams", faults),
        )
    elif dns is not None:
        faults.append(f"dns: {_shown(dns)} is not one; give Dns(mode, allow=..., deny=...)")
    mode = _number(Mode, policy.mode, "mode", faults)
    allow, deny = _cidrs(policy.allow, "allow", faults), _cidrs(policy.deny, "deny", faults)
    faults += _version_faults(policy.version)
    rules = EMPTY
    try:
        rules = apply(EMPTY, BulkUpdate(mode, allow, deny, spec, bool(policy.audit)), 0.0)
    except InvalidError as error:
        faults += [_PLACE.sub(_parameter, fault) for fault in error.errors]
    except ExhaustedError:
        if not faults:
            raise
    if faults:
        raise InvalidError(faults)
    return rules


_PLACE: Final = re.compile(r"^(?:(allow|deny)_cidrs|dns\.(allow|deny)_domains|dns\.(upstream)_servers)\b")


def _parameter(place: re.Match[str]) -> str:
    """Return the constructor's name of what the wire calls otherwise."""
    cidrs, domains, upstream = place.groups()
    return cidrs or (f"dns.{domains}" if domains else f"dns.{upstream}s")


def _number(kind: type[ModeT], mode: ModeT | str, where: str, faults: list[str]) -> ModeT:
    """Return the mode of that name or number; a fault is noted and the first mode returned."""
    names = {one.name.lower(): one for one in kind}
    if isinstance(mode, str) and mode in names:
        return names[mode]
    if isinstance(mode, kind):
        return mode
    faults.append(f"{where}: {shown(str(mode))} is not one; allowed are {', '.join(names)}")
    return next(iter(kind))


def _of_number(kind: type[ModeT], number: int) -> ModeT | str:
    """Return the mode of a number, or a text that the constructor refuses."""
    return kind(number) if number in set(kind) else str(number)


def _cidrs(given: object, where: str, faults: list[str]) -> list[Cidr | str]:
    made: list[Cidr | str] = []
    for place, one in _items(given, where, faults):
        if isinstance(one, str) or (isinstance(one, Cidr) and isinstance(one.cidr, str) and _is_number(one.ttl_s)):
            made.append(one)
        else:
            faults.append(f"{place}: {_shown(one)} is not one; give a text or Cidr(text, ttl_s=seconds)")
            made.append("::/0")  # so that the others keep their places
    return made


def _domains(given: object, where: str, faults: list[str]) -> list[Domain]:
    made: list[Domain] = []
    for place, one in _items(given, where, faults):
        if isinstance(one, Domain) and isinstance(one.domain, str):
            made.append(one)
        elif isinstance(one, str):
            made.append(Domain(one))
        else:
            faults.append(f"{place}: {_shown(one)} is not one; give a text or Domain(text, include_subdomains=True)")
            made.append(Domain("*"))
    return made


def _upstreams(given: object, where: str, faults: list[str]) -> list[str]:
    made: list[str] = []
    for place, one in _items(given, where, faults):
        if not isinstance(one, str):
            faults.append(f"{place}: {_shown(one)} is not one; give a text, address or address:port")
        made.append(one if isinstance(one, str) else "::1")
    return made


def _items(given: object, where: str, faults: list[str]) -> Iterator[tuple[str, object]]:
    """Yield the items of a list and their places; a text in its place, which is a sequence too, is a fault."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        faults.append(f"{where}: {_shown(given)} is not a list; give a list of texts")
        return
    for index, one in enumerate(given):
        yield f"{where}[{index}]", one


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return shown(value if isinstance(value, str) else repr(value))


def _version_faults(version: object) -> list[str]:
    if not isinstance(version, str):
        return [f"version: {_shown(version)} is not a text"]
    try:
        size = len(version.encode())
    except UnicodeEncodeError:
        return [f"version: {version!r} cannot be written as UTF-8"]
    if size > MAX_VERSION_BYTES:
        return [f"version: {shown(version)} is {size} bytes long; at most {MAX_VERSION_BYTES} are allowed"]
    return []


def _ttl_lines(rules: Rules) -> list[str]:
    """Return a line for each entry with a TTL, sorted: what the hash leaves out. Expiries are TTLs: applied at 0."""
    if rules.cidrs.next_expiry() == NEVER:
        return []
    return [
        f"{'allow' if rule.allow else 'deny'} {rule.cidr} {rule.expiry!r}"
        for rule in rules.cidrs.rules()
        if rule.expiry != NEVER
    ]


def _bulk_update(policy: Policy) -> control_pb2.BulkUpdate:
    """Return the message in canonical form: masked prefixes, A-labels, no entry twice; equal rules, equal bytes."""
    rules = policy.rules
    bulk = control_pb2.BulkUpdate(mode=int(rules.mode), audit=rules.audit)  # type: ignore[arg-type]
    for rule in rules.cidrs.rules():
        entry = control_pb2.CIDREntry(cidr=rule.cidr, ttl=None if rule.expiry == NEVER else duration(rule.expiry))
        (bulk.allow_cidrs if rule.allow else bulk.deny_cidrs).append(entry)
    if policy.dns is not None:  # absent where it was not given: the daemon then warns of it in allowlist mode
        bulk.dns.mode = int(rules.dns.mode)  # type: ignore[assignment]
        bulk.dns.upstream_servers.extend(rules.dns.upstreams)
        for name in sorted(rules.dns.domains.rules()):
            entry_of = control_pb2.DomainEntry(domain=name.domain, include_subdomains=name.include_subdomains)
            (bulk.dns.allow_domains if name.allow else bulk.dns.deny_domains).append(entry_of)
    return bulk
