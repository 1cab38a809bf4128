"""What `why` restates of the kernel's program is what the program says; tests/kernel/test_explain.py does the rest."""

from __future__ import annotations

import re
from pathlib import Path

from netfence.dataplane.explain import METADATA, METADATA_RULE, Judged, Rules
from netfence.policy.modes import Mode, Reason

ALWAYS = (Path(__file__).resolve().parents[3] / "bpf" / "always.h").read_text()


def number(pattern: str) -> int:
    found = re.search(pattern, ALWAYS)
    assert found is not None, pattern
    return int(found[1], 0)


def test_the_metadata_addresses_are_those_of_the_program() -> None:
    ipv4 = number(r"#define IPV4_METADATA (\w+)").to_bytes(4, "big")
    first = number(r"address->word\[0\] == bpf_htonl\((\w+)\) && address->word\[1\] == 0 &&")
    last = number(r"address->word\[3\] == bpf_htonl\((\w+)\); /\* fd00:ec2::254 \*/")
    assert {ipv4, first.to_bytes(4, "big") + bytes(8) + last.to_bytes(4, "big")} == METADATA
    assert {
        4: number(r"#define METADATA_RULE_IPV4 (\d+)"),
        16: number(r"#define METADATA_RULE_IPV6 (\d+)"),
    } == METADATA_RULE


def test_a_verdict_is_worded_as_in_the_api() -> None:
    rules = Rules(None, None, ())
    judged = [
        Judged(reason, would, Mode.ALLOWLIST, False, rules, None)
        for reason, would in ((Reason.LEASE, False), (Reason.DEFAULT_DROP, False), (Reason.DEFAULT_DROP, True))
    ]
    assert [one.verdict for one in judged] == ["pass", "drop", "would_drop"]
