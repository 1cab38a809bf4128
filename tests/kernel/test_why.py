"""`netfenced why` against a real daemon: the chain, the verdict that packets get, what to do; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from harness.agent import Agent
from harness.daemon import Attached, Netfenced
from harness.fence import packed
from harness.packets import UDP4, UDP6
from harness.topology import METADATA4, Topology, Workload
from harness.unbound import Unbound
from netfence.api.client import DaemonClient
from netfence.api.explain_render import explanation_document
from netfence.dataplane.layout import Layout
from netfence.dataplane.leases import kernel_address
from netfence.dataplane.maps import Map, u32
from netfence.dataplane.slotword import SlotWord

pytestmark = pytest.mark.userspace

GOOD4, GOOD6, EDGE4, INSIDE4, DENIED4, OPEN4 = (
    "203.0.113.80", "2001:db8:b::80", "203.0.113.81", "10.1.2.3", "198.18.0.1", "203.0.113.99"
)  # fmt: skip
RECORDS = [
    f"good.test. 300 IN A {GOOD4}",
    f"good.test. 300 IN AAAA {GOOD6}",
    "alias.test. 300 IN CNAME edge.test.",
    f"edge.test. 300 IN A {EDGE4}",
    f"inside.test. 300 IN A {INSIDE4}",
    f"denied.test. 300 IN A {DENIED4}",
]
RULES: dict[str, Any] = {
    "mode": "allowlist",
    "allow_cidrs": [OPEN4],
    "deny_cidrs": ["198.18.0.0/15"],
    "dns": {
        "mode": "allowlist",
        "allow": ["good.test", "alias.test", "inside.test", "denied.test"],
        "deny": ["edge.test"],
    },
}


@pytest.fixture(autouse=True)
def _names(names: Unbound) -> None:
    names.replace(RECORDS)


@pytest.fixture
def fenced(daemon: Netfenced, workload: Workload) -> Iterator[Attached]:
    attached = daemon.attach(interface=workload.host_if)
    daemon.set_policy({"default": RULES})  # with nothing attached it would not be waited for
    yield attached
    daemon.detach(attached.id)


def why(daemon: Netfenced, attached: Attached, subject: str) -> dict[str, Any]:
    """Ask, and see that asking changed nothing that is counted."""
    before = daemon.info(attached.id)
    with DaemonClient(daemon.socket) as client:
        told = explanation_document(client.explain(attached.id, subject))
    assert daemon.info(attached.id) == before
    return told


def verdicts(told: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {one["address"]: (one["verdict"], one["reason"]) for one in told["addresses"]}


def test_a_name_before_and_after_it_was_resolved(
    daemon: Netfenced, topology: Topology, workload: Workload, agent: Agent, fenced: Attached
) -> None:
    told = why(daemon, fenced, "Good.Test.")
    assert (told["subject"], told["name_verdict"]) == ("good.test", "pass")
    assert verdicts(told) == {GOOD4: ("drop", "default_drop"), GOOD6: ("drop", "default_drop")}
    host, port = fenced.dns
    through = f"through DNS {host}:{port}"
    assert told["remedies"] == [f"the workload has to resolve good.test {through} first (no live lease)"]
    assert topology.arrived(workload, UDP4, GOOD4) == 0  # asking has opened nothing

    agent.query(fenced.dns, "good.test")
    told = why(daemon, fenced, "good.test")
    assert verdicts(told) == {GOOD4: ("pass", "lease"), GOOD6: ("drop", "default_drop")}
    assert 300 < told["addresses"][0]["lease_s"] <= 360
    assert topology.arrived(workload, UDP4, GOOD4) == 3
    assert topology.arrived(workload, UDP6, GOOD6) == 0
    assert ("lease", GOOD4, "good.test") in {
        (step["kind"], step["subject"], step["text"].rpartition(" ")[2]) for step in told["steps"]
    }
    of_the_address = why(daemon, fenced, GOOD4)
    assert (verdicts(of_the_address), of_the_address["name_verdict"]) == ({GOOD4: ("pass", "lease")}, None)
    assert of_the_address["remedies"] == []


def test_names_that_are_not_answered_and_addresses_that_are_cut(daemon: Netfenced, fenced: Attached) -> None:
    other = why(daemon, fenced, "other.test")
    assert (other["name_verdict"], other["addresses"]) == ("drop", [])
    assert other["remedies"] == ["dns.allow: other.test"]
    alias = why(daemon, fenced, "alias.test")
    assert (alias["name_verdict"], alias["addresses"]) == ("drop", [])
    assert alias["remedies"] == ["remove deny edge.test"]
    inside = why(daemon, fenced, "inside.test")
    assert (inside["name_verdict"], inside["addresses"]) == ("pass", [])
    assert inside["remedies"] == [f"allow_cidrs: {INSIDE4}/32, or add it to dns.allow_private of the configuration"]


def test_addresses(daemon: Netfenced, topology: Topology, workload: Workload, fenced: Attached) -> None:
    for address, expected, rule, remedies in (
        (OPEN4, ("pass", "allow_rule"), f"allow {OPEN4}/32", []),
        (f"::ffff:{OPEN4}", ("pass", "allow_rule"), f"allow {OPEN4}/32", []),
        (
            DENIED4,
            ("drop", "deny_rule"),
            "deny 198.18.0.0/15",
            [f"allow_cidrs: {DENIED4}/32 (more specific than deny 198.18.0.0/15)"],
        ),
        (EDGE4, ("drop", "default_drop"), "", [f"allow_cidrs: {EDGE4}/32"]),
        (
            METADATA4,
            ("drop", "metadata"),
            "",
            [f"allow_cidrs: {METADATA4}/32 (it hands out the machine's own credentials)"],
        ),
    ):
        told = why(daemon, fenced, address)
        assert list(verdicts(told).values()) == [expected]
        assert told["addresses"][0]["rule"] == rule
        assert told["remedies"] == remedies
        if ":" not in address:
            assert topology.arrived(workload, UDP4, address) == (3 if expected[0] == "pass" else 0)


def take_away(daemon: Netfenced, attached: Attached, rule: str, lease: str) -> None:
    """Delete the rule and the lease of two addresses from the kernel's tables; the daemon is told nothing."""
    layout = Layout.load(next((daemon.directory / "data").glob("layout-*.json")))
    maps, slot = next(daemon.pins.glob("maps-*")), daemon.slot(attached.id)
    with closing(Map.pinned(maps / "leases")) as leases:
        assert leases.delete(layout.packer("lease_key", "slot", "address").pack(slot, kernel_address(packed(lease))))
    with closing(Map.pinned(maps / "config")) as config, closing(Map.pinned(maps / "rules4")) as rules:
        active = layout.packer("config", "active")
        word = config.lookup(u32(slot))
        assert word is not None
        index = SlotWord.decode(active.unpack(word[: active.size])[0], layout).index
        with closing(rules.inner(u32(index)) or rules) as trie:
            assert trie.delete(u32(32) + packed(rule))


def test_it_reads_the_kernels_tables_and_not_the_daemons_books(
    daemon: Netfenced, topology: Topology, workload: Workload, agent: Agent, fenced: Attached
) -> None:
    """What somebody took away behind the daemon's back is told as packets meet it."""
    agent.query(fenced.dns, "good.test")
    assert verdicts(why(daemon, fenced, OPEN4)) == {OPEN4: ("pass", "allow_rule")}
    assert verdicts(why(daemon, fenced, GOOD4)) == {GOOD4: ("pass", "lease")}
    take_away(daemon, fenced, OPEN4, GOOD4)
    for address in (OPEN4, GOOD4):
        assert verdicts(why(daemon, fenced, address)) == {address: ("drop", "default_drop")}
        assert topology.arrived(workload, UDP4, address) == 0


@pytest.mark.parametrize("subject", [DENIED4, EDGE4, METADATA4, INSIDE4])
def test_what_it_says_to_add_lets_packets_pass(
    daemon: Netfenced, topology: Topology, workload: Workload, fenced: Attached, subject: str
) -> None:
    (remedy,) = why(daemon, fenced, subject)["remedies"]
    host = remedy.partition("allow_cidrs: ")[2].partition(" ")[0]
    daemon.set_policy({"default": {**RULES, "allow_cidrs": [host]}})
    assert verdicts(why(daemon, fenced, subject)) == {subject: ("pass", "allow_rule")}
    assert topology.arrived(workload, UDP4, subject) == 3


def test_what_it_says_in_place_of_a_rule_lets_packets_pass(
    daemon: Netfenced, topology: Topology, workload: Workload, agent: Agent, fenced: Attached
) -> None:
    """To take the rule away would not do: what nothing allows is dropped too."""
    dns = {"mode": "allowlist", "deny": ["good.test"]}
    daemon.set_policy({"default": {**RULES, "deny_cidrs": [f"{EDGE4}/32"], "dns": dns}})
    (remedy,) = why(daemon, fenced, EDGE4)["remedies"]
    assert remedy == f"allow_cidrs: {EDGE4}/32 in place of deny {EDGE4}/32"
    (remedy,) = why(daemon, fenced, "good.test")["remedies"]
    assert remedy == "dns.allow: good.test in place of deny good.test"
    dns = {"mode": "allowlist", "allow": ["good.test"]}
    daemon.set_policy({"default": {**RULES, "allow_cidrs": [f"{EDGE4}/32"], "deny_cidrs": [], "dns": dns}})
    (remedy,) = why(daemon, fenced, "good.test")["remedies"]
    assert remedy.startswith("the workload has to resolve good.test")
    agent.query(fenced.dns, "good.test")
    for address in (EDGE4, GOOD4):
        (verdict,) = verdicts(why(daemon, fenced, address)).values()
        assert verdict[0] == "pass"
        assert topology.arrived(workload, UDP4, address) == 3


def test_audit_and_block_all(daemon: Netfenced, topology: Topology, workload: Workload, fenced: Attached) -> None:
    daemon.set_policy({"default": {**RULES, "audit": True}})
    told = why(daemon, fenced, EDGE4)
    assert verdicts(told) == {EDGE4: ("would_drop", "default_drop")}
    assert topology.arrived(workload, UDP4, EDGE4) == 3
    assert why(daemon, fenced, "edge.test")["name_verdict"] == "would_drop"
    daemon.set_policy({"default": {**RULES, "mode": "block_all"}})
    assert verdicts(why(daemon, fenced, OPEN4)) == {OPEN4: ("drop", "block_all")}
    blocked = why(daemon, fenced, "good.test")
    assert (blocked["name_verdict"], blocked["addresses"]) == ("drop", [])
    assert blocked["remedies"] == ["set the policy's mode to allowlist or denylist: block_all lets nothing out"]


def test_people_read_a_chain(daemon: Netfenced, agent: Agent, fenced: Attached) -> None:
    agent.query(fenced.dns, "good.test")
    assert daemon.cli_json("why", "--id", fenced.id, "good.test")["name_verdict"] == "pass"
    done = daemon.cli("why", "--id", fenced.id, "good.test")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "good.test: answered"
    assert f"  {GOOD4}: pass (lease)" in lines
    assert "    address global" not in lines  # documentation space is special
    assert "    address special-purpose" in lines
    assert lines[-2] == "to change it:"
    denied = daemon.cli("why", "--id", fenced.id, "other.test")
    assert (denied.returncode, denied.stdout.splitlines()[0]) == (0, "other.test: denied")  # whatever the verdict


def test_bad_input(daemon: Netfenced, workload: Workload, fenced: Attached) -> None:
    for subject, words in (
        ("*.test", "is a pattern"),
        ("a b", "neither a name nor an address"),
        ("203.0.113.0/24", "neither a name nor an address"),
        ("203.0.113.300", "nor an IPv4 address"),
        ("x" * 2000, "2000 characters"),
    ):
        done = daemon.cli("why", "--id", fenced.id, subject, check=False)
        assert done.returncode == 1
        assert words in done.stderr
    for wanted in (workload.host_if, fenced.id[:-1] + "x"):
        done = daemon.cli("why", "--id", wanted, GOOD4, check=False)
        assert done.returncode == 1
        assert f"did you mean {fenced.id} ({workload.host_if})?" in done.stderr
    assert daemon.cli("why", "--id", fenced.id[:8], GOOD4).returncode == 0
    nobody = daemon.cli("why", "--id", "nobody", GOOD4, check=False)
    assert nobody.stderr == "netfenced: why: no attachment nobody; see `netfenced list`\n"
