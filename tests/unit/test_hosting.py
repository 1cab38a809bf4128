"""The daemon as its control plane sees it, over the real life cycle and store and a kernel that is a record."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tests.unit import test_lifecycle
from tests.unit.test_lifecycle import Bench, FakePlane, interface, on_bench, until

from netfence import hosting as module
from netfence import lifecycle as lifecycle_module
from netfence.control.port import AttachmentView, FirstPolicy, StatsView
from netfence.errors import InvalidError, NetfenceError, NotFoundError
from netfence.hosting import Host
from netfence.lifecycle import Live
from netfence.policy.commands import AllowCidr, SetMode
from netfence.policy.modes import Mode
from netfence.policy_codec import Clock, seconds_since


@dataclass(frozen=True)
class Counters:
    """What the kernel counted."""

    allowed: tuple[int, int]
    blocked: tuple[int, int]
    would_packets: tuple[int, ...] = (3, 4)


class Plane(FakePlane):
    """A kernel that counts: slot n has passed n packets."""

    def counters(self, slot: int) -> Counters:
        self.calls.append(f"counters {slot}")
        return Counters((slot, 10 * slot), (100 * slot, 1000 * slot))


class Control(test_lifecycle.Control):
    """A control plane that may be away for too long, and that lets attaches wait."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.deciding: asyncio.Event | None = None

    @property
    def stale(self) -> bool:
        return self.away

    async def subscribe(self, view: AttachmentView) -> FirstPolicy:
        if self.deciding is not None:
            await self.deciding.wait()
        return await super().subscribe(view)


@pytest.fixture(autouse=True)
def _targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make vethN the interface with index N."""
    monkeypatch.setattr(
        lifecycle_module, "resolve_interface", lambda name: interface(name, int(name.removeprefix("veth")))
    )


def hosted(directory: Path, work: Callable[[Bench, Host, Control], Awaitable[None]]) -> None:
    async def with_host(bench: Bench) -> None:
        control = Control()
        bench.control = control
        bench.lifecycle.parts = replace(bench.lifecycle.parts, control=control)
        await work(bench, Host(bench.lifecycle), control)

    on_bench(directory, with_host, Plane())


def test_only_who_is_attached_is_listed_and_who_is_being_attached_can_be_seen(tmp_path: Path) -> None:
    async def work(bench: Bench, host: Host, control: Control) -> None:
        live = await bench.attach("veth7")
        control.deciding = asyncio.Event()
        attaching = asyncio.ensure_future(bench.attach("veth8"))
        await until(lambda: len(bench.lifecycle.every()) == 2 and "attach" in bench.plane.calls[-1])
        (other,) = (one for one in bench.lifecycle.every() if one is not live)
        assert [view.id for view in host.attachments()] == [live.row.id]
        view = host.view(other.row.id)
        assert view is not None
        assert (view.target, view.acked, view.policy_version) == ("veth8", False, "")
        control.deciding.set()
        await attaching
        assert [view.target for view in host.attachments()] == ["veth7", "veth8"]
        assert all(view.acked and view.policy_version == "v1" for view in host.attachments())
        await bench.lifecycle.detach(live.row.id)
        assert host.view(live.row.id) is None
        assert [view.target for view in host.attachments()] == ["veth8"]

    hosted(tmp_path, work)


def test_commands_go_to_their_attachment(tmp_path: Path) -> None:
    async def work(bench: Bench, host: Host, _control: Control) -> None:
        one, other = await bench.attach("veth7"), await bench.attach("veth8")
        await host.apply(one.row.id, SetMode(Mode.DENYLIST), "v2")
        refusals = await host.apply_all(other.row.id, [(AllowCidr("x"), "v3"), (SetMode(Mode.DISABLED), "v4")])
        assert [type(refusal) for refusal in refusals] == [InvalidError, type(None)]
        found = [(view.mode, view.policy_version) for view in host.attachments()]
        assert found == [(Mode.DENYLIST, "v2"), (Mode.DISABLED, "v4")]
        with pytest.raises(InvalidError):
            await host.apply(one.row.id, SetMode(9), "v5")

    hosted(tmp_path, work)


def test_an_unknown_id_is_told(tmp_path: Path) -> None:
    async def work(_bench: Bench, host: Host, _control: Control) -> None:
        for work in (host.apply("x", SetMode(1)), host.apply_all("x", [(SetMode(1), "v")])):
            with pytest.raises(NotFoundError, match="no attachment x"):
                await work
        assert host.view("x") is None

    hosted(tmp_path, work)


def test_counters_are_those_of_the_kernel_and_of_the_dns_server(tmp_path: Path) -> None:
    async def work(bench: Bench, host: Host, _control: Control) -> None:
        live = await bench.attach()
        live.attachment.note_query(allowed=True)
        live.attachment.note_query(allowed=False)
        live.attachment.note_query(allowed=False)
        slot = live.row.slot
        assert await host.stats() == [
            StatsView(
                id=live.row.id,
                allowed=(slot, 10 * slot),
                blocked=(100 * slot, 1000 * slot),
                would_block=7,
                queries_allowed=1,
                queries_blocked=2,
                policy_hash=live.attachment.policy_hash,
            )
        ]

    hosted(tmp_path, work)


def test_who_ends_while_others_are_counted_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATS_PIECE", 1)

    async def work(bench: Bench, host: Host, _control: Control) -> None:
        one, other = await bench.attach("veth7"), await bench.attach("veth8")
        counting = asyncio.ensure_future(host.stats())
        await asyncio.sleep(0)
        other.ended = True  # its slot may be another's by now
        assert [stats.id for stats in await counting] == [one.row.id]
        other.ended = False

    hosted(tmp_path, work)


def test_staleness_reaches_everybody_though_one_fails(tmp_path: Path) -> None:
    async def work(bench: Bench, host: Host, control: Control) -> None:
        lives = [await bench.attach(f"veth{number}") for number in (7, 8, 9)]
        for live in lives:
            await host.apply(live.row.id, SetMode(Mode.DENYLIST), "v2")
        follow = lives[0].attachment.follow_staleness

        async def fail() -> None:
            raise OSError(5, "input/output error")

        lives[0].attachment.follow_staleness = fail  # type: ignore[method-assign]
        control.away = True
        with (
            capture_logs() as logs,
            pytest.raises(NetfenceError, match=r"1 attachments could not be switched: .*error"),
        ):
            await host.follow_staleness()
        assert [entry["event"] for entry in logs].count("staleness_not_followed") == 1
        assert modes(bench, lives) == [Mode.DENYLIST, Mode.BLOCK_ALL, Mode.BLOCK_ALL]
        lives[0].attachment.follow_staleness = follow  # type: ignore[method-assign]
        await host.follow_staleness()
        assert modes(bench, lives) == [Mode.BLOCK_ALL] * 3
        lives[2].attached = False  # its policy is in force, the rest of its attach takes its time
        control.away = False
        await host.follow_staleness()
        assert modes(bench, lives) == [Mode.DENYLIST] * 3
        lives[2].attached = True

    hosted(tmp_path, work)


def modes(bench: Bench, lives: list[Live]) -> list[Mode]:
    """Return the modes that the kernel has."""
    return [bench.plane.policies[live.row.slot].mode for live in lives]


def test_an_attach_that_began_before_and_ends_after_it_is_stale_is_blocked(tmp_path: Path) -> None:
    async def work(bench: Bench, host: Host, control: Control) -> None:
        control.deciding = asyncio.Event()
        attaching = asyncio.ensure_future(bench.attach())
        await until(lambda: bench.lifecycle.every() and "attach" in bench.plane.calls)
        control.away = True
        await host.follow_staleness()
        control.deciding.set()
        live = await attaching
        await host.apply(live.row.id, SetMode(Mode.DISABLED), "v2")
        assert modes(bench, [live]) == [Mode.BLOCK_ALL]

    hosted(tmp_path, work)


def test_the_contact_is_stored_as_a_moment(tmp_path: Path) -> None:
    async def work(bench: Bench, host: Host, _control: Control) -> None:
        assert bench.store.contact is None
        await host.save_contact()
        ago = seconds_since(bench.store.contact, Clock.now())
        assert ago is not None
        assert 0 <= ago < 5

    hosted(tmp_path, work)
