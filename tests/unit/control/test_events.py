"""What we say on the wire: every field of every event, and texts that no peer chokes on."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from tests.unit.control.peer import BLOCK_ALL, DENYLIST, view_of

from netfence import __version__
from netfence.control import events as module
from netfence.control.events import CAPABILITIES, event_message, fitting, sync_event
from netfence.control.outbox import Event, Heartbeat, Result, Subscribed, Unsubscribed
from netfence.control.port import StatsView, UnsubscribeReason
from netfence.v1 import control_pb2, types_pb2

VIEW = view_of("a", mode=DENYLIST, dns_mode=4, policy_version="v1", policy_hash="h")
STATS = StatsView("a", (1, 2), (3, 4), 5, 6, 7, "h")
DENIED = types_pb2.DNS_MODE_PROXY


def test_a_sync_request_says_who_we_are_and_what_is_in_force() -> None:
    event = sync_event("daemon", "host", {"site": "x"}, [VIEW, view_of("b", kind="cgroup", target="/sys/fs/cgroup/b")])
    assert event.WhichOneof("event") == "sync"
    sync = event.sync
    assert (sync.daemon_id, sync.hostname, dict(sync.metadata)) == ("daemon", "host", {"site": "x"})
    assert (sync.daemon_version, tuple(sync.capabilities)) == (__version__, CAPABILITIES)
    assert list(CAPABILITIES) == sorted(CAPABILITIES)
    assert sync.attachments[0] == control_pb2.Attachment(
        id="a",
        target="veth-a",
        type=types_pb2.ATTACHMENT_TYPE_TC,
        mode=types_pb2.POLICY_MODE_DENYLIST,
        dns_mode=DENIED,
        metadata={"tenant": "acme"},
        dns_address="192.0.2.1:53",
        policy_version="v1",
        policy_hash="h",
    )
    (xdp,) = sync_event("daemon", "host", {}, [replace(VIEW, xdp=True)]).sync.attachments
    assert xdp.type == event_message(Subscribed(replace(VIEW, xdp=True))).subscribed.type
    assert xdp.type == types_pb2.ATTACHMENT_TYPE_XDP
    assert (sync.attachments[1].type, sync.attachments[1].mode) == (types_pb2.ATTACHMENT_TYPE_CGROUP, BLOCK_ALL)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            Subscribed(VIEW),
            control_pb2.DaemonEvent(
                subscribed=control_pb2.Subscribed(
                    id="a",
                    target="veth-a",
                    type=types_pb2.ATTACHMENT_TYPE_TC,
                    mode=types_pb2.POLICY_MODE_DENYLIST,
                    dns_mode=DENIED,
                    dns_address="192.0.2.1:53",
                    metadata={"tenant": "acme"},
                )
            ),
        ),
        (
            Unsubscribed("a", UnsubscribeReason.ERROR, "why"),
            control_pb2.DaemonEvent(
                unsubscribed=control_pb2.Unsubscribed(id="a", reason=types_pb2.UNSUBSCRIBE_REASON_ERROR, error="why")
            ),
        ),
        (
            Result("n", "a", "v", ok=False, errors=("x", "y"), policy_hash="h"),
            control_pb2.DaemonEvent(
                command_result=control_pb2.CommandResult(
                    nonce="n", id="a", version="v", ok=False, errors=["x", "y"], policy_hash="h"
                )
            ),
        ),
        (
            Heartbeat((STATS,)),
            control_pb2.DaemonEvent(
                heartbeat=control_pb2.Heartbeat(
                    stats=[
                        control_pb2.AttachmentStats(
                            id="a",
                            packets_allowed=1,
                            bytes_allowed=2,
                            packets_blocked=3,
                            bytes_blocked=4,
                            packets_would_block=5,
                            dns_queries_allowed=6,
                            dns_queries_blocked=7,
                            policy_hash="h",
                        )
                    ]
                )
            ),
        ),
        (Heartbeat(()), control_pb2.DaemonEvent(heartbeat=control_pb2.Heartbeat())),
    ],
    ids=["subscribed", "unsubscribed", "result", "heartbeat", "heartbeat-of-nobody"],
)
def test_every_event_becomes_its_message(event: Event, expected: control_pb2.DaemonEvent) -> None:
    assert event_message(event) == expected
    assert expected.WhichOneof("event")


@pytest.mark.parametrize("reason", list(UnsubscribeReason), ids=lambda reason: str(reason.name))
def test_reasons_have_the_numbers_of_the_wire(reason: UnsubscribeReason) -> None:
    event = event_message(Unsubscribed("a", reason))
    assert types_pb2.UnsubscribeReason.Name(event.unsubscribed.reason) == f"UNSUBSCRIBE_REASON_{reason.name}"


def test_a_name_that_is_not_utf8_is_told_as_far_as_it_can_be() -> None:
    name = b"veth\xff".decode(errors="surrogateescape")
    view = view_of("a", target=name)
    assert event_message(Subscribed(view)).subscribed.target == "veth?"
    assert sync_event("d", "h", {}, [view]).sync.attachments[0].target == "veth?"
    assert event_message(Unsubscribed("a", UnsubscribeReason.ERROR, f"attach to {name}")).unsubscribed.error.endswith(
        "?"
    )
    assert fitting([name]) == ("veth?",)


def test_what_is_no_event_is_a_defect() -> None:
    nothing: Any = object()
    with pytest.raises(TypeError, match="not an event"):
        event_message(nothing)


def test_every_fault_is_told_as_far_as_a_message_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ERROR_BYTES", 30)
    assert fitting(["0123456789"] * 2) == ("0123456789", "0123456789")
    assert fitting(["0123456789"] * 7) == ("0123456789", "0123456789", "and 5 more faults")
    assert fitting(["ü" * 13, "x"]) == ("ü" * 13, "and 1 more faults")  # bytes, not letters
    assert fitting([]) == ()


def test_the_faults_of_a_hundred_thousand_entries_fit_a_common_message() -> None:
    errors = [f"allow_cidrs[{number}]: '10.0.0.0/99': not a prefix; at most /32" for number in range(100_000)]
    told = fitting(errors)
    message = event_message(Result("n", "a", "", ok=False, errors=told))
    assert message.ByteSize() < 4 << 20  # gRPC's default
    assert list(message.command_result.errors) == list(told)
    assert len(told) > 10_000
    assert told[-1] == f"and {100_000 - len(told) + 1} more faults"


def test_a_host_name_that_is_not_utf8_is_no_obstacle() -> None:
    assert sync_event("d", os.fsdecode(b"host\xff"), {}, []).sync.hostname == "host?"
