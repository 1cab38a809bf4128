"""QueryDns: who asks, what `answer_dns` is given, and the statuses where there is no answer."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any

import grpc
import grpc.aio
import pytest
from tests.unit.controlplane.fake_daemon import FakeDaemon, until
from tests.unit.controlplane.harness import Policies, all_are, run, serving

from netfence.controlplane import Attachment, Daemon, Limits, NameAnswer, Peer, State
from netfence.controlplane import server as server_module
from netfence.errors import InvalidError


async def status_of(daemon: FakeDaemon, attachment_id: str, domain: str = "pypi.org.") -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await daemon.query(attachment_id, domain)
    return caught.value.code()


def test_answer_is_the_handlers() -> None:
    asked: list[tuple[str, dict[str, str], str, str]] = []

    async def answer_dns(attachment: Attachment, name: str, qtype: str) -> NameAnswer:
        asked.append((attachment.id, dict(attachment.metadata), name, qtype))
        return NameAnswer(allow=True, add_to_filter=True, ips=["192.0.2.1", "2001:db8::1"], ttl_s=60)

    async def test() -> None:
        async with (
            serving(Policies(), answer_dns=answer_dns) as plane,
            FakeDaemon(plane.address, {"a": {"tenant": "acme"}}) as daemon,
        ):
            response = await daemon.query("a", "pypi.org.", "AAAA")
            assert asked == [("a", {"tenant": "acme"}, "pypi.org", "AAAA")]
            assert response.allow
            assert response.add_to_filter
            assert list(response.ips) == ["192.0.2.1", "2001:db8::1"]
            assert response.ttl_seconds == 60

    run(test())


@pytest.mark.parametrize(
    ("ips", "ttl_s"),
    [
        (["nowhere"], 0),
        ([], -1),
        ([], 2**32),
        ([], 1.5),
        ([], "60"),
        (["192.0.2.1/32"], 0),
        (["fe80::1%eth0"], 0),
        ([ipaddress.ip_address("192.0.2.1")], 0),
    ],
)
def test_bad_answer_is_refused_where_it_is_made(ips: Any, ttl_s: Any) -> None:
    with pytest.raises(InvalidError):
        NameAnswer(allow=True, ips=ips, ttl_s=ttl_s)


async def deny(_attachment: Attachment, _name: str, _qtype: str) -> NameAnswer:
    return NameAnswer(allow=False)


def test_attachment_can_ask_as_soon_as_it_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subscribed and the question come on streams of their own; the question may be faster."""
    monkeypatch.setattr(server_module, "ARRIVAL_S", 30)

    async def test() -> None:
        policies = Policies()
        policies.gate.clear()  # even before its policy is decided
        async with serving(policies, answer_dns=deny) as plane, FakeDaemon(plane.address) as daemon:
            question = asyncio.ensure_future(daemon.query("new", "pypi.org."))
            await until(lambda: plane._book._awaited)
            await daemon.attach("new")
            assert not (await question).allow
            assert not plane._book._awaited

    run(test())


def test_unknown_attachment_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ARRIVAL_S", 0.05)

    async def test() -> None:
        async with serving(Policies(), answer_dns=deny) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            assert await status_of(daemon, "nobody") is grpc.StatusCode.NOT_FOUND
            assert not plane._book._awaited
            assert not (await daemon.query("a", "pypi.org.")).allow

    run(test())


def test_questions_about_unknown_ids_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netfence.controlplane.book.MAX_AWAITED_QUERIES", 3)
    monkeypatch.setattr(server_module, "ARRIVAL_S", 30)

    async def test() -> None:
        async with serving(Policies(), answer_dns=deny) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            waiting = [asyncio.ensure_future(daemon.query(f"n{number}", "x.")) for number in range(3)]
            await until(lambda: plane._book._awaiting == 3)
            assert await status_of(daemon, "one-more") is grpc.StatusCode.NOT_FOUND
            for question in waiting:
                question.cancel()
            await asyncio.wait(waiting)
            await until(lambda: plane._book._awaiting == 0)
            assert not plane._book._awaited

    run(test())


def test_without_a_handler_it_is_unimplemented() -> None:
    async def test() -> None:
        async with serving(Policies()) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            assert await status_of(daemon, "a") is grpc.StatusCode.UNIMPLEMENTED

    run(test())


@pytest.mark.parametrize("answer", [ValueError("secret detail"), None, "yes"], ids=["raises", "none", "text"])
def test_failing_handler_is_internal(answer: Any) -> None:
    async def answer_dns(_attachment: Attachment, name: str, _qtype: str) -> Any:
        if name == "good.example":
            return NameAnswer(allow=True)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def test() -> None:
        async with (
            serving(Policies(), answer_dns=answer_dns) as plane,
            FakeDaemon(plane.address, {"a": {}}) as daemon,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await daemon.query("a", "bad.example.")
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in (caught.value.details() or "")
            assert (await daemon.query("a", "good.example.")).allow
            await until(lambda: all_are(plane, State.IN_SYNC, 1))

    run(test())


def test_garbage_is_refused() -> None:
    async def test() -> None:
        async with serving(Policies(), answer_dns=deny) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            call = daemon._channel.unary_unary("/netfence.v1.ControlPlane/QueryDns")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\xff\xff")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(test())


def test_equal_ids_of_two_daemons_are_told_apart_by_the_connection() -> None:
    async def answer_dns(attachment: Attachment, _name: str, _qtype: str) -> NameAnswer:
        return NameAnswer(allow=attachment.daemon.id == "daemon-1")

    async def test() -> None:
        async with (
            serving(Policies(), answer_dns=answer_dns) as plane,
            FakeDaemon(plane.address, {"a": {}}) as one,
            FakeDaemon(plane.address, {"a": {}}, daemon_id="daemon-2") as other,
            FakeDaemon(plane.address, {}, daemon_id="daemon-3") as third,
        ):
            assert (await one.query("a", "x.")).allow
            assert not (await other.query("a", "x.")).allow
            assert await status_of(third, "a") is grpc.StatusCode.NOT_FOUND

    run(test())


def test_questions_at_once_are_bounded_per_connection() -> None:
    """The surplus waits at its client; at the very bound gRPC may also refuse one."""
    gate = asyncio.Event()
    under_way = most = 0

    async def answer_dns(_attachment: Attachment, _name: str, _qtype: str) -> NameAnswer:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await gate.wait()
        under_way -= 1
        return NameAnswer(allow=True)

    async def test() -> None:
        limits = Limits(max_calls_per_connection=5)
        async with (
            serving(Policies(), answer_dns=answer_dns, limits=limits) as plane,
            FakeDaemon(plane.address, {"a": {}}) as daemon,
        ):
            questions = [asyncio.ensure_future(daemon.query("a", f"n{number}.")) for number in range(20)]
            await until(lambda: under_way == 4, lambda: f"{under_way} under way")  # and the stream
            gate.set()
            answers = await asyncio.gather(*questions, return_exceptions=True)
            assert sum(not isinstance(answer, BaseException) and answer.allow for answer in answers) >= 4
            assert most == 4
            assert (await daemon.query("a", "after.")).allow

    run(test())


def test_name_is_in_lower_case() -> None:
    async def answer_dns(_attachment: Attachment, name: str, _qtype: str) -> NameAnswer:
        return NameAnswer(allow=name == "pypi.org")

    async def test() -> None:
        async with serving(Policies(), answer_dns=answer_dns) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            assert (await daemon.query("a", "PyPI.org.")).allow

    run(test())


def test_namesake_that_is_away_does_not_answer() -> None:
    async def answer_dns(attachment: Attachment, _name: str, _qtype: str) -> NameAnswer:
        return NameAnswer(allow=attachment.daemon.id == "now")

    async def test() -> None:
        async with (
            serving(Policies(), answer_dns=answer_dns) as plane,
            FakeDaemon(plane.address, {"a": {}}, daemon_id="before") as old,
            FakeDaemon(plane.address, {"a": {}}, daemon_id="now"),
            FakeDaemon(plane.address, {}, daemon_id="asks") as asks,
        ):
            await old.drop()
            await until(lambda: sum(status.connected for status in plane.daemons) == 2)
            assert (await asks.query("a", "x.")).allow

    run(test())


def test_who_is_not_admitted_as_the_daemon_may_not_ask_for_it() -> None:
    def admit(daemon: Daemon, peer: Peer) -> bool:
        return peer.token == daemon.id

    async def test() -> None:
        async with (
            serving(Policies(), answer_dns=deny, admit=admit, tokens=["one", "two"]) as plane,
            FakeDaemon(plane.address, {"a": {}}, daemon_id="one", token="one") as one,
            FakeDaemon(plane.address, {}, daemon_id="two", token="two") as two,
        ):
            assert not (await one.query("a", "x.")).allow
            assert await status_of(two, "a") is grpc.StatusCode.PERMISSION_DENIED

    run(test())
