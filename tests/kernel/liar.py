"""A name server of the internet that lies: by the first label of the name that it is asked for.

A `Lie` makes datagrams and octets of a stream out of a `Question`; names without a lie are answered by `honest`.
Sockets are real, in the internet's namespace; `asked` tells what came, with the id and the port that it came from.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import dnslib

from harness.netns import NetNs
from harness.services import Server
from harness.topology import NAMESERVER4

PORT = 53
HONEST = "198.51.100.7"  # what `honest` says
QUESTION_NAME = b"\xc0\x0c"
IN = 1

Address: TypeAlias = tuple[str, int]
Datagrams: TypeAlias = Iterable[bytes | tuple[Address, bytes]]
"""What to send, from the name server's own address and port or from another."""

Stream: TypeAlias = Iterable[bytes | float]
"""What to write, and seconds to wait; the connection is closed at the end, or reset after `RESET`."""

RESET = -1.0
MAX_ASKED = 4096  # questions kept


def record(rtype: int, rdata: bytes, *, owner: bytes = QUESTION_NAME, ttl: int = 60, rclass: int = IN) -> bytes:
    """Make a record; its owner is the question's name unless told otherwise."""
    return owner + struct.pack("!HHIH", rtype, rclass, ttl, len(rdata)) + rdata


def a(address: str, *, owner: bytes = QUESTION_NAME, ttl: int = 60, rclass: int = IN) -> bytes:
    """Make an A record."""
    return record(dnslib.QTYPE.A, socket.inet_aton(address), owner=owner, ttl=ttl, rclass=rclass)


def cname(target: str, owner: str | None = None) -> bytes:
    """Make a CNAME record."""
    return record(dnslib.QTYPE.CNAME, wire(target), owner=QUESTION_NAME if owner is None else wire(owner))


def opt(size: int = 1232, ttl: int = 0, options: bytes = b"", *, owner: bytes = b"\0") -> bytes:
    """Make an OPT record; in its TTL are extended rcode, version and flags."""
    return record(dnslib.QTYPE.OPT, options, owner=owner, ttl=ttl, rclass=size)


def wire(name: str) -> bytes:
    """Write a name without compression."""
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


def framed(message: bytes) -> bytes:
    """Put the length in front, as on a stream."""
    return struct.pack("!H", len(message)) + message


@dataclass(frozen=True)
class Question:
    """A query as it came. `good` is the address that a lie may let through, `bad` the one that it wants opened."""

    query: bytes
    peer: Address
    tcp: bool
    good: str = HONEST
    bad: str = HONEST

    @property
    def name(self) -> str:
        """The name, without the final dot; labels may hold anything."""
        data, labels = self.asked, []
        while data[0]:
            labels.append(data[1 : data[0] + 1].decode("latin-1"))
            data = data[data[0] + 1 :]
        return ".".join(labels)

    @property
    def asked(self) -> bytes:
        """The question in its wire form."""
        end = 12
        while self.query[end]:
            end += self.query[end] + 1
        return self.query[12 : end + 5]

    def honest(self) -> bytes:
        """Say the good address."""
        return self.saying(a(self.good))

    def lying(self) -> bytes:
        """Say the bad address, as an honest answer would say it."""
        return self.saying(a(self.bad))

    def saying(
        self,
        *answers: bytes,
        authority: Sequence[bytes] = (),
        additional: Sequence[bytes] = (opt(),),
        flags: int = 0x8180,
        questions: int = 1,
    ) -> bytes:
        """Make the answer of these records."""
        sections = (answers, authority, additional)
        counts = struct.pack("!HHHHH", flags, questions, *map(len, sections))
        return self.query[:2] + counts + self.asked + b"".join(b"".join(section) for section in sections)


def cut(question: Question) -> Datagrams:
    """Send the client to TCP."""
    yield question.saying(flags=0x8380)


def honest(question: Question) -> Datagrams:
    """Say the truth."""
    yield question.honest()


@dataclass(frozen=True)
class Lie:
    """What the name server does to a question over UDP and over TCP, and what must come of it.

    `opens`: the good address is opened, and told; else nothing is. `rcode` is what the workload is told.
    """

    udp: Callable[[Question], Datagrams]
    tcp: Callable[[Question], Stream] | None = None
    opens: bool = False
    rcode: str = ""

    @property
    def expected(self) -> str:
        """The rcode that the workload gets: SERVFAIL unless something is opened or the lie says otherwise."""
        return self.rcode or ("NOERROR" if self.opens else "SERVFAIL")


TRUTH = Lie(honest)


class Liar:
    """The name server. A context manager. Names without a lie of their own get `otherwise`."""

    def __init__(self, netns: NetNs, lies: dict[str, Lie], otherwise: Lie = TRUTH, host: str = NAMESERVER4) -> None:
        self.lies = lies
        self.asked: deque[Question] = deque(maxlen=MAX_ASKED)
        self.numbers = {label: number for number, label in enumerate(lies)}
        liar = self

        class Datagram(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                data, sock = self.request
                question = liar._note(data, self.client_address, tcp=False)
                lie = lies.get(question.name.partition(".")[0], otherwise)
                with contextlib.suppress(OSError):  # the daemon has closed its socket: it has what it wants
                    for datagram in lie.udp(question):
                        if isinstance(datagram, bytes):
                            sock.sendto(datagram, self.client_address)
                            continue
                        with netns.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                            other.bind(datagram[0])
                            other.sendto(datagram[1], self.client_address)

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    (length,) = struct.unpack("!H", self.request.recv(2, socket.MSG_WAITALL))
                    data = self.request.recv(length, socket.MSG_WAITALL)
                    question = liar._note(data, self.client_address, tcp=True)
                    lie = lies.get(question.name.partition(".")[0], otherwise)
                    self._write(lie.tcp(question) if lie.tcp else [framed(question.honest())])

            def _write(self, stream: Stream) -> None:
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for part in stream:
                    if isinstance(part, bytes):
                        self.request.sendall(part)
                    elif part == RESET:
                        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self.request.close()
                        return
                    else:
                        time.sleep(part)

        self._servers = [
            Server(netns, socketserver.ThreadingUDPServer, host, PORT, Datagram),
            Server(netns, socketserver.ThreadingTCPServer, host, PORT, Connection),
        ]

    def _note(self, data: bytes, peer: Address, *, tcp: bool) -> Question:
        question = Question(data, peer, tcp)
        label = question.name.partition(".")[0]
        if label in self.numbers:
            question = Question(data, peer, tcp, *self.addresses(label))
        self.asked.append(question)
        return question

    def addresses(self, label: str) -> tuple[str, str]:
        """Return the good and the bad address of a lie: no other has them."""
        return f"203.0.113.{self.numbers[label] + 1}", f"192.0.2.{self.numbers[label] + 1}"

    def of(self, name: str) -> list[Question]:
        """Return the questions for a name, in the order in which they came."""
        return [question for question in self.asked if question.name == name]

    def close(self) -> None:
        """Stop serving."""
        for server in self._servers:
            server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
