"""The kit and the daemon's own side of the stream, `netfence.control.remote`, together; only the kernel is missing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.control.peer import FakeHost, Soon, view_of
from tests.unit.controlplane.fake_daemon import until
from tests.unit.controlplane.harness import OPEN, SHUT, WEB, WEB_AND_ONE, Policies, all_are, run, states

from netfence.config import ControlPlane as Settings
from netfence.control.credentials import load
from netfence.control.port import FirstPolicy, UnsubscribeReason
from netfence.control.remote import RemoteControl
from netfence.controlplane import Attachment, ControlPlane, NameAnswer, Outcome, State
from netfence.policy import commands
from netfence.policy.policy import EMPTY


@contextlib.asynccontextmanager
async def daemon(address: str, *ids: str, **settings: Any) -> AsyncIterator[tuple[RemoteControl, FakeHost]]:
    """Run the daemon's side with attachments that have a policy already."""
    host = FakeHost(*(view_of(attachment_id) for attachment_id in ids))
    made = Settings(**{"url": (address,), "heartbeat_interval": 0.2, **settings})
    control = RemoteControl(made, load(made), {"site": "x"}, Soon())
    control.introduce("daemon-1", None)
    running = asyncio.create_task(control.run(host))
    try:
        yield control, host
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def attach(control: RemoteControl, host: FakeHost, attachment_id: str) -> None:
    """Attach as the daemon's life cycle does."""
    view = view_of(attachment_id, acked=False)
    host.attaching[attachment_id] = view
    first = await control.subscribe(view)
    assert isinstance(first, FirstPolicy)
    policy = commands.apply(EMPTY, first.update, 0.0)
    host.policies[attachment_id] = policy
    host.views[attachment_id] = replace(
        view, policy_version=first.version, policy_hash=policy.hash(), mode=int(policy.mode), acked=True
    )
    del host.attaching[attachment_id]
    first.settled(None)


async def answer_dns(attachment: Attachment, name: str, qtype: str) -> NameAnswer:
    return NameAnswer(allow=name == "good.example" and qtype == "A", ips=["192.0.2.1"], ttl_s=5)


def test_whole_life(tmp_path: Path) -> None:
    async def test() -> None:
        policies = Policies(WEB)
        plane = ControlPlane(policies, answer_dns=answer_dns)
        address = f"unix:{tmp_path}/plane"
        async with plane.serving(address), daemon(address, "a", "b") as (control, host):
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            assert host.policies == {"a": WEB.rules, "b": WEB.rules}
            assert plane.daemons[0].daemon.metadata == {"site": "x"}

            await attach(control, host, "new")
            await until(lambda: all_are(plane, State.IN_SYNC, 3))
            assert host.policies["new"] == WEB.rules

            policies.default = WEB_AND_ONE
            results = await plane.update()
            assert {result.outcome for result in results} == {Outcome.APPLIED}
            assert host.policies["new"] == WEB_AND_ONE.rules
            assert isinstance(host.batches[-1][1][0][0], commands.AllowCidr)

            await until(lambda: all(status.counters for status in plane.attachments))
            decision = await control.query_dns("a", "good.example", "A")
            assert decision.allow
            assert decision.ips == (bytes([192, 0, 2, 1]),)
            assert not (await control.query_dns("a", "bad.example", "A")).allow

            await control.unsubscribe("b", UnsubscribeReason.DETACHED)
            del host.views["b"]
            await until(lambda: sorted(states(plane)) == ["a", "new"])

    run(test())


@pytest.mark.parametrize("change", [False, True], ids=["same", "changed"])
def test_restarted_control_plane_sends_what_differs(tmp_path: Path, change: bool) -> None:
    async def test() -> None:
        address = f"unix:{tmp_path}/plane"
        policies = Policies(WEB)
        first = ControlPlane(policies)
        async with contextlib.AsyncExitStack() as stack:
            async with first.serving(address):
                _, host = await stack.enter_async_context(daemon(address, "a", "b"))
                await until(lambda: all_are(first, State.IN_SYNC, 2))
            sent = len(host.batches)
            if change:
                policies.by_id["a"] = SHUT
            second = ControlPlane(policies)
            async with second.serving(address):
                await until(lambda: all_are(second, State.IN_SYNC, 2))
                assert [whom for whom, _ in host.batches[sent:]] == (["a"] if change else [])
                assert host.policies["a"] == (SHUT if change else WEB).rules

    run(test())


def test_policy_that_the_daemon_cannot_take_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        address = f"unix:{tmp_path}/plane"
        policies = Policies(WEB)
        plane = ControlPlane(policies)
        async with plane.serving(address), daemon(address, "a") as (_, host):
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            host.failure = RuntimeError("the kernel does not")
            policies.default = OPEN
            results = await plane.update()
            assert [result.outcome for result in results] == [Outcome.REFUSED]
            assert results.all[0].errors
            host.failure = None
            assert [result.outcome for result in await plane.update()] == [Outcome.REFUSED]
            assert host.policies["a"] == WEB.rules
            policies.default = SHUT
            assert (await plane.update()).ok

    run(test())
