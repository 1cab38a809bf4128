"""packaging/netfenced.service under systemd itself: starts, fences, is restarted by the watchdog, reloads, stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import netfence
from booted import Booted
from confined import capabilities
from harness.agent import Agent
from harness.deadline import SLOWNESS, wait_for
from harness.fresh import Fresh
from harness.packets import UDP4
from harness.topology import UP_IF
from netfence.dataplane import probe

pytestmark = pytest.mark.userspace

OUTSIDE4, OTHER4, LEARNED4 = "203.0.113.99", "203.0.113.98", "203.0.113.80"
POLICY: dict[str, Any] = {
    "default": {
        "mode": "allowlist",
        "allow_cidrs": [OUTSIDE4],
        "dns": {"mode": "allowlist", "allow": ["good.test"]},
    }
}

SOURCES = Path(netfence.__file__).parents[1]
SLOW_END = """
import asyncio
from netfence import daemon, lifecycle
end, daemon.AT_ONCE = lifecycle.Lifecycle.end, 1
async def slow(self, *args, **how):
    await asyncio.sleep(2)
    await end(self, *args, **how)
lifecycle.Lifecycle.end = slow
"""


def test_a_life_under_systemd(fresh: Fresh, tmp_path: Path) -> None:
    topology = fresh.topology()
    fresh.names(topology, f"good.test. 300 IN A {LEARNED4}")
    workload = topology.add_veth()

    def passed() -> list[int]:
        return [topology.arrived(workload, UDP4, where) for where in (OUTSIDE4, OTHER4)]

    with Booted(topology, tmp_path, POLICY, watchdog_s=2 * SLOWNESS) as systemd:
        status = systemd.status()
        assert int(status["CapEff"], 16) == sum(1 << probe.CAPABILITIES[name] for name in capabilities())
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        options = {fields[4]: fields[5].split(",") for fields in systemd.mounts()}
        assert [place for place in ("/", "/sys") if "ro" not in options[place]] == []
        assert [place for place in ("/sys/fs/bpf/netfence", "/var/lib/netfence") if "ro" in options[place]] == []

        systemd.netfenced("attach", "--interface", workload.host_if)
        (attached,) = json.loads(systemd.netfenced("list", "--json"))["attachments"]
        host, _, port = attached["dns_address"].rpartition(":")
        with Agent(netns=workload.netns) as agent:
            assert [str(record.rdata) for record in agent.query((host, int(port)), "good.test").rr] == [LEARNED4]
        assert passed() == [3, 0]
        assert topology.arrived(workload, UDP4, LEARNED4) == 3
        wait_for(lambda: systemd.shows("StatusText") == "1 attachments", "a ping of the watchdog that tells of it")

        # A daemon that hangs is replaced; meanwhile and afterwards the fence holds.
        assert systemd.shows("NRestarts") == "0"
        systemd.run("systemctl", "kill", "--signal=STOP", "netfenced.service")
        wait_for(lambda: systemd.shows("NRestarts") == "1", "the watchdog to restart the service", 30 * SLOWNESS)
        assert passed() == [3, 0]
        wait_for(lambda: systemd.shows("ActiveState") == "active", "the next daemon", 60 * SLOWNESS)
        assert passed() == [3, 0]
        assert "Fatal Python error: Aborted" in systemd.said()
        (after,) = json.loads(systemd.netfenced("list", "--json"))["attachments"]
        assert after["id"] == attached["id"]

        systemd.run("systemctl", "reload", "netfenced.service")
        assert (systemd.shows("ActiveState"), systemd.shows("NRestarts")) == ("active", "1")
        systemd.run("systemctl", "stop", "netfenced.service")
        assert (systemd.shows("ActiveState"), systemd.shows("ExecMainStatus")) == ("inactive", "0")
        assert passed() == [3, 0]
        systemd.run("systemctl", "start", "netfenced.service")
        systemd.netfenced("detach", "--id", attached["id"])
        assert passed() == [3, 3]


def test_a_stop_that_takes_every_fence_off_is_waited_for(fresh: Fresh, tmp_path: Path) -> None:
    """As long as it takes: each fence lasts longer than TimeoutStopSec= here."""
    topology = fresh.topology()
    workloads = [topology.add_veth() for _ in range(3)]
    (tmp_path / "sitecustomize.py").write_text(SLOW_END)
    more = f"""
Environment=PYTHONPATH={tmp_path}:{SOURCES} NETFENCE_ENFORCEMENT__ON_SHUTDOWN=detach
TimeoutStopSec=1
"""
    with Booted(topology, tmp_path, POLICY, watchdog_s=60, more=more) as systemd:
        for workload in workloads:
            systemd.netfenced("attach", "--interface", workload.host_if)
        assert [topology.arrived(each, UDP4, OTHER4) for each in workloads] == [0, 0, 0]
        systemd.run("systemctl", "stop", "netfenced.service")
        assert (systemd.shows("ActiveState"), systemd.shows("ExecMainStatus")) == ("inactive", "0")
        assert [topology.arrived(each, UDP4, OTHER4) for each in workloads] == [3, 3, 3]


def test_what_it_has_to_see_of_the_host(fresh: Fresh, tmp_path: Path) -> None:
    """A cgroup, with its end; and the service's own, which nothing else shares, or a way out could not be fenced."""
    topology = fresh.topology()
    with Booted(topology, tmp_path, POLICY, watchdog_s=60) as systemd:

        def targets() -> list[str]:
            return [entry["target"] for entry in json.loads(systemd.netfenced("list", "--json"))["attachments"]]

        group = "/sys/fs/cgroup/box"
        systemd.run("mkdir", group)
        systemd.netfenced("attach", "--cgroup", group)
        assert targets() == [group]
        systemd.run("rmdir", group)
        wait_for(lambda: targets() == [], "the attachment of a cgroup that was removed to go")

        systemd.netfenced("attach", "--interface", UP_IF, "--direction", "host")
        assert targets() == [UP_IF]
