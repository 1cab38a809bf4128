"""`netfenced why`: what would happen now to a name or an address, link by link, and what to do about it.

Puts together what the DNS server says of the name (`dns.explain`) and what the kernel says of each address
(`dataplane.explain`), for people. Decides nothing itself, opens nothing and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from netfence.api.views import ExplainedAddress, ExplanationView, FlowVerdict
from netfence.attachment import dns_address
from netfence.dataplane.explain import METADATA, METADATA_RULE, Judged
from netfence.dns.judge import Verdict
from netfence.dns.server import Looked
from netfence.errors import InvalidError, NotFoundError
from netfence.lifecycle import Lifecycle, Live
from netfence.policy.domain import RuleKind, parse_domain
from netfence.policy.modes import DnsMode, Mode, Reason
from netfence.policy.prefix import address_text, cidr_text, key_of, parse_address, shown
from netfence.policy.special import is_special

MAX_ADDRESSES: Final = 64
"""Addresses of one name that are judged: each costs the event loop some ten system calls, and nobody reads more."""

MAX_NAMES: Final = 5
"""Names told of one lease: an address of a CDN has thousands."""

MAX_TRIES: Final = 3
"""Look-ups of a name whose policy changes meanwhile; after that the last one is told."""

Step = tuple[str, str, str]


async def explain(lifecycle: Lifecycle, attachment_id: str, subject: str) -> ExplanationView:
    """Explain a name or an address. Raises NotFoundError, InvalidError for what is neither."""
    live = lifecycle.find(attachment_id, "why")
    address, name = parse_subject(subject)
    if address is not None:
        chain = _Chain(lifecycle, live)
        chain.mode()
        chain.address(address)
        return chain.view(address_text(address))
    looked: Sequence[Looked] = ()
    for _ in range(MAX_TRIES):
        generation = live.attachment.generation
        looked = await live.server.trace(name)
        if live.ended or live.attachment.closed:
            raise NotFoundError(f"why: {live.row.name} was detached meanwhile")
        if generation == live.attachment.generation:
            break
    chain = _Chain(lifecycle, live)
    chain.mode()
    chain.name(name, looked)
    return chain.view(name)


def parse_subject(text: str) -> tuple[bytes | None, str]:
    """Return the packed address that the text is, or None and the name in the form that rules are compared with.

    Raises InvalidError for what is neither.
    """
    bare = text.strip().removesuffix(".")
    try:
        return parse_address(bare), ""
    except ValueError:
        pass
    try:
        name, below = parse_domain(bare)
    except ValueError as error:
        raise InvalidError(f"why: neither a name nor an address: {error}") from None
    if "*" in bare or below:
        raise InvalidError(f"why: {shown(bare)} is a pattern; ask about one name")
    if name.rpartition(".")[2].isdigit():  # no top-level domain is a number (RFC 3696 section 2)
        raise InvalidError(f"why: {shown(bare)} is neither a name nor an IPv4 address (a.b.c.d, each 0 to 255)")
    return None, name


class _Chain:
    """The links as they are found. Filled in one go, without a suspension, so that all of it is of one moment."""

    def __init__(self, lifecycle: Lifecycle, live: Live) -> None:
        self._lifecycle, self._live = lifecycle, live
        self._attachment, self._policy = live.attachment, live.attachment.policy
        self._dns = dns_address(live.row)
        self._foreign = {one.endpoint.packed: one.endpoint.port for one in lifecycle.every() if one is not live}
        self._steps: list[Step] = []
        self._addresses: list[ExplainedAddress] = []
        self._remedies: dict[str, None] = {}  # each once, in order
        self._name_verdict: FlowVerdict | str = ""
        self._learned = True  # answers to the name open its addresses

    def view(self, subject: str) -> ExplanationView:
        """Return what was found."""
        verdict: FlowVerdict | str = self._name_verdict
        return ExplanationView(
            subject=subject,
            name_verdict=verdict,  # type: ignore[arg-type]
            steps=tuple(self._steps),
            addresses=tuple(self._addresses),
            remedies=tuple(self._remedies),
        )

    def _step(self, kind: str, subject: str, text: str) -> None:
        self._steps.append((kind, subject, text))

    def _remedy(self, *texts: str) -> None:
        self._remedies.update(dict.fromkeys(texts))

    def mode(self) -> None:
        """Tell what is in force."""
        policy, parts = self._policy, [f"packets {self._policy.mode.name.lower()}"]
        parts.append(f"names {policy.dns.mode.name.lower()}")
        if policy.audit:
            parts.append("audit: nothing is dropped")
        if self._lifecycle.parts.control.stale:
            parts.append("the control plane is away for longer than max_stale")
        self._step("mode", self._live.row.name, ", ".join(parts))

    # -- names ------------------------------------------------------------------------------------------------------

    def name(self, name: str, looked: Sequence[Looked]) -> None:
        """Tell what is answered to a name and what becomes of connections to its addresses."""
        self._judge(name, looked)
        found: dict[bytes, None] = {}
        for one in looked:
            if self._answer(name, one):
                found.update(dict.fromkeys(one.addresses))
        held = [address for address in self._attachment.held_by(name) if address not in found]
        if held:
            self._step("answer", name, f"{_count(len(held), 'more address', 'more addresses')} of earlier answers")
        found.update(dict.fromkeys(held))
        for address in list(found)[:MAX_ADDRESSES]:
            self.address(address, name)
        if len(found) > MAX_ADDRESSES:
            self._step("answer", name, f"{len(found) - MAX_ADDRESSES} more addresses, not looked at")

    def _judge(self, name: str, looked: Sequence[Looked]) -> None:
        """Tell what is said of the name itself; of each type where the control plane says it of each."""
        verdicts = {one.qtype: one.verdict for one in looked}
        said = [verdict for verdict in verdicts.values() if verdict is not None]
        self._learned = any(verdict.learn for verdict in said)
        alike = {verdict.why: verdict for verdict in said}  # what differs otherwise is when it was said
        for why, verdict in alike.items():
            of = [qtype for qtype, other in verdicts.items() if other is not None and other.why == why]
            self._judged(name, verdict, "" if len(of) == len(verdicts) else f"{' and '.join(of)}: ")
        allowed = any(not verdict.denied for verdict in said)
        if allowed:
            self._name_verdict = "pass"
        elif said and len(said) == len(verdicts):
            self._name_verdict = "would_drop" if said[0].audit else "drop"
        if len(said) < len(verdicts) or not said:
            of = [qtype for qtype, verdict in verdicts.items() if verdict is None]
            which = f"{' and '.join(of)}: " if said else ""
            why = "DNS mode proxy: the control plane decides when the workload asks; it said nothing that still holds"
            self._step("name", name, which + why)
            self._remedy(f"let the workload resolve {name} through DNS {self._dns}: the control plane is asked then")

    def _judged(self, name: str, verdict: Verdict, which: str) -> None:
        """Tell what a verdict on the name is, and what would change it."""
        if verdict.name != name:
            self._step("name", name, f"judged without its search domain, as {verdict.name}")
        self._step("name", verdict.name, which + verdict.why)
        if not verdict.denied:
            return
        if verdict.reason == "block_all":
            self._closed()
        elif verdict.reason == "control_plane":
            self._remedy(f"have the control plane allow {verdict.name}")
        elif verdict.rule is not None and verdict.rule.name == verdict.name and verdict.rule.kind is RuleKind.EXACT:
            self._remedy(f"dns.allow: {verdict.name} in place of {verdict.rule.text}")
        else:
            self._remedy(f"dns.allow: {verdict.name}")

    def _answer(self, name: str, one: Looked) -> bool:
        """Tell what a question of one type gets; False where the client gets none of its addresses."""
        for link in one.chain:
            self._step("cname", link, f"{one.qtype} of {name} leads to it")
        if one.failure:
            self._step("answer", name, f"{one.qtype}: none: {one.failure}")
        elif one.source:
            addresses = ", ".join(map(address_text, one.addresses[:MAX_ADDRESSES])) or "no addresses"
            told = addresses if one.rcode == "NOERROR" else one.rcode
            ttl = f", TTL {one.ttl_s} s" if one.addresses else ""
            self._step("answer", name, f"{one.qtype}: {told}; from {one.source}{ttl}")
        for address in one.cut[:MAX_ADDRESSES]:
            text = address_text(address)
            self._step("answer", text, "special-purpose: the rebinding guard cuts it out of the answer")
            self._remedy(f"allow_cidrs: {_host(address)}, or add it to dns.allow_private of the configuration")
        if one.denied_by is None:
            return True
        rule, link = one.denied_by
        self._step("rule", link, f"{rule.text}: the answer leads to it")
        exact = rule.name == link and rule.kind is RuleKind.EXACT
        self._remedy(f"remove {rule.text}" if exact else f"dns.allow: {link}")
        if self._policy.audit:
            self._name_verdict = "would_drop"
            return True
        self._name_verdict = "drop"
        return False

    def _closed(self) -> None:
        if self._lifecycle.parts.control.stale:
            self._remedy("bring the control plane back (control_plane.max_stale is over)")
        else:
            self._remedy("set the policy's mode to allowlist or denylist: block_all lets nothing out")

    # -- addresses --------------------------------------------------------------------------------------------------

    def address(self, address: bytes, name: str = "") -> None:
        """Tell what the kernel does with a connection to an address, which may be one of a name's."""
        judged = self._lifecycle.parts.plane.judge_address(self._live.row.slot, address)
        text = address_text(address)
        self._step("address", text, ", ".join(self._notes(address)))
        rule = ""
        if judged.rules is not None:
            rule = self._rules(text, address, judged)
            if judged.rules.reason is None and judged.reason is not Reason.METADATA:
                self._lease(text, address, judged)
        self._default(text, judged)
        if self._live.row.kind == "cgroup" and judged.verdict == "drop":
            self._step("connect", text, "connect() and sendmsg() fail with EPERM at once; counted as connect")
        self._remedies_of(address, judged, name)
        lease_s = judged.lease_s if judged.lease_s is not None and judged.lease_s > 0 else None
        self._addresses.append(ExplainedAddress(text, judged.verdict, judged.reason.name.lower(), rule, lease_s))

    def _notes(self, address: bytes) -> Iterable[str]:
        if address in METADATA:
            yield "cloud metadata: open only by an allow rule of its own"
        elif is_special(address):
            yield "special-purpose"
        else:
            yield "global"
        if address == self._live.endpoint.packed:
            yield f"port {self._live.endpoint.port} passes: the own DNS server"
        if address in self._foreign:  # one of them: thousands may share the address
            yield f"ports like {self._foreign[address]} are dropped: DNS servers of other attachments"

    def _rules(self, text: str, address: bytes, judged: Judged) -> str:
        """Tell what the rules say; return the rule that decides, "" where none does."""
        rules = judged.rules
        assert rules is not None  # noqa: S101 - asked by the caller
        for key in rules.passed_over:
            self._step("rule", cidr_text(key), "expired")
        if rules.key is None:
            missing = rules.reason is not None
            self._step("rule", text, "the rules cannot be read: denied" if missing else "no CIDR rule covers it")
            return ""
        rule = f"{'deny' if rules.reason is Reason.DENY_RULE else 'allow'} {cidr_text(rules.key)}"
        if judged.reason is Reason.METADATA:
            enough = f"needs /{METADATA_RULE[len(address)]} or longer"
            self._step("rule", cidr_text(rules.key), f"{rule}: the metadata address {enough}")
            return ""
        self._step("rule", cidr_text(rules.key), rule)
        return rule

    def _lease(self, text: str, address: bytes, judged: Judged) -> None:
        names = self._attachment.names_of(address)[-MAX_NAMES:]
        by = f", opened by {', '.join(names)}" if names else ""
        if judged.lease_s is None:
            self._step("lease", text, "no live lease")
        elif judged.lease_s <= 0:
            self._step("lease", text, f"ran out {_span(-judged.lease_s)} ago{by}; running TCP may go on")
        else:
            self._step("lease", text, f"live for {_span(judged.lease_s)} more{by}")

    def _default(self, text: str, judged: Judged) -> None:
        """Tell what decides where neither a rule nor a lease does."""
        found = _DEFAULTS.get(judged.reason)
        if found is not None:
            self._step("default", text, found)

    def _remedies_of(self, address: bytes, judged: Judged, name: str) -> None:
        """Tell what would let a connection to the address pass."""
        match judged.reason:
            case Reason.BLOCK_ALL:
                self._closed()
            case Reason.START:
                self._remedy("have the control plane send the first policy; until then start_mode holds")
            case Reason.METADATA:
                self._remedy(f"allow_cidrs: {_host(address)} (it hands out the machine's own credentials)")
            case Reason.DENY_RULE:
                key = judged.rules.key if judged.rules is not None else None
                if key is not None:
                    rule = f"deny {cidr_text(key)}"
                    whole = key[-1] == 8 * len(address)
                    how = f"in place of {rule}" if whole else f"(more specific than {rule})"
                    self._remedy(f"allow_cidrs: {_host(address)} {how}")
            case Reason.DEFAULT_DROP:
                self._remedy(self._opening(address, name, judged))

    def _opening(self, address: bytes, name: str, judged: Judged) -> str:
        """Return what opens an address that nothing is said about."""
        host, holders = _host(address), self._attachment.names_of(address)
        if name and self._policy.dns.mode is DnsMode.DISABLED:
            return f"set DNS mode allowlist or denylist: in mode disabled answers open nothing; or allow_cidrs: {host}"
        if name and self._name_verdict and not self._learned:
            return f"allow_cidrs: {host}, or have the control plane say add_to_filter of {name}"
        if name and self._name_verdict == "pass":
            return f"the workload has to resolve {name} through DNS {self._dns} first (no live lease)"
        if name:
            return f"then the workload has to resolve {name} through DNS {self._dns}"
        again = f", or the workload resolves {holders[-1]} through DNS {self._dns} again" if holders else ""
        return f"allow_cidrs: {host}{again if judged.lease_s is not None else ''}"


_DEFAULTS: Final = {
    Reason.DISABLED: "mode disabled: everything passes",
    Reason.LOOPBACK: "loopback of a cgroup: passes, but for port 53",
    Reason.BLOCK_ALL: "mode block_all: nothing passes",
    Reason.START: "no policy yet: start_mode",
    Reason.LINK_LOCAL: "link-local: passes by enforcement.allow_link_local",
    Reason.METADATA: "cloud metadata: dropped without an allow rule of its own",
    Reason.DEFAULT_DROP: f"mode {Mode.ALLOWLIST.name.lower()}: what nothing allows is dropped",
    Reason.DEFAULT_PASS: f"mode {Mode.DENYLIST.name.lower()}: what nothing denies passes",
}


def _host(address: bytes) -> str:
    """Return the CIDR of one address."""
    return cidr_text(key_of(address, 8 * len(address)))


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _span(seconds: float) -> str:
    """Return a time span for people: ``42 s``, ``5 m 10 s``, ``3 h 2 m``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} m"
