"""A fleet of simulated daemons in one process: the daemon's own stream client over attachments that are dictionaries.

    python fleet.py ADDRESS DAEMONS ATTACHMENTS

Answers each line on standard input with one JSON line: how many daemons are connected, how many attachments have which
policy version, and this process's memory; end of input ends it. Everything but the kernel is real: back-off, streams,
conversion and judging of commands, policy hashes.
"""

from __future__ import annotations

import asyncio
import collections
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from netfence import log
from netfence.config import ControlPlane
from netfence.control.credentials import Secrets
from netfence.control.port import AttachmentView, ConnectionState, StatsView
from netfence.control.remote import RemoteControl
from netfence.errors import NetfenceError
from netfence.policy.commands import Command, apply
from netfence.policy.policy import EMPTY, Policy


class Simulated:
    """One daemon: a `ControlHost` whose kernel is a dictionary."""

    def __init__(self, number: int, attachments: int) -> None:
        self.id = f"daemon-{number}"
        self.policies: dict[str, tuple[Policy, str]] = {
            f"{self.id}-{index}": (EMPTY, "") for index in range(attachments)
        }

    def view(self, attachment_id: str) -> AttachmentView | None:
        known = self.policies.get(attachment_id)
        if known is None:
            return None
        policy, version = known
        return AttachmentView(
            attachment_id,
            target=f"veth-{attachment_id}",
            kind="interface",
            metadata={"tenant": "acme"},
            dns_address="192.0.2.1:53",
            mode=int(policy.mode),
            dns_mode=int(policy.dns.mode),
            policy_version=version,
            policy_hash=policy.hash(),
        )

    def attachments(self) -> Sequence[AttachmentView]:
        return [view for one in self.policies if (view := self.view(one)) is not None]

    async def apply(self, attachment_id: str, command: Command, version: str = "") -> None:
        policy, _ = self.policies[attachment_id]
        self.policies[attachment_id] = (apply(policy, command, time.monotonic()), version)

    async def apply_all(
        self, attachment_id: str, commands: Sequence[tuple[Command, str]]
    ) -> Sequence[NetfenceError | None]:
        for command, version in commands:
            await self.apply(attachment_id, command, version)
        return [None] * len(commands)

    async def stats(self) -> Sequence[StatsView]:
        return [StatsView(one, (1, 1), (0, 0), 0, 0, 0, policy.hash()) for one, (policy, _) in self.policies.items()]

    async def follow_staleness(self) -> None:
        """Nothing is ever stale."""

    async def save_contact(self) -> None:
        """Nothing is kept."""


async def main(address: str, daemons: int, attachments: int) -> None:
    settings = ControlPlane(url=(address,))
    fleet = [(Simulated(number, attachments), RemoteControl(settings, Secrets(), {})) for number in range(daemons)]
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with asyncio.TaskGroup() as group:
        tasks = []
        for host, control in fleet:
            control.introduce(host.id, None)
            tasks.append(group.create_task(control.run(host)))
        while await reader.readline():
            versions = collections.Counter(version for host, _ in fleet for _, version in host.policies.values())
            connected = sum(control.state is ConnectionState.CONNECTED for _, control in fleet)
            print(json.dumps({"connected": connected, "versions": versions, "rss_mb": rss_mb()}), flush=True)  # noqa: T201
        for task in tasks:
            task.cancel()


def rss_mb() -> float:
    """Return this process's resident memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    log.set_up("error", "json")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
