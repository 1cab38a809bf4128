"""One numbering (style.md 10): C headers, Python and proto say the same numbers, and shared bounds fit together."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Any

import pytest

from netfence.config import Config
from netfence.control.port import ConnectionState, UnsubscribeReason
from netfence.dataplane.target import Direction, Hook
from netfence.policy import limits
from netfence.policy.modes import FIRST_DROP, REASON_COUNT, DnsMode, Mode, Reason, is_drop
from netfence.v1 import daemon_pb2, types_pb2

BPF = Path(__file__).resolve().parents[2] / "bpf"
DEFINE = re.compile(r"^#define (\w+) (-?\d+)(?=\s|$)", re.MULTILINE)


def defines(header: str, prefix: str) -> dict[str, int]:
    """Read a header's numeric constants with that prefix, which is cut off."""
    found = DEFINE.findall((BPF / header).read_text())
    names = [name for name, _ in found]
    assert len(names) == len(set(names)), "defined twice"
    return {name.removeprefix(prefix): int(value) for name, value in found if name.startswith(prefix)}


def by_name(numbers: type[enum.IntEnum]) -> dict[str, int]:
    return {each.name: int(each) for each in numbers}


LAYOUT = defines("layout.h", "NF_")


def test_reasons_are_numbered_alike_in_c_and_python() -> None:
    reasons = defines("reasons.h", "REASON_")
    assert reasons.pop("COUNT") == REASON_COUNT
    assert reasons == by_name(Reason)
    assert len(set(reasons.values())) == len(reasons)
    assert max(reasons.values()) < REASON_COUNT


def test_the_first_drop_parts_the_reasons_that_pass_from_those_that_drop() -> None:
    assert defines("reasons.h", "FIRST_") == {"DROP": FIRST_DROP}
    assert {reason for reason in Reason if not is_drop(reason)} == {
        Reason.DISABLED, Reason.ALLOW_RULE, Reason.LEASE, Reason.ESTABLISHED, Reason.DEFAULT_PASS, Reason.REPLY,
        Reason.ARP, Reason.NEIGHBOUR, Reason.DNS, Reason.DHCP, Reason.LOOPBACK, Reason.DAEMON, Reason.LINK_LOCAL,
    }  # fmt: skip


def test_every_counter_array_has_a_place_for_every_reason() -> None:
    body = re.search(r"struct counters \{(.*?)\n\};", (BPF / "layout.h").read_text(), re.DOTALL)
    assert body is not None
    sizes = re.findall(r"\w+\[(\w+)\];", body[1])
    assert sizes
    assert set(sizes) <= {str(REASON_COUNT), "REASON_COUNT"}
    assert REASON_COUNT & (REASON_COUNT - 1) == 0, "the index is masked, so it must be a power of two"


def test_modes_are_numbered_alike_in_c_and_python() -> None:
    assert defines("reasons.h", "MODE_") == by_name(Mode)


@pytest.mark.parametrize(
    ("ours", "proto", "prefix"),
    [
        (Mode, types_pb2.PolicyMode, "POLICY_MODE_"),
        (DnsMode, types_pb2.DnsMode, "DNS_MODE_"),
        (UnsubscribeReason, types_pb2.UnsubscribeReason, "UNSUBSCRIBE_REASON_"),
        (ConnectionState, types_pb2.ConnectionState, "CONNECTION_STATE_"),
        (Direction, daemon_pb2.Direction, "DIRECTION_"),
        (Hook, daemon_pb2.Hook, "HOOK_"),
    ],
    ids=["mode", "dns-mode", "unsubscribe-reason", "connection-state", "direction", "hook"],
)
def test_enums_are_numbered_alike_in_python_and_proto(ours: type[enum.IntEnum], proto: Any, prefix: str) -> None:
    values = {name.removeprefix(prefix): number for name, number in proto.items()}
    assert all(name.startswith(prefix) for name in proto.keys())  # noqa: SIM118 - a proto enum, not a dict
    unspecified = values.pop("UNSPECIFIED")
    numbers = by_name(ours)
    if "AUTO" in numbers:  # what the caller leaves open
        assert numbers.pop("AUTO") == unspecified
    assert unspecified == 0
    assert numbers == values


def test_the_kernel_looks_through_as_many_expired_prefixes_as_a_policy_may_nest() -> None:
    assert LAYOUT["TTL_NESTING"] == limits.MAX_TTL_NESTING


def test_the_kernels_tables_hold_what_the_limits_promise() -> None:
    assert LAYOUT["SLOTS"] == limits.MAX_ATTACHMENTS + 1  # slot 0 is reserved
    assert LAYOUT["RULES"] >= limits.MAX_CIDR_RULES
    assert LAYOUT["POLICIES"] >= 2 * limits.MAX_ATTACHMENTS  # one in force, one being filled
    assert LAYOUT["POLICIES"] <= 1 << LAYOUT["ACTIVE_MODE_SHIFT"]  # the index has these bits of the word
    assert LAYOUT["LEASES_DEFAULT"] == Config().dns.max_leases_total


def test_bits_that_share_a_word_do_not_meet() -> None:
    active = [value for name, value in LAYOUT.items() if name.startswith("ACTIVE_") and name != "ACTIVE_MODE_SHIFT"]
    flags = [value for name, value in LAYOUT.items() if name.startswith("FLAG_")]
    for bits in (active, flags):
        assert all(bit & (bit - 1) == 0 for bit in bits), "one bit each"
        assert len(set(bits)) == len(bits)
    lowest = 1 << (LAYOUT["ACTIVE_MODE_SHIFT"] + 8)  # above the mode's byte
    assert all(bit >= lowest for bit in active)
    assert max(Mode) < 256
