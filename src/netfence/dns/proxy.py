"""DNS mode `proxy`: the control plane's decisions about names, merged while asked and remembered while they hold.

Owns the book of one attachment. Every policy change (`Gate.generation`) empties it: a question asked before is not
joined and its answer not remembered after.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog
from dnslib import QTYPE

from netfence.dns.gate import Gate
from netfence.dns.judge import Verdict
from netfence.dns.limits import MAX_DECISIONS
from netfence.errors import NetfenceError, UnavailableError

DEFAULT_TTL_S: Final = 300  # of `ips` without ttl_seconds (semantics.md 14)
MAX_TTL: Final = 0x7FFFFFFF

log = structlog.get_logger(__name__)

Done = Callable[[Verdict | NetfenceError], None]
Question = tuple[str, int]  # name, type


class ProxyBook:
    """Asks the control plane about names and remembers what it decided."""

    def __init__(self, gate: Gate, clock: Callable[[], float]) -> None:
        self._gate = gate
        self._clock = clock
        self._generation = gate.generation
        self._known: dict[Question, Verdict] = {}
        self._asking: dict[Question, list[Done]] = {}  # who waits for a question on its way
        self._tasks: set[asyncio.Task[None]] = set()

    def known(self, name: str, qtype: int) -> Verdict | None:
        """Return the decision that still holds, or None."""
        self._sync()
        verdict = self._known.get((name, qtype))
        if verdict is not None and verdict.until <= self._clock():
            del self._known[name, qtype]
            return None
        return verdict

    def decide(self, name: str, qtype: int, done: Done) -> None:
        """Ask about a name, together with whoever asks the same; `done` gets the decision, or why there is none."""
        self._sync()
        waiters = self._asking.get((name, qtype))
        if waiters is not None:
            waiters.append(done)
            return
        waiters = self._asking[name, qtype] = [done]
        task = asyncio.get_running_loop().create_task(self._ask(name, qtype, waiters), name="dns-proxy")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop asking."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _sync(self) -> None:
        """Forget everything of an older generation."""
        if self._generation != self._gate.generation:
            self._generation = self._gate.generation
            self._known.clear()
            self._asking.clear()

    async def _ask(self, name: str, qtype: int, waiters: list[Done]) -> None:
        generation = self._generation
        result: Verdict | NetfenceError
        try:
            result = await self._verdict(name, qtype)
        except NetfenceError as error:
            result = error
        except Exception as error:
            log.exception("query_dns_failed", error=repr(error))
            result = UnavailableError("ask the control plane: internal error")
        self._sync()
        if generation == self._generation:
            self._asking.pop((name, qtype), None)
            if isinstance(result, Verdict) and result.until > self._clock():
                while len(self._known) >= MAX_DECISIONS:
                    del self._known[next(iter(self._known))]
                self._known[name, qtype] = result
        for done in waiters:
            done(result)

    async def _verdict(self, name: str, qtype: int) -> Verdict:
        answer = await self._gate.ask_control_plane(name, QTYPE.forward.get(qtype, f"TYPE{qtype}"))
        now = self._clock()
        ttl_s = min(max(answer.ttl_s, 0.0), float(MAX_TTL))
        return Verdict(
            name,
            denied=not answer.allow,
            why="allowed by the control plane" if answer.allow else "denied by the control plane",
            learn=answer.allow and answer.add_to_filter,
            audit=self._gate.policy.audit,
            ips=tuple(answer.ips) if answer.allow else (),
            ttl_s=int(ttl_s) or DEFAULT_TTL_S,
            since=now,
            until=now + ttl_s,
        )
