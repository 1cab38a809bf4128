"""Resolving: order and failover of upstreams, lies of all kinds, TCP, merging, bounds (semantics.md 19)."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import pytest
from dnslib import RR, DNSRecord
from tests.unit.dns.world import PUBLIC, FakeUpstream, addresses, packed, policy, question, rcode, run, until, world

from netfence.dns import upstream as upstream_module
from netfence.dns.answer import Answer
from netfence.dns.cache import CacheKey
from netfence.dns.limits import MAX_BAD_DATAGRAMS
from netfence.dns.settings import DnsSettings
from netfence.dns.upstream import Resolver
from netfence.dns.wire import parse_query
from netfence.errors import ExhaustedError, NetfenceError, UnavailableError

ZONE = f"a.org. 300 IN A {PUBLIC}\n"
OTHER = "a.org. 300 IN A 93.184.216.99\n"


@asynccontextmanager
async def resolving(*upstreams: str, attempts: int = 1, timeout_s: float = 0.1) -> AsyncIterator[Resolver]:
    resolver = Resolver(DnsSettings(upstreams=upstreams, attempts=attempts, timeout_s=timeout_s))
    try:
        yield resolver
    finally:
        await resolver.close()


async def resolve(resolver: Resolver, *upstreams: str, name: str = "a.org", owner: object = None) -> Answer:
    """Await one resolution; raises what it ended with."""
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def done(result: Answer | NetfenceError) -> None:
        if isinstance(result, Answer):
            future.set_result(result)
        else:
            future.set_exception(result)

    query = parse_query(question(name))
    resolver.resolve(CacheKey(upstreams, query.key, do=False, cd=False), query, owner, done)
    return await future


def closed_port() -> str:
    """Return an upstream where nobody listens."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def test_first_upstream_is_asked_alone_while_it_answers() -> None:
    async def go() -> None:
        first, second = FakeUpstream(ZONE), FakeUpstream(OTHER)
        async with first.serving(), second.serving(), resolving() as resolver:
            answer = await resolve(resolver, first.text, second.text)
            assert answer.addresses == packed(PUBLIC)
            assert second.seen == []
            assert len(resolver) == 0

    run(go())


@pytest.mark.parametrize("failure", ["silent", "refused-port", "servfail", "refused", "garbage", "bad-ext-rcode"])
def test_next_upstream_is_asked_on(failure: str) -> None:
    async def go() -> None:
        first, second = FakeUpstream(ZONE), FakeUpstream(OTHER)
        async with first.serving(), second.serving(), resolving() as resolver:
            text = first.text
            if failure == "silent":
                first.udp = lambda _query: []
            elif failure == "refused-port":
                text = closed_port()
            elif failure in ("servfail", "refused"):
                first.rcode = {"servfail": 2, "refused": 5}[failure]
            elif failure == "garbage":
                first.udp = lambda query: [first.answer(query)[:-9]]
            else:
                first.udp = lambda query: [first.answer(query)[:-6] + b"\x01" + first.answer(query)[-5:]]
            answer = await resolve(resolver, text, second.text)
            assert answer.addresses == packed("93.184.216.99")

    run(go())


def test_nxdomain_of_the_first_upstream_is_an_answer() -> None:
    async def go() -> None:
        first, second = FakeUpstream(rcode=3), FakeUpstream(OTHER)
        async with first.serving(), second.serving(), resolving() as resolver:
            assert (await resolve(resolver, first.text, second.text)).rcode == 3
            assert second.seen == []

    run(go())


def test_upstreams_that_did_not_answer_are_asked_again_those_that_failed_are_not() -> None:
    async def go() -> None:
        first, second = FakeUpstream(), FakeUpstream(rcode=2)
        first.udp = lambda query: [] if len(first.seen) == 1 else [first.answer(query)]
        first.set_zone(ZONE)
        async with first.serving(), second.serving(), resolving(attempts=2) as resolver:
            assert (await resolve(resolver, first.text, second.text)).addresses == packed(PUBLIC)
            assert (len(first.seen), len(second.seen)) == (2, 1)

    run(go())


def test_servfail_from_all_is_a_failure_that_names_the_last() -> None:
    async def go() -> None:
        first, second = FakeUpstream(rcode=2), FakeUpstream(rcode=5)
        async with first.serving(), second.serving(), resolving(attempts=3) as resolver:
            with pytest.raises(UnavailableError, match=rf"{second.text}: .*rcode 5"):
                await resolve(resolver, first.text, second.text)
            assert (len(first.seen), len(second.seen)) == (1, 1)

    run(go())


@pytest.mark.parametrize("lie", ["id", "question", "question-type", "not-a-response", "no-question", "stump"])
def test_datagrams_that_do_not_match_are_ignored(lie: str) -> None:
    def lies(honest: bytes) -> bytes:
        if lie == "id":
            return bytes([honest[0] ^ 1]) + honest[1:]
        if lie == "question":
            return honest[:13] + b"b" + honest[14:]
        if lie == "question-type":
            return honest[:20] + b"\x1c" + honest[21:]
        if lie == "not-a-response":
            return honest[:2] + b"\x01" + honest[3:]
        if lie == "no-question":
            return honest[:4] + b"\0\0" + honest[6:12]
        return honest[:1]

    async def go() -> None:
        upstream, wrong = FakeUpstream(ZONE), FakeUpstream("a.org. 300 IN A 93.184.216.66\n")
        upstream.udp = lambda query: [lies(wrong.answer(query)), lies(wrong.answer(query)), upstream.answer(query)]
        async with upstream.serving(), resolving(timeout_s=1.0) as resolver:
            assert (await resolve(resolver, upstream.text)).addresses == packed(PUBLIC)
            assert resolver.udp.mismatches == 2
        async with upstream.serving(), resolving(timeout_s=0.05) as resolver:
            upstream.udp = lambda query: [lies(wrong.answer(query))]
            with pytest.raises(UnavailableError, match="timed out"):
                await resolve(resolver, upstream.text)

    run(go())


def test_answers_from_another_port_or_address_are_not_taken() -> None:
    async def go() -> None:
        upstream = FakeUpstream(ZONE)
        wrong = FakeUpstream("a.org. 300 IN A 93.184.216.66\n")
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as address,
        ):
            port.bind(("127.0.0.1", 0))

            def lie(query: bytes) -> Iterable[bytes]:
                to = ("127.0.0.1", upstream.peers[-1])
                port.sendto(wrong.answer(query), to)
                address.sendto(wrong.answer(query), to)
                return [upstream.answer(query)]

            upstream.udp = lie
            async with upstream.serving(), resolving(timeout_s=1.0) as resolver:
                address.bind(("127.0.0.2", upstream.port))  # the right port of the wrong host
                assert (await resolve(resolver, upstream.text)).addresses == packed(PUBLIC)

    run(go())


def test_source_port_and_id_differ_per_query() -> None:
    async def go() -> None:
        upstream = FakeUpstream(ZONE)
        async with upstream.serving(), resolving() as resolver:
            for n in range(40):
                await resolve(resolver, upstream.text, name=f"n{n}.org")
            assert len(set(upstream.peers)) > 35
            idents = [seen[:2] for seen in upstream.seen]
            assert len(set(idents)) > 35
            steps = {b - a for a, b in zip(upstream.peers, upstream.peers[1:], strict=False)}
            assert len(steps) > 20  # not counting up

    run(go())


def test_somebody_guessing_sends_us_to_tcp() -> None:
    async def go() -> None:
        upstream, wrong = FakeUpstream(ZONE), FakeUpstream("a.org. 300 IN A 93.184.216.66\n")
        guesses = range(1, MAX_BAD_DATAGRAMS + 1)
        # The right one comes too late to be taken over UDP.
        upstream.udp = lambda query: [
            *(struct.pack("!H", int.from_bytes(query[:2], "big") ^ n) + wrong.answer(query)[2:] for n in guesses),
            wrong.answer(query),
        ]
        async with upstream.serving(), resolving(timeout_s=1.0) as resolver:
            assert (await resolve(resolver, upstream.text)).addresses == packed(PUBLIC)
            assert len(upstream.seen_tcp) == 1

    run(go())


def test_guessing_fills_no_log(capsys: pytest.CaptureFixture[str]) -> None:
    async def go() -> None:
        upstream = FakeUpstream(ZONE)
        upstream.udp = lambda query: [bytes([query[0] ^ 1]) + upstream.answer(query)[1:]] * MAX_BAD_DATAGRAMS
        async with upstream.serving(), resolving(timeout_s=1.0) as resolver:
            for _ in range(3):
                assert (await resolve(resolver, upstream.text)).addresses == packed(PUBLIC)
            assert len(upstream.seen_tcp) == 3

    run(go())
    assert capsys.readouterr().out.count("dns_answers_do_not_match") == 1


def cut(upstream: FakeUpstream) -> None:
    """Make an upstream cut its UDP answers."""

    def truncated(query: bytes) -> list[bytes]:
        data = bytearray(upstream.answer(query))
        data[2] |= 2
        return [bytes(data)]

    upstream.udp = truncated


def test_a_truncated_answer_is_asked_for_again_over_tcp() -> None:
    async def go() -> None:
        upstream = FakeUpstream("".join(f"a.org. 60 IN A 93.184.217.{n}\n" for n in range(200)))
        cut(upstream)
        async with upstream.serving(), resolving() as resolver:
            answer = await resolve(resolver, upstream.text)
            assert len(answer.addresses) == 200
            assert len(upstream.seen_tcp) == 1

    run(go())


@pytest.mark.parametrize("lie", ["close", "short", "wrong-id", "wrong-question", "truncated", "zero", "silent"])
def test_a_lying_tcp_upstream_is_left_for_the_next(lie: str) -> None:
    async def go() -> None:
        first, second = FakeUpstream(ZONE), FakeUpstream(OTHER)
        cut(first)

        def script(query: bytes) -> bytes | None:
            data = first.answer(query)
            if lie == "close":
                return None
            if lie == "short":
                return struct.pack("!H", len(data) + 5) + data
            if lie == "zero":
                return b"\0\0"
            if lie == "silent":
                return b""
            if lie == "wrong-id":
                data = bytes([data[0] ^ 1]) + data[1:]
            elif lie == "wrong-question":
                data = data[:13] + b"b" + data[14:]
            else:
                data = data[:2] + bytes([data[2] | 2]) + data[3:]
            return struct.pack("!H", len(data)) + data

        first.tcp = script
        async with first.serving(), second.serving(), resolving() as resolver:
            assert (await resolve(resolver, first.text, second.text)).addresses == packed("93.184.216.99")

    run(go())


@pytest.mark.parametrize(
    "lie", ["loop", "forward-pointer", "oversized", "counts", "rdlength", "trailing", "long-chain"]
)
def test_malformed_answers_are_never_used_and_never_a_crash(lie: str) -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            honest = w.upstream.answer

            def lies(query: bytes) -> Iterable[bytes]:
                head = query[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + query[12:23]
                if lie == "loop":
                    return [head + b"\xc0\x17" + b"\0\5\0\1\0\0\0\x3c\0\2\xc0\x17"]
                if lie == "forward-pointer":
                    return [head + b"\xc0\x30" + b"\0\1\0\1\0\0\0\x3c\0\4\x5d\xb8\xd8\x22"]
                if lie == "oversized":
                    return [honest(query) + bytes(8000)]
                if lie == "counts":
                    return [honest(query)[:6] + b"\xff\xff" + honest(query)[8:]]
                if lie == "rdlength":
                    return [head + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\3\x5d\xb8\xd8"]
                if lie == "trailing":
                    return [honest(query) + b"x"]
                chain = "".join(f"c{n}.org. 60 IN CNAME c{n + 1}.org.\n" for n in range(20))
                w.upstream.set_zone(f"a.org. 60 IN CNAME c0.org.\n{chain}c20.org. 60 IN A {PUBLIC}")
                return [honest(query)]

            w.upstream.udp = lies
            reply = await w.ask("a.org")
            assert (rcode(reply), addresses(reply)) == ("SERVFAIL", [])
            assert w.gate.learned == []
            w.upstream.set_zone(ZONE)
            w.upstream.udp = lambda query: [honest(query)]
            assert addresses(await w.ask("a.org")) == [PUBLIC]  # and none of it was cached

    run(go())


def test_an_opt_record_in_front_of_others_is_taken_out() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            honest = w.upstream.answer

            def shuffled(query: bytes) -> Iterable[bytes]:
                record = DNSRecord.parse(honest(query))
                record.ar += RR.fromZone("x.org. 60 IN A 93.184.216.35")
                record.header.ar = len(record.ar)
                return [bytes(record.pack())]

            w.upstream.udp = shuffled
            reply = await w.ask("a.org")
            assert addresses(reply) == [PUBLIC]
            assert [rr.rtype for rr in reply.ar] == [1, 41]  # one OPT, ours, at the end

    run(go())


def test_equal_questions_share_a_flight_and_each_gets_the_answer() -> None:
    async def go() -> None:
        upstream = FakeUpstream(ZONE)
        upstream.hold = asyncio.Event()
        async with upstream.serving(), resolving(timeout_s=2.0) as resolver:
            waiting = [asyncio.ensure_future(resolve(resolver, upstream.text, owner=n)) for n in range(3)]
            await until(lambda: len(upstream.seen) == 1)
            assert len(resolver) == 1
            upstream.hold.set()
            answers = await asyncio.gather(*waiting)
            assert answers[0] is answers[1] is answers[2]
            assert (len(upstream.seen), len(resolver)) == (1, 0)

    run(go())


def test_the_greed_of_one_leaves_a_flight_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_module, "MAX_FREE_FLIGHTS", 3)
    monkeypatch.setattr(upstream_module, "MAX_FLIGHTS", 5)

    async def go() -> None:
        upstream = FakeUpstream(ZONE)
        upstream.hold = asyncio.Event()
        async with upstream.serving(), resolving(timeout_s=2.0) as resolver:
            held = [
                asyncio.ensure_future(resolve(resolver, upstream.text, name=f"g{n}.org", owner="greedy"))
                for n in range(3)
            ]
            await until(lambda: len(resolver) == 3)
            with pytest.raises(ExhaustedError):
                await resolve(resolver, upstream.text, name="g9.org", owner="greedy")
            held += [
                asyncio.ensure_future(resolve(resolver, upstream.text, name=f"o{n}.org", owner=n)) for n in range(2)
            ]
            await until(lambda: len(resolver) == 5)
            with pytest.raises(ExhaustedError):
                await resolve(resolver, upstream.text, name="last.org", owner="last")
            upstream.hold.set()
            await asyncio.gather(*held)
            assert len(resolver) == 0

    run(go())


def test_close_ends_what_is_in_the_air() -> None:
    async def go() -> None:
        upstream = FakeUpstream(ZONE)
        upstream.hold = asyncio.Event()
        async with upstream.serving():
            resolver = Resolver(DnsSettings(timeout_s=30.0))
            waiting = asyncio.ensure_future(resolve(resolver, upstream.text))
            await until(lambda: len(upstream.seen) == 1)
            await resolver.close()
            with pytest.raises(UnavailableError, match="stops"):
                await waiting

    run(go())


def test_a_bad_upstream_in_a_policy_is_an_error_not_a_crash() -> None:
    async def go() -> None:
        async with resolving() as resolver:
            with pytest.raises(UnavailableError, match="not an upstream"):
                await resolve(resolver, "ns.example.org")

    run(go())
