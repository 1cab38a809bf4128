"""Sockets towards upstreams: time-outs in order, descriptors given back, refusals of the kernel."""

from __future__ import annotations

import asyncio
import itertools
import socket
from pathlib import Path

import pytest
from tests.unit.dns.world import WAIT_S, FakeUpstream, question, run, until

from netfence.dns import exchange as exchange_module
from netfence.dns.exchange import TIMED_OUT, UdpExchanger, matches, new_id
from netfence.dns.settings import Upstream, upstream_of

QUERY = question("a.org")


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_every_descriptor_is_given_back() -> None:
    async def go() -> None:
        upstream = FakeUpstream("a.org. 60 IN A 93.184.216.34")
        async with upstream.serving():
            udp = UdpExchanger(0.05)
            results: list[str] = []
            udp.send(upstream_of(upstream.text), QUERY, QUERY[12:], lambda _data, why: results.append(why))
            await until(lambda: len(results) == 1)
            before = open_descriptors()
            turn = itertools.count()
            upstream.udp = lambda query: [upstream.answer(query)] if next(turn) % 2 else []
            for _ in range(50):
                udp.send(upstream_of(upstream.text), QUERY, QUERY[12:], lambda _data, why: results.append(why))
            await until(lambda: len(results) == 51)
            assert results.count("") == 26
            assert results.count(TIMED_OUT) == 25
            assert (len(udp), open_descriptors()) == (0, before)
            udp.close()

    run(go())


def test_a_burst_of_answers_leaves_the_loop_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "TAKE_S", 0.0)

    async def go() -> None:
        udp = UdpExchanger(5.0)
        count = 3 * exchange_module._BATCH
        results: list[str] = []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream:
            upstream.bind(("127.0.0.1", 0))
            upstream.settimeout(5)
            target = upstream_of(f"127.0.0.1:{upstream.getsockname()[1]}")
            for _ in range(count):
                udp.send(target, QUERY, QUERY[12:], lambda _data, why: results.append(why))
            for _ in range(count):  # all are there before the loop looks
                query, asker = upstream.recvfrom(512)
                upstream.sendto(query[:2] + b"\x81\x80" + query[4:], asker)
            steps = []
            async with asyncio.timeout(WAIT_S):
                while len(results) < count:
                    before = len(results)
                    await asyncio.sleep(0)
                    steps.append(len(results) - before)
        assert max(steps) == 1
        assert results == [""] * count
        udp.close()

    run(go())


def test_timeouts_run_from_each_sending() -> None:
    async def go() -> None:
        udp = UdpExchanger(0.1)
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            upstream = upstream_of(f"127.0.0.1:{silent.getsockname()[1]}")
            waits: list[float] = []
            for _ in range(3):
                sent = loop.time()
                udp.send(upstream, QUERY, QUERY[12:], lambda _d, _w, sent=sent: waits.append(loop.time() - sent))  # type: ignore[misc]
                await asyncio.sleep(0.03)
            await until(lambda: len(waits) == 3)
        assert all(0.09 <= wait < 0.5 for wait in waits)
        udp.close()

    run(go())


def test_a_refusal_of_the_kernel_is_an_os_error_at_once() -> None:
    async def go() -> None:
        udp = UdpExchanger(0.1)
        before = open_descriptors()
        with pytest.raises(PermissionError):
            udp.send(
                Upstream("broadcast", socket.AF_INET, ("255.255.255.255", 53)),
                QUERY,
                QUERY[12:],
                lambda _data, _why: None,
            )
        assert open_descriptors() <= before + 1  # the epoll instance
        udp.close()

    run(go())


def test_ids_are_two_octets_and_vary() -> None:
    assert len({new_id() for _ in range(100)}) > 90
    assert len(new_id()) == 2


@pytest.mark.parametrize("cut", range(0, 23, 4))
def test_a_stump_never_matches(cut: int) -> None:
    response = QUERY[:2] + b"\x81\x80" + QUERY[4:]
    assert matches(response, QUERY[:2], QUERY[12:])
    assert not matches(response[:cut], QUERY[:2], QUERY[12:])
