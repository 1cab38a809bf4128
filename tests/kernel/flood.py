"""A workload that sends as fast as it can, and an exact count at the far end of what arrives of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.cgroup import Cgroup
from harness.deadline import wait_for
from harness.fence import Attachment
from harness.netns import NetNs
from harness.spawn import spawn, stop
from harness.topology import Topology, Workload
from harness.wire import harness_cpu
from netfence.policy.modes import Reason

PROGRAM = Path(__file__).with_name("blaster.py")
AT_ONCE = 50  # times that `flood` hands all of its frames to the kernel, between two looks at whether to end

Source = dict[str, Any]  # see blaster.py


@dataclass(frozen=True, slots=True)
class Sent:
    """What a sender did: packets handed to the kernel, those of whole cycles among them, those refused (EPERM)."""

    packets: int
    whole: int
    refused: int
    began: float
    ended: float


class Sender:
    """A process that sends one stream when told to. Close it."""

    def __init__(self, netns: NetNs | None, stream: list[Source], cgroup: Cgroup | None = None) -> None:
        self._per_cycle = sum(len(each["packets"]) for each in stream)
        argv = [sys.executable, "-I", "-S", str(PROGRAM), str(harness_cpu()), json.dumps(stream)]
        self._process = spawn(argv, netns=netns, cgroup=cgroup, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the sender ended with {self._process.wait()}"
        return json.loads(line)

    def _say(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())
        self._process.stdin.flush()

    def _sent(self) -> Sent:
        told = self._answer()
        whole = told["cycles"] * self._per_cycle
        return Sent(whole + told["again"], whole, told["refused"], told["began"], told["ended"])

    def send(self, count: int) -> Sent:
        """Send at least so many packets."""
        self._say(str(count))
        return self._sent()

    @contextmanager
    def flooding(self) -> Iterator[list[Sent]]:
        """Send while inside; the list gets what was sent."""
        sent: list[Sent] = []
        self._say("0")
        yield sent
        self._say("")
        sent.append(self._sent())

    def close(self) -> None:
        """End the process."""
        stop(self._process)


@contextmanager
def flood(workload: Workload, *frames: bytes) -> Iterator[list[int]]:
    """Send the frames in turn, as fast as it goes, while inside; the list gets how often each was sent."""
    stream = [{"device": "eth0", "packets": [frame.hex() for frame in frames] * AT_ONCE}]
    times: list[int] = []
    with closing(Sender(workload.netns, stream)) as sender, sender.flooding() as sent:
        yield times
    times.append(sent[0].whole // len(frames))


def wait_for_more(fenced: Attachment, reason: Reason | None = None) -> None:
    """Wait until another packet is counted, under that reason if one is given."""

    def seen() -> int:
        packets = fenced.counters().packets
        return sum(packets) if reason is None else packets[reason]

    before = seen()
    wait_for(lambda: seen() > before, "the next packet")


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
