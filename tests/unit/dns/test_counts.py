"""Every reply is counted once, under its rcode, and no upstream that a policy makes up gets a series."""

from __future__ import annotations

from netfence.dns.counts import OTHER, Counts, Totals, UpstreamCounts
from netfence.dns.settings import upstream_of

NOERROR, REFUSED, BADVERS = 0, 5, 16


def reply(rcode: int) -> bytes:
    return bytes([0, 0, 0x81, 0x80 | rcode])


def test_a_reply_is_timed_and_counted_when_it_is_sent() -> None:
    now = [10.0]
    totals = Totals(lambda: now[0])
    counts = Counts(totals)
    sent: list[bytes] = []
    send = counts.timed(sent.append)
    assert counts.replies() == {}
    now[0] += 0.03
    send(reply(REFUSED))
    assert (sent, counts.replies()) == ([reply(REFUSED)], {"refused": 1})
    assert dict(totals.durations.cumulative())["0.01"] == 0
    assert dict(totals.durations.cumulative())["0.05"] == 1


def test_ready_replies_and_others_add_up() -> None:
    counts = Counts(Totals())
    counts.note(NOERROR)
    counts.note(BADVERS)
    counts.ready[NOERROR] += 2
    counts.ready[9] += 1
    assert counts.replies() == {"noerror": 3, "other": 2}


def test_ready_replies_outlive_their_server() -> None:
    totals = Totals()
    one, other = Counts(totals), Counts(totals)
    one.ready[NOERROR] += 5
    other.ready[REFUSED] += 1
    assert totals.ready == 6
    one.close()
    assert totals.ready == 6
    one.close()  # as a server that is closed twice
    other.ready[NOERROR] += 1
    assert totals.ready == 7


def test_upstreams_of_policies_share_one_name() -> None:
    counts = UpstreamCounts(("192.0.2.53:53",))
    counts.note_asked(upstream_of("192.0.2.53:53"))
    for number in range(9):
        counts.note_asked(upstream_of(f"192.0.2.{number}:53"))
        counts.note_failed(upstream_of(f"192.0.2.{number}:53"), "timeout")
    assert counts.asked == {"192.0.2.53:53": 1, OTHER: 9}
    assert counts.failed[OTHER, "timeout"] == 9
    assert sum(counts.failed.values()) == 9
    assert {name for name, _ in counts.failed} == {"192.0.2.53:53", OTHER}
