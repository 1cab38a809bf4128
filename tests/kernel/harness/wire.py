"""Put packets in at one end, count exactly how many come out at the other.

A packet that must *not* arrive cannot be waited for. Instead a sentinel (an ARP frame, which every policy lets pass)
follows the packets, and once it has arrived nothing that was before it can still come: a veth hands packets to the
receiving CPU's queue, which is first in, first out, and every sender of the harness stays on one CPU (`harness_cpu`).
No sleep, no guess: a sentinel that does not arrive is an error of its own (`LostSentinelError`).

Packets that native XDP has seen on a veth come by another queue than the sentinel behind the fence: it is sent only
after one that followed them has come through that (`barrier`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from harness.deadline import SLOWNESS
from harness.netns import NetNs

ETH_P_ALL = 3
ETH_P_ARP = 0x0806
SOL_PACKET = 263
PACKET_IGNORE_OUTGOING = 23
SO_ATTACH_FILTER = 26
BPF_LD_LEN, BPF_JEQ, BPF_RET = 0x80, 0x15, 0x06  # of classic BPF, see linux/bpf_common.h
RECEIVE_BUFFER = 8 << 20  # bytes: thousands of small frames between two reads
TIMEOUT_S = 5.0 * SLOWNESS
BROADCAST = b"\xff" * 6


class LostSentinelError(AssertionError):
    """The packet that always passes did not arrive: the path is broken, and nothing can be said about the others."""


def harness_cpu() -> int:
    """Choose the CPU that this test process and its agents send from."""
    cpus = sorted(_ALLOWED_CPUS)
    return cpus[os.getpid() % len(cpus)]


_ALLOWED_CPUS = os.sched_getaffinity(0)


@contextmanager
def on_harness_cpu() -> Iterator[None]:
    """Keep the calling thread on the harness's CPU while it sends."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {harness_cpu()})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True, slots=True)
class Tag:
    """What makes a packet ours: a unique payload and, for frames too short to carry it, a unique source MAC."""

    unique: bytes = field(default_factory=lambda: secrets.token_bytes(5))

    @property
    def payload(self) -> bytes:
        """Bytes that occur in no other packet (34, printable), of which every tag's add up to the same checksum."""
        text = self.unique.hex().encode()
        return b"netfence-tag:" + text + bytes(ord("0") + ord("f") - octet for octet in text) + b";"

    @property
    def mac(self) -> bytes:
        """A locally administered unicast address (6 bytes)."""
        return b"\x02" + self.unique

    def marks(self, frame: bytes) -> bool:
        """Tell whether this frame carries the tag."""
        return self.payload in frame or frame[6:12] == self.mac


class Sender(Protocol):
    """An end where packets are put in."""

    def send(self, packet: bytes) -> None:
        """Send one packet as it is. A packet that the kernel refuses because a filter dropped it is no error."""


class PacketSender:
    """Sends whole frames out of an interface (AF_PACKET)."""

    def __init__(self, netns: NetNs, ifname: str) -> None:
        with netns.inside():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.bind((ifname, 0))

    def send(self, packet: bytes) -> None:
        """Send one frame; ENOBUFS is how an egress filter's drop looks to the sender."""
        try:
            self._socket.send(packet)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class Sniffer:
    """Listens to what arrives on an interface, from its construction on."""

    def __init__(self, netns: NetNs, ifname: str) -> None:
        self._where = f"{ifname} in {netns.name}"
        with netns.inside():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._socket.bind((ifname, ETH_P_ALL))
        self._socket.setblocking(False)  # the socket module's own signature

    def ignore(self, *lengths: int) -> None:
        """Take no more frames of these lengths (bytes): a flood of them cannot fill the buffer between two reads."""
        steps = [_step(BPF_LD_LEN, 0)]
        for left, length in zip(range(len(lengths), 0, -1), lengths, strict=True):
            steps.append(_step(BPF_JEQ, length, when=left))
        steps += [_step(BPF_RET, 0xFFFF), _step(BPF_RET, 0)]
        program = ctypes.create_string_buffer(b"".join(steps))
        self._socket.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(steps), ctypes.addressof(program))
        )

    def frames(self, until: Callable[[bytes], bool], timeout_s: float = TIMEOUT_S) -> Iterator[bytes]:
        """Give every frame up to and with the first for which `until` is true; TimeoutError if none comes in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            ready, _, _ = select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                message = f"nothing more on {self._where} for {timeout_s:g} s"
                raise TimeoutError(message)
            frame = self._socket.recv(65536)
            yield frame
            if until(frame):
                return

    def count(self, tag: Tag, sentinel: Tag, timeout_s: float = TIMEOUT_S) -> int:
        """Count the frames with `tag` that came before the one with `sentinel`."""
        try:
            return sum(tag.marks(frame) for frame in self.frames(sentinel.marks, timeout_s))
        except TimeoutError as error:
            message = f"the sentinel did not arrive on {self._where}"
            raise LostSentinelError(message) from error

    def wait(self, tag: Tag, timeout_s: float = TIMEOUT_S) -> bytes:
        """Wait for one frame with `tag` and return it."""
        *_, last = self.frames(tag.marks, timeout_s)
        return last

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _step(code: int, operand: int, when: int = 0) -> bytes:
    """Encode one instruction of classic BPF, which skips `when` others if its comparison is true."""
    return struct.pack("HBBI", code, when, 0, operand)


def arp_sentinel(tag: Tag) -> bytes:
    """Build a broadcast ARP request that nobody answers, with the tag behind it."""
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + tag.mac + bytes(4) + bytes(6) + bytes(4)
    return BROADCAST + tag.mac + struct.pack("!H", ETH_P_ARP) + body + tag.payload


class Meter:
    """Counts how many packets of a tag have come out, when the sending is over.

    `sentinel` sends frames towards the sniffer by a way that always passes: behind the fence, or through it. `barrier`
    returns when all that was sent before is as far as where the sentinel begins.
    """

    def __init__(self, sniffer: Sniffer, sentinel: Sender, barrier: Callable[[], None] = lambda: None) -> None:
        self._sniffer = sniffer
        self._sentinel = sentinel
        self._barrier = barrier

    def arrived(self, tag: Tag) -> int:
        """Count the packets with `tag` among everything sent from the harness's CPU until now."""
        self._barrier()
        end = Tag()
        with on_harness_cpu():
            self._sentinel.send(arp_sentinel(end))
        return self._sniffer.count(tag, end)

    def transmit(self, sender: Sender, tag: Tag, packets: Iterable[bytes]) -> int:
        """Send packets that carry `tag` and count how many arrive."""
        with on_harness_cpu():
            for packet in packets:
                sender.send(packet)
        return self.arrived(tag)
