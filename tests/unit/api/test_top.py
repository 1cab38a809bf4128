"""What `top` computes of counters and events, and how it looks."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from tests.unit.api.fake import VIEW
from tests.unit.api.test_watch import FLOW

from netfence.api.messages import attachment_message, flow_message
from netfence.api.top import MAX_KEYS, Meter, Snapshot, Tally, document, page, rate_text, tables


def info(attachment_id: str, *counts: int, **changes: Any) -> Any:
    passed, dropped, queries, denied = counts
    return attachment_message(
        replace(
            VIEW,
            id=attachment_id,
            packets_allowed=passed,
            packets_blocked=dropped,
            dns_queries_allowed=queries,
            dns_queries_blocked=denied,
            **changes,
        )
    )


def snapshot() -> Snapshot:
    meter, tally = Meter(), Tally()
    meter.read([info("a", 10, 20, 30, 40), info("b", 0, 0, 0, 0)], 100.0)
    rates = meter.read([info("a", 12, 20, 30, 41, target="veth1"), info("b", 0, 500, 7, 0)], 102.0)
    for _ in range(3):
        tally.add(flow_message(replace(FLOW, id="b")))
    tally.add(flow_message(replace(FLOW, id="a", verdict="would_drop", destination="192.0.2.1", domain="", lost=0)))
    tally.add(flow_message(replace(FLOW, id="a", kind="dns", destination="A", reason="default_drop", lost=0)))
    return Snapshot(1_700_000_000.25, 2.0, rates, *tally.most(10))


def test_rates_are_of_the_time_between_two_looks_and_the_most_dropping_come_first() -> None:
    rates = snapshot().rates
    assert [(one.info.id, one.passed, one.dropped, one.queries, one.denied) for one in rates] == [
        ("b", 0.0, 250.0, 3.5, 0.0),
        ("a", 1.0, 0.0, 0.0, 0.5),
    ]


def test_what_audit_lets_pass_comes_first_as_what_is_dropped_does() -> None:
    meter = Meter()
    meter.read([info("a", 0, 0, 0, 0), info("b", 0, 0, 0, 0, packets_would_block=0)], 0.0)
    audited = info("b", 900, 0, 0, 0, packets_would_block=80)
    first, second = meter.read([info("a", 5000, 70, 0, 0), audited], 2.0)
    assert (first.info.id, first.passed, first.would_drop, second.would_drop) == ("b", 450.0, 40.0, 0.0)


def test_who_is_new_has_no_rate_and_no_rate_is_negative() -> None:
    meter = Meter()
    assert [one.dropped for one in meter.read([info("a", 0, 1000, 0, 0)], 5.0)] == [0.0]
    (rates,) = meter.read([info("a", 5, 10, 0, 0)], 6.0)  # another daemon's counters
    assert (rates.passed, rates.dropped) == (5.0, 0.0)


def test_drops_are_counted_by_where_they_wanted_to_go() -> None:
    found = snapshot()
    assert [(one.id, one.destination, one.would, count) for one, count in found.destinations] == [
        ("b", "203.0.113.9:53", False, 3),
        ("a", "192.0.2.1", True, 1),
    ]
    assert [(one.id, one.name, one.reason, count) for one, count in found.names] == [("a", "x.test", "default_drop", 1)]
    assert found.lost == 9


def test_a_workload_cannot_fill_the_memory_and_what_is_frequent_stays() -> None:
    tally = Tally()
    frequent = flow_message(replace(FLOW, destination="192.0.2.1:1"))
    for number in range(3 * MAX_KEYS):
        tally.add(flow_message(replace(FLOW, destination=f"host{number}")))
        if number % 100 == 0:
            tally.add(frequent)
    assert len(tally._packets) <= MAX_KEYS
    (first, count), *_ = tally.most(1)[0]
    assert (first.destination, count) == ("192.0.2.1:1", -(-3 * MAX_KEYS // 100))


def test_the_document() -> None:
    found = json.loads(json.dumps(document(snapshot())))
    assert (found["time"], found["interval_s"], found["lost"]) == ("2023-11-14T22:13:20.250Z", 2.0, 9)
    assert found["attachments"][1] == {
        "id": "a",
        "target": "veth1",
        "metadata": {"tenant": "acme"},
        "mode": "allowlist",
        "dns_mode": "proxy",
        "packets_allowed_per_s": 1.0,
        "packets_blocked_per_s": 0.0,
        "packets_would_block_per_s": 0.0,
        "dns_queries_allowed_per_s": 0.0,
        "dns_queries_blocked_per_s": 0.5,
    }
    assert found["destinations"][0] == {
        "count": 3,
        "id": "b",
        "target": "veth0",
        "protocol": "udp",
        "destination": "203.0.113.9:53",
        "domain": "x.test",
        "reason": "deny_rule",
        "verdict": "drop",
    }
    assert found["destinations"][1]["verdict"] == "would_drop"
    assert found["names"] == [
        {"count": 1, "id": "a", "target": "veth1", "domain": "x.test", "reason": "default_drop", "verdict": "drop"}
    ]


def test_the_tables() -> None:
    (_, rates), (_, destinations), (_, names) = tables(snapshot())
    assert rates[0] == ["b", "veth0", "allowlist", "0", "250", "0", "3.5", "0", "tenant=acme"]
    assert destinations[1] == ["1", "192.0.2.1", "udp", "", "deny_rule (audit)", "a", "veth1"]
    assert names == [["1", "x.test", "default_drop", "a", "veth1"]]


@pytest.mark.parametrize("name", ["a\x1b[2J.test", "[red]a", "a\nb"], ids=ascii)
def test_nothing_steers_the_terminal(name: str) -> None:
    meter, tally = Meter(), Tally()
    tally.add(flow_message(replace(FLOW, domain=name, destination=name)))
    tally.add(flow_message(replace(FLOW, domain=name, kind="dns")))
    hostile = replace(snapshot(), rates=meter.read([info("id-0", 0, 0, 0, 0, target=name, metadata={"k": name})], 1.0))
    destinations, names, lost = tally.most(10)
    hostile = replace(hostile, destinations=destinations, names=names, lost=lost)
    assert all(cell.isprintable() for _, rows in tables(hostile) for row in rows for cell in row)
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=False).print(page(hostile, 40))
    assert "\x1b" not in out.getvalue()
    assert "[red]a" in out.getvalue() or name != "[red]a"  # no markup


def test_the_page_fits_its_terminal_and_tells_what_is_left_out() -> None:
    meter = Meter()
    many = [info(f"id-{number}", 0, 0, 0, 0) for number in range(100)]
    whole = replace(snapshot(), rates=meter.read(many, 1.0))
    for height in (15, 24, 60):
        out = io.StringIO()
        Console(file=out, width=150, force_terminal=False).print(page(whole, height))
        text = out.getvalue()
        assert len(text.splitlines()) <= max(height, 17)  # a smaller terminal cuts it
        assert "more attachments" in text


@pytest.mark.parametrize(("rate", "text"), [(0.0, "0"), (0.25, "0.2"), (9.96, "10.0"), (1234.6, "1235")], ids=str)
def test_rates_are_short(rate: float, text: str) -> None:
    assert rate_text(rate) == text
