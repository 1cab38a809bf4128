"""The recipes for containers of docs/recipes.md with real ones (runc): fenced by their cgroup, and by their veth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from container import Container
from demo import SITE, STRANGER, internet
from harness.cgroup import Cgroup
from harness.daemon import Netfenced, host_port
from harness.deadline import SLOWNESS
from harness.fresh import Fresh
from harness.topology import Topology
from netfence.policy.modes import Reason
from recipes import (
    DNS_OF_ITS_OWN,
    EPERM,
    METADATA,
    NO_NAME,
    STRANGERS,
    UNKNOWN,
    can_have_addresses,
    dropped,
    fetch,
)

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(40 * SLOWNESS, func_only=True)]

POLICY: dict[str, Any] = {
    "attachments": [
        {
            "match": {"metadata": {"app": "builder"}},
            "mode": "allowlist",
            "dns": {"mode": "allowlist", "allow": ["*.example.test"], "deny": ["tracker.example.test"]},
        },
        {
            "match": {"metadata": {"app": "reader"}},
            "mode": "allowlist",
            "dns": {"mode": "allowlist", "allow": ["elsewhere.test"]},
        },
    ],
    "default": {"mode": "block_all"},
}

Host = tuple[Topology, Netfenced]


@pytest.fixture
def host(fresh: Fresh, tmp_path: Path) -> Iterator[Host]:
    """Give a host with an internet and a daemon."""
    topology = fresh.topology()
    can_have_addresses(topology)
    with internet(topology, tmp_path / "unbound"):
        yield topology, fresh.daemon(topology, policy=POLICY, config=DNS_OF_ITS_OWN)


def attach(daemon: Netfenced, flag: str, target: str, app: str) -> tuple[str, str]:
    """Attach as an operator does; return the id and the address for resolv.conf."""
    said = daemon.cli_json("attach", flag, target, "--metadata", f"app={app}")
    nameserver, port = host_port(said["dns_address"])
    assert port == 53  # a resolv.conf can name no other
    return said["id"], nameserver


def test_containers_fenced_by_their_cgroups(host: Host, cgroups: Callable[[str], Cgroup], tmp_path: Path) -> None:
    topology, daemon = host
    with ExitStack() as stack:
        # The fence comes first: the cgroup above the container's, which is there before it.
        parents = {app: cgroups(app) for app in ("builder", "reader")}
        attached = {app: attach(daemon, "--cgroup", str(each.path), app) for app, each in parents.items()}
        builder, reader = (
            stack.enter_context(
                Container(topology.add_veth().inside, parents[app], tmp_path / app, nameserver=attached[app][1])
            ).run
            for app in parents
        )

        assert fetch(builder, "www.example.test", "-4") == (0, "hello")
        assert fetch(builder, "www.example.test", "-6") == (0, "hello over IPv6")
        assert fetch(builder, "tracker.example.test").status == NO_NAME
        assert fetch(builder, "elsewhere.test").status == NO_NAME
        before = daemon.reasons(attached["builder"][0])
        for address in UNKNOWN:
            assert EPERM in fetch(builder, address, "-v").text
        assert daemon.reasons(attached["builder"][0]) - before == {Reason.CONNECT: len(UNKNOWN)}

        # What one's names have opened is open to it alone, and its name server serves it alone.
        assert EPERM in fetch(reader, SITE, "-v").text
        assert fetch(reader, "elsewhere.test") == (0, "who are you?")
        assert EPERM in fetch(builder, STRANGER, "-v").text
        assert fetch(builder, SITE) == (0, "hello")
        lookup = f"nslookup -type=a elsewhere.test {attached['reader'][1]}"
        assert reader(lookup).status == 0
        assert EPERM in builder(lookup).text

        # Without the fence all of it answers: the fence it was that did not let it.
        daemon.cli("detach", "--id", attached["builder"][0])
        for address, body in UNKNOWN.items():
            assert fetch(builder, address) == (0, body)
        assert EPERM in fetch(reader, SITE, "-v").text


def test_a_container_fenced_by_its_veth(host: Host, cgroups: Callable[[str], Cgroup], tmp_path: Path) -> None:
    topology, daemon = host
    workload = topology.add_veth()
    attachment, nameserver = attach(daemon, "--interface", workload.host_if, "builder")
    with Container(workload.inside, cgroups("box"), tmp_path / "box", nameserver=nameserver) as container:
        assert fetch(container.run, "www.example.test", "-4") == (0, "hello")
        assert fetch(container.run, "www.example.test", "-6") == (0, "hello over IPv6")
        assert fetch(container.run, "tracker.example.test").status == NO_NAME
        assert fetch(container.run, "elsewhere.test").status == NO_NAME
        for address in STRANGERS:
            assert dropped(container.run, address, lambda: daemon.reasons(attachment)[Reason.DEFAULT_DROP])
        for address in METADATA:
            assert dropped(container.run, address, lambda: daemon.reasons(attachment)[Reason.METADATA])
        assert fetch(container.run, SITE) == (0, "hello")  # what a name has opened

        daemon.cli("detach", "--id", attachment)
        for address, body in UNKNOWN.items():
            assert fetch(container.run, address) == (0, body)
