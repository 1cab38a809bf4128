"""Who watches what is decided: `netfenced watch`, `top` and others, each with a queue that nobody has to empty.

Owns the watchers, and that nobody pays for them otherwise: the kernel reports drops, and DNS servers tell decisions, of
the attachments that somebody watches and while somebody does. Every `TICK_S` what was reported is handed out, in
slices. A watcher's queue is `flow_watcher`'s, how an event looks `flow_views`', how it travels the API's.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Final, Protocol

from netfence.api.views import FlowVerdict, FlowView
from netfence.dataplane.plane import Flow
from netfence.dns.decision import Decision, Sink
from netfence.errors import ExhaustedError, UnavailableError
from netfence.finding import unknown
from netfence.flow_views import Judging, dns_view, packet_verdict, packet_view
from netfence.flow_watcher import Watcher

TICK_S: Final = 0.05
"""Between two looks at what was reported: nobody sees the delay, and a flood's reports fit the kernel's ring."""

MAX_WATCHERS: Final = 32
"""Streams at once: operators and their tools, not workloads. Each may keep `flow_watcher.QUEUE` events in memory."""

RATE: Final = 1000.0
"""Events a second handed out, shared among the watchers: each costs some 80 µs until it is sent, so a tenth of a core
is what a flood can cost. More than that nobody reads."""

SLICE: Final = 8
"""Events made and handed out before others have their turn: 0.1 ms, as much as an answer of the DNS server."""

QUERIES: Final = 64
"""Decisions of one DNS server taken in one tick: a workload that floods its own must not displace those of others."""

FLOOD: Final = RATE * TICK_S
"""Events of one tick beyond which attachments take turns: there is not room for all."""

ROUND_S: Final = 1.0
"""How long it takes to see once, of every attachment that is watched, what the kernel kept back; 7 µs each."""

AGE_S: Final = 0.02
"""What a report's time may be off: of what is older than the watch that is about to see it, nobody asked."""


class Plane(Protocol):
    """What is needed of the data plane."""

    def watch_slots(self, slots: Collection[int]) -> None:
        """Have the kernel report drops of these slots, and of no others."""
        ...

    def read_flows(self) -> list[Flow]:
        """Return what it has reported since."""
        ...

    def kept_back(self, slot: int) -> int:
        """Return how many drops of the slot it has not reported since the last one that it has."""
        ...


class Server(Protocol):
    """What is needed of an attachment's DNS server."""

    def watch(self, sink: Sink | None, *, passes: bool = True) -> None:
        """Tell `sink` of each decision from now on, of those that pass if `passes`."""
        ...


class Placed(Protocol):
    """What is needed of an attachment's row."""

    @property
    def id(self) -> str:
        """Return the attachment's id."""
        ...

    @property
    def slot(self) -> int:
        """Return its slot in the kernel."""
        ...

    @property
    def name(self) -> str:
        """Return its target's name."""
        ...


class Attached(Protocol):
    """What is needed of an attachment that is in force; see `lifecycle.Live`."""

    @property
    def row(self) -> Placed:
        """Return its id and slot, which never change."""
        ...

    @property
    def attachment(self) -> Judging:
        """Return what knows its policy and its leases."""
        ...

    @property
    def server(self) -> Server:
        """Return its DNS server."""
        ...


class _Tap:
    """What one DNS server tells its decisions to."""

    __slots__ = ("_heard", "attached", "lost", "passes", "room")

    def __init__(self, attached: Attached, heard: list[_Heard]) -> None:
        self.attached = attached
        self.passes: bool | None = None  # not listening yet
        self.room = QUERIES
        self.lost: Counter[FlowVerdict] = Counter()  # of this tick
        self._heard = heard

    def __call__(self, decision: Decision) -> None:
        if self.room:
            self.room -= 1
            self._heard.append((time.time(), self, decision))
        else:
            self.lost[decision.word] += 1


_Heard = tuple[float, _Tap, Decision]  # when, by the wall clock; whose; what


class Flows:
    """All watchers of the daemon. `attached` gives the attachments in force; use it only on the event loop."""

    def __init__(self, plane: Plane, attached: Callable[[], Sequence[Attached]]) -> None:
        self._plane, self._attached = plane, attached
        self._watchers: list[Watcher] = []
        self._there: Sequence[Attached] = ()  # as of the last tick
        self._slots: dict[int, Attached] = {}  # of these
        self._taps: dict[str, _Tap] = {}
        self._heard: list[_Heard] = []
        self._since = 0.0  # when the kernel began to report
        self._told: dict[str, int] = {}  # of whose packets it is to report: what of `kept_back` has been told already
        self._round: deque[Attached] = deque()  # of these, whose turn it is to be looked at
        self._wanted = asyncio.Event()
        self._closed = False
        self.refused = 0

    def __len__(self) -> int:
        return len(self._watchers)

    @contextmanager
    def watch(self, attachment_id: str, verdicts: Collection[FlowVerdict]) -> Iterator[Watcher]:
        """Give a stream of what is decided from now on about one attachment, or ("") all; no `verdicts`: any.

        It ends when that attachment leaves. Raises NotFoundError for an unknown id, ExhaustedError beyond
        `MAX_WATCHERS`, and UnavailableError, later in the iteration too, when the daemon stops.
        """
        if self._closed:
            raise _stopping()
        there = self._attached()
        if attachment_id and all(one.row.id != attachment_id for one in there):
            raise unknown("watch", attachment_id, ((one.row.id, one.row.name) for one in there))
        if len(self._watchers) >= MAX_WATCHERS:
            self.refused += 1
            raise ExhaustedError(f"watch: {MAX_WATCHERS} streams are open already, which is the limit; end one of them")
        watcher = Watcher(attachment_id, verdicts)
        if not any(one.wants_packets for one in self._watchers):
            self._since = time.monotonic() - AGE_S
        self._watchers.append(watcher)
        try:
            self._follow(there)
            self._wanted.set()
            yield watcher
        finally:
            self._watchers.remove(watcher)
            if self._watchers:
                self._follow(self._there)
            else:  # who leaves while nobody watches is not kept either
                self._follow(())
                self._heard.clear()

    def close(self) -> None:
        """End all streams: the daemon stops."""
        self._closed = True
        for watcher in self._watchers:
            watcher.end(_stopping())

    async def run(self) -> None:
        """Hand out what is reported while somebody watches, until cancelled."""
        while True:
            while not self._watchers:
                self._wanted.clear()
                await self._wanted.wait()
            await asyncio.sleep(TICK_S)
            await self._tick()

    async def _tick(self) -> None:
        """Hand out what was reported since the last tick, and follow the coming and going of attachments."""
        before, there, known = self._slots, self._attached(), self._there
        same = there == known
        after = before if same else {one.row.slot: one for one in there}
        reported = self._plane.read_flows() if any(watcher.wants_packets for watcher in self._watchers) else []
        heard = self._heard[:]
        self._heard.clear()
        unheard = [(tap.attached.row.id, *one) for tap in self._taps.values() for one in tap.lost.items()]
        for tap in self._taps.values():
            tap.room = QUERIES
            tap.lost.clear()
        wall = time.time() - time.monotonic()
        rules: dict[int, dict[bytes, str]] = {}
        for count, event in enumerate(_in_turns([*reported, *heard])):
            if isinstance(event, Flow):
                self._packet(event, before, after, wall, rules)
            else:
                self._decision(event)
            if count % SLICE == SLICE - 1:
                await asyncio.sleep(0)
        for one in unheard:
            self._lose(*one)
        self._look()
        for watcher in self._watchers:
            watcher.tell_loss(time.time(), time.monotonic())
        if not same and self._there is known:  # else who began to watch meanwhile has followed what is newer
            self._follow(there)

    def _packet(
        self,
        flow: Flow,
        before: Mapping[int, Attached],
        after: Mapping[int, Attached],
        wall: float,
        rules: dict[int, dict[bytes, str]],
    ) -> None:
        """Hand out one report of the kernel's, if it can be told whose it is: slots are used again."""
        old, new = before.get(flow.slot), after.get(flow.slot)
        attached = old or new
        if attached is None or flow.at < self._since:
            return
        verdict = packet_verdict(flow)
        already = min(flow.lost, self._told.get(attached.row.id, 0))
        if already:
            self._told[attached.row.id] -= already
            flow = flow._replace(lost=flow.lost - already)
        if old is not None and new is not None and old is not new:  # of either
            for watcher in self._watchers:
                if watcher.wants(old.row.id, verdict) or watcher.wants(new.row.id, verdict):
                    watcher.lose(1 + flow.lost)
            return
        self._lose(attached.row.id, verdict, flow.lost)
        if takers := self._takers(attached.row.id, verdict):
            view = packet_view(attached.row.id, attached.attachment, flow, wall, rules.setdefault(flow.slot, {}))
            _hand_out(takers, view)

    def _decision(self, heard: _Heard) -> None:
        """Hand out one decision of a DNS server."""
        at, tap, decision = heard
        attachment_id = tap.attached.row.id
        if takers := self._takers(attachment_id, decision.word):
            _hand_out(takers, dns_view(attachment_id, decision, at))

    def _look(self) -> None:
        """See what the kernel kept back of some attachments: without a further drop it would tell nobody."""
        for _ in range(math.ceil(len(self._round) * TICK_S / ROUND_S)):
            attached = self._round[0]
            self._round.rotate(-1)
            attachment_id = attached.row.id
            kept, told = self._plane.kept_back(attached.row.slot), self._told[attachment_id]
            if kept > told:  # less is told with a report that we have yet to read
                self._told[attachment_id] = kept
                self._lose(attachment_id, "would_drop" if attached.attachment.policy.audit else "drop", kept - told)

    def _lose(self, attachment_id: str, verdict: FlowVerdict, count: int) -> None:
        """Have everybody who wanted such events lose that many."""
        for watcher in self._watchers:
            if watcher.wants(attachment_id, verdict):
                watcher.lose(count)

    def _takers(self, attachment_id: str, verdict: FlowVerdict) -> list[Watcher]:
        """Return who wants such an event and has room for it; the others lose it."""
        takers = []
        now = time.monotonic()
        rate = RATE / max(len(self._watchers), 1)
        for watcher in self._watchers:
            if watcher.wants(attachment_id, verdict):
                if watcher.has_room(rate, now):
                    takers.append(watcher)
                else:
                    watcher.lose(1)
        return takers

    def _follow(self, there: Sequence[Attached]) -> None:
        """Watch what somebody wants to see of what is there, and nothing else; end the streams of what left."""
        ids = {one.row.id for one in there}
        for watcher in self._watchers:
            if watcher.id and watcher.id not in ids:
                watcher.end()
        self._there, self._slots = there, {one.row.slot: one for one in there}
        packets = _chosen(there, [watcher for watcher in self._watchers if watcher.wants_packets])
        known, self._told = self._told, {}
        for one in packets:  # what was kept back before is for nobody
            before = known.get(one.row.id)
            self._told[one.row.id] = self._plane.kept_back(one.row.slot) if before is None else before
        self._round = deque(packets)
        self._plane.watch_slots({one.row.slot for one in packets})
        wanted = {one.row.id: one for one in _chosen(there, self._watchers)}
        passed = _chosen(there, [watcher for watcher in self._watchers if watcher.wants_passes])
        passes = {one.row.id for one in passed}
        for gone in self._taps.keys() - wanted.keys():
            self._taps.pop(gone).attached.server.watch(None)
        for attachment_id, one in wanted.items():
            tap = self._taps.get(attachment_id)
            if tap is None:
                tap = self._taps[attachment_id] = _Tap(one, self._heard)
            if tap.passes is not (attachment_id in passes):
                tap.passes = attachment_id in passes
                one.server.watch(tap, passes=tap.passes)


def _in_turns(events: list[Flow | _Heard]) -> list[Flow | _Heard]:
    """Return events in an order in which a workload's flood displaces no other's, nor its queries its packets.

    Of a flood, the first packet and the first query of each attachment come before anybody's second.
    """
    if len(events) <= FLOOD:
        return events
    before: Counter[tuple[int, bool]] = Counter()
    turns: list[tuple[int, Flow | _Heard]] = []
    for event in events:
        whose = (event.slot, True) if isinstance(event, Flow) else (event[1].attached.row.slot, False)
        turns.append((before[whose], event))
        before[whose] += 1
    return [event for _, event in sorted(turns, key=itemgetter(0))]


def _chosen(there: Sequence[Attached], watchers: Sequence[Watcher]) -> Sequence[Attached]:
    """Return what these watchers watch."""
    if any(not watcher.id for watcher in watchers):
        return there
    ids = {watcher.id for watcher in watchers}
    return [one for one in there if one.row.id in ids] if ids else []


def _hand_out(takers: Sequence[Watcher], view: FlowView) -> None:
    for watcher in takers:
        watcher.put(view)


def _stopping() -> UnavailableError:
    return UnavailableError("watch: the daemon is stopping; watch again when it is back")
