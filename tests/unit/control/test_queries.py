"""Questions about names over a real channel: what is asked, what an answer may be, and every way to fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.unit.control.peer import Peer, serving, until

from netfence.control import queries as module
from netfence.control.channel import make_channel
from netfence.control.credentials import Secrets
from netfence.control.port import NameDecision
from netfence.control.queries import NameQueries
from netfence.errors import DeadlineError, ExhaustedError, UnavailableError
from netfence.v1 import control_pb2

Response = control_pb2.DnsQueryResponse


class Bench:
    """Queries over a channel to a control plane."""

    def __init__(self, peer: Peer, timeout_s: float) -> None:
        self.peer = peer
        self.queries = NameQueries(timeout_s)
        self.channel = make_channel(peer.address, Secrets(), max_message_size=1 << 20)
        self.queries.use(self.channel, (("authorization", "Bearer t"),))

    def answer(self, response: Response | Exception) -> None:
        """Have every question answered so."""

        async def answer(_request: control_pb2.DnsQueryRequest) -> Response:
            if isinstance(response, Exception):
                raise response
            return response

        self.peer.answer = answer

    def silence(self) -> asyncio.Event:
        """Have no question answered until the event is set."""
        release = asyncio.Event()

        async def answer(_request: control_pb2.DnsQueryRequest) -> Response:
            await release.wait()
            return Response(allow=True)

        self.peer.answer = answer
        return release

    async def ask(self, attachment_id: str = "a", name: str = "pypi.org") -> NameDecision:
        return await asyncio.wait_for(self.queries.ask(attachment_id, name, "A"), 5)


def on_bench(directory: Path, work: Callable[[Bench], Awaitable[None]], timeout_s: float = 5.0) -> None:
    async def test() -> None:
        async with serving(directory) as peer:
            bench = Bench(peer, timeout_s)
            try:
                await work(bench)
            finally:
                await bench.channel.close()
        assert (bench.queries._total, bench.queries._asking) == (0, {})

    asyncio.run(asyncio.wait_for(test(), 20))


def test_a_question_says_who_asks_for_what_and_the_answer_is_a_decision(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.answer(Response(allow=True, add_to_filter=True, ips=["192.0.2.1", "2001:db8::1"], ttl_seconds=7))
        decision = await bench.ask()
        ips = (bytes((192, 0, 2, 1)), bytes.fromhex("20010db8000000000000000000000001"))
        assert decision == NameDecision(allow=True, add_to_filter=True, ips=ips, ttl_s=7.0)
        (question,) = bench.peer.questions
        assert (question.id, question.domain, question.query_type) == ("a", "pypi.org.", "A")
        assert bench.peer.asked_with[0]["authorization"] == "Bearer t"

    on_bench(tmp_path, work)


def test_a_no_is_a_no_whatever_else_it_says(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.answer(Response(allow=False, add_to_filter=True, ips=["nonsense"], ttl_seconds=7))
        assert await bench.ask() == NameDecision(allow=False, ttl_s=7.0)

    on_bench(tmp_path, work)


@pytest.mark.parametrize("ip", ["nonsense", "", "192.0.2.0/24", "fe80::1%eth0"])
def test_a_bad_address_is_no_answer(tmp_path: Path, ip: str) -> None:
    async def work(bench: Bench) -> None:
        bench.answer(Response(allow=True, ips=["192.0.2.1", ip]))
        with pytest.raises(UnavailableError, match="bad address"):
            await bench.ask()

    on_bench(tmp_path, work)


def test_more_addresses_than_an_answer_holds_are_no_answer(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.answer(Response(allow=True, ips=["192.0.2.1"] * module.MAX_IPS))
        assert len((await bench.ask()).ips) == module.MAX_IPS
        bench.answer(Response(allow=True, ips=["192.0.2.1"] * (module.MAX_IPS + 1)))
        with pytest.raises(UnavailableError, match="513 addresses"):
            await bench.ask()

    on_bench(tmp_path, work)


def test_without_a_connection_it_fails_at_once(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.queries.use(None)
        with pytest.raises(UnavailableError, match=r"pypi\.org A: not connected"):
            await bench.ask()
        assert bench.peer.questions == []

    on_bench(tmp_path, work)


def test_no_answer_in_time_is_a_deadline(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.silence()
        with pytest.raises(DeadlineError, match=r"no answer within 0\.05 s"):
            await bench.ask()

    on_bench(tmp_path, work, timeout_s=0.05)


def test_a_failure_of_the_control_plane_is_told(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.answer(RuntimeError("broken there"))
        with pytest.raises(UnavailableError, match=r"UNKNOWN: .*broken there"):
            await bench.ask()

    on_bench(tmp_path, work)


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.UNIMPLEMENTED], ids=lambda code: code.name)
def test_a_status_of_the_control_plane_is_a_failure_of_it(tmp_path: Path, code: grpc.StatusCode) -> None:
    async def work(bench: Bench) -> None:
        async def query(_request: Any, context: Any) -> Response:
            await context.abort(code, "no")
            return Response()

        bench.peer._query = query  # type: ignore[method-assign,assignment]
        with pytest.raises(UnavailableError):
            await bench.ask()

    on_bench(tmp_path, work)


def test_a_channel_closed_under_it_is_a_failure_and_no_cancellation(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.silence()
        asking = [asyncio.ensure_future(bench.queries.ask("a", f"n{number}.test", "A")) for number in range(3)]
        await until(lambda: len(bench.peer.questions) == 3)
        bench.queries.use(None)
        await bench.channel.close()
        for failure in await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 2):
            assert isinstance(failure, UnavailableError), failure
            assert "connection was closed" in str(failure)

    on_bench(tmp_path, work)


def test_a_closed_channel_still_in_use_is_a_failure_too(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.channel.close()
        with pytest.raises(UnavailableError):
            await bench.ask()

    on_bench(tmp_path, work)


def test_whoever_asks_may_go_away(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.silence()
        asking = asyncio.ensure_future(bench.queries.ask("a", "pypi.org", "A"))
        await until(lambda: bench.peer.questions)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    on_bench(tmp_path, work)


def test_questions_in_the_air_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_QUERIES", 4)
    monkeypatch.setattr(module, "MAX_FREE", 100)

    async def work(bench: Bench) -> None:
        release = bench.silence()
        asking = [asyncio.ensure_future(bench.ask(str(number))) for number in range(4)]
        await until(lambda: len(bench.peer.questions) == 4)
        with pytest.raises(ExhaustedError, match="4 questions wait"):
            await bench.ask("another")
        release.set()
        assert all(decision.allow for decision in await asyncio.gather(*asking))
        assert (await bench.ask("another")).allow

    on_bench(tmp_path, work)


def test_the_flood_of_one_leaves_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_QUERIES", 5)
    monkeypatch.setattr(module, "MAX_FREE", 3)

    async def work(bench: Bench) -> None:
        release = bench.silence()
        asking = [asyncio.ensure_future(bench.ask("greedy")) for _ in range(3)]
        await until(lambda: len(bench.peer.questions) == 3)
        with pytest.raises(ExhaustedError):
            await bench.ask("greedy")
        asking.append(asyncio.ensure_future(bench.ask("modest")))
        await until(lambda: len(bench.peer.questions) == 4)
        with pytest.raises(ExhaustedError):
            await bench.ask("modest")
        release.set()
        await asyncio.gather(*asking)

    on_bench(tmp_path, work)
