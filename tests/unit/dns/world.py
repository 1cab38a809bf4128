"""The world around a DNS server for its tests: a gate that records, an upstream that lies, a client, a clock.

Sockets are real, on 127.0.0.1 and ports that the kernel picks; nothing here needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop
from dnslib import EDNS0, QTYPE, RCODE, RR, DNSRecord

from netfence.dns.server import DnsServer, DnsSettings, Resolver, SharedCache
from netfence.errors import NetfenceError, UnavailableError
from netfence.policy.cidr import CidrTable, parse_cidr
from netfence.policy.domain import DomainRule, DomainTable, kind_of, parse_domain
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import DnsPolicy, Policy

T = TypeVar("T")

PUBLIC = "93.184.216.34"
PUBLIC6 = "2606:2800:220:1:248:1893:25c8:1946"
WAIT_S = 5.0


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine on the loop that the daemon uses."""
    return uvloop.run(work)


def packed(*addresses: str) -> tuple[bytes, ...]:
    """Return addresses in the form that the gate gets."""
    return tuple(socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text) for text in addresses)


def rules(texts: Iterable[str], *, allow: bool) -> list[DomainRule]:
    """Make rules of texts like ``a.org`` (exact), ``.a.org`` (with everything below), ``*.a.org``, ``*``."""
    made = []
    for text in texts:
        name, below = parse_domain(text.removeprefix("."))
        kind = kind_of(name, below_only=below, include_subdomains=text.startswith("."))
        made.append(DomainRule(name, kind, allow))
    return made


def policy(
    dns: DnsMode = DnsMode.ALLOWLIST,
    *,
    mode: Mode = Mode.ALLOWLIST,
    allow: Iterable[str] = (),
    deny: Iterable[str] = (),
    cidrs: Iterable[str] = (),
    upstreams: Sequence[str] = (),
    audit: bool = False,
) -> Policy:
    """Make a policy; `cidrs` are allowed, or denied where they begin with ``!``."""
    table = CidrTable()
    for text in cidrs:
        key = parse_cidr(text.removeprefix("!"))
        table = table.deny(key) if text.startswith("!") else table.allow(key)
    domains = DomainTable.build([*rules(allow, allow=True), *rules(deny, allow=False)])
    return Policy(mode=mode, audit=audit, cidrs=table, dns=DnsPolicy(dns, domains, tuple(upstreams)))


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Decision:
    """A control plane's answer in mode proxy."""

    allow: bool = True
    add_to_filter: bool = True
    ips: tuple[bytes, ...] = ()
    ttl_s: float = 0.0


@dataclass
class FakeGate:
    """An attachment that records what its DNS server does to it."""

    _policy: Policy
    generation: int = 1
    learned: list[tuple[str, tuple[bytes, ...], float]] = field(default_factory=list)
    counts: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    audits: list[tuple[str, tuple[bytes, ...], str]] = field(default_factory=list)
    chains: list[tuple[str, ...]] = field(default_factory=list)  # of the audited answers
    asked: list[tuple[str, str]] = field(default_factory=list)
    refuse: NetfenceError | None = None
    decide: Callable[[str, str], Coroutine[Any, Any, Decision]] | None = None

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, new: Policy) -> None:
        self._policy = new
        self.generation += 1

    def learn(self, name: str, addresses: Sequence[bytes], ttl_s: float) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.learned.append((name, tuple(addresses), ttl_s))

    def note_query(self, allowed: bool) -> None:
        self.counts[allowed] += 1

    def note_audit(self, name: str, addresses: Sequence[bytes], why: str, chain: Sequence[str] = ()) -> None:
        self.audits.append((name, tuple(addresses), why))
        self.chains.append(tuple(chain))

    async def ask_control_plane(self, name: str, qtype: str) -> Decision:
        self.asked.append((name, qtype))
        if self.decide is None:
            raise UnavailableError("no control plane")
        return await self.decide(name, qtype)


def deciding(decision: Decision) -> Callable[[str, str], Coroutine[Any, Any, Decision]]:
    """Return a control plane that always decides the same."""

    async def decide(_name: str, _qtype: str) -> Decision:
        return decision

    return decide


def bound_pair() -> tuple[socket.socket, socket.socket]:
    """Return a UDP and a TCP socket on the same port of 127.0.0.1.

    A port free for one may be taken for the other (a client's, in TIME_WAIT), so more than one is tried.
    """
    for _ in range(50):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            udp.bind(("127.0.0.1", 0))
            tcp.bind(udp.getsockname())
        except OSError:
            udp.close()
            tcp.close()
        else:
            return udp, tcp
    raise AssertionError("no port is free for UDP and TCP")


async def start(server: DnsServer, address: str = "127.0.0.1") -> None:
    """Start a server on some port that is free for UDP and TCP."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            await server.start(address, 0)
            return
    raise AssertionError("no port is free for UDP and TCP")


UdpScript = Callable[[bytes], Iterable[bytes]]
TcpScript = Callable[[bytes], bytes | None]


class FakeUpstream:
    """A name server with a zone, or with a script that makes any octets it likes of a query.

    `zone` holds records in zone-file form. `udp` returns the datagrams to send for a query, `tcp` what to write to the
    connection (length prefix included), None to close it. `seen` and `seen_tcp` are the queries that came, `peers` the
    source ports of the UDP ones.
    """

    def __init__(self, zone: str = "", *, rcode: int = 0) -> None:
        self.records = RR.fromZone(zone) if zone else []
        self.rcode = rcode
        self.udp: UdpScript = lambda query: [self.answer(query)]
        self.tcp: TcpScript = self._framed
        self.authority: list[RR] = []
        self.additional: list[RR] = []
        self.seen: list[bytes] = []
        self.seen_tcp: list[bytes] = []
        self.peers: list[int] = []
        self.hold: asyncio.Event | None = None
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def text(self) -> str:
        return f"127.0.0.1:{self.port}"

    def set_zone(self, zone: str) -> None:
        self.records = RR.fromZone(zone)

    def answer(self, query: bytes) -> bytes:
        """Answer honestly: CNAMEs are followed, EDNS is spoken."""
        asked = DNSRecord.parse(query)
        reply = asked.reply(aa=0, ra=1)
        reply.header.rcode = self.rcode
        owner, seen = asked.q.qname, set()
        while owner not in seen:
            seen.add(owner)
            found = [rr for rr in self.records if rr.rname == owner]
            for rr in found:
                if rr.rtype in (asked.q.qtype, QTYPE.CNAME):
                    reply.add_answer(rr)
                if rr.rtype == QTYPE.CNAME and asked.q.qtype != QTYPE.CNAME:
                    owner = rr.rdata.label
        for rr in self.authority:
            reply.add_auth(rr)
        for rr in self.additional:
            reply.add_ar(rr)
        reply.add_ar(EDNS0(udp_len=1232))
        return bytes(reply.pack())

    def _framed(self, query: bytes) -> bytes | None:
        data = self.answer(query)
        return struct.pack("!H", len(data)) + data

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeUpstream]:
        loop = asyncio.get_running_loop()
        udp, tcp = bound_pair()
        self.port = udp.getsockname()[1]
        upstream = self

        class Protocol(asyncio.DatagramProtocol):
            def connection_made(self, transport: Any) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, addr: Any) -> None:
                upstream.seen.append(data)
                upstream.peers.append(addr[1])
                upstream.keep(upstream.send(self.transport, data, addr))

        transport, _ = await loop.create_datagram_endpoint(Protocol, sock=udp)
        server = await asyncio.start_server(self._stream, sock=tcp)
        try:
            yield self
        finally:
            transport.close()
            server.close()
            for task in list(self._tasks):
                task.cancel()

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def send(self, transport: Any, data: bytes, addr: Any) -> None:
        if self.hold is not None:
            await self.hold.wait()
        for datagram in self.udp(data):
            transport.sendto(datagram, addr)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            query = await reader.readexactly(length)
            self.seen_tcp.append(query)
            if (data := self.tcp(query)) is not None:
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


async def udp_exchange(port: int, *queries: bytes, address: str = "127.0.0.1") -> list[bytes]:
    """Send queries from one socket and wait for as many replies."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect((address, port))
        for query in queries:
            sock.send(query)
        return [await asyncio.wait_for(loop.sock_recv(sock, 65535), WAIT_S) for _ in queries]


async def tcp_exchange(port: int, *queries: bytes) -> list[bytes]:
    """Send queries over one connection, all at once, and wait for as many replies."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"".join(struct.pack("!H", len(query)) + query for query in queries))
        return [await asyncio.wait_for(read_framed(reader), WAIT_S) for _ in queries]
    finally:
        writer.close()


async def read_framed(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack("!H", await reader.readexactly(2))
    return await reader.readexactly(length)


def question(name: str, qtype: str = "A", *, edns: int = 0, do: bool = False, ident: int = 0x1234) -> bytes:
    """Build a query; `edns` is the UDP size offered, 0: no EDNS."""
    record = DNSRecord.question(name, qtype)
    record.header.id = ident
    if edns:
        record.add_ar(EDNS0(udp_len=edns, flags="do" if do else ""))
    return bytes(record.pack())


@dataclass
class World:
    """A server under test with everything around it."""

    gate: FakeGate
    upstream: FakeUpstream
    server: DnsServer
    resolver: Resolver
    cache: SharedCache
    clock: Clock
    settings: DnsSettings

    async def raw(self, query: bytes, *, tcp: bool = False) -> bytes:
        exchange = tcp_exchange if tcp else udp_exchange
        return (await exchange(self.server.port, query))[0]

    async def ask(
        self, name: str, qtype: str = "A", *, edns: int = 1232, do: bool = False, tcp: bool = False
    ) -> DNSRecord:
        return DNSRecord.parse(await self.raw(question(name, qtype, edns=edns, do=do), tcp=tcp))


@asynccontextmanager
async def world(
    rules_: Policy,
    zone: str = "",
    *,
    upstreams: Sequence[str] | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """Serve an attachment with `rules_`, over an upstream with `zone`."""
    upstream = FakeUpstream(zone)
    async with upstream.serving():
        chosen = DnsSettings(
            upstreams=tuple(upstreams) if upstreams is not None else (upstream.text,),
            **({"timeout_s": 0.3, "attempts": 1} | settings),
        )
        clock = Clock()
        gate, cache, resolver = FakeGate(rules_), SharedCache(chosen.max_lease_s), Resolver(chosen, clock)
        server = DnsServer(gate, chosen, cache, resolver, clock)
        await start(server)
        try:
            yield World(gate, upstream, server, resolver, cache, clock, chosen)
        finally:
            await server.close()
            await resolver.close()


def addresses(reply: DNSRecord) -> list[str]:
    """Return the addresses in the answer section, as text."""
    return [str(rr.rdata) for rr in reply.rr if rr.rtype in (QTYPE.A, QTYPE.AAAA)]


def rcode(reply: DNSRecord) -> str:
    return str(RCODE[reply.header.rcode])


def ede(reply: DNSRecord) -> tuple[int, str] | None:
    """Return code and text of a reply's Extended DNS Error."""
    for rr in reply.ar:
        if rr.rtype == QTYPE.OPT:
            for option in rr.rdata:
                if option.code == 15:
                    return struct.unpack("!H", bytes(option.data[:2]))[0], bytes(option.data[2:]).decode()
    return None


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, with a deadline."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - conditions of sockets have no event
            await asyncio.sleep(0.002)
