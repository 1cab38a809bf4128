"""Decisions in the words of the local API: what the kernel and the DNS servers report, made into `FlowView`s.

Translates only. Which rule decided is asked of the policy of that moment: the kernel tells no rule, and asks none.
"""

from __future__ import annotations

from typing import Final, Protocol

from netfence.api.views import FlowVerdict, FlowView
from netfence.dataplane.plane import Flow
from netfence.dns.decision import Decision, type_text
from netfence.policy.modes import Reason
from netfence.policy.policy import Policy
from netfence.policy.prefix import address_text, cidr_text, normal

_PROTOCOLS: Final = {0: "", 1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
_REASONS: Final = {int(reason): reason.name.lower() for reason in Reason}
_BY_RULE: Final = frozenset({int(Reason.DENY_RULE), int(Reason.CONNECT)})
_UNKNOWN: Final = bytes(16)


class Judging(Protocol):
    """What has to be known of an attachment."""

    @property
    def policy(self) -> Policy:
        """Return the policy in force."""
        ...

    def name_for(self, address: bytes) -> str:
        """Return the name that the packed address was given to last; "" for none."""
        ...


def packet_verdict(flow: Flow) -> FlowVerdict:
    """Return what became of a packet."""
    return "would_drop" if flow.would else "drop"


def packet_view(attachment_id: str, judging: Judging, flow: Flow, wall: float, rules: dict[bytes, str]) -> FlowView:
    """Return a packet's event. `wall` is what makes monotonic seconds wall-clock ones; `rules` keeps looked-up rules.

    `rules` is of one attachment and one moment: the policy may be another the next time.
    """
    known = flow.destination != _UNKNOWN
    address = normal(flow.destination)
    rule = ""
    if known and flow.reason in _BY_RULE:
        found = rules.get(address)
        if found is None:
            found = rules[address] = _deny_rule(judging.policy, address, flow.at)
        rule = found
    return FlowView(
        time=flow.at + wall,
        id=attachment_id,
        kind="packet",
        verdict=packet_verdict(flow),
        reason=_REASONS.get(flow.reason, str(flow.reason)),
        protocol=_PROTOCOLS.get(flow.protocol, str(flow.protocol)),
        source=_place(normal(flow.source), flow.source_port) if flow.source != _UNKNOWN else "",
        destination=_place(address, flow.destination_port) if known else "",
        domain=judging.name_for(address) if known else "",
        rule=rule,
    )


def dns_view(attachment_id: str, decision: Decision, at: float) -> FlowView:
    """Return a query's event; `at` is seconds since the epoch."""
    peer = decision.peer
    return FlowView(
        time=at,
        id=attachment_id,
        kind="dns",
        verdict=decision.word,
        reason=decision.reason,
        protocol="tcp" if decision.tcp else "udp",
        source=_with_port(str(peer[0]), int(peer[1])) if peer else "",
        destination=type_text(decision.qtype),
        domain=decision.name,
        rule=decision.rule.text if decision.rule is not None else "",
    )


def _deny_rule(policy: Policy, address: bytes, now: float) -> str:
    """Return the rule that denies an address; "" where none does (a refused connect() may have other reasons)."""
    found = policy.judge_address(address, now)
    return f"deny {cidr_text(found[0])}" if found is not None and not found[1] else ""


def _place(address: bytes, port: int) -> str:
    return _with_port(address_text(address), port)


def _with_port(address: str, port: int) -> str:
    if not port:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
