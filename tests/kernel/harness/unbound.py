"""A real unbound that plays the name servers of the internet: it owns the root zone and answers from records we give.

Records are master-file lines with absolute names, e.g. ``"www.allowed.test. 300 IN A 203.0.113.80"``. CNAMEs are
followed; names that do not exist get NXDOMAIN with the root's SOA. `asked` tells what reached it: the proof that a
denied query did not.
"""

from __future__ import annotations

import itertools
import signal
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import dnslib

from harness.deadline import wait_for
from harness.netns import NetNs
from harness.spawn import spawn, stop

NEGATIVE_TTL_S = 60
MARKER = "harness-marker.test."

CONFIG = """
server:
    verbosity: 0
    do-daemonize: no
    username: ""
    chroot: ""
    directory: "{directory}"
    pidfile: ""
    use-syslog: no
    logfile: "{log}"
    log-queries: yes
    log-time-ascii: no
    num-threads: 1
    incoming-num-tcp: 100
    so-reuseport: no
    {interfaces}
    port: {port}
    do-ip6: yes
    ip-freebind: yes
    access-control: 0.0.0.0/0 allow
    access-control: ::/0 allow
    do-not-query-localhost: no
    module-config: "iterator"
    minimal-responses: yes
    local-zone: "test." nodefault
    local-zone: "10.in-addr.arpa." nodefault
remote-control:
    control-enable: no
auth-zone:
    name: "."
    zonefile: "{zone}"
    for-downstream: yes
    for-upstream: yes
    fallback-enabled: no
"""


class Unbound:
    """One running unbound. Use as a context manager."""

    def __init__(
        self, netns: NetNs, directory: Path, addresses: Iterable[str], records: Iterable[str] = (), port: int = 53
    ) -> None:
        """Start it in `netns` on `addresses` (which must be its own) and wait until it answers."""
        self._netns = netns
        self.addresses = list(addresses)
        self.port = port
        self._directory = directory
        self._directory.mkdir(parents=True, exist_ok=True)
        self._log = directory / "unbound.log"
        self._serials = itertools.count(1)
        self._markers = itertools.count(1)
        self._write_zone(records)
        config = directory / "unbound.conf"
        config.write_text(
            CONFIG.format(
                directory=directory,
                log=self._log,
                zone=self._zone,
                port=port,
                interfaces="\n    ".join(f"interface: {address}" for address in self.addresses),
            )
        )
        with (directory / "unbound.err").open("wb") as errors:
            self._process = spawn(["unbound", "-d", "-c", str(config)], netns=netns, stdout=errors, stderr=errors)
        self._wait_for_serial()

    @property
    def _zone(self) -> Path:
        return self._directory / "root.zone"

    def _write_zone(self, records: Iterable[str]) -> None:
        self._serial = next(self._serials)
        head = [
            "$ORIGIN .",
            f". 3600 IN SOA ns.test. hostmaster.test. {self._serial} 3600 600 86400 {NEGATIVE_TTL_S}",
            ". 3600 IN NS ns.test.",
            f"ns.test. 3600 IN A {self.addresses[0]}" if ":" not in self.addresses[0] else "",
        ]
        self._zone.write_text("\n".join([*head, *records, ""]))

    def replace(self, records: Iterable[str]) -> None:
        """Serve these records instead, from the moment this returns."""
        self._write_zone(records)
        self._process.send_signal(signal.SIGHUP)
        self._wait_for_serial()

    def _wait_for_serial(self) -> None:
        def serves() -> bool:
            if self._process.poll() is not None:
                errors = (self._directory / "unbound.err").read_text() + self._log.read_text()
                message = f"unbound ended with {self._process.returncode}: {errors}"
                raise RuntimeError(message)
            answer = self._ask(".", "SOA")
            return answer is not None and bool(answer.rr) and answer.rr[0].rdata.times[0] == self._serial

        wait_for(serves, f"unbound to serve zone version {self._serial}")

    def _ask(self, name: str, qtype: str) -> dnslib.DNSRecord | None:
        """Ask it from inside its own namespace; None if it does not answer at once."""
        address = self.addresses[0]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self._netns.inside():
            sock = socket.socket(family, socket.SOCK_DGRAM)
        with sock:
            sock.settimeout(0.2)
            try:
                sock.connect((address, self.port))
                sock.send(dnslib.DNSRecord.question(name, qtype).pack())
                return dnslib.DNSRecord.parse(sock.recv(4096))
            except OSError:
                return None

    def asked(self, name: str) -> int:
        """Count the queries for a name (of any type) that have arrived until now."""
        marker = f"{next(self._markers)}.{MARKER}"  # the log is in order: what is not before the marker never came
        self._ask(marker, "A")

        def until_marker() -> list[str]:
            names = [line.split()[4] for line in self._log.read_text().splitlines() if " IN" in line]
            return names[: names.index(marker) + 1] if marker in names else []

        return wait_for(until_marker, "unbound's query log").count(name.rstrip(".") + ".")

    def close(self) -> None:
        """End it."""
        stop(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def version() -> str:
    """Tell which unbound this is."""
    return subprocess.run(["unbound", "-V"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
