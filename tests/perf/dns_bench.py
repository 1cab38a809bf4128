"""The DNS servers that `test_dns.py` compares, and what loads them: all in one namespace, all on one CPU.

    dnsperf or `Asker` ── netfenced │ dnsmasq --nftset │ unbound ── upstream (unbound, answers from records)

netfenced is the real daemon: its answers open leases in the kernel before they are sent, as dnsmasq's fill a real
nftables set; unbound opens nothing. Names come in three kinds: "warm" ones may be cached for an hour, "cold" ones have
a TTL of 0 and go upstream each time, "denied" ones are refused.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from harness.cgroup import Cgroup
from harness.daemon import Netfenced
from harness.deadline import wait_for
from harness.netns import NetNs
from harness.spawn import spawn, stop

NAMES = 100
OUTSTANDING = 20
TTLS_S = {"warm": 3600, "cold": 0}
KINDS = {"warm": "NOERROR", "cold": "NOERROR", "denied": "REFUSED"}
ZONE = "bench.example"
UPSTREAM_PORT, UNBOUND_PORT, DNSMASQ_PORT = 5301, 5302, 5303
POLICY = {
    "default": {"mode": "allowlist", "dns": {"mode": "allowlist", "allow": [f"*.{kind}.{ZONE}" for kind in TTLS_S]}}
}
HEADER = struct.Struct("!HHHHHH")
RCODES = {"NOERROR": 0, "REFUSED": 5}
UNBOUND = """
server:
    username: ""
    chroot: ""
    pidfile: ""
    use-syslog: no
    do-daemonize: no
    num-threads: 1
    interface: 127.0.0.1
    port: {port}
    access-control: 127.0.0.0/8 allow
    module-config: "iterator"
    do-not-query-localhost: no
{server}
remote-control:
    control-enable: {control}
{rest}
"""


@dataclass(frozen=True, slots=True)
class Server:
    """Where a contestant answers."""

    address: str
    port: int


def _upstream(control: Path) -> str:
    lines = [f'    local-zone: "{ZONE}." static']
    for kind, ttl_s in TTLS_S.items():
        lines += [f'    local-data: "h{n}.{kind}.{ZONE}. {ttl_s} IN A 93.184.216.{n + 1}"' for n in range(NAMES)]
    rest = f"    control-interface: {control}\n    control-use-cert: no"
    return UNBOUND.format(port=UPSTREAM_PORT, server="\n".join(lines), control="yes", rest=rest)


def _forwarder() -> str:
    forward = f'forward-zone:\n    name: "."\n    forward-addr: 127.0.0.1@{UPSTREAM_PORT}'
    server = f'    local-zone: "denied.{ZONE}." refuse'
    return UNBOUND.format(port=UNBOUND_PORT, server=server, control="no", rest=forward)


def _dnsmasq() -> list[str]:
    servers = [f"--server=/{kind}.{ZONE}/127.0.0.1#{UPSTREAM_PORT}" for kind in TTLS_S]  # else: REFUSED
    return [
        "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file=", "--user=root",
        *servers, f"--port={DNSMASQ_PORT}", "--listen-address=127.0.0.1", "--bind-interfaces", "--cache-size=10000",
        f"--nftset=/{ZONE}/4#inet#bench#s4", "--log-facility=-",
    ]  # fmt: skip


@contextlib.contextmanager
def _running(netns: NetNs, port: int, argv: Sequence[str], log: Path) -> Iterator[Server]:
    """Run a server until the block ends; it listens when the block begins."""
    with log.open("wb") as out:
        process = spawn(argv, netns=netns, stdout=out, stderr=out)
    try:
        wait_for(lambda: f"127.0.0.1:{port} " in netns.run("ss", "-Hltn").stdout, f"{argv[0]} to listen, see {log}")
        yield Server("127.0.0.1", port)
    finally:
        stop(process)


@contextlib.contextmanager
def peers(netns: NetNs, directory: Path) -> Iterator[dict[str, Server]]:
    """Run the upstream and the servers that are no fence of ours."""
    for name, text in (("upstream", _upstream(directory / "control")), ("unbound", _forwarder())):
        (directory / f"{name}.conf").write_text(text)
    # Thousands of connections to one server leave the client no port that never was used. By default only those to
    # 127/8 may be used again at once: the others would look 2 ms slower, and what looks so is the client.
    netns.sysctl("net/ipv4/tcp_tw_reuse", "1")
    rules = "add table inet bench\nadd set inet bench s4 { type ipv4_addr; flags timeout; timeout 1h; }\n"
    (directory / "set.nft").write_text(rules)
    netns.run("nft", "-f", str(directory / "set.nft"))
    with contextlib.ExitStack() as stack:

        def run(name: str, port: int, argv: Sequence[str]) -> Server:
            return stack.enter_context(_running(netns, port, argv, directory / f"{name}.log"))

        run("upstream", UPSTREAM_PORT, ["unbound", "-d", "-c", str(directory / "upstream.conf")])
        yield {
            "dnsmasq-nftset": run("dnsmasq", DNSMASQ_PORT, _dnsmasq()),
            "unbound": run("unbound", UNBOUND_PORT, ["unbound", "-d", "-c", str(directory / "unbound.conf")]),
        }


def asked_upstream(netns: NetNs, directory: Path) -> int:
    """Count the queries that came to the upstream, by whomever: what a cache answers does not."""
    told = netns.run("unbound-control", "-c", str(directory / "upstream.conf"), "stats_noreset").stdout
    found = re.search(r"^total\.num\.queries=(\d+)$", told, re.MULTILINE)
    assert found is not None, told
    return int(found[1])


def nft_elements(netns: NetNs) -> int:
    """Count the addresses that dnsmasq opened."""
    return netns.run("nft", "list", "set", "inet", "bench", "s4").stdout.count(" expires ")


class Fenced:
    """A daemon with a number of fenced cgroups; each has a DNS server of its own and the same policy."""

    def __init__(self, netns: NetNs, directory: Path, attachments: int, first_port: int) -> None:
        dns = {
            "upstreams": [f"127.0.0.1:{UPSTREAM_PORT}"], "port_min": first_port, "port_max": first_port + attachments,
            "timeout": 2,
        }  # fmt: skip
        self.daemon = Netfenced(netns, directory, policy=POLICY, config={"log_level": "warning", "dns": dns})
        self._name, self._count = f"dns-{first_port}", attachments
        self._close = contextlib.ExitStack()
        self.servers: dict[str, Server] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            cgroups = [Cgroup(f"{self._name}-{number}") for number in range(self._count)]
            for cgroup in cgroups:
                stack.callback(cgroup.remove)
            stack.enter_context(self.daemon)
            for cgroup in cgroups:
                attached = self.daemon.attach(cgroup=cgroup)
                self.servers[attached.id] = Server(*attached.dns)
            self._close = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._close.close()

    def counted(self) -> tuple[int, int]:
        """Tell how many queries were allowed and blocked, all attachments together."""
        infos = self.daemon.attachments()
        return sum(one.dns_queries_allowed for one in infos), sum(one.dns_queries_blocked for one in infos)


def write_names(directory: Path) -> Mapping[str, Path]:
    """Write dnsperf's input, a file for each kind of names."""
    files = {}
    for kind in KINDS:
        files[kind] = directory / f"{kind}.txt"
        files[kind].write_text("".join(f"h{n}.{kind}.{ZONE} A\n" for n in range(NAMES)))
    return files


def load(netns: NetNs, server: Server, names: Path, rcode: str, seconds: float, *, tcp: bool) -> tuple[float, int]:
    """Load a server with `OUTSTANDING` queries in the air; return queries/s and how many were answered, all rightly."""
    text = netns.run(
        "dnsperf", "-s", server.address, "-p", str(server.port), "-d", str(names), "-q", str(OUTSTANDING), "-c", "1",
        "-T", "1", "-l", str(seconds), "-t", "5", "-m", "tcp" if tcp else "udp",
    ).stdout  # fmt: skip

    def number(label: str) -> float:
        found = re.search(rf"{label}:\s+([0-9.]+)", text)
        assert found is not None, f"dnsperf printed no {label!r}:\n{text}"
        return float(found[1])

    sent, completed = int(number("Queries sent")), int(number("Queries completed"))
    right = re.search(rf"{rcode} (\d+) \(", text)
    # The tail that is in the air when the time is up is not lost.
    assert completed > 0, text
    assert sent - completed <= OUTSTANDING, text
    assert right is not None, text
    assert int(right[1]) == completed, text
    return number("Queries per second"), completed


class Asker:
    """Asks one query after the other and takes the time; Python's part of it is the same for every server."""

    def __init__(self, netns: NetNs) -> None:
        self._netns = netns

    def udp_us(self, server: Server, kind: str, queries: int) -> list[float]:
        """Return the sorted latencies of queries from one socket."""
        with self._netns.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.connect((server.address, server.port))

            def ask(query: bytes) -> bytes:
                sock.send(query)
                return sock.recv(512)

            return _latencies_us(ask, kind, queries)

    def tcp_us(self, server: Server, kind: str, queries: int) -> list[float]:
        """Return the sorted latencies of queries with a connection each, as after a truncated answer."""

        def ask(query: bytes) -> bytes:
            with socket.create_connection((server.address, server.port), 5) as sock:
                sock.send(struct.pack("!H", len(query)) + query)
                answer = sock.recv(514)
                while len(answer) < 2 + int.from_bytes(answer[:2], "big"):
                    answer += sock.recv(514)
                return answer[2:]

        with self._netns.inside():
            return _latencies_us(ask, kind, queries)


def _latencies_us(ask: Callable[[bytes], bytes], kind: str, queries: int) -> list[float]:
    """Time `ask` for the names of a kind in turn; every answer must be the right one."""
    now = time.perf_counter_ns
    asked = [_query(f"h{n % NAMES}.{kind}.{ZONE}", n) for n in range(queries)]
    times, answers = [], []
    for query in asked:
        start = now()
        answers.append(ask(query))
        times.append((now() - start) / 1000)
    for query, answer in zip(asked, answers, strict=True):
        _, flags, *_ = HEADER.unpack_from(answer)
        assert answer[:2] == query[:2], "an answer came to another question"
        assert flags & 15 == RCODES[KINDS[kind]], answer
    return sorted(times)


def _query(name: str, number: int) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return HEADER.pack(number & 0xFFFF, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"
