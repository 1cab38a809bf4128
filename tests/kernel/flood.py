"""A workload that sends as fast as it can, and an exact count at the far end of what arrives of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from harness.spawn import spawn, stop
from harness.topology import Topology, Workload
from harness.wire import harness_cpu

FLOOD = """
import os, socket, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
sock.bind(("eth0", 0))
frames = [bytes.fromhex(text) for text in sys.argv[2:]]
os.set_blocking(0, False)
sent = 0
print("running", flush=True)
while True:
    for _ in range(50):
        for frame in frames:
            sock.send(frame)
    sent += 50
    try:
        if os.read(0, 1) == b"":
            break
    except BlockingIOError:
        pass
print(sent, flush=True)
"""


@contextmanager
def flood(workload: Workload, *frames: bytes) -> Iterator[list[int]]:
    """Send the frames in turn, as fast as it goes, while inside; the list gets how often each was sent."""
    argv = [sys.executable, "-I", "-S", "-c", FLOOD, str(harness_cpu()), *[frame.hex() for frame in frames]]
    process = spawn(argv, netns=workload.netns, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    sent: list[int] = []
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        yield sent
        process.stdin.close()
        sent.append(int(process.stdout.readline()))
    finally:
        stop(process)


class FarEnd:
    """Counts in the internet's kernel what arrives for an address, before anything there could lose it."""

    def __init__(self, topology: Topology, addresses: list[str]) -> None:
        self._netns = topology.internet
        rules = "; ".join(f"{'ip6' if ':' in each else 'ip'} daddr {each} counter" for each in addresses)
        chain = f"chain arrived {{ type filter hook prerouting priority -400; {rules}; }}"
        self._netns.run("nft", f"table inet far_end {{ {chain}; }}")

    def counts(self) -> list[int]:
        listed = json.loads(self._netns.run("nft", "-j", "list", "chain", "inet", "far_end", "arrived").stdout)
        rules = [each["rule"]["expr"] for each in listed["nftables"] if "rule" in each]
        return [expression["counter"]["packets"] for rule in rules for expression in rule if "counter" in expression]

    def close(self) -> None:
        self._netns.run("nft", "delete table inet far_end")
