"""`why` reads the kernel's tables instead of guessing: its verdict and reason against what packets get, no difference.

Random worlds of test_differential.py (rules nested and expired, leases live and run out, all modes, audit), packets by
BPF_PROG_TEST_RUN. The packet is the one that `why` is about: the SYN of a TCP connection to no DNS port.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import time
from collections import Counter

import pytest

from frames import Frame
from harness.deadline import SLOWNESS
from harness.needs import needs
from netfence.dataplane import links
from netfence.dataplane.explain import Explainer
from netfence.dataplane.plane import DataPlane
from netfence.dataplane.slotword import SlotWord
from netfence.policy.cidr import parse_cidr
from netfence.policy.commands import BulkUpdate, CidrSpec, apply
from netfence.policy.modes import Mode, Reason
from netfence.policy.policy import EMPTY
from oracle import World, unmapped
from test_differential import (
    HOSTS,
    PASS_DROP,
    SLOT,
    Hook,
    Tell,
    _in_force,
    plane,
    program,
    runner,
)

__all__ = ["plane", "program", "runner"]  # fixtures

WORLDS = 12 if SLOWNESS == 1 else 2  # per hook
MODES = (Mode.ALLOWLIST, Mode.DENYLIST, Mode.ALLOWLIST, Mode.BLOCK_ALL, Mode.DENYLIST, Mode.DISABLED)
NEAR = 2  # addresses beside each host: the other side of prefix borders
A, B = ipaddress.ip_address("198.51.100.1"), ipaddress.ip_address("2001:db8::1")


def _explainer(plane: DataPlane) -> Explainer:
    return Explainer(plane._loaded.maps, plane._loaded.layout, plane.clock)


def _destinations(rng: random.Random) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    near = [type(host)((int(host) ^ 1 << rng.randrange(24)) % (1 << 32)) for host in HOSTS if host.version == 4]
    return [*HOSTS, *rng.sample(near, NEAR)]


def _compare(plane: DataPlane, program: int, rng: random.Random, world: World) -> Counter[str]:
    explainer = _explainer(plane)
    passed, dropped = PASS_DROP[world.hook]
    counted: Counter[str] = Counter()
    for to in _destinations(rng):
        frame = Frame(destination=to, protocol="tcp", flags="S", source_port=50000)
        if to.version == 6:
            frame.source = ipaddress.ip_address("2001:db8:ffff::10")
        told = explainer.judge(SLOT, to.packed)
        before = plane.counters(SLOT)
        got = links.prog_test_run(program, frame.build()).retval
        after = plane.counters(SLOT)
        name = "would_packets" if told.would else "packets"
        moved = {
            Reason(index).name
            for index, (a, b) in enumerate(zip(getattr(before, name), getattr(after, name), strict=True))
            if a != b
        }
        assert (got == passed, moved) == (told.verdict != "drop", {told.reason.name}), f"{to}: {told}\n{world}"
        assert got in (passed, dropped)
        for key in () if told.rules is None else (told.rules.key, *told.rules.passed_over):
            assert key is None or unmapped(to) in ipaddress.ip_network((key[:-1], key[-1]))
        counted[f"{told.verdict} {told.reason.name}"] += 1
    return counted


@pytest.mark.dealt
@pytest.mark.parametrize("hook", ["tc", pytest.param("cgroup", marks=needs("test runs of cgroup programs"))])
def test_it_says_what_packets_get(
    hook: Hook, plane: DataPlane, program: int, runner: asyncio.Runner, record_property: Tell
) -> None:
    seen: Counter[str] = Counter()
    for number in range(WORLDS):
        rng = random.Random(f"explain {hook} {number}")
        with _in_force(plane, runner, rng, hook, MODES[number % len(MODES)]) as world:
            seen.update(_compare(plane, program, rng, world))
    record_property("packets", seen.total())
    record_property("verdicts", dict(seen))
    reasons = {Reason[verdict.split()[1]] for verdict in seen}
    often = {Reason.ALLOW_RULE, Reason.DENY_RULE, Reason.DEFAULT_DROP, Reason.DEFAULT_PASS, Reason.LEASE}
    if SLOWNESS == 1:
        assert often | {Reason.BLOCK_ALL, Reason.DISABLED, Reason.METADATA, Reason.LINK_LOCAL} <= reasons
        assert hook == "tc" or Reason.LOOPBACK in reasons
        assert any(verdict.startswith("would_drop") for verdict in seen)


def test_it_tells_what_it_looked_at_and_touches_nothing(plane: DataPlane, runner: asyncio.Runner) -> None:
    rng = random.Random("explain: one world")
    with _in_force(plane, runner, rng, "tc", Mode.DISABLED):
        explainer = _explainer(plane)
        soon = time.monotonic() + 3600
        rules = [CidrSpec("198.51.0.0/16"), CidrSpec("198.51.100.0/24", 0.01), CidrSpec("198.51.100.1/32", 0.01)]
        bulk = BulkUpdate(mode=int(Mode.ALLOWLIST), allow_cidrs=rules[1:], deny_cidrs=rules[:1], dns=None)
        runner.run(plane.apply(SLOT, apply(EMPTY, bulk, time.monotonic()), None))
        plane.open_leases(SLOT, [A.packed, B.packed], soon)
        lease = plane._leases._map.lookup(plane._leases._key.pack(SLOT, B.packed))
        counters = plane.counters(SLOT)
        deadline = time.monotonic() + 5
        while explainer.judge(SLOT, A.packed).rules.key != parse_cidr("198.51.0.0/16"):  # type: ignore[union-attr]
            assert time.monotonic() < deadline
        told = explainer.judge(SLOT, A.packed)
        assert told.rules is not None
        assert (told.reason, told.rules.reason) == (Reason.DENY_RULE, Reason.DENY_RULE)
        expired = {parse_cidr("198.51.100.1"), parse_cidr("198.51.100.0/24")}
        assert told.rules.passed_over == tuple(sorted(expired, key=lambda key: -key[-1]))
        assert told.lease_s == pytest.approx(3600, abs=60)
        assert explainer.judge(SLOT, b"\0" * 10 + b"\xff\xff" + A.packed)[:5] == told[:5]
        assert explainer.judge(SLOT, B.packed).reason is Reason.LEASE
        # Neither a counter nor the last use of a lease has moved.
        assert plane.counters(SLOT) == counters
        assert plane._leases._map.lookup(plane._leases._key.pack(SLOT, B.packed)) == lease


def test_the_unspecified_address_is_a_cgroups_loopback(plane: DataPlane, runner: asyncio.Runner) -> None:
    """As `nf_connect4` and `nf_connect6` judge it: the kernel connects to the loopback, which passes."""
    for hook in ("tc", "cgroup"):
        with _in_force(plane, runner, random.Random("explain: unspecified"), hook, Mode.ALLOWLIST):
            bulk = BulkUpdate(mode=int(Mode.ALLOWLIST), allow_cidrs=[], deny_cidrs=[], dns=None)
            runner.run(plane.apply(SLOT, apply(EMPTY, bulk, time.monotonic()), None))
            reasons = {_explainer(plane).judge(SLOT, bytes(size)).reason for size in (4, 16)}
            assert reasons == {Reason.DEFAULT_DROP if hook == "tc" else Reason.LOOPBACK}


def test_before_the_first_policy_start_mode_holds_even_if_audited(plane: DataPlane, runner: asyncio.Runner) -> None:
    with _in_force(plane, runner, random.Random("explain: start"), "tc", Mode.DISABLED):
        word = SlotWord.decode(plane.config.word(SLOT), plane._loaded.layout)
        for start, would in ((True, False), (False, True)):
            word.mode, word.start, word.audit = Mode.BLOCK_ALL, start, True
            plane._write_word(SLOT, word)
            told = _explainer(plane).judge(SLOT, A.packed)
            assert (told.reason, told.would) == (Reason.START if start else Reason.BLOCK_ALL, would)
            frame = Frame(protocol="tcp", flags="S", destination=A)
            passes = links.prog_test_run(plane._loaded.programs["nf_tc"], frame.build()).retval == PASS_DROP["tc"][0]
            assert passes == would
