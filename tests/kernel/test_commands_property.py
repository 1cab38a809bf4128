"""Any sequence of commands leaves the kernel's maps equal to what a fresh daemon would load from the resulting policy.

Hypothesis makes up the life of an attachment: commands of every kind, good and bad, small and large, one by one and
together, leases learnt between them, time that passes, maintenance, a control plane that stays away. After every step
the maps are what a pure model says: `policy.commands.apply` alone for the policy, a dictionary for the leases. At the
end what the store has is loaded as a restart does, into fresh maps and over the old ones, and must come to the same.

Time is simulated, so that expiries can be compared exactly: the daemon's clock, the kernel's as the daemon reads it,
and the event loop's, go on with steps only. No packet flows; what maps mean to packets, test_verdict.py tells.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import pytest
import structlog
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st

from harness.deadline import SLOWNESS
from harness.fence import Fence, packed
from harness.topology import Topology
from map_dump import NEVER, Rule, dump, filled_indices
from netfence import policy_codec
from netfence.attachment import Attachment, start_policy
from netfence.control.local import NoControl
from netfence.control.port import FirstPolicy
from netfence.dataplane.slotword import SlotWord
from netfence.errors import ExhaustedError, NetfenceError, PreconditionError
from netfence.leasing import LeaseLimits, LeaseTable
from netfence.policy.cidr import cidr_text
from netfence.policy.commands import (
    AllowCidr,
    AllowDomain,
    BulkUpdate,
    CidrSpec,
    Command,
    DenyCidr,
    DenyDomain,
    DnsSpec,
    DomainSpec,
    RemoveCidr,
    RemoveDomain,
    SetDnsMode,
    SetMode,
    apply,
)
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import Policy
from netfence.store import Row, Store

pytestmark = pytest.mark.dealt

T = TypeVar("T")

MIN_S, GRACE_S, MAX_S, MAX_LEASES = 60.0, 30.0, 3600.0, 4
LIMITS = LeaseLimits(min_s=MIN_S, grace_s=GRACE_S, max_s=MAX_S, max_leases=MAX_LEASES)
SCAN_S = 6.0  # after that long the data plane walks the leases again (plane.SCAN_EVERY_S)
MEDIUM, LARGE = 300, 700  # rules: more than plane.IN_PLACE, and more than judging.BULK
SHORT_S = 2.0 if SLOWNESS == 1 else 6.0  # of real time: longer than two commands take on a busy machine
PROXY = "(proxy)"

# -- what can happen --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bulk:
    """A bulk update with so many rules more that nobody wants to read, from those numbered `start` on."""

    update: BulkUpdate
    fillers: int = 0
    start: int = 0

    @property
    def command(self) -> BulkUpdate:
        more = [
            f"10.{n >> 8}.{n & 255}.0/24" if n % 3 else f"2001:db8:{n:x}::/48"
            for n in range(self.start, self.start + self.fillers)
        ]
        return replace(self.update, deny_cidrs=[*self.update.deny_cidrs, *more]) if more else self.update


Change = Command | Bulk


@dataclass(frozen=True)
class Together:
    """Commands that waited together."""

    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Learn:
    """A name was answered with these addresses."""

    name: str
    addresses: tuple[str, ...]
    ttl_s: float


@dataclass(frozen=True)
class Wait:
    """Time passes."""

    seconds: int


@dataclass(frozen=True)
class Maintain:
    """The half-minutely sweep."""


@dataclass(frozen=True)
class Stale:
    """The control plane is away for too long, or back."""

    away: bool


Step = Change | Together | Learn | Wait | Maintain | Stale

# They nest, overlap, and say the same prefix in several ways. Five of a family with a TTL nest too deep.
CIDRS = st.sampled_from([
    "0.0.0.0/0", "10.0.0.0/8", "10.1.2.3/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3", "10.1.2.3/32", "10.1.2.2/31",
    "255.255.255.255", "::ffff:10.1.2.3", "::ffff:10.1.2.0/120", "::ffff:0.0.0.0/96", "::/0", "2001:db8::/32",
    "2001:db8:1::/48", "2001:DB8:1::/64", "2001:db8:1::1", "2001:db8:1:0:0:0:0:1/128", "2001:db8:1::1/64",
])  # fmt: skip
BAD_CIDRS = st.sampled_from(["", "10.0.0.0/33", "10.1/16", "2001:db8::/129", "fe80::1%eth0", " 10.0.0.0/8", "::/0/0"])
TTLS = st.sampled_from([0.0, 0.0, 40.0, 600.0, 5000.0])
BAD_TTLS = st.sampled_from([-1.0, math.nan, math.inf, 1e12])
DOMAINS = st.sampled_from([
    "example.com", "EXAMPLE.com.", "*.example.com", "a.example.com", "b.a.example.com", "*.a.example.com", "*",
    "münchen.example",
])  # fmt: skip
BAD_DOMAINS = st.sampled_from(["", "a..example", "*.*.com", "a.*", "two words", "x" * 64 + ".com"])
MODES = st.sampled_from([int(mode) for mode in (Mode.DENYLIST, Mode.ALLOWLIST, Mode.DISABLED, Mode.BLOCK_ALL)])
DNS_MODES = st.sampled_from([int(mode) for mode in (DnsMode.DENYLIST, *DnsMode)])
BAD_MODES = st.sampled_from([0, 5, -1, 255])
NAMES = st.sampled_from(["example.com", "a.example.com", "b.a.example.com", "xn--mnchen-3ya.example", "other.test"])
ADDRESSES = st.sampled_from([*(f"203.0.113.{n}" for n in range(1, 6)), *(f"2001:db8:b::{n}" for n in range(1, 5))])

SPECS = st.builds(CidrSpec, CIDRS, TTLS) | CIDRS
DNS_SPECS = st.builds(
    DnsSpec,
    DNS_MODES,
    st.lists(st.builds(DomainSpec, DOMAINS, st.booleans()), max_size=3),
    st.lists(st.builds(DomainSpec, DOMAINS, st.booleans()), max_size=2),
    st.lists(st.sampled_from(["192.0.2.53", "192.0.2.54:5353", "[2001:db8::53]:53"]), max_size=2, unique=True),
)


def updates(dns: st.SearchStrategy[DnsSpec | None]) -> st.SearchStrategy[BulkUpdate]:
    return st.builds(
        BulkUpdate, MODES, st.lists(SPECS, max_size=5), st.lists(SPECS, max_size=4), dns, audit=st.booleans()
    )


UPDATES = updates(st.none() | DNS_SPECS)
SINGLE = st.one_of(
    st.builds(SetMode, MODES),
    st.builds(AllowCidr, CIDRS, TTLS),
    st.builds(AllowCidr, CIDRS, TTLS),
    st.builds(DenyCidr, CIDRS, TTLS),
    st.builds(DenyCidr, CIDRS, TTLS),
    st.builds(RemoveCidr, CIDRS),
    st.builds(RemoveCidr, CIDRS),
    st.builds(SetDnsMode, DNS_MODES),
    st.builds(AllowDomain, DOMAINS, st.booleans()),
    st.builds(DenyDomain, DOMAINS, st.booleans()),
    st.builds(RemoveDomain, DOMAINS),
)
BIG = st.builds(Bulk, UPDATES, st.sampled_from([MEDIUM, LARGE]), st.sampled_from([0, 1, 2, LARGE]))
BAD = st.one_of(
    st.builds(SetMode, BAD_MODES),
    st.builds(SetDnsMode, BAD_MODES),
    st.builds(AllowCidr, BAD_CIDRS, TTLS),
    st.builds(DenyCidr, CIDRS, BAD_TTLS),
    st.builds(RemoveCidr, BAD_CIDRS),
    st.builds(AllowDomain, BAD_DOMAINS, st.booleans()),
    st.builds(RemoveDomain, BAD_DOMAINS),
    st.builds(BulkUpdate, BAD_MODES, st.lists(SPECS, max_size=2)),
    st.builds(BulkUpdate, MODES, st.tuples(SPECS, BAD_CIDRS)),
    st.builds(BulkUpdate, MODES, dns=st.builds(DnsSpec, DNS_MODES, st.tuples(st.builds(DomainSpec, BAD_DOMAINS)))),
)
LEARN = st.builds(
    Learn,
    NAMES,
    st.lists(ADDRESSES, min_size=1, max_size=3, unique=True).map(tuple),
    st.sampled_from([0.0, 300.0, 1000.0, 1e6]),
)
WAIT = st.builds(Wait, st.sampled_from([1, 40, 700, 4000]))
STALE = st.builds(Stale, st.sampled_from([False, False, True]))


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Choose by weight; `one_of` would weigh every alternative of the alternatives the same."""
    numbers = [number for number, (weight, _) in enumerate(choices) for _ in range(weight)]
    return st.sampled_from(numbers).flatmap(lambda number: choices[number][1])


CHANGES = weighted((14, SINGLE), (1, UPDATES), (1, BIG), (2, BAD))
TOGETHER = st.builds(Together, st.lists(CHANGES, min_size=2, max_size=4).map(tuple))
# What the first revokes stays revoked, though the second allows it again.
THERE_AND_BACK = st.one_of(
    DOMAINS.map(lambda domain: Together((DenyDomain(domain), RemoveDomain(domain)))),
    MODES.map(lambda mode: Together((SetMode(int(Mode.BLOCK_ALL)), SetMode(mode)))),
    DNS_MODES.map(lambda mode: Together((SetDnsMode(int(DnsMode.DISABLED)), SetDnsMode(mode)))),
)
STEP = weighted(
    (10, CHANGES), (9, LEARN), (2, TOGETHER), (2, THERE_AND_BACK), (2, WAIT), (1, st.just(Maintain())), (1, STALE)
)
# In pieces, because a list of up to 48 would have five on average.
STEPS = st.lists(st.lists(STEP, min_size=1, max_size=6), max_size=8).map(lambda pieces: [*chain(*pieces)])
# The first policy: one under which names can be learnt, more often than not.
FIRST = updates(DNS_SPECS)

# -- what must come of it ---------------------------------------------------------------------------------------------


@dataclass
class Model:
    """The attachment without kernel, store and event loop."""

    policy: Policy
    version: str = ""
    stale: bool = False
    holds: dict[str, dict[str, float]] = field(default_factory=dict)  # address → holder → expiry

    @property
    def in_force(self) -> Policy:
        return replace(self.policy, mode=Mode.BLOCK_ALL, audit=False) if self.stale else self.policy

    def change(self, command: Command, version: str, now: float) -> NetfenceError | None:
        """Apply a command; return the refusal."""
        old = self.policy
        try:
            self.policy = apply(old, command, now)
        except NetfenceError as refusal:
            return refusal
        self.version = version
        same_mode = self.policy.dns.mode is old.dns.mode
        for address, holders in list(self.holds.items()):
            left = {name: expiry for name, expiry in holders.items() if same_mode and self.allows(self.policy, name)}
            if left:
                self.holds[address] = left
            else:
                del self.holds[address]
        return None

    def learn(self, step: Learn, now: float) -> type[NetfenceError] | None:
        """Open leases; return the kind of the refusal."""
        mode, audit = self.in_force.dns.mode, self.in_force.audit
        holder = PROXY if mode is DnsMode.PROXY and self.allows(self.in_force, PROXY) else step.name
        if mode is DnsMode.DISABLED:
            return None
        if not self.allows(self.in_force, holder):
            return None if audit else PreconditionError
        if len(self.leases(now).keys() | set(step.addresses)) > MAX_LEASES:
            return ExhaustedError
        expiry = now + min(max(step.ttl_s, MIN_S), MAX_S) + GRACE_S
        for address in step.addresses:
            holders = self.holds.setdefault(address, {})
            holders[holder] = max(expiry, holders.get(holder, 0.0))
        return None

    def leases(self, now: float) -> dict[str, float]:
        """Return the live ones."""
        expiries = {address: max(holders.values()) for address, holders in self.holds.items()}
        return {address: expiry for address, expiry in expiries.items() if expiry > now}

    @staticmethod
    def allows(policy: Policy, holder: str) -> bool:
        if holder == PROXY:
            return policy.dns.mode is DnsMode.PROXY and (policy.mode is not Mode.BLOCK_ALL or policy.audit)
        return policy.judge_name(holder).allowed


# -- where it happens -------------------------------------------------------------------------------------------------


class Control(NoControl):
    """A control plane that may stay away."""

    away = False

    @property
    def stale(self) -> bool:
        return self.away


class World:
    """A data plane, a store and a clock that outlive many attachments."""

    def __init__(self, fence: Fence, store: Store, slots: tuple[int, int]) -> None:
        self.fence, self.plane, self.store, self._slots = fence, fence.plane, store, slots
        self.now = float(int(time.monotonic()))
        self._numbers = count()

    @contextmanager
    def simulated(self) -> Iterator[None]:
        """Let the daemon's clocks be `now`, and the kernel's one that goes with it."""
        clock = self.plane.clock
        base, jiffies = self.now, clock.now()
        clock._seconds, clock._jiffies = base, jiffies
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: self.now)
            patch.setattr(clock, "now", lambda: jiffies + int((self.now - base) * clock.hz))
            try:
                yield
            finally:
                patch.undo()
                clock.now()
                self.plane._scanned = -math.inf

    async def afresh(self) -> tuple[int, int]:
        """Return the two slots as an attach leaves them: `start_mode`, no rules, no leases.

        An attach of its own for every life would take ten times as long, all of it waiting for RCU.
        """
        for slot in self._slots:
            plane, word = self.plane, SlotWord(mode=Mode.BLOCK_ALL)
            before, plane._slots[slot] = plane._slots[slot], word
            plane._write_word(slot, word)
            plane._leases.clear(slot)
            if before.index:
                plane._give_back(before.index)
        return self._slots

    def row(self, slot: int) -> Row:
        return Row(
            id=f"a{next(self._numbers)}", slot=slot, kind="interface", name="veth", identity="1", link_kind="veth",
            direction="workload", hook="tc", mechanism="tcx", dns_host="198.51.100.254", dns_port=11000,
            boot_id="boot", attached_at=0.0,
        )  # fmt: skip

    def attachment(self, row: Row, policy: Policy, control: Control) -> Attachment:
        table = LeaseTable(4096)
        return Attachment(row, policy, kernel=self.plane, store=self.store, control=control, limits=LIMITS, table=table)

    def expected(self, policy: Policy) -> dict[str, Rule]:
        """Tell what the tries have to hold for a policy."""
        return {
            cidr_text(key): Rule(self.jiffies(entry.allow), self.jiffies(entry.deny), key[-1])
            for key, entry in policy.cidrs.entries.items()
        }

    def jiffies(self, expiry: float) -> int:
        clock = self.plane.clock
        if expiry in (0.0, math.inf):
            return NEVER if expiry else 0
        return clock._jiffies + int(expiry - clock._seconds) * clock.hz

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.fence.run(work)


@pytest.fixture(scope="module")
def world(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory: Path = tmp_path_factory.mktemp("commands")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))  # thousands of policies
    store = Store.open(directory / "state")
    with Fence(topology, directory) as fence:
        one, two = (fence.interface(topology.add_veth().host_if, replies="off") for _ in range(2))
        yield World(fence, store, (one.slot, two.slot))
        fence.run(store.close())
    structlog.reset_defaults()


class Life:
    """One attachment, its model, and the comparison of the two after every step."""

    def __init__(self, world: World, row: Row) -> None:
        self.world, self.control = world, Control()
        start = start_policy(Mode.BLOCK_ALL)
        self.one, self.model = world.attachment(row, start, self.control), Model(start)
        self._versions = count(1)

    async def begin(self, first: BulkUpdate) -> bool:
        """Apply the first policy; False when it was refused."""
        expected = self.model.change(first, "v0", self.world.now)
        refusal = None
        try:
            await self.one.begin(FirstPolicy(first, "v0"))
        except NetfenceError as error:
            refusal = error
        assert _told(refusal) == _told(expected)
        if refusal is None:
            self.check()
        return refusal is None

    async def take(self, step: Step) -> None:
        match step:
            case Wait(seconds):
                self.world.now += seconds
            case Maintain():
                await self.one.maintain(self.world.now)
                self.model.policy = self.model.policy.live(self.world.now)
            case Stale(away):
                self.control.away = self.model.stale = away
                await self.one.follow_staleness()
            case Learn():
                self._learn(step)
            case Together(changes):
                await self._change(changes)
            case _:
                await self._change([step])

    def _learn(self, step: Learn) -> None:
        expected = self.model.learn(step, self.world.now)
        try:
            self.one.learn(step.name, list(map(packed, step.addresses)), step.ttl_s)
        except NetfenceError as error:
            refusal: type[NetfenceError] | None = type(error)
        else:
            refusal = None
        assert refusal is expected

    async def _change(self, changes: Sequence[Change]) -> None:
        commands = [
            (change.command if isinstance(change, Bulk) else change, f"v{next(self._versions)}") for change in changes
        ]
        expected = [self.model.change(command, version, self.world.now) for command, version in commands]
        refusals = await self._apply(commands)
        assert [*map(_told, refusals)] == [*map(_told, expected)]

    async def _apply(self, commands: Sequence[tuple[Command, str]]) -> Sequence[NetfenceError | None]:
        if len(commands) > 1:
            return await self.one.apply_all(commands)
        try:
            await self.one.apply(*commands[0])
        except NetfenceError as error:
            return [error]
        return [None]

    def check(self) -> None:
        """Compare what is in force, in the daemon and in the kernel, with the model."""
        world, model, one = self.world, self.model, self.one
        policy = model.in_force
        assert one.policy == policy, _differences(one.policy, policy)
        assert one.policy_hash == policy.hash()
        assert one.row.policy_version == model.version
        found = dump(world.plane, one.row.slot)
        word = found.word
        assert (word.mode, word.audit, word.start) == (policy.mode, policy.audit, False)
        assert (word.rules4, word.rules6) == (policy.cidrs.size_of(4) > 0, policy.cidrs.size_of(16) > 0)
        assert found.rules == world.expected(policy)
        now = world.plane.clock.now()
        live = {address: expiry for address, expiry in found.leases.items() if expiry > now}
        assert live == {address: world.jiffies(expiry) for address, expiry in model.leases(world.now).items()}
        assert word.leases or not live

    async def end(self, fresh_slot: int) -> None:
        """Load what the store has as a restart does: into fresh maps, and over those in force."""
        world, one = self.world, self.one
        [row] = await world.store.load()
        assert (row.id, row.policy_version) == (one.row.id, self.model.version)
        assert row.policy is not None
        stored = policy_codec.decode(row.policy, policy_codec.Clock.now())
        loaded, wanted = (policy.live(world.now) for policy in (stored, self.model.policy))
        assert loaded == wanted, _differences(loaded, wanted)
        fresh = world.attachment(replace(row, slot=fresh_slot), stored, self.control)
        await fresh.take_over(_no_hook)
        self.equal(fresh)
        world.now += SCAN_S
        for each in (one, fresh):
            await each.maintain(world.now)
        self.model.policy = self.model.policy.live(world.now)
        self.check()
        self.equal(fresh)
        here, there = dump(world.plane, one.row.slot), dump(world.plane, fresh_slot)
        # Until then the tries and the flags may differ in what is over: maintenance is not worth a write to disk.
        assert here.rules == there.rules
        assert (here.word.rules4, here.word.rules6) == (there.word.rules4, there.word.rules6)
        assert here.leases.keys() == self.model.leases(world.now).keys()
        assert there.leases == {}

        again = world.attachment(row, stored, self.control)
        again.adopt({packed(address): world.plane.clock.seconds(expiry) for address, expiry in here.leases.items()})
        await again.take_over(_no_hook)
        self.equal(again)
        self.one = again
        await again.maintain(world.now)
        self.check()
        for each in (one, fresh, again):
            await each.close()

    def equal(self, other: Attachment) -> None:
        """Compare this attachment's maps with another's."""
        plane = self.world.plane
        now = plane.clock.now()
        here, there = dump(plane, self.one.row.slot), dump(plane, other.row.slot)
        assert here.says(now) == there.says(now)
        assert self.one.policy_hash == other.policy_hash


def _differences(found: Policy, expected: Policy) -> str:
    """Name what policies that should be equal say differently."""
    lines = [
        {*policy.canonical_lines(), *map(str, policy.cidrs.rules()), repr(policy.dns.domains)}
        for policy in (found, expected)
    ]
    return f"\nfound only: {sorted(lines[0] - lines[1])}\nexpected only: {sorted(lines[1] - lines[0])}"


def _told(refusal: NetfenceError | None) -> str:
    return f"{type(refusal).__name__}: {refusal}"


async def _no_hook() -> None:
    """Leave the hooks alone: they are in place."""


async def _live(world: World, first: BulkUpdate, steps: Sequence[Step]) -> None:
    slot, fresh_slot = await world.afresh()
    row = world.row(slot)
    await world.store.reserve(row)
    try:
        life = Life(world, row)
        if not await life.begin(first):
            return
        for number, step in enumerate(steps):
            world.now += 1
            try:
                await life.take(step)
                life.check()
            except BaseException:
                note(f"steps[{number}] went wrong: {step!r}")
                raise
        await life.end(fresh_slot)
    finally:
        await world.store.remove(row.id)


def check_life(world: World, first: BulkUpdate, steps: Sequence[Step]) -> None:
    with world.simulated():
        world.run(_live(world, first, steps))


OPEN = BulkUpdate(int(Mode.DENYLIST), dns=DnsSpec(int(DnsMode.DENYLIST)))
# Rare by chance: of two names that hold an address, the one that holds it longer is denied.
SHORTENED = [
    Learn("example.com", ("203.0.113.1",), 1000.0),
    Learn("other.test", ("203.0.113.1",), 300.0),
    DenyDomain("example.com"),
]

SETTINGS = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.timeout(400)  # some 15 s; a failure takes its time until it is small
@settings(SETTINGS, max_examples=300 if SLOWNESS == 1 else 10, derandomize=True)
@given(first=FIRST, steps=STEPS)
@example(first=OPEN, steps=SHORTENED)
def test_commands_leave_what_a_fresh_daemon_would_load(world: World, first: BulkUpdate, steps: list[Step]) -> None:
    check_life(world, first, steps)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@settings(SETTINGS, max_examples=3000)
@given(first=FIRST, steps=STEPS)
def test_many_more_commands_leave_the_same(world: World, first: BulkUpdate, steps: list[Step]) -> None:
    check_life(world, first, steps)


def test_what_is_over_is_loaded_by_nobody(world: World) -> None:
    """The same in real time: the clocks are read anew whenever the daemon does."""
    slot, fresh_slot = world.run(world.afresh())
    row, start = world.row(slot), start_policy(Mode.BLOCK_ALL)
    one = world.attachment(row, start, Control())
    update = BulkUpdate(
        int(Mode.DENYLIST),
        allow_cidrs=[CidrSpec("10.1.0.0/16", SHORT_S), CidrSpec("2001:db8:1::/48", SHORT_S)],
        deny_cidrs=["10.0.0.0/8", CidrSpec("10.1.0.0/16", 3600), CidrSpec("10.1.2.3", 3600)],
    )

    async def begin() -> None:
        await world.store.reserve(row)
        await one.begin(FirstPolicy(update))
        await one.apply(DenyCidr("10.2.0.0/16", SHORT_S))
        assert dump(world.plane, slot).rules.keys() == {
            "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "10.2.0.0/16", "2001:db8:1::/48"
        }  # fmt: skip

    async def end() -> None:
        [stored] = await world.store.load()
        assert stored.policy is not None
        policy = policy_codec.decode(stored.policy, policy_codec.Clock.now())
        fresh = world.attachment(replace(row, slot=fresh_slot), policy, Control())
        await fresh.take_over(_no_hook)
        await one.maintain(time.monotonic())
        here, there = dump(world.plane, slot).rules, dump(world.plane, fresh_slot).rules
        assert here.keys() == there.keys() == {"10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32"}
        for cidr, rule in here.items():
            assert rule.allow == there[cidr].allow == 0
            assert abs(rule.deny - there[cidr].deny) <= 1, f"{cidr}: jiffies and seconds do not tick together"
            assert rule.length == there[cidr].length
        await world.store.remove(row.id)

    world.run(begin())
    world.fence.wait_until(time.monotonic() + SHORT_S)
    world.run(end())


def test_no_table_is_left_behind(world: World) -> None:
    world.run(world.afresh())
    world.fence.settle()
    assert filled_indices(world.plane) == set()
