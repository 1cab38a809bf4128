"""The daemon's database is damaged or gone: it is set aside, the fences stay, and are known again from the kernel."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from control_commands import ack, dns, policy_hash
from daemons import Fenced
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.controlplane import ControlPlaneProcess
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.packets import UDP4, UDP6
from harness.topology import Workload
from netfence.store import DATABASE

ALLOWED4, ALLOWED6, DENIED4, LEARNED4, TTL4 = (
    "203.0.113.99", "2001:db8:77::1", "203.0.113.120", "203.0.113.80", "198.18.0.1",
)  # fmt: skip
OTHER4, OTHER6 = "203.0.113.200", "2001:db8:78::1"
ALLOW = ["203.0.113.96/27", "2001:db8:77::/64"]
NAMES = dns("allowlist", [("good.test", False)])
ACK = ack(allow=[*ALLOW, ("198.18.0.0/15", 3600)], deny=[f"{DENIED4}/32"], dns=NAMES, version="v1")


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def cut(path: Path) -> None:
    os.truncate(path, 5_000)


def gone(path: Path) -> None:
    path.unlink()


def holes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)


def page(path: Path) -> None:
    """Break one page that every start reads; all of the attachments can be read still."""
    with closing(sqlite3.connect(path)) as state:
        ((number, size),) = state.execute(
            "SELECT rootpage, page_size FROM sqlite_schema, pragma_page_size WHERE name = 'daemon'"
        ).fetchall()
    content = bytearray(path.read_bytes())
    content[(number - 1) * size : number * size] = os.urandom(size)
    path.write_bytes(content)


class Scene:
    """One attachment of each kind, with rules, a TTL rule and a lease."""

    def __init__(self, stack: ExitStack, fresh: Fresh, directory: Path, *, tcx: bool) -> None:
        self.topology = topology = fresh.topology()
        fresh.names(topology, f"good.test. 300 IN A {LEARNED4}")
        self.plane = stack.enter_context(ControlPlaneProcess(topology.host))
        self.plane.on_subscribed(ACK)
        self.group = Cgroup(f"lost-{id(self):x}")
        stack.callback(self.group.remove)
        self.veths = [topology.add_veth() for _ in range(3)]
        topology.queues(self.veths[1].host_if)
        config = self.plane.config()
        self.daemon = stack.enter_context(Fenced(topology, directory / "daemon", tcx=tcx, policy=None, config=config))
        attach = self.daemon.attach
        self.attached = [
            attach(interface=self.veths[0].host_if, metadata={"tenant": "a"}),
            attach(interface=self.veths[1].host_if, hook="xdp"),
            attach(cgroup=self.group),
        ]
        places: list[dict[str, Any]] = [{"netns": veth.inside} for veth in self.veths[:2]]
        self.agents = [
            stack.enter_context(Agent(**where)) for where in (*places, {"netns": topology.host, "cgroup": self.group})
        ]
        for each, agent in zip(self.attached, self.agents, strict=True):
            assert [str(one.rdata) for one in agent.query(each.dns, "good.test").rr] == [LEARNED4]
        self.enforced()

    def passes(self, target: Workload, address: str) -> bool:
        arrived = self.topology.arrived(target, UDP6 if ":" in address else UDP4, address)
        assert arrived in (0, 3)
        return arrived == 3

    def sends(self, address: str) -> bool:
        try:
            self.agents[2].udp().sendto(b"x", (address, 9))
        except PermissionError:
            return False
        return True

    def enforced(self) -> None:
        self.interfaces_enforced()
        self.cgroup_enforced()

    def interfaces_enforced(self) -> None:
        for veth in self.veths[:2]:
            for address in (ALLOWED4, ALLOWED6, LEARNED4, TTL4):
                assert self.passes(veth, address), (veth.host_if, address)
            for address in (DENIED4, OTHER4, OTHER6):
                assert not self.passes(veth, address), (veth.host_if, address)

    def cgroup_enforced(self) -> None:
        assert [self.sends(address) for address in (ALLOWED4, LEARNED4, TTL4)] == [True] * 3
        assert [self.sends(address) for address in (DENIED4, OTHER4)] == [False] * 2

    def told(self) -> list[tuple[Any, ...]]:
        return [self.told_of(info) for info in (self.daemon.info(each.id) for each in self.attached)]

    def told_of(self, info: Any) -> tuple[Any, ...]:
        return (info.target, info.hook, info.attach_mechanism, info.direction, info.dns_address, info.mode)

    def take_everything_off(self) -> None:
        """Leave in the kernel what a reboot leaves: nothing."""
        pins = self.daemon.pins.rglob("*")
        for pin in sorted(pins, key=lambda path: len(path.parts), reverse=True):
            pin.rmdir() if pin.is_dir() else pin.unlink()
        for veth in self.veths[:2]:
            self.topology.host.run("tc", "qdisc", "del", "dev", veth.host_if, "clsact", check=False)
            wait_for(lambda: self.passes(veth, OTHER4), "its links to be gone")  # noqa: B023
        wait_for(lambda: self.sends(OTHER4), "the cgroup's links to be gone")


@pytest.fixture(params=[pytest.param(True, id="tcx"), pytest.param(False, id="clsact")])
def scene(request: pytest.FixtureRequest, fresh: Fresh, tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(stack, fresh, tmp_path, tcx=request.param)


@pytest.mark.timeout(180)
@pytest.mark.userspace
@pytest.mark.parametrize("how", ["stop", "kill -9"])
@pytest.mark.parametrize("damage", [garbage, cut, gone, holes])
def test_attachments_are_known_again_from_the_kernel(scene: Scene, damage: Callable[[Path], None], how: str) -> None:
    daemon, before = scene.daemon, scene.told()
    if how == "stop":
        assert daemon.stop() == 0
    else:
        daemon.kill()
    scene.plane.kill()
    database = daemon.directory / "data" / DATABASE
    damage(database)
    if damage is not holes:
        database.with_name(f"{DATABASE}-wal").unlink(missing_ok=True)  # else it may hold everything there was
    began = time.time()
    daemon.start()
    if damage is garbage or (how == "stop" and damage is not gone):  # after kill -9 the log may have been all there was
        assert [told["level"] for told in daemon.events("state_damaged")] == ["critical"]
        assert len([*database.parent.glob(f"{DATABASE}.damaged-*[0-9]")]) == 1
    if damage is not holes:
        assert len(daemon.events("recovered")) == 3
    assert scene.told() == before
    assert not daemon.events("hook_put_back")
    assert {info.policy_hash for info in daemon.attachments()} <= {
        policy_hash("allowlist", ALLOW, deny=[f"{DENIED4}/32"], dns_mode="allowlist", more=more)
        for more in ([], ["allow_domain good.test 0"])
    }
    assert all(info.attached_at.ToSeconds() <= began for info in daemon.attachments())
    scene.enforced()
    # The control plane says again what it may: names too.
    scene.plane.start()
    for each in scene.attached:
        wait_for(lambda: daemon.info(each.id).policy_version == "v1", "the policy from the control plane")  # noqa: B023
    for each, agent in zip(scene.attached, scene.agents, strict=True):
        assert [str(one.rdata) for one in agent.query(each.dns, "good.test").rr] == [LEARNED4]
    scene.enforced()
    # Nobody else gets what is theirs, and the new database knows them.
    other = daemon.attach(interface=scene.veths[2].host_if)
    assert other.dns not in [each.dns for each in scene.attached]
    daemon.restart()
    assert scene.told() == before
    scene.enforced()


@pytest.mark.timeout(180)
@pytest.mark.userspace
def test_a_target_that_went_meanwhile_is_dropped(scene: Scene) -> None:
    daemon = scene.daemon
    daemon.kill()
    garbage(daemon.directory / "data" / DATABASE)
    scene.topology.host.ip(f"link del {scene.veths[0].host_if}")
    for agent in scene.agents[2:]:
        agent.close()
    scene.group.remove()
    daemon.start()
    assert [info.id for info in daemon.attachments()] == [scene.attached[1].id]
    assert {pin.rpartition("-")[0] for pin in daemon.link_pins()} == {scene.attached[1].id}
    daemon.attach(interface=scene.veths[2].host_if)


@pytest.mark.timeout(180)  # the programs are compiled anew
@pytest.mark.userspace
@pytest.mark.parametrize("reboot", [True, False], ids=["reboot", "pins lost"])
def test_what_nothing_pins_is_fenced_again_as_far_as_it_can_be_read(scene: Scene, *, reboot: bool) -> None:
    """After a reboot the damaged file is all there is; and pins may be lost within one boot."""
    daemon, before = scene.daemon, scene.told()
    assert daemon.stop() == 0
    scene.plane.kill()
    scene.take_everything_off()
    database = daemon.directory / "data" / DATABASE
    if reboot:
        with closing(sqlite3.connect(database)) as state, state:
            state.execute("UPDATE attachments SET boot_id = 'the boot before'")
            state.execute("UPDATE attachments SET identity = 9000 + slot WHERE kind = 'interface'")
    page(database)
    daemon.start()
    assert len(daemon.events("state_damaged")) == 1
    left = scene.attached[: 2 if reboot else 3]  # no cgroup outlives a reboot
    assert [info.id for info in daemon.attachments()] == [each.id for each in left]
    for _ in range(2):
        assert [scene.told_of(daemon.info(each.id)) for each in left] == before[: len(left)]
        assert daemon.info(left[0].id).metadata == {"tenant": "a"}
        for each, agent in zip(left, scene.agents, strict=False):
            assert [str(one.rdata) for one in agent.query(each.dns, "good.test").rr] == [LEARNED4]
        scene.interfaces_enforced()
        if not reboot:
            scene.cgroup_enforced()
        daemon.restart()  # an ordinary one
        assert len(daemon.events("state_damaged")) == 1
    scene.plane.start()
    for each in left:
        scene.plane.wait_event("subscribed", id=each.id)  # whether there is anything newer


@pytest.mark.timeout(180)  # the programs are compiled anew
@pytest.mark.userspace
@pytest.mark.parametrize("scene", [True], indirect=True, ids=["tcx"])
def test_a_start_that_fails_loses_nothing_of_it(scene: Scene) -> None:
    daemon = scene.daemon
    assert daemon.stop() == 0
    scene.plane.kill()
    scene.take_everything_off()
    page(daemon.directory / "data" / DATABASE)
    held = os.open(daemon.pins, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        daemon.launch()
        assert "another netfenced uses it" in daemon.ended_saying()
    finally:
        os.close(held)
    daemon.start()
    assert len(daemon.events("state_damaged")) == 1
    assert len(daemon.attachments()) == 3
    for each, agent in zip(scene.attached, scene.agents, strict=True):
        assert [str(one.rdata) for one in agent.query(each.dns, "good.test").rr] == [LEARNED4]
    scene.enforced()
