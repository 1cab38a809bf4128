"""One attachment over a kernel that is a dictionary: the order of its steps, and what every failure leaves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace

import pytest
from structlog.testing import capture_logs
from tests.unit.test_store import ROW

from netfence.attachment import Attachment, dns_address, start_policy
from netfence.control.local import NoControl
from netfence.control.port import FirstPolicy, NameDecision
from netfence.errors import ExhaustedError, InvalidError, NetfenceError, NotFoundError, PreconditionError
from netfence.leasing import LeaseLimits, LeaseTable
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
    RemoveDomain,
    SetDnsMode,
    SetMode,
)
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY, Policy
from netfence.policy_codec import Clock, decode
from netfence.store import Row

A, B, C = (bytes((192, 0, 2, number)) for number in (1, 2, 3))
LIMITS = LeaseLimits(min_s=300, grace_s=60, max_s=3600, max_leases=3)

NAMES = BulkUpdate(
    mode=Mode.ALLOWLIST,
    dns=DnsSpec(DnsMode.ALLOWLIST, [DomainSpec("a.test"), DomainSpec("b.test", include_subdomains=True)]),
)


class FakeKernel:
    """Keeps policy and leases of one slot; `fail` makes the next call of that name raise."""

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.start = True
        self.leases: dict[bytes, float] = {}
        self.calls: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.switching: asyncio.Event | None = None
        self.swept: set[bytes] = set()
        self.unsure = False  # what is in force is not stored

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if (failure := self.fail.pop(name, None)) is not None:
            raise failure

    async def apply(self, slot: int, policy: Policy, old: Policy | None, *, start: bool = False) -> None:
        assert slot == ROW.slot
        assert old is None or old == self.policy
        if self.switching is not None:
            await self.switching.wait()
        await asyncio.sleep(0)
        self._called("apply")
        self.policy, self.start = policy, start

    def note_unstored(self, slot: int, unstored: bool) -> None:
        assert slot == ROW.slot
        self.unsure = unstored

    def unstored(self, slot: int) -> bool:
        assert slot == ROW.slot
        return self.unsure

    def open_leases(self, slot: int, addresses: Sequence[bytes], expiry: float) -> None:
        assert slot == ROW.slot
        if "open" in self.fail:  # worse than promised: half of them are open
            self.leases.update(dict.fromkeys(addresses[::2], expiry))
        self._called("open")
        for address in addresses:
            self.leases[address] = max(expiry, self.leases.get(address, 0))

    def close_leases(self, slot: int, addresses: Iterable[bytes]) -> None:
        assert slot == ROW.slot
        self.calls.append("close")
        for address in addresses:
            self.leases.pop(address, None)

    def shorten_lease(self, slot: int, address: bytes, expiry: float) -> None:
        assert slot == ROW.slot
        self.calls.append("shorten")
        self.leases[address] = expiry

    async def sweep(self, slot: int) -> set[bytes]:
        assert slot == ROW.slot
        await asyncio.sleep(0)
        for address in self.swept:
            self.leases.pop(address, None)
        return self.swept


class FakeStore:
    """Keeps the last saved row and policy, and the leases the kernel had at that moment."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.row: Row | None = None
        self.policy: Policy | None = None
        self.fail = False
        self.leases_then: set[bytes] = set()
        self._kernel = kernel

    async def save(self, row: Row, encode: Callable[[], str]) -> None:
        await asyncio.sleep(0)
        self._kernel.calls.append("save")
        self.leases_then = set(self._kernel.leases)
        if self.fail:
            raise NetfenceError("disk full")
        self.row, self.policy = row, decode(encode(), Clock.now())


class Bench:
    def __init__(self) -> None:
        self.kernel = FakeKernel()
        self.store = FakeStore(self.kernel)
        self.table = LeaseTable(100_000)
        self.one = self.made(start_policy(Mode.BLOCK_ALL))

    def made(self, policy: Policy) -> Attachment:
        """Make an attachment over this kernel and store."""
        parts = {"kernel": self.kernel, "store": self.store, "control": NoControl()}
        return Attachment(ROW, policy, **parts, limits=LIMITS, table=self.table)  # type: ignore[arg-type]

    def check(self) -> None:
        """Check that we, the kernel and the store mean the same, as must be whenever nothing is under way."""
        assert self.kernel.policy == self.one.policy == self.store.policy
        assert not self.kernel.unsure
        assert set(self.kernel.leases) == set(self.one._leases.addresses())


async def nothing() -> None:
    """Stand in for the hooks."""


def on_bench(work: Callable[[Bench], Awaitable[None]], *, names: bool = True) -> None:
    async def test() -> None:
        bench = Bench()
        if names:
            await bench.one.apply(NAMES, "v1")
            bench.kernel.calls.clear()
        await work(bench)

    asyncio.run(asyncio.wait_for(test(), 20))


def test_a_command_is_switched_stored_and_then_acknowledged() -> None:
    async def work(bench: Bench) -> None:
        assert (bench.one.policy.mode, bench.one.active) == (Mode.BLOCK_ALL, False)
        generation = bench.one.generation
        await bench.one.apply(NAMES, "v1")
        bench.check()
        assert bench.one.active
        assert bench.one.generation != generation
        assert bench.store.row is not None
        assert bench.store.row.policy_version == bench.one.row.policy_version == "v1"
        assert bench.one.view().policy_hash == bench.one.policy.hash()
        assert bench.kernel.calls == ["apply", "save"]

    on_bench(work, names=False)


def test_attachments_given_the_same_update_share_its_policy_until_one_is_changed() -> None:
    async def work(bench: Bench) -> None:
        other, third, timed = Bench(), Bench(), Bench()
        await other.one.apply(NAMES)
        assert other.one.policy is bench.one.policy
        await bench.one.apply(SetMode(Mode.DENYLIST))
        await third.one.apply(NAMES)
        assert third.one.policy is other.one.policy
        assert third.one.policy.mode is Mode.ALLOWLIST
        update = replace(NAMES, allow_cidrs=[CidrSpec("10.0.0.0/8", 60)])
        await other.one.apply(update)
        await timed.one.apply(update)
        assert timed.one.policy is not other.one.policy
        for each in (bench, other, third, timed):
            each.check()

    on_bench(work)


def test_a_refused_command_changes_nothing() -> None:
    async def work(bench: Bench) -> None:
        before, generation = bench.one.policy, bench.one.generation
        with pytest.raises(InvalidError) as raised:
            await bench.one.apply(BulkUpdate(mode=0, allow_cidrs=["x"]), "v2")
        assert len(raised.value.errors) == 2
        assert (bench.one.policy, bench.one.generation, bench.kernel.calls) == (before, generation, [])
        assert bench.one.row.policy_version == "v1"

    on_bench(work)


def test_a_kernel_that_refuses_keeps_the_old_policy_everywhere() -> None:
    async def work(bench: Bench) -> None:
        bench.kernel.fail["apply"] = ExhaustedError("no policy index")
        with pytest.raises(ExhaustedError):
            await bench.one.apply(SetMode(Mode.DISABLED), "v2")
        bench.check()
        assert bench.one.policy.mode is Mode.ALLOWLIST
        assert bench.kernel.calls == ["apply"]

    on_bench(work)


def test_a_store_that_fails_takes_the_switch_back() -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [A], 0)
        generation = bench.one.generation
        bench.store.fail = True
        with pytest.raises(NetfenceError, match="disk full"):
            await bench.one.apply(DenyDomain("a.test"), "v2")
        bench.check()
        assert bench.one.policy.judge_name("a.test").allowed
        assert bench.one.row.policy_version == "v1"
        assert bench.one.generation not in (generation, generation + 1)  # answers of either policy are void
        assert bench.kernel.leases == {}  # closed meanwhile, and the next answer opens it again
        bench.one.learn("a.test", [A], 0)
        assert set(bench.kernel.leases) == {A}

    on_bench(work)


def test_a_clock_that_cannot_be_read_is_told_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(bench: Bench) -> None:
        def fail() -> Clock:
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(Clock, "now", fail)
            with pytest.raises(ExhaustedError, match=r"Too many open files; raise the limit of open files"):
                await bench.one.apply(SetMode(Mode.BLOCK_ALL), "v2")
        bench.check()
        assert bench.one.row.policy_version == "v1"
        await bench.one.apply(SetMode(Mode.BLOCK_ALL), "v2")
        bench.check()
        assert bench.one.policy.mode is Mode.BLOCK_ALL

    on_bench(work)


def test_what_cannot_be_taken_back_is_what_we_say_is_in_force() -> None:
    async def work(bench: Bench) -> None:
        bench.store.fail = True
        save = bench.store.save

        async def save_and_break(row: Row, encode: Callable[[], str]) -> None:
            bench.kernel.fail["apply"] = ExhaustedError("no policy index")
            await save(row, encode)

        bench.store.save = save_and_break  # type: ignore[method-assign]
        with capture_logs() as logs, pytest.raises(NetfenceError, match="disk full"):
            await bench.one.apply(SetMode(Mode.BLOCK_ALL), "v2")
        assert bench.kernel.policy is bench.one.policy
        assert bench.one.policy.mode is Mode.BLOCK_ALL
        assert [entry["event"] for entry in logs] == ["policy_not_rolled_back"]

    on_bench(work)


def test_commands_take_effect_in_the_order_of_the_calls() -> None:
    async def work(bench: Bench) -> None:
        bench.kernel.switching = asyncio.Event()
        tasks = [asyncio.ensure_future(bench.one.apply(SetMode(mode), str(mode))) for mode in (1, 4, 3)]
        await asyncio.sleep(0.01)
        bench.kernel.switching.set()
        await asyncio.gather(*tasks)
        assert bench.one.policy.mode is Mode.BLOCK_ALL
        bench.check()

    on_bench(work)


def test_a_cancelled_command_is_finished() -> None:
    async def work(bench: Bench) -> None:
        bench.kernel.switching = asyncio.Event()
        task = asyncio.ensure_future(bench.one.apply(SetMode(Mode.DISABLED), "v2"))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        bench.kernel.switching.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        bench.check()
        assert (bench.one.policy.mode, bench.one.row.policy_version) == (Mode.DISABLED, "v2")

    on_bench(work)


@pytest.mark.parametrize(
    ("ttl_s", "expected"),
    [(0, 360), (299, 360), (1000, 1060), (1e9, 3660)],
    ids=["zero", "short", "in-between", "long"],
)
def test_a_lease_lives_as_long_as_the_answer_within_bounds(ttl_s: float, expected: float) -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [A, B], ttl_s)
        assert set(bench.kernel.leases) == {A, B}
        for expiry in bench.kernel.leases.values():
            assert expiry - time.monotonic() == pytest.approx(expected, abs=5)

    on_bench(work)


@pytest.mark.parametrize(
    ("command", "left"),
    [
        (DenyDomain("a.test"), {B, C}),
        (RemoveDomain("a.test"), {B, C}),
        (DenyDomain("b.test", include_subdomains=True), {A, C}),
        (SetDnsMode(DnsMode.DENYLIST), set()),
        (SetMode(Mode.BLOCK_ALL), set()),
        (SetMode(Mode.DENYLIST), {A, B, C}),
        (AllowDomain("more.test"), {A, B, C}),
        (AllowCidr("10.0.0.0/8"), {A, B, C}),
        (BulkUpdate(mode=2, dns=DnsSpec(2, [DomainSpec("b.test", include_subdomains=True)])), {B, C}),
        (BulkUpdate(mode=2), set()),
    ],
    ids=[
        "deny", "remove", "deny-subtree", "dns-mode", "block-all", "mode", "allow", "cidr", "bulk", "bulk-without-dns",
    ],
)  # fmt: skip
def test_a_revocation_closes_what_nobody_holds_any_more(command: Command, left: set[bytes]) -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [A, C], 0)
        bench.one.learn("x.b.test", [B, C], 0)
        await bench.one.apply(command)
        assert set(bench.kernel.leases) == left
        assert bench.store.leases_then == left  # closed before it was stored, so before it was acknowledged
        bench.check()

    on_bench(work)


def test_a_lease_held_by_another_name_ends_when_that_one_says() -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [A], 3600)
        bench.one.learn("b.test", [A], 0)
        assert bench.kernel.leases[A] - time.monotonic() > 3000
        await bench.one.apply(DenyDomain("a.test"))
        assert bench.kernel.leases[A] - time.monotonic() == pytest.approx(360, abs=5)

    on_bench(work)


def test_a_name_denied_meanwhile_opens_nothing() -> None:
    async def work(bench: Bench) -> None:
        await bench.one.apply(DenyDomain("a.test"))
        with pytest.raises(PreconditionError, match="denied meanwhile"):
            bench.one.learn("a.test", [A], 0)
        assert bench.kernel.leases == {}

    on_bench(work)


@pytest.mark.parametrize(
    "update",
    [replace(NAMES, dns=DnsSpec(DnsMode.DISABLED)), replace(NAMES, audit=True, mode=Mode.BLOCK_ALL)],
    ids=["dns-disabled", "audit-of-a-denied-name"],
)
def test_nothing_is_opened_where_nothing_is_learned(update: BulkUpdate) -> None:
    async def work(bench: Bench) -> None:
        await bench.one.apply(update)
        bench.one.learn("other.test", [A], 0)
        assert bench.kernel.leases == {}

    on_bench(work)


def test_in_proxy_mode_the_control_plane_holds_the_lease() -> None:
    async def work(bench: Bench) -> None:
        await bench.one.apply(SetDnsMode(DnsMode.PROXY))
        bench.one.learn("whatever.test", [A], 0)
        await bench.one.apply(AllowDomain("x.test"))
        assert set(bench.kernel.leases) == {A}
        await bench.one.apply(SetDnsMode(DnsMode.ALLOWLIST))
        assert bench.kernel.leases == {}

    on_bench(work)


def test_the_control_plane_is_asked_with_our_id() -> None:
    class Control(NoControl):
        async def query_dns(self, attachment_id: str, name: str, qtype: str) -> NameDecision:
            assert (attachment_id, name, qtype) == (ROW.id, "a.test", "A")
            return NameDecision(allow=True, ips=(A,), ttl_s=5)

    async def work(bench: Bench) -> None:
        bench.one._control = Control()
        answer = await bench.one.ask_control_plane("a.test", "A")
        assert (answer.allow, answer.add_to_filter, tuple(answer.ips), answer.ttl_s) == (True, False, (A,), 5)

    on_bench(work)


def test_a_full_attachment_refuses_a_new_lease_and_renews_an_old_one() -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [A, B, C], 0)
        with capture_logs() as logs, pytest.raises(ExhaustedError, match=r"3 live leases of dns\.max_leases=3"):
            bench.one.learn("a.test", [A, b"\1" * 16], 0)
        assert set(bench.kernel.leases) == {A, B, C}
        assert [entry["event"] for entry in logs] == ["lease_refused"]
        with capture_logs() as logs, pytest.raises(ExhaustedError):
            bench.one.learn("a.test", [b"\1" * 16], 0)
        assert logs == []  # a workload cannot fill the log
        assert bench.one.refused_leases == 2
        bench.one.learn("b.test", [A, B], 3600)
        bench.check()

    on_bench(work)


def test_expired_leases_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [A, B], 0)
        bench.one.learn("a.test", [C], 3600)
        later = time.monotonic() + 400
        monkeypatch.setattr("netfence.leasing.time.monotonic", lambda: later)
        bench.one.learn("b.test", [b"\1" * 16], 0)
        assert C in bench.kernel.leases
        assert b"\1" * 16 in bench.kernel.leases
        bench.check()

    on_bench(work)


def test_what_the_kernel_refuses_is_not_booked() -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [A], 0)
        bench.kernel.fail["open"] = ExhaustedError("the lease table is full")
        with pytest.raises(ExhaustedError):
            bench.one.learn("a.test", [B, A], 0)
        assert set(bench.kernel.leases) == {A}
        bench.check()

    on_bench(work)


def test_maintenance_removes_what_expired_from_policy_kernel_and_book() -> None:
    async def work(bench: Bench) -> None:
        await bench.one.apply(replace(NAMES, allow_cidrs=[CidrSpec("10.0.0.0/8", 5), "10.1.0.0/16"]))
        bench.one.learn("a.test", [A, B], 0)
        generation, digest = bench.one.generation, bench.one.policy.hash()
        await bench.one.maintain(time.monotonic())
        assert len(bench.one.policy.cidrs) == 2
        bench.kernel.swept = {A}
        await bench.one.maintain(time.monotonic() + 1000)
        assert len(bench.one.policy.cidrs) == 1
        assert bench.kernel.policy == bench.one.policy
        assert bench.one.generation == generation  # nothing that was in force changed
        assert bench.one.policy.hash() == digest
        assert list(bench.one._leases.addresses()) == [B]

    on_bench(work)


def test_a_lease_renewed_while_the_sweep_removed_it_stays_booked() -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [A], 0)
        bench.kernel.swept = {A}

        async def sweep(_slot: int) -> set[bytes]:
            bench.kernel.close_leases(ROW.slot, [A])
            bench.one.learn("a.test", [A], 3600)
            return {A}

        bench.kernel.sweep = sweep  # type: ignore[assignment,method-assign]
        await bench.one.maintain(time.monotonic() + 1000)
        assert set(bench.kernel.leases) == {A}
        bench.check()

    on_bench(work)


@pytest.mark.parametrize(
    ("command", "left"),
    [(AllowDomain("x.test"), {A}), (AllowCidr("10.0.0.0/8"), {A}), (DenyDomain("x.test"), set()),
     (RemoveDomain("a.test"), set()), (SetMode(Mode.BLOCK_ALL), set()), (SetDnsMode(DnsMode.DENYLIST), set())],
    ids=["allow", "cidr", "deny", "remove", "block-all", "dns-mode"],
)  # fmt: skip
def test_leases_of_a_former_life_end_with_the_first_command_that_denies(command: Command, left: set[bytes]) -> None:
    async def work(bench: Bench) -> None:
        one = bench.made(bench.one.policy)
        bench.kernel.leases[A] = time.monotonic() + 100
        one.adopt(dict(bench.kernel.leases))
        await one.take_over(nothing)
        assert one.active
        await one.apply(command)
        assert set(bench.kernel.leases) == left

    on_bench(work)


@pytest.mark.parametrize(
    "command",
    [AllowCidr("192.0.2.0/24"), DenyCidr("192.0.2.0/24"), DenyDomain("a.test"), SetMode(Mode.DISABLED)],
    ids=lambda command: type(command).__name__,
)
def test_what_a_death_cut_off_between_kernel_and_store_is_undone_and_told(command: Command) -> None:
    """Also what changes nothing that could be read back from the kernel: names."""

    async def work(bench: Bench) -> None:
        await bench.one.apply(NAMES)
        before = bench.one.policy
        never = asyncio.Event()

        async def save(*_: object) -> None:
            never.set()
            await asyncio.Event().wait()

        saving, bench.store.save = bench.store.save, save  # type: ignore[method-assign,assignment]
        dying = asyncio.ensure_future(bench.one.apply(command))
        await never.wait()
        assert bench.kernel.policy == bench.one.policy != before
        bench.store.save = saving  # type: ignore[method-assign]
        stored = bench.store.policy
        assert stored == before
        after = bench.made(stored)
        with capture_logs() as logs:
            await after.take_over(nothing)
            await after.take_over(nothing)
        assert [one["log_level"] for one in logs if one["event"] == "command_undone"] == ["warning"]
        assert bench.kernel.policy == before
        await after.apply(command)
        with capture_logs() as logs:
            await bench.made(after.commanded).take_over(nothing)
        assert "command_undone" not in [one["event"] for one in logs]
        dying.cancel()

    on_bench(work)


@pytest.mark.parametrize("refuses", ["kernel", "store", "nobody"])
def test_what_was_refused_or_stored_is_not_told_to_be_undone(refuses: str) -> None:
    async def work(bench: Bench) -> None:
        await bench.one.apply(NAMES)
        if refuses == "kernel":
            bench.kernel.fail = {"apply": NetfenceError("no")}
        bench.store.fail = refuses == "store"
        with contextlib.suppress(NetfenceError):
            await bench.one.apply(SetMode(Mode.DISABLED))
        assert bench.kernel.policy is not None
        assert bench.kernel.policy.mode is (Mode.DISABLED if refuses == "nobody" else Mode.ALLOWLIST)
        assert not bench.kernel.unsure

    on_bench(work)


def test_many_revoked_leases_do_not_hold_up_the_loop() -> None:
    async def work(bench: Bench) -> None:
        bench.one._leases._limits = replace(LIMITS, max_leases=20_000)
        await bench.one.apply(SetDnsMode(DnsMode.DENYLIST))
        for number in range(16_000):
            bench.one.learn(f"n{number}.b.test", [number.to_bytes(4, "big")], 0)
        turns = 0
        closed_in: set[int] = set()
        close = bench.kernel.close_leases

        def close_leases(slot: int, addresses: Iterable[bytes]) -> None:
            closed_in.add(turns)
            close(slot, addresses)

        async def watch() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        bench.kernel.close_leases = close_leases  # type: ignore[method-assign]
        watcher = asyncio.ensure_future(watch())
        await bench.one.apply(DenyDomain("b.test", include_subdomains=True))
        watcher.cancel()
        assert bench.kernel.leases == {}
        assert len(closed_in) > 20  # it was cut into pieces, between which the loop turned
        bench.check()

    on_bench(work)


def test_after_the_end_nothing_is_accepted() -> None:
    async def work(bench: Bench) -> None:
        generation = bench.one.generation
        await bench.one.close()
        assert bench.one.closed
        assert bench.one.generation != generation
        with pytest.raises(NotFoundError):
            await bench.one.apply(SetMode(Mode.DISABLED))
        with pytest.raises(NotFoundError):
            bench.one.learn("a.test", [A], 0)
        await bench.one.maintain(time.monotonic())
        assert bench.kernel.calls == []

    on_bench(work)


def test_hooks_are_not_touched_beside_a_command_or_after_the_end() -> None:
    async def work(bench: Bench) -> None:
        async def put_back() -> None:
            bench.kernel.calls.append("put back")

        bench.kernel.switching = asyncio.Event()
        command = asyncio.ensure_future(bench.one.apply(SetMode(Mode.DISABLED)))
        await asyncio.sleep(0.01)
        put = asyncio.ensure_future(bench.one.while_open(put_back))
        await asyncio.sleep(0.01)
        assert "put back" not in bench.kernel.calls
        bench.kernel.switching.set()
        await asyncio.gather(command, put)
        assert bench.kernel.calls[-1] == "put back"
        await bench.one.close()
        bench.kernel.calls.clear()
        await bench.one.while_open(put_back)
        assert bench.kernel.calls == []
        bench.one.reopen()
        await bench.one.while_open(put_back)
        assert bench.kernel.calls == ["put back"]

    on_bench(work)


def test_without_a_first_policy_the_start_policy_is_stored() -> None:
    async def work(bench: Bench) -> None:
        await bench.one.begin(None)
        assert bench.one.active
        assert bench.store.policy == EMPTY
        assert bench.kernel.calls == ["save"]

    on_bench(work, names=False)


def test_counts_names_and_forms() -> None:
    async def work(bench: Bench) -> None:
        bench.one.note_query(allowed=True)
        bench.one.note_query(allowed=False)
        bench.one.note_query(allowed=False)
        await bench.one.apply(SetMode(Mode.DISABLED), "v2")
        assert bench.store.row is not None
        assert (bench.store.row.dns_allowed, bench.store.row.dns_blocked) == (1, 2)
        with capture_logs() as logs:
            bench.one.note_audit("bad.test", [A], "no rule")
            bench.one.note_audit("bad.test", [B], "no rule", ["cdn.test"])
        assert [(entry["event"], entry["name"]) for entry in logs] == [("would_deny_name", "bad.test")]
        ((name, known),) = bench.one.audited.names()
        assert (name, known.queries, list(known.addresses), known.chain) == ("bad.test", 2, [A, B], ("cdn.test",))
        bench.one.end()
        assert len(bench.one.audited) == 0
        bench.one.rename("veth9")
        assert bench.one.view().target == "veth9"
        assert bench.one.view().dns_address == "127.0.0.1:11000"
        assert dns_address(replace(ROW, dns_host="2001:db8::1", dns_port=53)) == "[2001:db8::1]:53"

    on_bench(work)


# -- what the security review found ------------------------------------------------------------------------------------


def test_a_policy_under_way_is_never_given_to_another_attachment() -> None:
    async def work(bench: Bench) -> None:
        other = Bench()
        saving = asyncio.Event()
        save = bench.store.save

        async def slow_save(row: Row, encode: Callable[[], str]) -> None:
            await saving.wait()
            await save(row, encode)

        bench.store.save = slow_save  # type: ignore[method-assign]
        command = asyncio.ensure_future(bench.one.apply(SetMode(Mode.DISABLED), "v2"))
        await asyncio.sleep(0.01)
        assert bench.one.policy.mode is Mode.DISABLED
        await other.one.apply(NAMES, "v1")
        assert other.one.policy.mode is Mode.ALLOWLIST
        other.check()
        saving.set()
        await command
        assert bench.one.policy.mode is Mode.DISABLED

    on_bench(work)


def test_a_command_behind_a_first_policy_that_failed_brings_nothing_to_life() -> None:
    async def work(bench: Bench) -> None:
        bench.kernel.switching = asyncio.Event()
        bench.kernel.fail["apply"] = ExhaustedError("no policy index")
        first = asyncio.ensure_future(bench.one.begin(FirstPolicy(NAMES, "v1")))
        await asyncio.sleep(0.01)
        queued = asyncio.ensure_future(bench.one.apply(SetMode(Mode.DISABLED), "v2"))
        await asyncio.sleep(0.01)
        bench.kernel.switching.set()
        with pytest.raises(ExhaustedError):
            await first
        with pytest.raises(NotFoundError):
            await queued
        assert not bench.one.active
        assert bench.kernel.policy is None

    on_bench(work, names=False)


@pytest.mark.parametrize("command", [AllowDomain("new.test"), SetDnsMode(DnsMode.DENYLIST)], ids=["name", "dns-mode"])
def test_what_only_a_refused_policy_let_open_is_closed_with_it(command: Command) -> None:
    async def work(bench: Bench) -> None:
        save = bench.store.save

        async def learn_and_fail(row: Row, encode: Callable[[], str]) -> None:
            bench.one.learn("new.test", [B], 0)  # an answer that comes while the store works
            await save(row, encode)

        bench.store.save = learn_and_fail  # type: ignore[method-assign]
        bench.store.fail = True
        with pytest.raises(NetfenceError, match="disk full"):
            await bench.one.apply(command)
        assert B not in bench.kernel.leases
        bench.check()

    on_bench(work)


def test_a_revocation_that_the_kernel_refuses_takes_the_command_back_and_is_tried_again() -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [A], 0)
        close = bench.kernel.close_leases

        def refuse(slot: int, addresses: Iterable[bytes]) -> None:
            if list(addresses):
                raise OSError(16, "busy")

        bench.kernel.close_leases = refuse  # type: ignore[method-assign]
        with pytest.raises(NetfenceError, match="close 1 revoked addresses"):
            await bench.one.apply(DenyDomain("a.test"), "v2")
        assert bench.one.policy.judge_name("a.test").allowed
        assert bench.kernel.policy is bench.one.policy
        assert bench.one.row.policy_version == "v1"
        bench.kernel.close_leases = close  # type: ignore[method-assign]
        await bench.one.maintain(time.monotonic())
        bench.check()
        assert bench.kernel.leases == {}

    on_bench(work)


def test_what_cannot_be_judged_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [A], 0)

        def fail(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr("netfence.leasing._denied", fail)
        await bench.one.apply(AllowDomain("x.test"))
        assert bench.kernel.leases == {}
        bench.check()

    on_bench(work)


def test_a_name_asked_again_under_the_new_dns_mode_keeps_its_new_lease() -> None:
    async def work(bench: Bench) -> None:
        bench.one._leases._limits = replace(LIMITS, max_leases=20_000)
        for number in range(4_000):
            bench.one.learn(f"n{number}.b.test", [number.to_bytes(4, "big")], 3600)
        last = (3_999).to_bytes(4, "big")
        close = bench.kernel.close_leases

        def close_leases(slot: int, addresses: Iterable[bytes]) -> None:
            if bench.kernel.calls.count("close") == 0:  # once, between the first two pieces of the revocation
                asyncio.get_running_loop().call_soon(learn_again)
            close(slot, addresses)

        learned = set()

        def learn_again() -> None:
            for name in ("again.test", "n3999.b.test"):
                learned.add(name)
                bench.one.learn(name, [last if name.startswith("n") else A], 0)

        bench.kernel.close_leases = close_leases  # type: ignore[method-assign]
        bench.kernel.calls.clear()
        await bench.one.apply(SetDnsMode(DnsMode.DENYLIST))
        assert learned
        assert set(bench.kernel.leases) == {A, last}
        assert bench.kernel.leases[last] - time.monotonic() == pytest.approx(360, abs=5)  # what the new answer said
        bench.check()

    on_bench(work)


# -- one table for all -------------------------------------------------------------------------------------------------


def test_expired_leases_of_all_make_room_in_a_full_kernel_table(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(bench: Bench) -> None:
        other = bench.made(bench.one.policy)
        await other.take_over(nothing)
        bench.one.learn("a.test", [A, B], 0)
        opened = bench.kernel.open_leases

        def full(slot: int, addresses: Sequence[bytes], expiry: float) -> None:
            if len(bench.kernel.leases) >= 2:
                raise ExhaustedError("the lease table is full")
            opened(slot, addresses, expiry)

        bench.kernel.open_leases = full  # type: ignore[method-assign]
        with pytest.raises(ExhaustedError):
            other.learn("a.test", [b"\1" * 4], 0)
        later = time.monotonic() + 400
        monkeypatch.setattr("netfence.leasing.time.monotonic", lambda: later)
        other.learn("a.test", [b"\1" * 4], 0)
        assert set(bench.kernel.leases) == {b"\1" * 4}
        assert list(bench.one._leases.addresses()) == []

    on_bench(work)


def test_nobody_takes_the_share_of_another() -> None:
    async def work(bench: Bench) -> None:
        bench.table = table = LeaseTable(400)  # a quarter stays free: 300 to share out
        await bench.one.apply(SetDnsMode(DnsMode.DENYLIST))
        greedy, modest, late = (bench.made(bench.one.policy) for _ in range(3))
        for one in (greedy, modest, late):
            one._leases._limits = replace(LIMITS, max_leases=1000)
        late.end()
        fresh = iter(range(1 << 16, 1 << 20))

        def fill(one: Attachment) -> int:
            for count in range(1000):
                try:
                    one.learn("x.test", [next(fresh).to_bytes(4, "big")], 3600)
                except ExhaustedError:
                    return count
            return 1000

        assert fill(greedy) == 300  # alone in the table, it may have all but the reserve
        assert fill(modest) == 150  # and yet the other finds its share: half of what is shared out
        with pytest.raises(ExhaustedError, match="25% of the table stay free for the others"):
            greedy.learn("x.test", [b"\1" * 16], 0)
        late._leases = type(late._leases)(ROW.slot, bench.kernel, replace(LIMITS, max_leases=1000), table)
        assert fill(late) == 100
        greedy.end()
        assert fill(late) == 50

    on_bench(work)


# -- commands that wait together ---------------------------------------------------------------------------------------


def test_commands_that_wait_together_cost_one_switch_and_one_write() -> None:
    async def work(bench: Bench) -> None:
        commands = [(AllowCidr(f"10.{number}.0.0/16"), f"v{number}") for number in range(100)]
        with capture_logs() as logs:
            assert await bench.one.apply_all(commands) == [None] * 100
        assert bench.kernel.calls == ["apply", "save"]
        assert len(bench.one.policy.cidrs) == 100
        assert bench.store.row is not None
        assert bench.store.row.policy_version == bench.one.row.policy_version == "v99"
        assert bench.one.view().policy_hash == bench.one.policy.hash()
        (entry,) = logs
        assert (entry["event"], entry["version"], entry["commands"]) == ("policy_applied", "v99", 100)
        with capture_logs() as logs:
            await bench.one.apply(SetMode(Mode.DENYLIST), "v100")
        assert "commands" not in logs[0]
        bench.check()

    on_bench(work)


def test_a_bad_command_among_good_ones_is_refused_alone() -> None:
    async def work(bench: Bench) -> None:
        refusals = await bench.one.apply_all(
            [
                (SetMode(Mode.DENYLIST), "v2"),
                (AllowCidr("x"), "v3"),
                (AllowCidr("10.0.0.0/8"), "v4"),
                (SetMode(0), "v5"),
            ]
        )
        assert [type(refusal) for refusal in refusals] == [type(None), InvalidError, type(None), InvalidError]
        assert bench.kernel.calls == ["apply", "save"]
        assert (bench.one.policy.mode, len(bench.one.policy.cidrs)) == (Mode.DENYLIST, 1)
        assert bench.one.row.policy_version == "v4"  # of the last one that was applied
        bench.check()

    on_bench(work)


def test_if_all_are_bad_nothing_happens() -> None:
    async def work(bench: Bench) -> None:
        generation = bench.one.generation
        refusals = await bench.one.apply_all([(AllowCidr("x"), "v2"), (SetMode(9), "v3")])
        assert all(isinstance(refusal, InvalidError) for refusal in refusals)
        assert (bench.kernel.calls, bench.one.generation, bench.one.row.policy_version) == ([], generation, "v1")

    on_bench(work)


@pytest.mark.parametrize("who", ["kernel", "store"])
def test_together_refused_each_command_has_a_fate_of_its_own(who: str) -> None:
    """The allow list with three prefixes fits neither the kernel nor the disk; each subset does."""

    async def work(bench: Bench) -> None:
        switch, save = bench.kernel.apply, bench.store.save

        async def small_switch(slot: int, policy: Policy, old: Policy | None, **how: bool) -> None:
            if who == "kernel" and len(policy.cidrs) > 2:
                raise ExhaustedError("the kernel is full")
            await switch(slot, policy, old, **how)

        async def small_save(row: Row, encode: Callable[[], str]) -> None:
            if who == "store" and len(decode(encode(), Clock.now()).cidrs) > 2:
                raise NetfenceError("the disk is full")
            await save(row, encode)

        bench.kernel.apply, bench.store.save = small_switch, small_save  # type: ignore[method-assign]
        commands = [(AllowCidr(f"10.{number}.0.0/16"), f"v{number}") for number in range(2, 5)]
        refusals = await bench.one.apply_all([*commands, (SetMode(9), "v5"), (SetMode(Mode.DENYLIST), "v6")])
        assert [str(refusal or "") for refusal in (refusals[0], refusals[1], refusals[4])] == [""] * 3
        assert f"the {'kernel' if who == 'kernel' else 'disk'} is full" in str(refusals[2])
        assert isinstance(refusals[3], InvalidError)
        assert (bench.one.policy.mode, len(bench.one.policy.cidrs)) == (Mode.DENYLIST, 2)
        assert bench.one.row.policy_version == "v6"
        bench.check()

    on_bench(work)


@pytest.mark.parametrize(
    "commands",
    [
        (DenyDomain("a.test"), RemoveDomain("a.test"), AllowDomain("a.test")),
        (SetMode(Mode.BLOCK_ALL), SetMode(Mode.ALLOWLIST)),
        (SetDnsMode(DnsMode.DISABLED), SetDnsMode(DnsMode.ALLOWLIST)),
        (BulkUpdate(mode=Mode.ALLOWLIST), replace(NAMES)),
    ],
    ids=["name", "mode", "dns-mode", "bulk"],
)
def test_what_one_command_denies_is_revoked_though_the_next_allows_it_again(commands: Sequence[Command]) -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [A], 0)
        bench.one.learn("b.test", [B], 0)
        assert await bench.one.apply_all([(command, "") for command in commands]) == [None] * len(commands)
        assert bench.kernel.calls.count("apply") == 1
        assert A not in bench.kernel.leases
        assert A not in bench.store.leases_then
        assert (B in bench.kernel.leases) is isinstance(commands[0], DenyDomain)
        bench.one.learn("a.test", [A], 0)
        assert A in bench.kernel.leases
        bench.check()

    on_bench(work)


def test_together_they_wait_for_the_one_before_and_are_refused_after_the_end() -> None:
    async def work(bench: Bench) -> None:
        bench.kernel.switching = asyncio.Event()
        first = asyncio.ensure_future(bench.one.apply(SetMode(Mode.DENYLIST), "v2"))
        await asyncio.sleep(0)
        together = asyncio.ensure_future(bench.one.apply_all([(SetMode(Mode.DISABLED), "v3")]))
        bench.kernel.switching.set()
        await asyncio.gather(first, together)
        assert bench.one.row.policy_version == "v3"
        await bench.one.close()
        with pytest.raises(NotFoundError):
            await bench.one.apply_all([(SetMode(Mode.DISABLED), "v4")])

    on_bench(work)


# -- while the control plane is away for too long ----------------------------------------------------------------------


class Away(NoControl):
    """A control plane that is away for too long, or is back."""

    def __init__(self, *, away: bool) -> None:
        self.away = away

    @property
    def stale(self) -> bool:
        return self.away


def mode_of(attachment: Attachment) -> Mode:
    """Return the mode in force."""
    return attachment.policy.mode


def test_stale_everything_is_blocked_and_the_policy_is_in_force_again_afterwards() -> None:
    async def work(bench: Bench) -> None:
        await bench.one.apply(replace(NAMES, audit=True, allow_cidrs=["10.0.0.0/8"]), "v2")
        policy, digest, generation = bench.one.policy, bench.one.policy_hash, bench.one.generation
        bench.one._control = control = Away(away=True)
        with capture_logs() as logs:
            await bench.one.follow_staleness()
        blocked = bench.kernel.policy
        assert blocked is not None
        assert (blocked.mode, blocked.audit, blocked.cidrs) == (Mode.BLOCK_ALL, False, policy.cidrs)
        assert bench.one.policy is blocked
        assert bench.one.generation != generation  # no answer of before counts
        assert bench.store.policy == policy
        view = bench.one.view()
        assert (view.mode, view.policy_version) == (Mode.BLOCK_ALL, "v2")
        assert view.policy_hash == bench.one.policy_hash == blocked.hash() != digest
        assert [(entry["event"], entry["stale"], entry["mode"]) for entry in logs] == [
            ("staleness_followed", True, "block_all")
        ]
        control.away = False
        await bench.one.follow_staleness()
        assert bench.kernel.policy == bench.one.policy == policy
        assert bench.one.policy_hash == bench.one.view().policy_hash == digest
        bench.check()

    on_bench(work)


def test_stale_commands_change_what_is_stored_and_not_what_is_blocked() -> None:
    async def work(bench: Bench) -> None:
        bench.one._control = control = Away(away=True)
        await bench.one.follow_staleness()
        for command in (SetMode(Mode.DENYLIST), AllowCidr("10.0.0.0/8")):
            await bench.one.apply(command, "v2")
            assert bench.kernel.policy is not None
            assert bench.kernel.policy.mode is mode_of(bench.one) is Mode.BLOCK_ALL
        assert bench.store.policy is not None
        assert (bench.store.policy.mode, len(bench.store.policy.cidrs)) == (Mode.DENYLIST, 1)
        assert bench.one.row.policy_version == "v2"
        await bench.one.maintain(time.monotonic())
        assert mode_of(bench.one) is Mode.BLOCK_ALL
        control.away = False
        await bench.one.follow_staleness()
        bench.check()
        assert (bench.one.policy.mode, len(bench.one.policy.cidrs)) == (Mode.DENYLIST, 1)

    on_bench(work)


def test_stale_a_command_that_fails_leaves_it_blocked() -> None:
    async def work(bench: Bench) -> None:
        bench.one._control = control = Away(away=True)
        await bench.one.follow_staleness()
        bench.store.fail = True
        with pytest.raises(NetfenceError, match="disk full"):
            await bench.one.apply(SetMode(Mode.DISABLED), "v2")
        assert bench.kernel.policy is bench.one.policy
        assert mode_of(bench.one) is Mode.BLOCK_ALL
        control.away = False
        await bench.one.follow_staleness()
        assert mode_of(bench.one) is Mode.ALLOWLIST
        bench.check()

    on_bench(work)


def test_stale_no_name_opens_an_address() -> None:
    async def work(bench: Bench) -> None:
        bench.one._control = Away(away=True)
        await bench.one.follow_staleness()
        with pytest.raises(PreconditionError, match="denied meanwhile"):
            bench.one.learn("a.test", [A], 0)
        assert bench.kernel.leases == {}

    on_bench(work)


def test_stale_a_take_over_is_never_open() -> None:
    async def work(bench: Bench) -> None:
        switched: list[Policy] = []
        switch = bench.kernel.apply

        async def noted(slot: int, policy: Policy, old: Policy | None, **how: bool) -> None:
            switched.append(policy)
            await switch(slot, policy, old, **how)

        bench.kernel.apply = noted  # type: ignore[method-assign]
        one = bench.made(bench.one.policy)
        one._control = control = Away(away=True)
        await one.take_over(nothing)
        assert [policy.mode for policy in switched] == [Mode.BLOCK_ALL]
        assert mode_of(one) is Mode.BLOCK_ALL
        assert one.view().policy_hash == switched[0].hash()
        control.away = False
        await one.follow_staleness()
        assert one.policy == bench.store.policy

    on_bench(work)


@pytest.mark.parametrize("first", [FirstPolicy(replace(NAMES, mode=Mode.DISABLED)), None], ids=["acked", "unacked"])
def test_stale_an_attach_begins_blocked(first: FirstPolicy | None) -> None:
    async def work(bench: Bench) -> None:
        one = bench.made(start_policy(Mode.DISABLED))
        one._control = control = Away(away=True)
        await one.begin(first)
        assert one.active
        assert bench.kernel.policy is not None
        assert bench.kernel.policy.mode is mode_of(one) is Mode.BLOCK_ALL
        assert bench.store.policy is not None
        assert bench.store.policy.mode is Mode.DISABLED
        control.away = False
        await one.follow_staleness()
        assert mode_of(one) is Mode.DISABLED

    on_bench(work, names=False)


def test_staleness_is_nothing_to_what_is_not_active_or_over() -> None:
    async def work(bench: Bench) -> None:
        one = bench.made(start_policy(Mode.DISABLED))
        one._control = Away(away=True)
        await one.follow_staleness()
        bench.one._control = Away(away=True)
        await bench.one.close()
        await bench.one.follow_staleness()
        assert bench.kernel.calls == []

    on_bench(work)


def test_a_kernel_that_refuses_to_follow_is_told_and_can_be_asked_again() -> None:
    async def work(bench: Bench) -> None:
        bench.one._control = Away(away=True)
        bench.kernel.fail["apply"] = ExhaustedError("no policy index")
        with pytest.raises(ExhaustedError):
            await bench.one.follow_staleness()
        assert mode_of(bench.one) is Mode.ALLOWLIST
        bench.check()
        await bench.one.follow_staleness()
        assert mode_of(bench.one) is Mode.BLOCK_ALL

    on_bench(work)


# -- first policies ----------------------------------------------------------------------------------------------------


def test_who_did_not_wait_is_stored_as_unacked_until_a_whole_policy_comes() -> None:
    async def work(bench: Bench) -> None:
        await bench.one.begin(None)
        assert bench.store.row is not None
        assert bench.store.row.acked is bench.one.row.acked is bench.one.view().acked is False
        await bench.one.apply(AllowCidr("10.0.0.0/8"), "v1")
        assert bench.store.row.acked is bench.one.view().acked is False
        await bench.one.apply_all([(NAMES, "v2"), (AllowCidr("10.0.0.0/8"), "v3")])
        assert bench.store.row.acked is bench.one.row.acked is bench.one.view().acked is True
        await bench.one.apply(AllowCidr("10.1.0.0/16"), "v4")
        assert bench.store.row.acked is True

    on_bench(work, names=False)


def test_taken_over_before_anybody_gave_a_policy_it_is_in_start_mode_still() -> None:
    async def work(bench: Bench) -> None:
        await bench.one.begin(None)
        for mode in (Mode.BLOCK_ALL, Mode.DISABLED):
            again = bench.made(start_policy(mode))
            again.row = replace(ROW, acked=False)
            await again.take_over(nothing)
            assert (bench.kernel.policy, bench.kernel.start) == (start_policy(mode), True)
            await again.take_over(nothing)  # as after a detach that failed
            assert bench.kernel.start
            again._control = Away(away=True)
            await again.take_over(nothing)
            assert (bench.kernel.start, mode_of(again)) == (False, Mode.BLOCK_ALL)
            again._control = NoControl()
            await again.apply(AllowCidr("10.0.0.0/8"), "v1")  # nobody acked, and yet it has rules now
            assert not bench.kernel.start
            await again.take_over(nothing)
            assert not bench.kernel.start
        acked = bench.made(start_policy(Mode.BLOCK_ALL))
        await acked.take_over(nothing)
        assert not bench.kernel.start

    on_bench(work, names=False)


def test_a_whole_policy_that_was_refused_acks_nothing() -> None:
    async def work(bench: Bench) -> None:
        await bench.one.begin(None)
        for bad in (BulkUpdate(mode=0), NAMES):
            bench.store.fail = bad is NAMES
            refusals = await bench.one.apply_all([(bad, "v1")])
            assert refusals[0] is not None
            assert bench.one.view().acked is False
        bench.store.fail = False
        await bench.one.apply_all([(SetMode(Mode.DENYLIST), "v2"), (BulkUpdate(mode=0), "v3")])
        assert bench.one.view().acked is False

    on_bench(work, names=False)


@pytest.mark.parametrize("how", ["applied", "refused", "kernel", "store", "cancelled"])
def test_whoever_gave_the_first_policy_is_told_once_how_it_went(how: str) -> None:
    async def work(bench: Bench) -> None:
        told: list[BaseException | None] = []
        if how == "kernel":
            bench.kernel.fail["apply"] = ExhaustedError("no policy index")
        bench.store.fail = how == "store"
        bench.kernel.switching = asyncio.Event()
        first = FirstPolicy(BulkUpdate(mode=0) if how == "refused" else NAMES, "v1", told.append)
        begun = asyncio.ensure_future(bench.one.begin(first))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if how == "cancelled":
            begun.cancel()
        assert told == [] or how == "refused"  # not before it is in force
        bench.kernel.switching.set()
        (outcome,) = await asyncio.gather(begun, return_exceptions=True)
        assert [type(failure) for failure in told] == [type(outcome)]
        expected = {"refused": InvalidError, "kernel": ExhaustedError, "store": NetfenceError}
        assert type(outcome) is {"applied": type(None), "cancelled": asyncio.CancelledError, **expected}[how]
        assert bench.one.closed is (how != "applied")
        if how in {"applied", "cancelled"}:
            bench.check()

    on_bench(work, names=False)


# -- defects of ours, and ends -----------------------------------------------------------------------------------------


def test_a_defect_costs_its_command_and_not_the_others() -> None:
    async def work(bench: Bench) -> None:
        switch = bench.kernel.apply

        async def breaks(slot: int, policy: Policy, old: Policy | None, **how: bool) -> None:
            if policy.mode is Mode.DENYLIST:
                raise OSError(5, "secret of ours")
            await switch(slot, policy, old, **how)

        bench.kernel.apply = breaks  # type: ignore[method-assign]
        with capture_logs() as logs:
            outcomes = await bench.one.apply_all(
                [(SetMode(Mode.DISABLED), "v2"), (SetMode(Mode.DENYLIST), "v3"), (AllowCidr("10.0.0.0/8"), "v4")]
            )
        assert [outcomes[0], outcomes[2]] == [None, None]
        assert isinstance(outcomes[1], NetfenceError)
        assert "SetMode" in str(outcomes[1])
        assert "internal error; the daemon's log has the details" in str(outcomes[1])
        assert "secret" not in str(outcomes[1])
        assert "secret" in next(entry["error"] for entry in logs if entry["event"] == "command_failed")
        assert bench.one.row.policy_version == "v4"
        bench.check()

    on_bench(work)


def test_a_defect_in_the_first_policy_ends_the_attach() -> None:
    async def work(bench: Bench) -> None:
        told: list[BaseException | None] = []
        bench.kernel.fail["apply"] = OSError(5, "secret of ours")
        with pytest.raises(NetfenceError, match="internal error"):
            await bench.one.begin(FirstPolicy(NAMES, "v1", told.append))
        assert [type(failure) for failure in told] == [NetfenceError]
        assert bench.one.closed
        assert not bench.one.active

    on_bench(work, names=False)


def test_shut_it_takes_nothing_more_at_once_though_something_is_in_progress() -> None:
    async def work(bench: Bench) -> None:
        bench.kernel.switching = asyncio.Event()
        first = asyncio.ensure_future(bench.one.apply(SetMode(Mode.DENYLIST), "v2"))
        second = asyncio.ensure_future(bench.one.apply(SetMode(Mode.DISABLED), "v3"))
        await asyncio.sleep(0)
        generation = bench.one.generation
        bench.one.shut()
        assert bench.one.closed
        assert bench.one.generation != generation
        with pytest.raises(NotFoundError):
            bench.one.learn("a.test", [A], 0)
        bench.kernel.switching.set()
        await first
        with pytest.raises(NotFoundError):
            await second
        assert bench.kernel.calls.count("apply") == 1

    on_bench(work)


def test_stale_one_is_blocked_from_the_start_and_when_its_take_over_fails() -> None:
    """Its DNS server answers by that policy before, and without, any take-over."""

    async def work(bench: Bench) -> None:
        control = Away(away=True)
        parts = {"kernel": bench.kernel, "store": bench.store, "control": control}
        one = Attachment(ROW, bench.one.policy, **parts, limits=LIMITS, table=bench.table)  # type: ignore[arg-type]
        one.active = True  # as `Lifecycle.register` does
        assert mode_of(one) is Mode.BLOCK_ALL
        assert one.view().mode == Mode.BLOCK_ALL
        assert one.view().policy_hash == one.policy.hash()

        async def hook() -> None:
            raise OSError(16, "busy")

        with pytest.raises(OSError, match="busy"):
            await one.take_over(hook)
        with pytest.raises(PreconditionError, match="denied meanwhile"):
            one.learn("a.test", [A], 0)
        control.away = False
        await one.follow_staleness()
        assert one.policy == bench.one.policy  # what it was made with was not lost

    on_bench(work)


@pytest.mark.parametrize("followed", [True, False], ids=["followed-before", "found-by-the-sweep"])
def test_what_expires_while_staleness_begins_voids_answers_only_if_something_was_blocked(followed: bool) -> None:
    async def work(bench: Bench) -> None:
        await bench.one.apply(replace(NAMES, allow_cidrs=[CidrSpec("10.0.0.0/8", 5)]), "v2")
        bench.one._control = Away(away=True)
        if followed:
            await bench.one.follow_staleness()
        generation = bench.one.generation
        await bench.one.maintain(time.monotonic() + 10)
        assert len(bench.one.policy.cidrs) == 0
        assert mode_of(bench.one) is Mode.BLOCK_ALL
        assert (bench.one.generation == generation) is followed

    on_bench(work)


def test_made_while_stale_and_begun_unacked_when_it_is_over_it_says_what_the_kernel_does() -> None:
    async def work(bench: Bench) -> None:
        control = Away(away=True)
        parts = {"kernel": bench.kernel, "store": bench.store, "control": control}
        start = start_policy(Mode.DISABLED)
        one = Attachment(ROW, start, **parts, limits=LIMITS, table=bench.table)  # type: ignore[arg-type]
        control.away = False  # the SyncAck comes while its hooks are put in place; nobody follows what is not active
        await one.begin(None)
        assert mode_of(one) is Mode.DISABLED
        assert one.view().policy_hash == start.hash()

    on_bench(work, names=False)


def test_names_and_the_addresses_that_they_opened_are_told_both_ways() -> None:
    async def work(bench: Bench) -> None:
        bench.one.learn("a.test", [B, A], 60)
        bench.one.learn("x.b.test", [B], 60)
        assert (bench.one.held_by("a.test"), bench.one.held_by("x.b.test")) == ((A, B), (B,))
        assert (bench.one.held_by("nobody.test"), bench.one.names_of(B)) == ((), ("a.test", "x.b.test"))
        assert bench.one.leased_names() == ["a.test", "x.b.test"]
        await bench.one.apply(RemoveDomain("a.test"), "v2")
        assert bench.one.held_by("a.test") == ()
        assert bench.one.leased_names() == ["x.b.test"]
        assert bench.one.commanded is bench.one.policy

    on_bench(work)
