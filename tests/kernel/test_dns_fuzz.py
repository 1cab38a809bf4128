"""Broken messages thrown at a real daemon from both sides, workload and upstream; minutes of tests/unit/dns/test_fuzz.

The nightly tests run for `NETFENCE_FUZZ_S` seconds each (600). `NETFENCE_SEED=…` repeats messages, not their timing.
"""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from ipaddress import ip_address
from typing import cast

import dnslib
import pytest
from tests.unit.dns.checks import Fuzz
from tests.unit.dns.mutants import CORPUS, answering, mutated_query, strange
from tests.unit.dns.reading import meaning, read

from harness.agent import Agent
from harness.daemon import Attached, Netfenced
from harness.deadline import SLOWNESS, wait_for
from harness.fresh import Fresh
from harness.topology import Workload
from liar import Datagrams, Liar, Lie, Question, Stream, cut, framed, honest
from netfence.dns.answer import scan
from netfence.dns.wire import WireError, parse_query
from netfence.policy.special import is_special
from open_addresses import open_addresses

pytestmark = pytest.mark.userspace

Tell = Callable[[str, object], None]
NIGHTLY_S = float(os.environ.get("NETFENCE_FUZZ_S", "600"))
BATCHES = 4
BATCH = 150  # datagrams; fewer than an attachment may have waiting
CONNECTIONS = 6
ATTACHED_FOR = 40  # batches: then a new attachment, so that neither leases nor its share of the cache run full
TIMEOUT_S = 0.4 * SLOWNESS
ANSWERED_S = 5.0 * SLOWNESS
GROWTH_KB = 32_768  # of resident memory from the first quarter on: the caches fill up meanwhile
POLICY = {"default": {"mode": "allowlist", "dns": {"mode": "allowlist", "allow": ["*.example.test"]}}}


def _seed() -> int:
    return int(os.environ.get("NETFENCE_SEED") or random.SystemRandom().randrange(1 << 32))


class Siege:
    """A daemon between a workload and an upstream that both send rubbish. A context manager."""

    def __init__(self, fresh: Fresh, seed: int) -> None:
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.worst_s = 0.0
        self.last_said = ""
        self._batch = 0
        topology = fresh.topology()
        lies = {"honest": Lie(honest)}
        self._liar = Liar(topology.internet, lies, Lie(self._datagrams, self._stream))
        self._truth, _ = self._liar.addresses("honest")
        self._may_open = {self._truth}
        self._workload: Workload = topology.add_veth()
        config = {"dns": {"timeout": TIMEOUT_S, "attempts": 1, "allow_private": [f"{self._truth}/32"]}}
        self._daemon: Netfenced = fresh.daemon(topology, policy=POLICY, config=config)
        self._attached: Attached = self._daemon.attach(interface=self._workload.host_if)
        self._agent: Agent = fresh.agent(netns=self._workload.netns)

    # -- upstream ------------------------------------------------------------------------------------------------------

    def _datagrams(self, question: Question) -> Datagrams:
        self.counts["answers over UDP"] += 1
        if random.Random(question.name).random() < 0.2:
            return cut(question)
        return [self._broken(question, "udp")]

    def _stream(self, question: Question) -> Stream:
        self.counts["answers over TCP"] += 1
        return [framed(self._broken(question, "tcp"))]

    def _broken(self, question: Question, transport: str) -> bytes:
        rng = random.Random(f"{self.seed} {transport} {question.query[2:].hex()}")
        data = strange(rng, rng.choice(answering(question.query)))
        told = read(data)
        addresses: tuple[bytes, ...] = ()
        if told is not None:
            with contextlib.suppress(AssertionError):  # it makes no sense, and opens nothing
                addresses = meaning(told).addresses
        else:
            query = parse_query(question.query)
            with contextlib.suppress(WireError):
                addresses = scan(data, len(query.question), query.name, query.qtype, 0.0).addresses
        self._may_open |= {str(ip_address(address)) for address in addresses if not is_special(address)}
        return data

    # -- workload ------------------------------------------------------------------------------------------------------

    def _messages(self, rng: random.Random, number: int) -> list[bytes]:
        """Draw queries: names that nobody asked for yet, by well-formed queries and broken ones."""
        made = []
        for _ in range(number):
            data = rng.choice(CORPUS).query if rng.random() < 0.6 else mutated_query(rng)
            data = data.replace(b"\x07w000000", b"\x07w%06d" % rng.randrange(1_000_000))
            made.append(rng.randbytes(2) + data[2:])
        return made

    def _socket(self, kind: socket.SocketKind) -> socket.socket:
        with self._workload.inside.inside():
            sock = socket.socket(socket.AF_INET, kind)
        sock.connect(self._attached.dns)
        return sock

    def _exchange(self, rng: random.Random) -> None:
        """Send datagrams and streams, and take what comes until nothing comes any more."""
        messages = self._messages(rng, BATCH)
        known = {data[:2] for data in messages}
        with ExitStack() as stack, selectors.DefaultSelector() as selector:
            udp = stack.enter_context(self._socket(socket.SOCK_DGRAM))
            selector.register(udp, selectors.EVENT_READ, None)
            for data in messages:
                udp.send(data)
            for _ in range(CONNECTIONS):
                tcp = stack.enter_context(self._socket(socket.SOCK_STREAM))
                with contextlib.suppress(OSError):  # closed at once, for a length that lies
                    tcp.sendall(self._stream_of(rng))
                    tcp.shutdown(socket.SHUT_WR)
                selector.register(tcp, selectors.EVENT_READ, bytearray())
            while ready := selector.select(1.5 * TIMEOUT_S):
                for key, _ in ready:
                    if key.data is None:
                        self._reply(udp.recv(65_535), known)
                    elif not self._more(cast(socket.socket, key.fileobj), key.data):
                        selector.unregister(key.fileobj)
        self.counts["queries over UDP"] += BATCH

    def _stream_of(self, rng: random.Random) -> bytes:
        messages = self._messages(rng, 5)
        self.counts["queries over TCP"] += len(messages)
        stream = bytearray().join(map(framed, messages))
        if rng.random() < 0.5:  # a length lies, or the stream ends in the middle
            stream[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
            del stream[rng.randrange(len(stream)) :]
        return bytes(stream)

    def _more(self, sock: socket.socket, buffer: bytearray) -> bool:
        """Take what came on a connection; False at its end."""
        try:
            data = sock.recv(65_535)
        except OSError:
            return False
        buffer += data
        while len(buffer) >= 2 and len(buffer) >= (end := 2 + int.from_bytes(buffer[:2], "big")):
            self._reply(bytes(buffer[2:end]), None)
            del buffer[:end]
        return bool(data)

    def _reply(self, data: bytes, known: set[bytes] | None) -> None:
        assert len(data) >= 12
        assert data[2] & 0x80, "a query came back"
        assert known is None or data[:2] in known, "an id that nobody sent"
        self.counts["replies"] += 1
        self.counts[f"rcode {data[3] & 15}"] += 1

    # -- what must hold ------------------------------------------------------------------------------------------------

    def batch(self) -> None:
        """Send one batch from both sides, then look whether all is well; an error tells seed and batch."""
        try:
            rng = random.Random(f"{self.seed} {self._batch}")
            self._exchange(rng)
            self.answers()
            opened = open_addresses(self._daemon, self._attached.id)
            assert opened <= self._may_open, f"open, and nobody answered so: {opened - self._may_open}"
            self.counts["opened"] = max(self.counts["opened"], len(opened))
            self._batch += 1
            if self._batch % ATTACHED_FOR == 0:
                self._daemon.detach(self._attached.id)
                self._attached = self._daemon.attach(interface=self._workload.host_if)
        except BaseException as error:
            error.add_note(f"NETFENCE_SEED={self.seed}, batch {self._batch}, {dict(self.counts)}")
            raise

    def answers(self) -> None:
        """Check that an honest name is answered, over UDP and TCP: in three tries, for the machine may be busy."""
        for transport in ("udp", "tcp"):
            begin = time.monotonic()
            tries = (self._honest(f"honest.{transport}{n}-{self._batch}.example.test", transport) for n in range(3))
            assert [self._truth] in tries, self.last_said
            self.worst_s = max(self.worst_s, time.monotonic() - begin)
        assert self.worst_s < ANSWERED_S

    def _honest(self, name: str, transport: str) -> list[str]:
        reply = self._agent.query(self._attached.dns, name, tcp=transport == "tcp")
        self.counts[f"honest: {dnslib.RCODE[reply.header.rcode]}"] += 1
        self.last_said = str(reply)
        return [str(rr.rdata) for rr in reply.rr]

    def settled_descriptors(self, at_most: int | None = None) -> int:
        """Count open files when no question is in the air any more; wait until there are no more than `at_most`."""
        if at_most is not None:
            wait_for(lambda: self._daemon.descriptors() <= at_most, f"no more than {at_most} descriptors", 30.0)
        return self._daemon.descriptors()

    def memory_kb(self) -> int:
        """Tell the daemon's resident memory."""
        return self._daemon.memory_kb()

    def end(self, tell: Tell) -> None:
        """Look into the log, and tell the numbers."""
        for event in ("dns_query_failed", "dns_task_failed", "dns_flight_failed", "asyncio"):
            assert not self._daemon.events(event)
        assert self.counts["opened"] > 1
        tell("seed", self.seed)
        tell("batches", self._batch)
        tell("counts", dict(self.counts))
        tell("slowest_honest_answer_s", round(self.worst_s, 3))

    def close(self) -> None:
        """Stop the upstream; the rest is `fresh`'s."""
        self._liar.close()


@pytest.mark.timeout(120)
def test_a_daemon_under_broken_messages(fresh: Fresh, record_property: Tell) -> None:
    with closing(Siege(fresh, _seed())) as siege:
        for _ in range(BATCHES):
            siege.batch()
        siege.end(record_property)


@pytest.mark.nightly
@pytest.mark.timeout(NIGHTLY_S + 300)
def test_a_daemon_under_broken_messages_for_minutes(fresh: Fresh, record_property: Tell) -> None:
    with closing(Siege(fresh, _seed())) as siege:
        begin = time.monotonic()
        siege.answers()
        before = siege.settled_descriptors()
        memory = 0
        while (left := begin + NIGHTLY_S - time.monotonic()) > 0:
            siege.batch()
            if not memory and left < NIGHTLY_S * 3 / 4:
                memory = siege.memory_kb()
        siege.settled_descriptors(at_most=before)
        grown = siege.memory_kb() - memory
        record_property("memory_kb", f"{memory} + {grown}")
        assert grown < GROWTH_KB
        siege.end(record_property)


@pytest.mark.nightly
@pytest.mark.timeout(NIGHTLY_S + 300)
def test_broken_messages_for_minutes(record_property: Tell) -> None:
    fuzz, outcomes = Fuzz(_seed()), Counter[str]()
    end = time.monotonic() + NIGHTLY_S
    while time.monotonic() < end:
        outcomes += fuzz.rounds(1000)
    record_property("rounds", fuzz.done)
    record_property("outcomes", dict(outcomes))
    assert outcomes["answer: taken"] > fuzz.done / 10
