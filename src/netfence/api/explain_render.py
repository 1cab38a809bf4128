"""How an explanation looks: a JSON document, and an indented chain for people.

Returns texts and words for styles and prints nothing. JSON keys are an interface: add, never rename. Names come from
whoever asked for them, so whatever is shown has what cannot be printed escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from netfence.text import printable
from netfence.v1 import daemon_pb2

NAME_WORDS: Final = {
    "pass": "answered",
    "drop": "denied",
    "would_drop": "answered, by audit alone",
    "": "decided when the workload asks",
}

_KIND_WIDTH: Final = 8


class Span(NamedTuple):
    """A piece of a line, and the verdict or word whose style it has ("" for none)."""

    text: str
    style: str = ""


Line = tuple[Span, ...]


def explanation_document(answer: daemon_pb2.ExplainResponse) -> dict[str, Any]:
    """Return an explanation as plain values; `name_verdict` is null for an address, `lease_s` null without a lease."""
    return {
        "subject": answer.subject,
        "name_verdict": answer.name_verdict or None,
        "steps": [{"kind": step.kind, "subject": step.subject, "text": step.text} for step in answer.steps],
        "addresses": [
            {
                "address": one.address,
                "verdict": one.verdict,
                "reason": one.reason,
                "rule": one.rule,
                "lease_s": one.lease.ToMilliseconds() / 1000 if one.HasField("lease") else None,
            }
            for one in answer.addresses
        ],
        "remedies": list(answer.remedies),
    }


def explanation_lines(answer: daemon_pb2.ExplainResponse) -> Iterator[Line]:
    """Yield the chain: what was asked, what decided, each address with its own links, and what would change it."""
    verdicts = {one.address: one for one in answer.addresses}
    own = verdicts.get(answer.subject)
    if own is not None:
        yield _verdict("", own)
    else:
        word = NAME_WORDS.get(answer.name_verdict, answer.name_verdict)
        yield Span(f"{printable(answer.subject)}: "), Span(printable(word), answer.name_verdict)
    margin, subject = "  ", answer.subject
    for step in answer.steps:
        if step.kind == "address" and step.subject in verdicts and own is None:
            margin, subject = "    ", step.subject
            yield _verdict("  ", verdicts[step.subject])
        elif step.kind == "answer":  # of the name again
            margin, subject = "  ", answer.subject
        told = step.subject == subject or (step.kind == "rule" and step.subject in step.text)
        about = "" if told else f"{printable(step.subject)}: "
        yield Span(f"{margin}{printable(step.kind):{_KIND_WIDTH}}", "kind"), Span(f"{about}{printable(step.text)}")
    if answer.remedies:
        yield (Span("to change it:", "remedy"),)
        for remedy in answer.remedies:
            yield (Span(f"  {printable(remedy)}"),)


def _verdict(margin: str, one: daemon_pb2.ExplainVerdict) -> Line:
    shown = Span(printable(one.verdict), one.verdict)
    return Span(f"{margin}{printable(one.address)}: "), shown, Span(f" ({printable(one.reason)})")
