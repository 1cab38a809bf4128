"""A control plane made with the kit, for a fleet: one policy for everybody, replaced on demand.

    python fleet_plane.py ADDRESS

Answers lines on standard input with one JSON line each: ``update`` gives everybody the next policy and tells how long
it took until every daemon's result was there; anything else tells how many daemons and attachments are in sync. End of
input ends it.
"""

from __future__ import annotations

import asyncio
import collections
import json
import resource
import sys
import time

import uvloop

from fleet import rss_mb
from netfence import log
from netfence.controlplane import Attachment, ControlPlane, Dns, Policy

RULES = 20


def policy_of(number: int) -> Policy:
    """Return the policy of a generation: no two have a rule in common."""
    cidrs = [f"10.{number % 200}.{index}.0/24" for index in range(RULES)]
    return Policy("allowlist", allow=cidrs, dns=Dns("allowlist", allow=["*.example.test"]), version=f"v{number}")


class Everybody:
    """What all get."""

    def __init__(self) -> None:
        self.number = 0
        self.policy = policy_of(0)

    async def policy_for(self, _attachment: Attachment) -> Policy:
        return self.policy

    def next(self) -> None:
        self.number += 1
        self.policy = policy_of(self.number)


async def main(address: str) -> None:
    everybody = Everybody()
    plane = ControlPlane(everybody.policy_for)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with plane.serving(address):
        print(json.dumps({"serving": plane.address}), flush=True)  # noqa: T201
        while word := await reader.readline():
            answer: dict[str, object] = {}
            if word == b"update\n":
                everybody.next()
                began = time.perf_counter()
                results = await plane.update(timeout_s=120)
                outcomes = collections.Counter(result.outcome.value for result in results)
                answer = {"seconds": time.perf_counter() - began, "outcomes": outcomes}
            answer["daemons"] = sum(daemon.connected for daemon in plane.daemons)
            answer["states"] = collections.Counter(status.state.value for status in plane.attachments)
            answer["rss_mb"] = rss_mb()
            print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    log.set_up("warning", "json")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1]))
