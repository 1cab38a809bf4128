"""How an explanation looks, for programs and for people."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.api.fake import EXPLANATION

from netfence.api.explain_render import explanation_document, explanation_lines
from netfence.api.messages import explanation_message
from netfence.api.views import ExplainedAddress, ExplanationView

ADDRESS = ExplanationView(
    subject="192.0.2.1",
    steps=[("mode", "veth0", "packets denylist"), ("address", "192.0.2.1", "global"), ("rule", "192.0.2.1", "no rule")],
    addresses=[ExplainedAddress("192.0.2.1", "would_drop", "default_drop")],
)


def lines(view: ExplanationView) -> list[str]:
    return ["".join(span.text for span in line) for line in explanation_lines(explanation_message(view))]


def test_the_chain_of_a_name() -> None:
    assert lines(EXPLANATION) == [
        "pypi.org: answered",
        "  mode    veth0: packets allowlist, names allowlist",
        "  name    rule: allow pypi.org",
        "  answer  A: 192.0.2.1, 192.0.2.2; from cache, TTL 60 s",
        "  192.0.2.1: pass (lease)",
        "    address global",
        "    lease   live for 5 m 0 s more",
        "  192.0.2.2: drop (deny_rule)",
        "    address global",
        "    rule    deny 192.0.2.0/24",
        "to change it:",
        "  remove deny 192.0.2.0/24",
    ]
    styles = {span.text: span.style for line in explanation_lines(explanation_message(EXPLANATION)) for span in line}
    assert (styles["answered"], styles["pass"], styles["drop"]) == ("pass", "pass", "drop")


def test_the_chain_of_an_address() -> None:
    assert lines(ADDRESS) == [
        "192.0.2.1: would_drop (default_drop)",
        "  mode    veth0: packets denylist",
        "  address global",
        "  rule    no rule",
    ]


def test_nothing_in_it_can_steer_a_terminal() -> None:
    evil = "a\x1b[2J\nb"
    view = replace(
        EXPLANATION, subject=evil, steps=[(evil, evil, evil)], remedies=[evil], addresses=[], name_verdict="drop"
    )
    assert all(line.isprintable() for line in lines(view))
    assert len(lines(view)) == 4


def test_the_document() -> None:
    document = explanation_document(explanation_message(EXPLANATION))
    assert document["name_verdict"] == "pass"
    assert document["steps"][0] == {"kind": "mode", "subject": "veth0", "text": EXPLANATION.steps[0][2]}
    assert document["addresses"] == [
        {"address": "192.0.2.1", "verdict": "pass", "reason": "lease", "rule": "", "lease_s": 299.5},
        {
            "address": "192.0.2.2", "verdict": "drop", "reason": "deny_rule", "rule": "deny 192.0.2.0/24",
            "lease_s": None,
        },
    ]  # fmt: skip
    assert document["remedies"] == ["remove deny 192.0.2.0/24"]
    assert explanation_document(explanation_message(ADDRESS))["name_verdict"] is None
