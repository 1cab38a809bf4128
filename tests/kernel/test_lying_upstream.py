"""An upstream that lies, in all ways that octets allow: it opens nothing, and nobody else notices.

A real daemon, a real workload, and a name server (liar.py) that answers each lie's name as the lie says. What is open
is read from the kernel. While all lies are being told, the same daemon answers others at once.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import dnslib
import pytest

from harness.agent import Agent
from harness.daemon import Attached, Netfenced
from harness.deadline import SLOWNESS, wait_for
from harness.topology import NAMESERVER4, Topology, Workload
from liar import (
    HONEST,
    PORT,
    QUESTION_NAME,
    RESET,
    Datagrams,
    Liar,
    Lie,
    Question,
    Stream,
    a,
    cname,
    cut,
    framed,
    opt,
    record,
    wire,
)
from open_addresses import open_addresses

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(120)]

TIMEOUT_S = 2.0 * SLOWNESS
MAX_TTL_S = 86_400  # dns.max_lease
POLICY = {
    "default": {
        "mode": "allowlist",
        "dns": {"mode": "allowlist", "allow": ["*.example.test"], "deny": ["denied.example.test"]},
    }
}
ELSEWHERE = ("203.0.113.82", PORT)
TOP_BIT = 1 << 31


def sends(*makers: Callable[[Question], bytes]) -> Callable[[Question], Datagrams]:
    """Make the datagrams of an answer."""
    return lambda question: [make(question) for make in makers]


def says(make: Callable[[Question], bytes], *, opens: bool = False, rcode: str = "") -> Lie:
    """Send one datagram, and over TCP the truth."""
    return Lie(sends(make), opens=opens, rcode=rcode)


def streams(make: Callable[[Question], Stream], *, opens: bool = False) -> Lie:
    """Send a cut answer over UDP, and this over TCP."""
    return Lie(cut, make, opens=opens)


def raw(rdata: bytes, rtype: int = dnslib.QTYPE.A) -> Callable[[Question], bytes]:
    """Say one record with this RDATA."""
    return lambda question: question.saying(record(rtype, rdata))


def owned(owner: bytes) -> Callable[[Question], bytes]:
    """Say the bad address at an owner of these octets."""
    return lambda question: question.saying(a(question.bad, owner=owner))


def pointer(offset: int) -> bytes:
    return struct.pack("!H", 0xC000 | offset)


def first(question: Question) -> int:
    """Tell the offset of the first record."""
    return 12 + len(question.asked)


def with_id(question: Question, step: int) -> bytes:
    """Lie under a guessed id."""
    return ((int.from_bytes(question.query[:2], "big") + step) & 0xFFFF).to_bytes(2, "big") + question.lying()[2:]


def other_question(question: Question) -> bytes:
    message = question.lying()
    return message[:13] + bytes([message[13] ^ 1]) + message[14:]


def chain(question: Question, length: int) -> bytes:
    names = [question.name, *(f"c{n}.example.test" for n in range(length))]
    steps = [cname(to, owner) for owner, to in itertools.pairwise(names)]
    return question.saying(*steps, a(question.good, owner=wire(names[-1])))


def patched(question: Question, at: int, new: bytes) -> bytes:
    """Say the bad address, with some octets of the message replaced."""
    message = question.lying()
    return message[:at] + new + message[at + len(new) :]


def drip(question: Question, pause_s: float, size: int = 1) -> Stream:
    whole = framed(question.honest())
    for start in range(0, len(whole), size):
        yield whole[start : start + size]
        yield pause_s


def guessing(question: Question) -> Datagrams:
    """Send what somebody sends who knows the port and guesses the id; the truth comes too late to count."""
    yield from (with_id(question, step) for step in range(1, 40))
    yield question.lying()


LIES: dict[str, Lie] = {
    # Whose answer it is.
    "wrong-id": says(lambda q: with_id(q, 1)),
    "wrong-id-first": Lie(sends(lambda q: with_id(q, 1), Question.honest), opens=True),
    "wrong-question": says(other_question),
    "wrong-question-first": Lie(sends(other_question, Question.honest), opens=True),
    "wrong-type": says(lambda q: patched(q, first(q) - 3, b"\x1c")),
    "wrong-class-asked": says(lambda q: patched(q, first(q) - 1, b"\x03")),
    "wrong-port": Lie(lambda q: [((NAMESERVER4, PORT + 1), q.lying()), q.honest()], opens=True),
    "wrong-address": Lie(lambda q: [(ELSEWHERE, q.lying()), q.honest()], opens=True),
    "wrong-address-alone": Lie(lambda q: [(ELSEWHERE, q.lying())]),
    "guessed-ids": Lie(guessing, opens=True),
    "a-query": says(lambda q: patched(q, 2, b"\x01")),
    "other-opcode": says(lambda q: patched(q, 2, b"\xa9")),
    "no-question": says(
        lambda q: q.query[:2] + struct.pack("!HHHHH", 0x8180, 0, 1, 0, 0) + a(q.bad, owner=wire(q.name))
    ),
    "two-questions": says(lambda q: q.saying(q.asked, a(q.bad), questions=2)),
    # Not a message.
    "nothing": says(lambda _: b""),
    "stump": says(lambda q: q.lying()[:11]),
    "header-alone": says(lambda q: q.lying()[:12]),
    "garbage": says(lambda q: random.Random(q.query).randbytes(300)),
    "garbage-behind-the-question": says(lambda q: q.query[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + q.asked + b"\xff" * 99),
    "cut-short": says(lambda q: q.lying()[:-15]),
    "octets-behind": says(lambda q: q.lying() + b"x"),
    "oversized": says(lambda q: q.lying() + bytes(4000)),
    "as-large-as-can-be": says(lambda q: q.lying() + bytes(65_000)),
    "counts-lie": says(lambda q: patched(q, 6, b"\xff\xff")),
    "too-many-records": Lie(
        cut, lambda q: [framed(q.saying(*[a(q.bad)] * 300, additional=[record(16, b"\1x")] * 213))]
    ),
    "duplicates": Lie(lambda q: [q.honest()] * 5, opens=True),
    "a-lie-behind-the-truth": Lie(sends(Question.honest, Question.lying, Question.lying), opens=True),
    # Compression.
    "pointer-to-itself": says(lambda q: owned(pointer(first(q)))(q)),
    "pointers-in-a-ring": says(
        lambda q: q.saying(a(q.bad, owner=pointer(first(q) + 16)), a(q.bad, owner=pointer(first(q))))
    ),
    "pointer-forward": says(lambda q: q.saying(a(q.bad, owner=pointer(first(q) + 16)), a(q.bad, owner=wire(q.name)))),
    "pointer-into-the-header": says(owned(pointer(5))),
    "pointer-past-the-end": says(owned(pointer(0x3FFF))),
    "label-and-pointer-to-itself": says(lambda q: owned(b"\1x" + pointer(first(q)))(q)),
    "label-of-unknown-type": says(owned(b"\x81a\0")),
    "name-too-long": says(owned((b"\x3f" + b"a" * 63) * 5 + b"\0")),
    "name-too-long-by-pointer": says(owned((b"\x3f" + b"a" * 63) * 4 + pointer(12))),
    "cname-pointer-to-itself": says(lambda q: q.saying(record(5, pointer(first(q) + 12)))),
    # Chains.
    "chain": Lie(sends(lambda q: chain(q, 5)), opens=True),
    "chain-too-long": says(lambda q: chain(q, 20)),
    "chain-to-itself": says(lambda q: q.saying(cname(q.name), a(q.bad))),
    "chain-loops": says(
        lambda q: q.saying(cname("x.test"), cname("y.test", "x.test"), cname("x.test", "y.test"), a(q.bad))
    ),
    "chain-leaves": says(lambda q: q.saying(cname("x.test"), a(q.good, owner=wire("x.test"))), opens=True),
    "chain-to-denied": says(
        lambda q: q.saying(cname("denied.example.test"), a(q.bad, owner=wire("denied.example.test"))), rcode="REFUSED"
    ),
    "chain-through-denied": says(
        lambda q: q.saying(
            cname("DENIED.example.test"), cname("z.test", "denied.EXAMPLE.test"), a(q.bad, owner=wire("z.test"))
        ),
        rcode="REFUSED",
    ),
    "two-chains": says(lambda q: q.saying(cname("x.test"), cname("y.test"), a(q.bad, owner=wire("y.test")))),
    "chain-broken": says(lambda q: q.saying(cname("x.test"), a(q.bad, owner=wire("y.test"))), rcode="NOERROR"),
    # Records that were not asked for.
    "another-name": says(lambda q: q.saying(a(q.bad, owner=wire("x.test"))), rcode="NOERROR"),
    "another-name-too": says(lambda q: q.saying(a(q.good), a(q.bad, owner=wire("other.example.test"))), opens=True),
    "a-dot-in-a-label": says(
        lambda q: q.saying(a(q.bad, owner=bytes([len(q.name)]) + q.name.encode() + b"\0")), rcode="NOERROR"
    ),
    "authority": says(lambda q: q.saying(a(q.good), authority=[a(q.bad)]), opens=True),
    "additional": says(lambda q: q.saying(a(q.good), additional=[a(q.bad), opt()]), opens=True),
    "another-type": says(raw(bytes.fromhex("20010db8000b") + bytes(9) + b"\x66", 28), rcode="NOERROR"),
    "referral": says(
        lambda q: q.saying(authority=[record(2, wire("ns.test"))], additional=[a(q.bad, owner=wire("ns.test"))]),
        rcode="NOERROR",
    ),
    "loopback": says(lambda q: q.saying(a("127.0.0.1")), rcode="NOERROR"),
    "private": says(lambda q: q.saying(a("10.0.0.1"), a(q.good)), opens=True),
    # Classes, lengths, TTLs.
    "class-chaos": says(lambda q: q.saying(a(q.bad, rclass=3))),
    "class-any": says(lambda q: q.saying(a(q.bad, rclass=255))),
    "class-chaos-additional": says(lambda q: q.saying(a(q.good), additional=[a("10.0.0.1", rclass=3)])),
    "rdlength-16": says(raw(bytes(10) + b"\xff\xff\xc0\0\2\x42")),
    "rdlength-3": says(raw(b"\xc0\0\2")),
    "rdlength-0": says(raw(b"")),
    "rdlength-past-the-end": says(lambda q: patched(q, first(q) + 10, b"\xff\xff")),
    "aaaa-of-4": says(raw(b"\xc0\0\2\x42", 28)),
    "ttl-0": says(lambda q: q.saying(a(q.good, ttl=0)), opens=True),
    "ttl-top-bit": says(lambda q: q.saying(a(q.good, ttl=TOP_BIT)), opens=True),
    "ttl-all-bits": says(lambda q: q.saying(a(q.good, ttl=0xFFFFFFFF)), opens=True),
    "ttl-max": says(lambda q: q.saying(a(q.good, ttl=TOP_BIT - 1)), opens=True),
    # EDNS.
    "no-opt": says(lambda q: q.saying(a(q.good), additional=[]), opens=True),
    "opt-version-1": says(lambda q: q.saying(a(q.good), additional=[opt(ttl=1 << 16)]), opens=True),
    "opt-options": says(
        lambda q: q.saying(a(q.good), additional=[opt(0, options=b"\0\x0f\xff\xff\0\x11" * 90)]), opens=True
    ),
    "opt-in-front": says(lambda q: q.saying(a(q.good), additional=[opt(), a(q.bad, owner=wire("x.test"))]), opens=True),
    "opt-badvers": says(lambda q: q.saying(a(q.bad), additional=[opt(ttl=1 << 24)])),
    "opt-twice": says(lambda q: q.saying(a(q.bad), additional=[opt(), opt()])),
    "opt-in-the-answer": says(lambda q: q.saying(opt(), a(q.bad), additional=[])),
    "opt-owned": says(lambda q: q.saying(a(q.bad), additional=[opt(owner=QUESTION_NAME)])),
    # Rcodes.
    "servfail": says(lambda q: q.saying(a(q.bad), flags=0x8182)),
    "refused": says(lambda q: q.saying(a(q.bad), flags=0x8185)),
    "nxdomain": says(lambda q: q.saying(a(q.bad), flags=0x8183), rcode="NXDOMAIN"),
    "notauth": says(lambda q: q.saying(a(q.bad), flags=0x8189), rcode="NOTAUTH"),
    # Streams.
    "cut": Lie(cut, opens=True),
    "cut-with-records": Lie(sends(lambda q: q.saying(a(q.bad), flags=0x8380)), opens=True),
    "tcp-closes": streams(lambda _: []),
    "tcp-resets": streams(lambda _: [RESET]),
    "tcp-closes-in-the-length": streams(lambda _: [b"\0"]),
    "tcp-closes-in-the-answer": streams(lambda q: [framed(q.lying())[:-1]]),
    "tcp-resets-in-the-answer": streams(lambda q: [framed(q.lying())[:30], RESET]),
    "tcp-is-silent": streams(lambda _: [2 * TIMEOUT_S]),
    "tcp-drips": streams(lambda q: drip(q, TIMEOUT_S / 8)),
    "tcp-in-pieces": streams(lambda q: drip(q, 0.0, size=9), opens=True),
    "tcp-empty": streams(lambda _: [framed(b"")]),
    "tcp-length-too-long": streams(lambda q: [struct.pack("!H", 65_535) + q.lying()]),
    "tcp-length-too-short": streams(lambda q: [struct.pack("!H", len(q.lying()) - 12) + q.lying()]),
    "tcp-wrong-id": streams(lambda q: [framed(with_id(q, 1))]),
    "tcp-wrong-question": streams(lambda q: [framed(other_question(q))]),
    "tcp-cut": streams(lambda q: [framed(q.saying(a(q.bad), flags=0x8380))]),
    "tcp-garbage": streams(lambda _: [b"HTTP/1.1 400 Bad Request\r\n\r\n"]),
    "tcp-as-large-as-can-be": streams(lambda q: [framed(q.lying() + bytes(65_535 - len(q.lying())))]),
    "tcp-pointers-in-a-ring": streams(lambda q: [framed(owned(pointer(first(q)))(q))]),
    "tcp-two-answers": streams(lambda q: [framed(q.honest()) + framed(q.lying())], opens=True),
}


class Stage(NamedTuple):
    """The parts of a test."""

    daemon: Netfenced
    attached: Attached
    workload: Workload
    agent: Agent
    liar: Liar

    def open(self) -> set[str]:
        return open_addresses(self.daemon, self.attached.id)

    def asking(self, name: str) -> socket.socket:
        """Ask for a name's address; the answer will be on the socket."""
        with self.workload.inside.inside():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(10.0 * SLOWNESS)
        sock.connect(self.attached.dns)
        sock.send(bytes(dnslib.DNSRecord.question(name).pack()))
        return sock

    def ask(self, *labels: str) -> dict[str, dnslib.DNSRecord]:
        """Ask for the names of these lies, all at once, and wait for what comes of them."""
        with contextlib.ExitStack() as stack:
            asked = {label: stack.enter_context(self.asking(f"{label}.example.test")) for label in labels}
            return {label: dnslib.DNSRecord.parse(sock.recv(65_535)) for label, sock in asked.items()}


@pytest.fixture(scope="module")
def stage(topology: Topology, tmp_path_factory: pytest.TempPathFactory, workload: Workload) -> Iterator[Stage]:
    config = {"dns": {"timeout": TIMEOUT_S, "attempts": 1}}
    directory = tmp_path_factory.mktemp("netfenced")
    with (
        Liar(topology.internet, dict(LIES)) as liar,
        Netfenced(topology.host, directory, policy=POLICY, config=config) as daemon,
        Agent(netns=workload.netns) as agent,
    ):
        yield Stage(daemon, daemon.attach(interface=workload.host_if), workload, agent, liar)
        assert not daemon.events("dns_query_failed")
        assert not daemon.events("dns_task_failed")
        assert not daemon.events("dns_flight_failed")


class Told(NamedTuple):
    """What came of all lies, told at once: one reply each, what came after it, what is open."""

    replies: dict[str, dnslib.DNSRecord]
    more: set[str]
    open: set[str]
    honest_s: list[float]  # how long others waited meanwhile


@pytest.fixture(scope="module")
def told(stage: Stage) -> Told:
    before = stage.open()
    replies, more, honest_s = {}, set(), []
    with contextlib.ExitStack() as stack:
        asked = {label: stack.enter_context(stage.asking(f"{label}.example.test")) for label in LIES}
        for number in range(10):
            begin = time.monotonic()
            truth = stage.agent.query(stage.attached.dns, f"truth.n{number}.example.test")
            honest_s.append(time.monotonic() - begin)
            assert [str(rr.rdata) for rr in truth.rr] == [HONEST]
        for label, sock in asked.items():
            replies[label] = dnslib.DNSRecord.parse(sock.recv(65_535))
        for label, sock in asked.items():
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.recv(65_535)
                more.add(label)
    return Told(replies, more, stage.open() - before - {HONEST}, honest_s)


@pytest.mark.parametrize("label", LIES)
def test_a_lie_opens_nothing(stage: Stage, told: Told, label: str) -> None:
    lie, reply = LIES[label], told.replies[label]
    good, bad = stage.liar.addresses(label)
    assert dnslib.RCODE[reply.header.rcode] == lie.expected
    addresses = [str(rr.rdata) for rr in reply.rr if rr.rtype == dnslib.QTYPE.A]
    assert (good in addresses) is lie.opens
    assert lie.expected not in ("SERVFAIL", "REFUSED") or not reply.rr
    assert max((rr.ttl for rr in reply.rr), default=0) <= MAX_TTL_S
    assert (good in told.open, bad in told.open) == (lie.opens, False)
    assert label not in told.more  # one answer, however many came


def test_nothing_else_is_open(stage: Stage, told: Told) -> None:
    assert told.open == {stage.liar.addresses(label)[0] for label, lie in LIES.items() if lie.opens}


def test_others_do_not_wait_for_lies(told: Told) -> None:
    assert statistics.median(told.honest_s) < TIMEOUT_S / 4


def test_ids_and_ports_cannot_be_guessed(stage: Stage) -> None:
    """An off-path attacker has to hit both: they are evenly spread, and do not follow one another."""
    number = 300
    names = [f"r{n}.example.test" for n in range(number)]
    for name in names:
        with stage.asking(name) as sock:
            assert sock.recv(4096)
    asked = [stage.liar.of(name)[0] for name in names]
    ids = [int.from_bytes(question.query[:2], "big") for question in asked]
    ports = [question.peer[1] for question in asked]
    for drawn, bits, spread in ((ids, range(16), 65_536), (ports, range(12), 28_000)):
        assert len(set(drawn)) > number - 15
        for bit in bits:
            assert 0.33 < sum(value >> bit & 1 for value in drawn) / number < 0.67  # six standard deviations
        steps = [later - earlier for earlier, later in itertools.pairwise(drawn)]
        assert 0.33 < sum(step > 0 for step in steps) / number < 0.67
        assert len(set(steps)) > number - 20
        assert max(drawn) - min(drawn) > spread * 0.8
    assert len({(ident, port) for ident, port in zip(ids, ports, strict=True)}) == number


def test_ids_over_tcp_cannot_be_guessed(stage: Stage) -> None:
    idents = set()
    for _ in range(20):
        before = len(stage.liar.of("tcp-closes.example.test"))
        with stage.asking("tcp-closes.example.test") as sock:
            assert sock.recv(4096)
        over_udp, over_tcp = stage.liar.of("tcp-closes.example.test")[before:]
        assert (over_udp.tcp, over_tcp.tcp) == (False, True)
        assert over_udp.query[2:] == over_tcp.query[2:]
        idents |= {over_udp.query[:2], over_tcp.query[:2]}
    assert len(idents) > 36


def test_nothing_is_left_of_the_lies(stage: Stage) -> None:
    """Descriptors are given back, and what was unusable was not kept: asked again, the truth is told."""
    labels = ("chain-loops", "class-chaos", "rdlength-16", "tcp-closes", "tcp-is-silent", "tcp-drips", "wrong-id")
    before = stage.daemon.descriptors()
    for _ in range(2):
        replies = stage.ask(*labels)
        assert {reply.header.rcode for reply in replies.values()} == {dnslib.RCODE.SERVFAIL}
    wait_for(lambda: stage.daemon.descriptors() <= before, "the descriptors to be given back")
    for label in labels:
        del stage.liar.lies[label]
    for label, reply in stage.ask(*labels).items():
        assert [str(rr.rdata) for rr in reply.rr] == [stage.liar.addresses(label)[0]]
