"""Benchmark of the DNS path: our server, dnsmasq and unbound in turn, client, server and upstream on one CPU.

Run: ``python tests/perf/dns_bench.py [--rounds 7] [--seconds 2] [--cpu 0] [--json FILE] [--smoke]``; needs dnsperf,
dnsmasq, unbound and nft, no root: it runs itself in a network namespace of its own (and a user namespace, for a plain
user), where dnsmasq may have an nftables set to fill. Where the kernel forbids that, it runs without and says so.
Names say path and state:

- ``dns-answer-warm``: 100 names with TTL 3600, all caches full; ours, dnsmasq, unbound.
- ``dns-answer-cold``: the same with TTL 0, so that every query goes to the local unbound and every answer opens its
  address; ours, ``dnsmasq --nftset --cache-size=0`` (the goal is set against this one), and dnsmasq without the set.
- ``dns-refused``: 100 names that the policy denies; ours alone.

Contestants alternate within each round. Reported: median, spread (least and most), ratio of medians, "not
significant" where the spreads overlap. The work is checked: no query lost, the right rcode for all of them, and as
many queries and leases counted by our server as were answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

import measure
from netfence.dns.server import DnsServer, DnsSettings, Resolver, SharedCache
from netfence.policy.domain import DomainRule, DomainTable, RuleKind
from netfence.policy.leases import LeaseBook, lease_expiry
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import DnsPolicy, Policy

NAMES = 100
OUTSTANDING = 20
WARM_TTL_S = 3600
GOALS = {("dns-answer-warm", "dnsmasq"): 0.7, ("dns-answer-cold", "dnsmasq-nftset"): 0.5}
INSIDE = "NETFENCE_DNS_BENCH_INSIDE"  # set in the re-executed process: its namespace is its own
NFT_SET = "/bench.example/4#inet#bench#s4"


def free_port() -> int:
    """Return a port that is free for UDP and TCP on 127.0.0.1 now."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            try:
                udp.bind(("127.0.0.1", tcp.getsockname()[1]))
            except OSError:
                continue
            return int(tcp.getsockname()[1])


# ---------------------------------------------------------------- the server under test, in a process of its own


def serve(port: int, upstream: str) -> None:
    """Run a DnsServer as the daemon would, until SIGTERM; then print its counters as JSON."""

    class BenchGate:
        """Does the bookkeeping of leases for real; the kernel's map update (about 2 µs) is missing."""

        def __init__(self) -> None:
            rules = [DomainRule(f"{kind}.bench.example", RuleKind.SUBTREE, allow=True) for kind in ("warm", "cold")]
            domains = DomainTable.build(rules)
            self.policy = Policy(mode=Mode.ALLOWLIST, dns=DnsPolicy(mode=DnsMode.ALLOWLIST, domains=domains))
            self.generation = 1
            self.leases = LeaseBook()
            self.counts = {"allowed": 0, "blocked": 0, "learned": 0}

        def learn(self, name: str, addresses: Sequence[bytes], ttl_s: float) -> None:
            expiry = lease_expiry(time.monotonic(), ttl_s, 300.0, 60.0, 86_400.0)
            for address in addresses:
                self.leases.hold(name, address, expiry)
            self.counts["learned"] += 1

        def note_query(self, allowed: bool) -> None:
            self.counts["allowed" if allowed else "blocked"] += 1

        def note_audit(self, name: str, addresses: Sequence[bytes], why: str) -> None:
            raise NotImplementedError

        async def ask_control_plane(self, name: str, qtype: str) -> Any:
            raise NotImplementedError

    async def run() -> None:
        settings = DnsSettings(upstreams=(upstream,))
        gate, resolver = BenchGate(), Resolver(settings)
        server = DnsServer(gate, settings, SharedCache(settings.max_lease_s), resolver)
        await server.start("127.0.0.1", port)
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()
        await server.close()
        await resolver.close()
        print(json.dumps(gate.counts), flush=True)  # noqa: T201 - read by the parent

    uvloop.run(run())


# ---------------------------------------------------------------- contestants


@contextmanager
def running(cpu: int, command: Sequence[str], port: int) -> Iterator[subprocess.Popen[str]]:
    """Run a server pinned to `cpu`, wait until it answers on `port`, end it by its own pid."""
    pinned = ["taskset", "-c", str(cpu), *command]
    process = subprocess.Popen(pinned, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(process, port)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(process: subprocess.Popen[str], port: int) -> None:
    """Wait until something takes TCP connections on `port`."""
    deadline = time.monotonic() + 15
    while True:
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended: {process.communicate()[1]}")
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise SystemExit(f"{process.args!r} does not listen on port {port}") from None
            time.sleep(0.05)
        else:
            return


def unbound_config(directory: Path, port: int) -> Path:
    """Write the configuration of the upstream: it answers from local data, public addresses, no recursion."""
    lines = [
        "server:",
        '  username: ""\n  chroot: ""\n  pidfile: ""\n  use-syslog: no\n  do-daemonize: no\n  num-threads: 1',
        f'  directory: "{directory}"',
        f"  interface: 127.0.0.1\n  port: {port}\n  access-control: 127.0.0.0/8 allow\n  module-config: iterator",
        '  local-zone: "bench.example." static',
    ]
    for kind, ttl_s in (("warm", WARM_TTL_S), ("cold", 0)):
        lines += [f'  local-data: "h{n}.{kind}.bench.example. {ttl_s} IN A 93.184.216.{n + 1}"' for n in range(NAMES)]
    lines.append("remote-control:\n  control-enable: no")
    path = directory / "unbound.conf"
    path.write_text("\n".join(lines) + "\n")
    return path


def enter_namespace() -> None:
    """Run ourselves again in a network namespace of our own; returns there, and where none can be had."""
    if INSIDE in os.environ:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    unshare = ["unshare", *user, "--net"]
    if shutil.which("nft") and subprocess.run([*unshare, "nft", "list", "tables"], check=False).returncode == 0:
        os.environ[INSIDE] = "1"
        os.execvp(unshare[0], [*unshare, sys.executable, *sys.argv])


def make_nft_set() -> bool:
    """Make the set that dnsmasq fills; False when we are not in a namespace of our own."""
    if INSIDE not in os.environ:
        return False
    rules = "add table inet bench\nadd set inet bench s4 { type ipv4_addr; flags timeout; timeout 1h; }\n"
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
    return True


def nft_elements() -> int:
    """Count the addresses that dnsmasq opened."""
    text = subprocess.run(["nft", "list", "set", "inet", "bench", "s4"], capture_output=True, text=True, check=True)
    return text.stdout.count(" expires ")


def dnsmasq_command(port: int, upstream_port: int, cache_size: int, *, nftset: bool = False) -> list[str]:
    """Return the command of a dnsmasq that forwards to the upstream and, with `nftset`, adds answers to the set."""
    return [
        "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file=",
        f"--server=127.0.0.1#{upstream_port}", f"--port={port}", "--listen-address=127.0.0.1", "--bind-interfaces",
        f"--cache-size={cache_size}", "--log-facility=-",
        *([f"--nftset={NFT_SET}"] if nftset else []),
    ]  # fmt: skip


@dataclass
class Load:
    """One dnsperf run."""

    qps: float
    sent: int
    completed: int
    rcodes: dict[str, int]
    latency_us: float


def dnsperf(cpu: int, port: int, names: Path, seconds: float) -> Load:
    """Load a server for some seconds with `OUTSTANDING` queries in the air."""
    command = ["taskset", "-c", str(cpu), "dnsperf", "-s", "127.0.0.1", "-p", str(port), "-d", str(names)]
    command += ["-q", str(OUTSTANDING), "-c", "1", "-T", "1", "-l", str(seconds), "-t", "5"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def number(label: str) -> float:
        found = re.search(rf"{label}:\s+([0-9.]+)", text)
        if found is None:
            raise SystemExit(f"dnsperf printed no {label!r}:\n{text}")
        return float(found[1])

    rcodes = {name: int(count) for name, count in re.findall(r"([A-Z]+) (\d+) \(", text)}
    return Load(
        qps=number("Queries per second"),
        sent=int(number("Queries sent")),
        completed=int(number("Queries completed")),
        rcodes=rcodes,
        latency_us=number(r"Average Latency \(s\)") * 1e6,
    )


@dataclass
class Series:
    """All rounds of one contestant in one benchmark."""

    bench: str
    contestant: str
    port: int
    names: Path
    rcode: str = "NOERROR"
    qps: list[float] = field(default_factory=list)
    completed: int = 0

    def run(self, cpu: int, seconds: float, *, measure: bool = True) -> None:
        """Run one round and check that every query was answered as it must be."""
        load = dnsperf(cpu, self.port, self.names, seconds)
        # The tail that is in the air when the time is up is not lost.
        if (
            not load.completed
            or load.sent - load.completed > OUTSTANDING
            or load.rcodes.get(self.rcode, 0) != load.completed
        ):
            raise SystemExit(f"{self.bench} {self.contestant}: wrong work: {load}")
        self.completed += load.completed
        if measure:
            self.qps.append(load.qps)

    @property
    def median(self) -> float:
        """Return the median rate."""
        return statistics.median(self.qps)


def report(series: list[Series], ours: str = "netfence") -> dict[str, Any]:
    """Print a table and return it as data: medians, spreads, ratios of ours to each contestant, round by round."""
    out: dict[str, Any] = {}
    for one in series:
        entry: dict[str, Any] = {
            "median_qps": round(one.median),
            "spread_qps": [round(min(one.qps)), round(max(one.qps))],
        }
        base = next(s for s in series if s.bench == one.bench and s.contestant == ours)
        if one is not base:
            paired = measure.ratio(measure.Series("", base.qps), measure.Series("", one.qps))
            low, high = paired.spread
            entry |= {"ratio_of_ours": round(paired.median, 3), "ratio_quartiles": [round(low, 3), round(high, 3)]}
            entry["significant"] = not low <= 1 <= high
            goal = GOALS.get((one.bench, one.contestant))
            if goal is not None:
                entry |= {"goal": goal, "met": paired.median >= goal}
        out.setdefault(one.bench, {})[one.contestant] = entry
        words = " ".join(f"{key}={value}" for key, value in entry.items() if key != "significant")
        print(  # noqa: T201
            f"{one.bench:16} {one.contestant:14} {words}{'' if entry.get('significant', True) else ' not significant'}"
        )
    return out


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a figure has to be read with."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "kernel": platform.release(), "cpu": cpu[1] if cpu else "?", "commit": commit, "pinned_to_cpu": arguments.cpu,
        "rounds": arguments.rounds, "seconds": arguments.seconds, "names": NAMES, "outstanding": OUTSTANDING,
        "python": platform.python_version(),
    }  # fmt: skip


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start all contestants, run the rounds, check the work, return the figures."""
    for tool in ("dnsperf", "dnsmasq", "unbound", "taskset"):
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            raise SystemExit(f"dns_bench: {tool} is missing; run ci/bootstrap")
    os.environ["PATH"] += ":/usr/sbin"
    cpu = arguments.cpu
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dns-bench-")))
        files = {}
        for kind in ("warm", "cold", "denied"):
            files[kind] = directory / kind
            files[kind].write_text("".join(f"h{n}.{kind}.bench.example A\n" for n in range(NAMES)))
        nftset = make_nft_set()
        ports = {name: free_port() for name in ("unbound", "netfence", "dnsmasq", "dnsmasq-cold", "dnsmasq-nftset")}
        config = unbound_config(directory, ports["unbound"])
        stack.enter_context(running(cpu, ["unbound", "-d", "-c", str(config)], ports["unbound"]))
        command = [sys.executable, __file__, "--serve", str(ports["netfence"]), f"127.0.0.1:{ports['unbound']}"]
        ours = stack.enter_context(running(cpu, command, ports["netfence"]))
        for name, size in (("dnsmasq", 10_000), ("dnsmasq-cold", 0), ("dnsmasq-nftset", 0)):
            masq = dnsmasq_command(ports[name], ports["unbound"], size, nftset=nftset and name == "dnsmasq-nftset")
            stack.enter_context(running(cpu, masq, ports[name]))
        series = [
            Series("dns-answer-warm", "netfence", ports["netfence"], files["warm"]),
            Series("dns-answer-warm", "dnsmasq", ports["dnsmasq"], files["warm"]),
            Series("dns-answer-warm", "unbound", ports["unbound"], files["warm"]),
            Series("dns-answer-cold", "netfence", ports["netfence"], files["cold"]),
            Series("dns-answer-cold", "dnsmasq", ports["dnsmasq-cold"], files["cold"]),
            *([Series("dns-answer-cold", "dnsmasq-nftset", ports["dnsmasq-nftset"], files["cold"])] if nftset else []),
            Series("dns-refused", "netfence", ports["netfence"], files["denied"], rcode="REFUSED"),
        ]
        for one in series:
            one.run(cpu, min(arguments.seconds, 0.5), measure=False)  # fills the caches
        for _ in range(arguments.rounds):
            for one in series:
                one.run(cpu, arguments.seconds)
        ours.terminate()
        counts = json.loads(ours.communicate(timeout=10)[0])
        check(series, counts)
        if nftset and nft_elements() < NAMES:
            raise SystemExit(f"dnsmasq opened {nft_elements()} of {NAMES} addresses")
        return {"nftset": nftset, "counts": counts, "benchmarks": report(series)}


def check(series: list[Series], counts: dict[str, int]) -> None:
    """Compare what our server counted with what the client got."""
    ours = {one.bench: one.completed for one in series if one.contestant == "netfence"}
    answered = ours["dns-answer-warm"] + ours["dns-answer-cold"]
    if counts["allowed"] < answered or counts["blocked"] < ours["dns-refused"]:
        raise SystemExit(f"our server counted {counts}, the client got {ours}")
    if counts["learned"] < ours["dns-answer-cold"] + NAMES:
        raise SystemExit(f"our server opened {counts['learned']} leases for {ours['dns-answer-cold']} cold answers")


def main() -> None:
    """Run the benchmark (or, with --serve, the server under test)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "UPSTREAM"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="append the result to this file as one line")
    parser.add_argument(
        "--smoke", action="store_true", help="one short round: checks the work, the figures mean nothing"
    )
    arguments = parser.parse_args()
    if arguments.serve:
        serve(int(arguments.serve[0]), arguments.serve[1])
        return
    enter_namespace()
    if arguments.smoke:
        arguments.rounds, arguments.seconds = 1, 0.3
    line = json.dumps({"name": "dns", "time": int(time.time())} | facts(arguments) | run_all(arguments))
    print(line)  # noqa: T201 - the report
    if arguments.json:
        with arguments.json.open("a") as out:
            out.write(line + "\n")


if __name__ == "__main__":
    main()
