"""The program that floods hands whole batches to the kernel: what is measured is the path, not system calls."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from blaster import Source

PACKETS = [f"packet {number:03}".encode() for number in range(64)]


@pytest.fixture
def receiver() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


@pytest.fixture
def source(receiver: socket.socket) -> Iterator[Source]:
    made = Source({"to": receiver.getsockname(), "packets": [packet.hex() for packet in PACKETS]})
    yield made
    made.close()


def test_one_call_sends_a_whole_batch(source: Source, receiver: socket.socket) -> None:
    assert source.hand_over() == len(PACKETS)
    assert [receiver.recv(100) for _ in PACKETS] == PACKETS


def test_a_batch_may_be_sent_from_any_packet_on(source: Source, receiver: socket.socket) -> None:
    assert source.hand_over(61) == 3
    assert [receiver.recv(100) for _ in range(3)] == PACKETS[61:]
