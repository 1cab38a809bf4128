"""The recipe "a VM behind a tap" of docs/recipes.md with a real guest, whose only way out is the fenced tap."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from demo import SITE, internet
from guest import Guest
from harness.daemon import host_port
from harness.deadline import SLOWNESS
from harness.fresh import Fresh
from harness.needs import not_in_guest
from harness.topology import NAMESERVER4, Topology
from kernelcache import Installed, ensure
from kernellist import load
from netfence.policy.modes import Reason
from recipes import DNS_OF_ITS_OWN, METADATA, NO_NAME, STRANGERS, UNKNOWN, can_have_addresses, dropped, fetch

# With the containers' 2 × 40 s three minutes at most; to fetch the kernel, which `kernel` does, is not of it.
pytestmark = [pytest.mark.userspace, pytest.mark.timeout(100 * SLOWNESS, func_only=True)]

GUEST_KERNEL = "6.1"
# Between the topology's workloads and its bridge.
GATEWAY, ADDRESS = "198.51.100.177", "198.51.100.178"
GATEWAY6, ADDRESS6 = "2001:db8:1:ff::1", "2001:db8:1:ff::2"
POLICY: dict[str, Any] = {
    "attachments": [
        {
            "match": {"interface": "tap*"},
            "mode": "allowlist",
            "dns": {"mode": "allowlist", "allow": ["*.example.test"], "deny": ["tracker.example.test"]},
        }
    ],
    "default": {"mode": "block_all"},
}
NOTHING: dict[str, Any] = {"default": {"mode": "block_all"}}


@pytest.fixture(scope="module")
def kernel() -> Installed:
    """Give the kernel of the guest, fetched unless some session has it in the cache already."""
    not_in_guest()
    return ensure(next(each for each in load() if each.series == GUEST_KERNEL))


def add_tap(topology: Topology, name: str) -> str:
    topology.host.ip(f"tuntap add dev {name} mode tap", f"addr add {GATEWAY}/30 dev {name}",
                     f"addr add {GATEWAY6}/64 dev {name}", f"link set dev {name} up")  # fmt: skip
    return name


def test_a_guest_reaches_what_its_policy_allows_and_nothing_else(
    fresh: Fresh, kernel: Installed, tmp_path: Path
) -> None:
    topology = fresh.topology()
    can_have_addresses(topology)
    tap = add_tap(topology, "tap0")
    with ExitStack() as stack:
        stack.enter_context(internet(topology, tmp_path / "unbound"))
        daemon = fresh.daemon(topology, policy=POLICY, config=DNS_OF_ITS_OWN)
        attached = daemon.cli_json("attach", "--interface", tap)
        nameserver, port = host_port(attached["dns_address"])
        assert port == 53  # a resolv.conf can name no other
        network = {"NAMESERVER": nameserver, "ADDRESS": f"{ADDRESS}/30", "GATEWAY": GATEWAY,
                   "ADDRESS6": f"{ADDRESS6}/64", "GATEWAY6": GATEWAY6}  # fmt: skip
        guest = stack.enter_context(Guest(kernel, topology.host, tap, tmp_path / "guest", network))
        assert guest.run("uname -r").text == kernel.release

        assert fetch(guest.run, "www.example.test", "-4") == (0, "hello")
        assert fetch(guest.run, "www.example.test", "-6") == (0, "hello over IPv6")
        assert fetch(guest.run, "tracker.example.test").status == NO_NAME
        assert fetch(guest.run, "elsewhere.test").status == NO_NAME
        for address in STRANGERS:
            assert dropped(guest.run, address, lambda: daemon.reasons(attached["id"])[Reason.DEFAULT_DROP])
        for address in METADATA:
            assert dropped(guest.run, address, lambda: daemon.reasons(attached["id"])[Reason.METADATA])
        assert fetch(guest.run, SITE) == (0, "hello")  # what a name has opened

        daemon.set_policy(NOTHING)
        assert fetch(guest.run, "www.example.test").status == NO_NAME
        assert dropped(guest.run, SITE, lambda: daemon.reasons(attached["id"])[Reason.BLOCK_ALL])
        daemon.set_policy(POLICY)
        # It is not open again by itself.
        assert dropped(guest.run, SITE, lambda: daemon.reasons(attached["id"])[Reason.DEFAULT_DROP])
        assert fetch(guest.run, "www.example.test", "-4") == (0, "hello")

        # Without the fence all of it answers: the fence it was that did not let it.
        daemon.cli("detach", "--id", attached["id"])
        guest.run(f"echo nameserver {NAMESERVER4} >/etc/resolv.conf")
        for name, body in (("tracker.example.test", "we saw you"), ("elsewhere.test", "who are you?")):
            assert fetch(guest.run, name) == (0, body)
        for address, body in UNKNOWN.items():
            assert fetch(guest.run, address) == (0, body)
