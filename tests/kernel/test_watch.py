"""watch and cgroup_watch on a real loop: every event by doing the thing, and what looks like it but is not."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import uvloop

from harness.deadline import SLOWNESS
from hooktools import (
    DEADLINE_S,
    TCX_NEXT,
    bpffs,
    cgroup,
    inside_netns,
    netns,
    open_descriptors,
    program,
    remove_cgroup,
    run,
)
from netfence.dataplane import cgroup_watch, watch
from netfence.dataplane.cgroup_watch import CgroupWatcher
from netfence.dataplane.events import (
    AddressesChanged,
    CgroupGone,
    Event,
    HookGone,
    HostAddressesChanged,
    LinkGone,
    LinkNew,
    LinkRenamed,
    Resync,
)
from netfence.dataplane.hooks import clsact
from netfence.dataplane.hooks.chain import Side
from netfence.dataplane.rtnl import Rtnl
from netfence.dataplane.target import own_addresses
from netfence.dataplane.watch import LinkWatcher

pytestmark = pytest.mark.dealt


class Seen:
    """The events so far, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._more.set()

    async def wait(self, *wanted: Event) -> None:
        """Wait until every wanted event was seen."""
        async with asyncio.timeout(DEADLINE_S):
            while not all(each in self.events for each in wanted):
                self._more.clear()
                await self._more.wait()

    async def fence(self) -> None:
        """Wait until all that was caused so far has been delivered: an interface of our own making tells."""
        name = f"f{len(self.events)}x{time.monotonic_ns() % 10**6}"
        run(f"ip link add {name} type bridge")
        await self.wait(LinkNew(socket.if_nametoindex(name), name))
        run(f"ip link del {name}")

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


def on_loop(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await body()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@contextlib.asynccontextmanager
async def watcher() -> AsyncIterator[tuple[LinkWatcher, Seen]]:
    seen = Seen()
    made = LinkWatcher(seen)
    made.open()
    try:
        yield made, seen
    finally:
        made.close()


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    """Let uvloop open what it keeps open for the process."""

    async def body() -> None:
        process = await asyncio.create_subprocess_exec("true")
        await process.wait()

    on_loop(body)


@pytest.fixture(autouse=True)
def _namespace() -> Iterator[None]:
    before = open_descriptors()
    with inside_netns():
        run("ip link add h0 type veth peer name w0")
        yield
    assert open_descriptors() == before


def index(name: str = "h0") -> int:
    return socket.if_nametoindex(name)


def test_deleted() -> None:
    async def body() -> None:
        async with watcher() as (links, seen):
            h0 = index()
            links.watch(h0, "h0")
            start = time.monotonic()
            run("ip link del h0")
            await seen.wait(LinkGone(h0))
            assert time.monotonic() - start < 1.0  # semantics.md 23
            run(f"ip link add h0 index {h0} type veth peer name w0")  # name and index again: a new one, not ours
            await seen.wait(LinkNew(h0, "h0"))
            run("ip link del h0")
            await seen.fence()
            assert seen.of(LinkGone) == [LinkGone(h0)]

    on_loop(body)


def test_moved_to_another_namespace() -> None:
    async def body() -> None:
        async with watcher() as (links, seen):
            h0 = index()
            links.watch(h0, "h0")
            with netns() as other:
                run(f"ip link set h0 netns /proc/{os.getpid()}/fd/{other.fd}")
                await seen.wait(LinkGone(h0))

    on_loop(body)


def test_renamed_stays_watched() -> None:
    async def body() -> None:
        async with watcher() as (links, seen):
            h0 = index()
            links.watch(h0, "h0")
            run("ip link set h0 name h9")
            await seen.wait(LinkRenamed(h0, "h9"))
            run("ip link set h9 up")
            run("ip link del h9")
            await seen.wait(LinkGone(h0))
            assert seen.of(LinkRenamed) == [LinkRenamed(h0, "h9")]

    on_loop(body)


def test_what_happened_before_watch_is_told() -> None:
    async def body() -> None:
        async with watcher() as (links, seen):
            h0, w0 = index(), index("w0")
            run("ip link set w0 name w9")
            links.watch(w0, "w0")
            assert seen.of(LinkRenamed) == []  # never from within the call
            await seen.wait(LinkRenamed(w0, "w9"))
            run("ip link del h0")
            links.watch(h0, "h0")
            await seen.wait(LinkGone(h0), LinkGone(w0))
            await seen.fence()
            assert len(seen.of(LinkGone)) == 2  # each once, though the kernel's own message came after

    on_loop(body)


def test_leaving_a_bridge_is_not_gone() -> None:
    """The bridge tells RTM_DELLINK (AF_BRIDGE) for a port that leaves it."""

    async def body() -> None:
        run("ip link add br0 type bridge")
        async with watcher() as (links, seen):
            h0 = index()
            links.watch(h0, "h0")
            run("ip link set h0 master br0")
            run("ip link set h0 nomaster")
            await seen.fence()
            assert seen.of(LinkGone) == []
            assert AddressesChanged(h0) in seen.events  # its bridge's addresses were its own for a while

    on_loop(body)


def test_addresses_of_itself_and_of_its_bridge() -> None:
    async def body() -> None:
        run("ip link add br0 type bridge")
        run("ip link set h0 master br0")
        async with watcher() as (links, seen):
            h0 = index()
            links.watch(h0, "h0")
            for command in (
                "ip addr add fd00::1/64 dev br0 nodad",
                "ip addr add fd00::2/64 dev h0 nodad",
                "ip addr del fd00::1/64 dev br0",
            ):
                seen.events.clear()
                run(command)
                await seen.wait(AddressesChanged(h0), HostAddressesChanged())
            assert own_addresses(h0) == (socket.inet_pton(socket.AF_INET6, "fd00::2"),)
            await seen.fence()
            seen.events.clear()
            run("ip addr add 10.0.0.1/8 dev w0")  # nobody watches it, but it is the host's
            await seen.wait(HostAddressesChanged())
            assert seen.of(AddressesChanged) == []

    on_loop(body)


@pytest.mark.parametrize(
    "command",
    ["tc qdisc del dev h0 clsact", "tc filter del dev h0 ingress", "tc filter del dev h0 ingress prio 1 handle X bpf"],
    ids=["qdisc", "all-filters", "our-filter"],
)
def test_hook_taken_away(command: str) -> None:
    async def body() -> None:
        with bpffs() as pins, program(TCX_NEXT) as keep:
            async with watcher() as (links, seen):
                h0 = index()
                clsact.attach(keep, h0, "h0", Side.INGRESS, pins / "made")
                links.watch(h0, "h0")
                assert clsact.attached(h0, Side.INGRESS)
                run(command.replace("X", hex(clsact.HANDLE)))
                await seen.wait(HookGone(h0))
                assert clsact.attached(h0, Side.INGRESS) is None
                clsact.attach(keep, h0, "h0", Side.INGRESS, pins / "made")
                assert clsact.attached(h0, Side.INGRESS)
                links.unwatch(h0)
                seen.events.clear()
                clsact.detach(h0, Side.INGRESS, pins / "made")
                await seen.fence()
                assert seen.of(HookGone) == []

    on_loop(body)


def test_other_peoples_hooks_are_theirs() -> None:
    async def body() -> None:
        with bpffs() as pins, program(TCX_NEXT) as keep:
            async with watcher() as (links, seen):
                h0 = index()
                clsact.attach(keep, h0, "h0", Side.INGRESS, pins / "made")
                links.watch(h0, "h0")
                run("tc qdisc add dev w0 clsact")
                run("tc qdisc del dev w0 clsact")
                run("tc filter add dev h0 egress prio 5 protocol ip handle 800::5 u32 match u32 0 0 flowid 1:1")
                run("tc filter del dev h0 egress prio 5 protocol ip handle 800::5 u32")
                run("tc qdisc add dev h0 root pfifo")
                run("tc qdisc del dev h0 root")
                clsact.attach(keep, h0, "h0", Side.INGRESS, pins / "made")  # our own replacement
                await seen.fence()
                assert seen.of(HookGone) == []
                assert clsact.attached(h0, Side.INGRESS)

    on_loop(body)


def test_overflow_tells_resync_and_what_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_BUFFER_BYTES", 4096)

    async def body() -> None:
        async with watcher() as (links, seen):
            h0, w0 = index(), index("w0")
            run("ip link add g0 type bridge")
            links.watch(h0, "h0")
            links.watch(w0, "w0")
            for number in range(20):  # the loop does not run meanwhile
                run(f"ip link set g0 mtu {1400 + number}")
            run("ip link set w0 name w9")
            await seen.wait(Resync(), LinkRenamed(w0, "w9"))
            for number in range(20):
                run(f"ip link set g0 mtu {1300 + number}")
            run("ip link del h0")
            await seen.wait(LinkGone(h0), LinkGone(w0))
            await seen.fence()  # it goes on
            assert len(seen.of(Resync)) == 2

    on_loop(body)


def test_what_was_missed_is_told_also_when_it_could_not_be_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptors are left in the very moment in which events were lost; then an overflow comes again."""
    monkeypatch.setattr(watch, "_BUFFER_BYTES", 4096)
    monkeypatch.setattr(watch, "_AGAIN_S", 0.05)
    monkeypatch.setattr(watch, "_CHECKS_PER_TURN", 1)
    asked = refused = spared = 0

    class NoDescriptors(Rtnl):
        def __init__(self) -> None:
            nonlocal asked, refused
            asked += 1
            if asked > spared and refused < 3:
                refused += 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            super().__init__()

    async def body() -> None:
        nonlocal asked, refused, spared
        async with watcher() as (links, seen):
            h0, w0 = index(), index("w0")
            run("ip link add g0 type bridge")
            run("ip link add g1 type bridge")
            g1 = index("g1")
            for number, name in ((w0, "w0"), (g1, "g1"), (h0, "h0")):
                links.watch(number, name)
            monkeypatch.setattr(watch, "Rtnl", NoDescriptors)
            for spared, name, gone in ((1, "h0", {h0, w0}), (0, "g1", {g1})):
                asked = refused = 0
                for number in range(20):  # the loop does not run meanwhile
                    run(f"ip link set g0 mtu {1400 + number}")
                for number in range(20):  # smaller: what room is left after those is not enough for what comes now
                    run(f"ip addr add 192.0.2.{20 * spared + number}/32 dev g0")
                run(f"ip link del {name}")
                await seen.wait(*map(LinkGone, gone))
                assert refused == 3
            assert len(seen.of(LinkGone)) == 3
            await seen.fence()

    on_loop(body)


def test_a_failing_receiver_costs_no_event() -> None:
    async def body() -> None:
        reported: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
        seen = Seen()

        def receiver(event: Event) -> None:
            seen(event)
            raise RuntimeError("receiver")

        links = LinkWatcher(receiver)
        links.open()
        h0, w0 = index(), index("w0")
        links.watch(h0, "h0")
        links.watch(w0, "w0")
        run("ip link del h0")
        await seen.wait(LinkGone(h0), LinkGone(w0))
        assert reported.count("receiver") >= 2
        links.close()
        links.close()

    on_loop(body)


@pytest.mark.serial
def test_a_hundred_interfaces_do_not_block_the_loop() -> None:
    """Made and deleted in one go: no turn takes over 20 ms, nothing is lost."""

    async def body() -> None:
        async with watcher() as (links, seen):
            h0 = index()
            links.watch(h0, "h0")
            batch = "".join(f"link add b{number} type bridge\n" for number in range(100))
            batch += "".join(f"link del b{number}\n" for number in range(100)) + "link del h0\n"
            process = await asyncio.create_subprocess_exec("ip", "-batch", "-", stdin=asyncio.subprocess.PIPE)
            turns: list[float] = []
            talk = asyncio.ensure_future(process.communicate(batch.encode()))
            on_readable = links._on_readable

            def timed() -> None:
                start = time.thread_time()
                on_readable()
                turns.append(time.thread_time() - start)

            assert links._socket is not None
            asyncio.get_running_loop().add_reader(links._socket, timed)
            await talk
            await seen.wait(LinkGone(h0))
            assert len(seen.of(LinkNew)) == 100
            assert seen.of(Resync) == []
            assert max(turns) < 0.020 * SLOWNESS

    on_loop(body)


class TestCgroups:
    @contextlib.asynccontextmanager
    async def watcher(self) -> AsyncIterator[tuple[CgroupWatcher, Seen]]:
        seen = Seen()
        made = CgroupWatcher(seen)
        made.open()
        try:
            yield made, seen
        finally:
            made.close()
            made.close()

    def test_removed_others_stay(self) -> None:
        async def body() -> None:
            async with self.watcher() as (watcher, seen):
                with cgroup("a") as one, cgroup("b") as two, cgroup("c", two) as three:
                    ids = {path: path.stat().st_ino for path in (one, two, three)}
                    for path, identity in ids.items():
                        watcher.watch(identity, str(path))
                    start = time.monotonic()
                    remove_cgroup(one)
                    await seen.wait(CgroupGone(ids[one], str(one)))
                    assert time.monotonic() - start < 1.0  # semantics.md 23
                    remove_cgroup(three)
                    await seen.wait(CgroupGone(ids[three], str(three)))
                    assert len(seen.events) == 2
                    one.mkdir()  # the path again: a new target, not watched
                    remove_cgroup(one)
                    remove_cgroup(two)
                    await seen.wait(CgroupGone(ids[two], str(two)))
                    assert len(seen.events) == 3
                    assert watcher._parents == {}

        on_loop(body)

    def test_removed_before_watch_or_replaced_meanwhile(self) -> None:
        async def body() -> None:
            async with self.watcher() as (watcher, seen):
                with cgroup("a") as path:
                    identity = path.stat().st_ino
                    path.rmdir()
                    watcher.watch(identity, str(path))
                    assert seen.events == []  # never from within the call
                    await seen.wait(CgroupGone(identity, str(path)))
                    seen.events.clear()
                    path.mkdir()
                    watcher.watch(identity, str(path))  # the path exists, but it is another cgroup
                    await seen.wait(CgroupGone(identity, str(path)))

        on_loop(body)

    def test_removed_with_its_parents(self) -> None:
        async def body() -> None:
            async with self.watcher() as (watcher, seen):
                with cgroup("a") as outer, cgroup("b", outer) as inner:
                    identity = inner.stat().st_ino
                    watcher.watch(identity, str(inner))
                    inner.rmdir()
                    outer.rmdir()
                    await seen.wait(CgroupGone(identity, str(inner)))

        on_loop(body)

    def test_unwatched_is_silent(self) -> None:
        async def body() -> None:
            async with self.watcher() as (watcher, seen):
                with cgroup("a") as one, cgroup("b") as two:
                    ids = [path.stat().st_ino for path in (one, two)]
                    watcher.watch(ids[0], str(one))
                    watcher.watch(ids[1], str(two))
                    watcher.unwatch(ids[0])
                    remove_cgroup(one)
                    remove_cgroup(two)
                    await seen.wait(CgroupGone(ids[1], str(two)))
                    assert len(seen.events) == 1

        on_loop(body)

    def test_queue_overflow_looks_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel's overflow record names no watch: everything watched is looked at."""

        async def body() -> None:
            async with self.watcher() as (watcher, seen):
                with cgroup("a") as path:
                    identity = path.stat().st_ino
                    watcher.watch(identity, str(path))
                    path.rmdir()
                    real = os.read(watcher._fd, 4096)
                    assert path.name.encode() in real
                    lost = cgroup_watch._EVENT.pack(-1, cgroup_watch._IN_Q_OVERFLOW, 0, 0)
                    with monkeypatch.context() as patch:
                        patch.setattr(os, "read", lambda *_: lost)
                        watcher._on_readable()
                    assert seen.events == [CgroupGone(identity, str(path))]

        on_loop(body)
