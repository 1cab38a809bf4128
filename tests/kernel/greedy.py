"""Guests that use their DNS servers, one of them without measure, and what that does to the other's answers.

A `Guest` is a process in a workload's namespace (greedy_main.py). All guests share one CPU and the daemon has another,
where there are two: a wake-up across CPUs takes longer than an answer, so who is where must not change between rounds.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.netns import NetNs
from harness.spawn import spawn, stop

CPUS = sorted(os.sched_getaffinity(0))
PROGRAM = Path(__file__).with_name("greedy_main.py")

Told = dict[str, Any]


def settle(pid: int) -> None:
    """Keep the event loop of a daemon on a CPU without guests."""
    os.sched_setaffinity(pid, {CPUS[0]})


class Guest:
    """A process that asks one DNS server. Close it.

    One that is `nice` takes the CPU from nobody who has something to do: what it does to others, the daemon does.
    """

    def __init__(self, server: tuple[str, int], netns: NetNs | None, *, nice: int = 0) -> None:
        argv = [
            "nice",
            "-n",
            str(nice),
            sys.executable,
            "-I",
            "-S",
            str(PROGRAM),
            str(CPUS[-1]),
            server[0],
            str(server[1]),
        ]
        self._process = spawn(argv, netns=netns, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the guest ended with {self._process.wait()}"
        return json.loads(line)

    def _say(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())
        self._process.stdin.flush()

    def do(self, what: str, **arguments: Any) -> Told:
        """Have something done to its end."""
        self._say(json.dumps({"do": what, **arguments}))
        told: Told = self._answer()
        return told

    @contextmanager
    def doing(self, what: str, *, whole: bool = False, **arguments: Any) -> Iterator[list[Told]]:
        """Have something done while inside, or `whole`, to its end; the list gets what came of it."""
        told: list[Told] = []
        self._say(json.dumps({"do": what, **arguments}))
        try:
            yield told
            assert self._process.stdout is not None
            assert whole or not select.select([self._process.stdout], [], [], 0)[0], f"{what} ended before it had to"
        finally:
            if not whole:
                self._say("")
            told.append(self._answer())

    def close(self) -> None:
        """End the process."""
        stop(self._process)


@dataclass
class Latencies:
    """Microseconds that answers took, in rounds without and with the attack."""

    quiet: list[list[float]] = field(default_factory=list)
    attacked: list[list[float]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times longer the median answer took under attack, in the median pair of rounds."""
        pairs = zip(self.quiet, self.attacked, strict=True)
        return statistics.median(statistics.median(attacked) / statistics.median(quiet) for quiet, attacked in pairs)

    def told(self) -> dict[str, float]:
        """Return the ratio, and over all rounds medians and 99th percentiles in microseconds."""
        found = {"ratio": round(self.ratio, 2)}
        for name, rounds in (("quiet", self.quiet), ("attacked", self.attacked)):
            taken = [each for one in rounds for each in one]
            found[f"{name}_median_us"] = round(statistics.median(taken))
            found[f"{name}_p99_us"] = round(statistics.quantiles(taken, n=100)[-1])
        return found
