"""The program inside a workload that asks its DNS server: patiently, or as greedily as it can.

Run by `greedy.Guest` with Python's standard library alone. Argument 1 is the CPU it stays on, 2 and 3 are host and port
of the server. One JSON line per request, `{"do": method, …}`, and one per answer; what is greedy goes on until its
limit, if it has one, or until there is something to read.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

Answer = dict[str, Any]

LOST_S = 2.0  # after which a question is taken as lost
BURST = 64  # datagrams between two looks at whether to end
HEADER = struct.Struct("!HHHHHH")


def query(name: str, number: int) -> bytes:
    """Build a question for A records."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return HEADER.pack(number & 0xFFFF, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def told_to_end() -> bool:
    """Tell whether there is something to read."""
    return bool(select.select([0], [], [], 0)[0])


class Guest:
    """Each public method is one request."""

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET

    def _udp(self) -> socket.socket:
        sock = socket.socket(self._family, socket.SOCK_DGRAM)
        sock.connect(self._server)
        return sock

    def ask(self, names: list[str]) -> Answer:
        """Ask one question after the other, again where no answer comes, as resolvers do.

        Tells the microseconds that each took, the codes that were answered, and how many questions were lost.
        """
        taken: list[float] = []
        codes: Counter[int] = Counter()
        lost = 0
        with self._udp() as sock:
            sock.settimeout(LOST_S)
            for number, name in enumerate(names):
                asked = query(name, number)
                began = time.perf_counter_ns()
                sock.send(asked)
                answer = b""
                while answer[:2] != asked[:2]:
                    try:
                        answer = sock.recv(512)
                    except TimeoutError:
                        lost += 1
                        sock.send(asked)
                taken.append((time.perf_counter_ns() - began) / 1000)
                codes[answer[3] & 15] += 1
        return {"us": taken, "codes": codes, "lost": lost}

    def names(self, pattern: str, first: int, count: int, window: int, *, again: bool = False) -> Answer:
        """Have so many numbered names resolved, so many at once, or them again and again.

        Tells how many were asked for, and which codes answered.
        """
        codes: Counter[int] = Counter()
        began = answered = time.monotonic()
        asked = waiting = 0
        with self._udp() as sock:
            sock.setblocking(False)
            while (again or asked < count or waiting) and not told_to_end():
                while waiting < window and (again or asked < count):
                    sock.send(query(pattern.format(first + asked % count), asked))
                    asked, waiting = asked + 1, waiting + 1
                select.select([sock], [], [], 0.1)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        codes[sock.recv(512)[3] & 15] += 1
                        waiting, answered = waiting - 1, time.monotonic()
                if time.monotonic() > answered + LOST_S:
                    waiting, answered = 0, time.monotonic()
        return {"count": asked, "codes": codes, "seconds": round(answered - began, 1)}

    def garbage(self) -> Answer:
        """Send what is no DNS message."""
        pool = [os.urandom(size) for size in (0, 1, 2, 11, 12, 13, 40, 100, 500, 1400)]
        return self._flood(pool)

    def known(self, name: str) -> Answer:
        """Ask the same question as fast as it goes, and read no answer."""
        return self._flood([query(name, number) for number in range(BURST)])

    def denied(self, pattern: str) -> Answer:
        """Ask for ever new names, without waiting for answers."""

        def fresh() -> Iterator[bytes]:
            number = 0
            while True:
                yield query(pattern.format(number), number)
                number += 1

        return self._flood(fresh())

    def packets(self, device: str, frame: str) -> Answer:
        """Send the same frame, given in hex, out of a device as fast as it goes."""
        octets, count = bytes.fromhex(frame), 0
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
            sock.bind((device, 0))
            while not told_to_end():
                for _ in range(BURST):
                    with contextlib.suppress(OSError):
                        sock.send(octets)
                count += BURST
        return {"count": count, "codes": {}}

    def _flood(self, datagrams: list[bytes] | Iterator[bytes]) -> Answer:
        count = 0
        with self._udp() as sock:
            while not told_to_end():
                batch = datagrams if isinstance(datagrams, list) else [next(datagrams) for _ in range(BURST)]
                for datagram in batch:
                    with contextlib.suppress(OSError):
                        sock.send(datagram)
                count += len(batch)
        return {"count": count, "codes": {}}

    def stream(self, name: str) -> Answer:
        """Write the same question down TCP connections without end, and read the answers as they come."""
        message = query(name, 1)
        piece = (len(message).to_bytes(2, "big") + message) * 1000
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket.create_connection(self._server)) for _ in range(8)]
            sent = dict.fromkeys(socks, 0)
            for sock in socks:
                sock.setblocking(False)
            while not told_to_end():
                reading, writing, _ = select.select(socks, socks, [], 0.1)
                for sock in reading:
                    with contextlib.suppress(BlockingIOError):
                        if not sock.recv(1 << 16):
                            raise ConnectionError("the server closed a connection that asks")
                for sock in writing:
                    with contextlib.suppress(BlockingIOError):
                        sent[sock] += sock.send(piece[sent[sock] % len(piece) :])
        return {"count": sum(sent.values()) // (len(message) + 2), "codes": {}}

    def wide(self, pattern: str, names: int, window: int) -> Answer:
        """Ask for names with very many addresses over TCP connections, some at once on each, and read the answers."""
        codes: Counter[int] = Counter()
        asked = 0
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket.create_connection(self._server)) for _ in range(8)]
            read = {sock: bytearray() for sock in socks}
            waiting = dict.fromkeys(socks, 0)
            for sock in socks:
                sock.settimeout(LOST_S)
            while not told_to_end():
                for sock in socks:
                    while waiting[sock] < window:
                        message = query(pattern.format(asked % names), asked)
                        sock.sendall(len(message).to_bytes(2, "big") + message)
                        asked, waiting[sock] = asked + 1, waiting[sock] + 1
                for sock in select.select(socks, [], [], 0.1)[0]:
                    if not (data := sock.recv(1 << 16)):
                        raise ConnectionError("the server closed a connection that asks")
                    got = read[sock]
                    got += data
                    while len(got) > 2 and len(got) >= (size := int.from_bytes(got[:2], "big")) + 2:
                        codes[got[5] & 15] += 1
                        waiting[sock] -= 1
                        del got[: size + 2]
        return {"count": asked, "codes": codes}

    def connections(self, count: int, at_once: int) -> Answer:
        """Open TCP connections, keep each until the server closes it, and say nothing on them.

        `count` 0: until there is something to read. Tells how many were opened, and how many the server closed.
        """
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        poll = select.epoll()
        held: dict[int, socket.socket] = {}
        opened = closed = 0
        while not told_to_end() and (not count or opened < count):
            for _ in range(min(at_once - len(held), BURST)):
                opened += 1
                sock = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                sock.connect_ex(self._server)
                held[sock.fileno()] = sock
                poll.register(sock.fileno(), select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR)
            for fd, _ in poll.poll(0.01, 4 * BURST):
                poll.unregister(fd)
                held.pop(fd).close()
                closed += 1
        return {"count": opened, "codes": {}, "closed": closed}


def main() -> None:
    """Serve requests until standard input closes."""
    os.sched_setaffinity(0, {int(sys.argv[1])})
    guest = Guest(sys.argv[2], int(sys.argv[3]))
    sys.stdout.write(json.dumps("ready") + "\n")
    sys.stdout.flush()
    # Unbuffered: what `select` does not see here has not been written.
    with open(0, "rb", buffering=0) as requests:
        while line := requests.readline():
            if not line.strip():
                continue
            request = json.loads(line)
            method: Callable[..., Answer] = getattr(guest, request.pop("do"))
            sys.stdout.write(json.dumps(method(**request)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
