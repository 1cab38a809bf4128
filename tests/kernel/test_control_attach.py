"""Attach with a control plane: shut until its policy is in force, and nothing left where none came (wire.md 2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import pytest
from google.protobuf import duration_pb2

import control_commands as commands
from control_stage import (
    BOTH,
    ERROR,
    NET4,
    NET6,
    NONE,
    ONLY4,
    ONLY6,
    RECONNECT_S,
    REFUSED,
    Stage,
    ask,
    nothing_left,
    refused_attach,
    staged,
)
from harness.agent import Agent
from harness.controlplane import Command
from harness.daemon import host_port
from harness.deadline import wait_for
from harness.topology import Topology, Workload
from netfence.api.client import RefusedError
from netfence.v1 import control_pb2, daemon_pb2, daemon_pb2_grpc

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

ACK_S = 1.5
SLACK_S = 1.5


@pytest.fixture(scope="module")
def stage(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(topology, tmp_path_factory.mktemp("netfenced"), subscribe_ack_timeout=ACK_S) as stage:
        yield stage


def unsubscribed(stage: Stage, attachment_id: str) -> control_pb2.Unsubscribed:
    """Give the Unsubscribed of an attach that failed."""
    found: control_pb2.Unsubscribed = stage.plane.wait_event("unsubscribed", id=attachment_id, timeout_s=RECONNECT_S)
    assert found.reason == ERROR
    return found


# -- it works ----------------------------------------------------------------------------------------------------------


def test_nothing_gets_out_until_the_ack_is_applied(stage: Stage, workload: Workload, agent: Agent) -> None:
    assert stage.reach(workload) == BOTH
    with stage.attaching(workload) as (subscribed, future):
        assert stage.reach(workload) == NONE
        assert ask(agent, host_port(subscribed.dns_address), "any.test") == (REFUSED, [])
        assert not future.done()
        assert stage.daemon.attachments() == []
        stage.plane.send(commands.ack(subscribed.id, allow=[NET4]))
        attached = future.result()
    assert stage.reach(workload) == ONLY4
    assert (attached.id, attached.dns) == (subscribed.id, host_port(subscribed.dns_address))
    stage.daemon.detach(attached.id)
    assert stage.reach(workload) == BOTH


def test_subscribed_tells_what_it_is_about(stage: Stage, workload: Workload) -> None:
    attached = stage.attach(workload, commands.ack(), tenant="acme")
    subscribed = stage.plane.wait_event("subscribed", id=attached.id)
    info = stage.daemon.info(attached.id)
    for field in ("id", "target", "type", "dns_address", "metadata"):
        assert getattr(subscribed, field) == getattr(info, field), field
    assert (subscribed.mode, subscribed.dns_mode) == (commands.mode_of("block_all"), commands.dns_mode_of("disabled"))
    stage.daemon.detach(attached.id)


def test_the_first_packet_after_the_attach_passes(stage: Stage, workload: Workload) -> None:
    for round_ in range(5):
        attached = stage.attach(workload, commands.ack(allow=[NET6], version=str(round_)))
        assert stage.reach(workload) == ONLY6
        assert stage.daemon.info(attached.id).policy_version == str(round_)
        stage.daemon.detach(attached.id)


def test_each_of_two_gets_its_own_ack(stage: Stage, topology: Topology) -> None:
    left, right = topology.add_veth(), topology.add_veth()
    with stage.attaching(left) as (first, one), stage.attaching(right) as (second, two):
        stage.plane.send(commands.ack(second.id, allow=[NET6]), commands.ack(first.id, allow=[NET4]))
        assert {one.result().id, two.result().id} == {first.id, second.id}
    assert (stage.reach(left), stage.reach(right)) == (ONLY4, ONLY6)
    stage.detach_all()


# -- it fails and leaves nothing ---------------------------------------------------------------------------------------


def fails(stage: Stage, workload: Workload) -> tuple[str, str, control_pb2.Subscribed]:
    """Attach in vain; give status code, message and what the control plane had been told."""
    since = len(stage.plane.seen)
    code, said = refused_attach(stage.daemon, workload.host_if)
    stage.plane.settle()
    (seen,) = stage.plane.events("subscribed", since=since)
    return code, said, seen.body


def test_no_ack_in_time(stage: Stage, workload: Workload) -> None:
    stage.plane.on_subscribed()
    begun = time.monotonic()
    code, said, subscribed = fails(stage, workload)
    assert ACK_S <= time.monotonic() - begun < ACK_S + SLACK_S
    assert code == "DEADLINE_EXCEEDED"
    assert "control_plane.subscribe_ack_timeout" in said
    assert unsubscribed(stage, subscribed.id).error
    nothing_left(stage, workload, host_port(subscribed.dns_address))


def test_an_ack_for_another_id_is_none(stage: Stage, workload: Workload) -> None:
    stage.plane.on_subscribed(commands.ack("somebody-else", nonce="elsewhere"))
    code, _, subscribed = fails(stage, workload)
    assert code == "DEADLINE_EXCEEDED"
    result = stage.plane.wait_event("command_result", nonce="elsewhere")
    assert (result.ok, result.policy_hash, len(result.errors)) == (False, "", 1)
    nothing_left(stage, workload, host_port(subscribed.dns_address))


BAD_ACKS: dict[str, tuple[Command, list[str]]] = {
    "empty": (Command(subscribed_ack=control_pb2.SubscribedAck()), ["UNSPECIFIED"]),
    "many": (
        commands.ack(
            allow=[NET4, "203.0.113.0/33"], deny=[("10.0.0.0/8", -1)], dns=commands.dns("allowlist", allow=["a.*.test"])
        ),
        ["allow_cidrs[1]", "'203.0.113.0/33'", "deny_cidrs[0]", "negative", "a.*.test"],
    ),
    "dns-mode": (
        Command(subscribed_ack=control_pb2.SubscribedAck(mode=commands.mode_of("disabled"), dns={})),
        ["dns.mode", "UNSPECIFIED"],
    ),
    "duration": (
        Command(
            subscribed_ack=control_pb2.SubscribedAck(
                mode=commands.mode_of("disabled"), allow_cidrs=[{"cidr": NET4, "ttl": duration_pb2.Duration(nanos=-1)}]
            )
        ),
        ["allow_cidrs[0]", "negative"],
    ),
}


@pytest.mark.parametrize("name", BAD_ACKS)
def test_a_bad_ack_is_refused_whole(stage: Stage, workload: Workload, name: str) -> None:
    answer, faults = BAD_ACKS[name]
    answer.nonce = f"bad-{name}"
    stage.plane.on_subscribed(answer)
    code, said, subscribed = fails(stage, workload)
    assert code == "INVALID_ARGUMENT"
    told = unsubscribed(stage, subscribed.id).error
    result = stage.plane.wait_event("command_result", nonce=answer.nonce)
    assert not result.ok
    for fault in faults:
        assert fault in said
        assert fault in told
        assert fault in " ".join(result.errors)
    nothing_left(stage, workload, host_port(subscribed.dns_address))


@pytest.mark.parametrize("how", ["silence", "bad-ack", "bad-ack-of-the-wire", "lost"])
def test_the_message_says_what_was_tried_on_what(stage: Stage, workload: Workload, how: str) -> None:
    answers = {"bad-ack": commands.ack(mode="unspecified"), "bad-ack-of-the-wire": commands.ack(allow=[(NET4, -1)])}
    with ThreadPoolExecutor(1) as pool:
        stage.plane.on_subscribed(*[answers[how]] if how in answers else [])
        since = len(stage.plane.seen)
        future = pool.submit(refused_attach, stage.daemon, workload.host_if)
        if how == "lost":
            stage.plane.wait_event("subscribed", since=since)
            stage.plane.end()
        _, said = future.result()
    assert said.startswith(f"attach to {workload.host_if}: ")
    if how in answers:
        assert "SubscribedAck" in said


@pytest.mark.parametrize("how", ["ended", "refused", "killed"])
def test_the_stream_is_lost_while_it_waits(stage: Stage, workload: Workload, how: str) -> None:
    stage.anew()
    lose: dict[str, Callable[[], None]] = {
        "ended": stage.plane.end,
        "refused": partial(stage.plane.end, "PERMISSION_DENIED", "go away"),
        "killed": stage.plane.restart,
    }
    since = len(stage.plane.seen)
    with ThreadPoolExecutor(1) as pool:
        stage.plane.on_subscribed()
        future = pool.submit(refused_attach, stage.daemon, workload.host_if)
        subscribed = stage.plane.wait_event("subscribed", since=since)
        lose[how]()
        code, said = future.result()
    assert code == "UNAVAILABLE"
    assert said == unsubscribed(stage, subscribed.id).error
    (lost,) = stage.plane.events("unsubscribed", id=subscribed.id)
    first, *_ = stage.plane.events(stream=lost.stream)
    assert (first.name, list(first.body.attachments)) == ("sync", [])
    nothing_left(stage, workload, host_port(subscribed.dns_address))


def test_no_control_plane_at_all(stage: Stage, workload: Workload) -> None:
    stage.anew()
    stage.plane.kill()
    since = len(stage.plane.seen)
    begun = time.monotonic()
    code, said = refused_attach(stage.daemon, workload.host_if)
    assert code == "UNAVAILABLE"
    assert ACK_S <= time.monotonic() - begun < ACK_S + SLACK_S
    assert workload.host_if in said
    assert stage.plane.address in said
    assert stage.daemon.link_pins() == []
    assert stage.reach(workload) == BOTH
    stage.plane.start()
    stage.connected()
    attached = stage.attach(workload, commands.ack())
    told = [seen.body.id for name in ("subscribed", "unsubscribed") for seen in stage.plane.events(name, since=since)]
    assert told == [attached.id]
    stage.daemon.detach(attached.id)


def test_a_caller_that_goes_away(stage: Stage, workload: Workload) -> None:
    stage.plane.on_subscribed()
    since = len(stage.plane.seen)
    with grpc.insecure_channel(f"unix:{stage.daemon.socket}") as channel:
        call = daemon_pb2_grpc.DaemonServiceStub(channel).Attach.future(
            daemon_pb2.AttachRequest(interface_name=workload.host_if)
        )
        subscribed = stage.plane.wait_event("subscribed", since=since)
        call.cancel()
    unsubscribed(stage, subscribed.id)
    wait_for(lambda: stage.daemon.link_pins() == [], "the fence to be taken off")
    wait_for(lambda: "being attached" not in refused_word(stage, workload), "the roll-back to end")


def refused_word(stage: Stage, workload: Workload) -> str:
    """Attach and detach; give why that was refused, if it was."""
    try:
        attached = stage.attach(workload, commands.ack())
    except RefusedError as error:
        return str(error)
    stage.daemon.detach(attached.id)
    return ""


def test_a_target_that_goes_away_meanwhile(stage: Stage, topology: Topology) -> None:
    workload = topology.add_veth()
    since = len(stage.plane.seen)
    with stage.attaching(workload) as (subscribed, future):
        topology.host.ip(f"link del {workload.host_if}")
        with pytest.raises(RefusedError, match=workload.host_if):
            future.result()
    stage.plane.wait_event("unsubscribed", id=subscribed.id)
    stage.plane.settle()
    assert [seen.name for seen in stage.plane.events(since=since)] == ["subscribed", "unsubscribed"]
    assert (stage.daemon.attachments(), stage.daemon.link_pins()) == ([], [])
