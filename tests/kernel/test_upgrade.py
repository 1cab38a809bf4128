"""A daemon with other programs and other map layouts takes over from this one, while workloads send all the time.

The next version is this tree with another version number, fields added and swapped in what kernel and daemon share, and
bits and reasons renumbered: whatever was carried over by its place instead of its name would show.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import netfence
from crash import KEPT, LEARNED4, PROBES, RECORDS, Prober, asked, kept, shut
from daemons import Fenced
from flood import FarEnd
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.packets import UDP4
from harness.topology import Topology, Workload
from netfence.dataplane.loader import bpf_sources
from netfence.policy.modes import Reason

pytestmark = pytest.mark.userspace  # where Python is emulated, the senders leave it no time to take over

POLICY: dict[str, Any] = {
    "default": {
        "mode": "allowlist",
        "allow_cidrs": [*KEPT, {"cidr": "198.18.0.0/15", "ttl": "1h"}],
        "deny_cidrs": ["203.0.113.120"],
        "dns": {"mode": "allowlist", "allow": ["good.test"]},
    }
}
TTL4, DENIED4 = "198.18.0.1", "203.0.113.120"

CHANGES = {
    "bpf/layout.h": [
        ("struct lease {\n", "struct lease {\n    __u64 extra;\n"),
        ("struct rule {\n", "struct rule {\n    __u64 extra;\n"),
        ("struct counters {\n", "struct counters {\n    struct count extra;\n"),
        ("    __u64 active;\n", "    __u64 extra;\n    __u64 active;\n"),
        ("RULES4 16777216", "RULES4 33554432"),
        ("RULES6 33554432", "RULES6 16777216"),
        ("LEASES 67108864", "LEASES 134217728"),  # read in its old place, a slot with leases drops nothing
        ("AUDIT 134217728", "AUDIT 67108864"),
        ("NF_SLOTS 2048", "NF_SLOTS 2000"),
    ],
    "bpf/reasons.h": [("REASON_ALLOW_RULE 1", "REASON_ALLOW_RULE 2"), ("REASON_LEASE 2", "REASON_LEASE 1")],
    "src/netfence/policy/modes.py": [("ALLOW_RULE = 1", "ALLOW_RULE = 2"), ("LEASE = 2", "LEASE = 1")],
    "src/netfence/__init__.py": [(f'"{netfence.__version__}"', '"99.1.0"')],
}  # fmt: skip


@pytest.fixture(scope="module")
def following(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the tree of the next version; return where its Python is imported from."""
    tree = tmp_path_factory.mktemp("next")
    package = Path(netfence.__file__).parent
    shutil.copytree(package, tree / "src" / "netfence", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(bpf_sources(), tree / "bpf")
    for name, changes in CHANGES.items():
        text = (tree / name).read_text()
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tree / name).write_text(text)
    return tree / "src"


@dataclass
class Place:
    """An attached target, and who sends from it."""

    number: int
    target: Workload | Cgroup
    agent: Agent
    prober: Prober
    id: str = ""
    dns: tuple[str, int] = ("", 0)

    def passes(self, topology: Topology, address: str) -> bool:
        """Send three packets: all pass, or none."""
        if isinstance(self.target, Workload):
            arrived = topology.arrived(self.target, UDP4, address)
            assert arrived in (0, 3)
            return arrived == 3
        try:
            self.agent.udp().sendto(b"x", (address, 9))
        except PermissionError:
            return False
        return True


class Scene:
    """A daemon with a target of each kind attached, each of which sends without pause."""

    def __init__(self, stack: ExitStack, fresh: Fresh, directory: Path, following: Path, *, tcx: bool) -> None:
        self._following = following
        self.topology = topology = fresh.topology()
        fresh.names(topology, *RECORDS)
        topology.ignore(*PROBES)
        group = Cgroup(f"upgraded-{id(self):x}")
        stack.callback(group.remove)
        targets: list[Workload | Cgroup] = [topology.add_veth(), topology.add_veth(), group]
        self._far = stack.enter_context(
            closing(FarEnd(topology, [one for number in range(len(targets)) for one in (*kept(number), *shut(number))]))
        )
        self.daemon = stack.enter_context(Fenced(topology, directory / "daemon", tcx=tcx, policy=POLICY))
        topology.queues(topology.workloads[1].host_if)
        self.places = []
        for number, target in enumerate(targets):
            where: dict[str, Any] = {"netns": topology.host, "cgroup": target}
            if isinstance(target, Workload):
                where = {"netns": target.netns}
                attached = self.daemon.attach(interface=target.host_if, hook="xdp" if number == 1 else "auto")
            else:
                attached = self.daemon.attach(cgroup=target)
            agent = stack.enter_context(Agent(**where))
            prober = stack.enter_context(closing(Prober([*kept(number), *shut(number)], **where)))
            self.places.append(Place(number, target, agent, prober, attached.id, attached.dns))
            assert [str(one.rdata) for one in agent.query(attached.dns, "good.test").rr] == [LEARNED4]
        self.check()

    def follow(self) -> None:
        """Let the next start be that of the next version."""
        self.daemon._env = {"PYTHONPATH": str(self._following)}

    def go_back(self) -> None:
        """Let the next start be that of this version."""
        self.daemon._env = {}

    def check(self) -> None:
        """See by packets that each place has its policy and its lease."""
        for place in self.places:
            for address in (asked(place.number)[0], TTL4, LEARNED4):
                assert place.passes(self.topology, address), (place.number, address)
            for address in (shut(place.number)[0], DENIED4, "203.0.113.81"):
                assert not place.passes(self.topology, address), (place.number, address)

    def builds(self) -> list[str]:
        """List the builds that have pins, maps and programs each for itself."""
        return sorted(path.name for kind in ("maps", "programs") for path in self.daemon.pins.glob(f"{kind}-*"))

    def told(self) -> list[tuple[str, ...]]:
        """List what must not change of each attachment."""
        return [
            (info.id, info.target, info.dns_address, info.policy_version, info.policy_hash, info.attach_mechanism)
            for info in self.daemon.attachments()
        ]

    def dropped(self) -> list[int]:
        """Count each place's dropped packets."""
        return [self.daemon.info(place.id).packets_blocked for place in self.places]

    def end(self) -> None:
        """Stop sending: nothing denied may have arrived, nothing allowed may be lost."""
        for place in self.places:
            sent = place.prober.end()
            first = 4 * place.number
            took = [count for count, _ in sent[:2]]
            assert min(took) > 100
            wait_for(lambda: self._far.counts()[first : first + 2] == took, f"{took} packets to arrive")  # noqa: B023
            assert self._far.counts()[first + 2 : first + 4] == [0, 0], f"packets passed to {shut(place.number)}"
            assert [refused for _, refused in sent[:2]] == [0, 0]
            self.daemon.detach(place.id)


@pytest.fixture(params=[pytest.param(True, id="tcx"), pytest.param(False, id="clsact")])
def scene(request: pytest.FixtureRequest, fresh: Fresh, tmp_path: Path, following: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(stack, fresh, tmp_path, following, tcx=request.param)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["stop", "kill -9"])
def test_another_version_takes_over_without_a_gap(scene: Scene, how: str) -> None:
    daemon, before, dropped, was = scene.daemon, scene.told(), scene.dropped(), scene.builds()
    learned = [daemon.reasons(place.id)[Reason.LEASE] for place in scene.places]
    if how == "stop":
        assert daemon.stop() == 0
    else:
        daemon.kill()
    scene.follow()
    daemon.start()
    assert len(daemon.events("upgrading")) == 1
    assert not daemon.events("upgrade_not_finished")
    assert not daemon.events("hook_put_back")
    assert scene.told() == before
    assert [now >= once for now, once in zip(scene.dropped(), dropped, strict=True)] == [True] * 3
    # This version's reading of the next one's counters: it calls 2 what is 1 here.
    assert [daemon.reasons(place.id)[Reason.ALLOW_RULE] for place in scene.places] == learned
    now = scene.builds()
    assert len(now) == 2
    assert not set(now) & set(was)
    scene.check()
    daemon.kill()
    daemon.start()
    assert len(daemon.events("upgrading")) == 1
    assert scene.builds() == now
    scene.check()
    scene.end()


@pytest.mark.timeout(120)
def test_no_way_leads_back(scene: Scene) -> None:
    daemon, before = scene.daemon, scene.told()
    daemon.stop()
    scene.follow()
    daemon.start()
    daemon.stop()
    pins = sorted(daemon.link_pins())
    scene.go_back()
    daemon.launch()
    said = daemon.ended_saying()
    assert f"it is of version 99.1.0, this is {netfence.__version__}, and no way leads back; they stay in force" in said
    assert sorted(daemon.link_pins()) == pins
    scene.check()
    scene.follow()
    daemon.start()
    assert scene.told() == before
    scene.end()


@pytest.mark.timeout(120)
def test_without_the_layout_of_what_is_in_force_nothing_is_touched(scene: Scene) -> None:
    daemon = scene.daemon
    daemon.stop()
    (layout,) = (daemon.directory / "data").glob("layout-*.json")
    kept_aside = layout.rename(layout.with_suffix(".aside"))
    scene.follow()
    daemon.launch()
    assert f"read {layout}: " in daemon.ended_saying()
    scene.check()
    kept_aside.rename(layout)
    daemon.start()
    scene.check()
    scene.end()


@pytest.mark.timeout(180)
def test_an_upgrade_that_is_cut_short_is_finished_by_the_next_start(scene: Scene) -> None:
    daemon, before = scene.daemon, scene.told()
    daemon.stop()
    scene.follow()
    for _ in range(6):
        daemon.launch()
        # Compiling takes two seconds, what follows a quarter of one.
        wait_for(lambda: len(scene.builds()) > 2 or daemon.events("upgrading"), "the upgrade to begin")
        time.sleep(random.uniform(0, 2.5))
        daemon.kill()
        scene.check()
    daemon.start()
    assert len(scene.builds()) == 2
    assert scene.told() == before
    scene.check()
    scene.end()


@pytest.mark.timeout(120)
def test_another_limit_of_leases_needs_no_detach(scene: Scene) -> None:
    daemon, before = scene.daemon, scene.told()
    for limit in (1000, 2000, 1000):
        daemon.stop()
        daemon.write_config({"dns": {"max_leases": 500, "max_leases_total": limit}})
        daemon.start()
        assert len(scene.builds()) == 2
        assert scene.told() == before
        scene.check()
    assert len(daemon.events("upgrading")) == 3
    scene.end()
