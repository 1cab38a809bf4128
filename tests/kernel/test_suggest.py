"""`netfenced suggest` end to end: audit, suggest, apply; the same traffic passes, and nothing more. Names survive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.agent import Agent
from harness.daemon import Attached, Netfenced
from harness.packets import UDP4, UDP6
from harness.topology import METADATA4, Topology, Workload
from harness.unbound import Unbound
from netfence.v1 import types_pb2

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(120)]

GOOD4, ASKED4, EVIL4, KEPT4 = "203.0.113.80", "203.0.113.90", "203.0.113.91", "203.0.113.92"
PAIR4, BESIDE4, ALONE6, OPEN4 = ("203.0.113.82", "203.0.113.83"), "203.0.113.84", "2001:db8:b::82", "203.0.113.99"
DENIED4, INSIDE4 = "198.18.0.1", "10.1.2.3"
RECORDS = [
    f"good.test. 300 IN A {GOOD4}",
    f"asked.test. 300 IN A {ASKED4}",
    f"evil.test. 300 IN A {EVIL4}",
    f"kept.test. 300 IN A {KEPT4}",
    "alias.test. 300 IN CNAME evil.test.",
]
RULES: dict[str, Any] = {
    "mode": "allowlist",
    "audit": True,
    "allow_cidrs": [OPEN4],
    "deny_cidrs": ["198.18.0.0/15"],
    "dns": {"mode": "allowlist", "allow": ["kept.test"], "deny": ["evil.test"]},
}
BLOCKED = {"mode": "block_all", "audit": True}
REFUSED = 5


@pytest.fixture(autouse=True)
def _names(names: Unbound) -> None:
    names.replace(RECORDS)


@pytest.fixture
def fenced(daemon: Netfenced, workload: Workload) -> Iterator[Attached]:
    attached = daemon.attach(interface=workload.host_if, metadata={"app": "ci"})
    yield attached
    if attached.id in {info.id for info in daemon.attachments()}:
        daemon.detach(attached.id)


class Traffic:
    """What the workload does, and how much of it goes through."""

    def __init__(self, topology: Topology, workload: Workload, agent: Agent, fenced: Attached) -> None:
        self._topology, self._workload, self._agent, self._fenced = topology, workload, agent, fenced

    def ask(self, name: str) -> int:
        return int(self._agent.query(self._fenced.dns, name).header.rcode)

    def __call__(self) -> dict[str, int]:
        found: dict[str, int] = {name: self.ask(name) for name in ("good.test", "asked.test", "kept.test")}
        found |= {name: self.ask(name) for name in ("evil.test", "alias.test")}
        arrived = self._topology.arrived
        for address in (GOOD4, *PAIR4, BESIDE4, OPEN4, DENIED4, INSIDE4, METADATA4):
            found[address] = arrived(self._workload, UDP4, address)
        found[ALONE6] = arrived(self._workload, UDP6, ALONE6)
        return found


@pytest.fixture
def traffic(topology: Topology, workload: Workload, agent: Agent, fenced: Attached) -> Traffic:
    return Traffic(topology, workload, agent, fenced)


ALL_THROUGH = {
    "good.test": 0, "asked.test": 0, "kept.test": 0, "evil.test": 0, "alias.test": 0,
    GOOD4: 3, **dict.fromkeys(PAIR4, 3), BESIDE4: 3, OPEN4: 3, DENIED4: 3, INSIDE4: 3, METADATA4: 3, ALONE6: 3,
}  # fmt: skip
NEVER_OPENED = {"evil.test": REFUSED, "alias.test": REFUSED, DENIED4: 0, INSIDE4: 0, METADATA4: 0}


def suggested(daemon: Netfenced, attached: Attached, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """Have a policy suggested and checked; return its text and what it says."""
    file = tmp_path / "suggested.yaml"
    file.unlink(missing_ok=True)
    daemon.cli("suggest", "--id", attached.id, "--output", str(file))
    text = file.read_text()
    assert daemon.cli("suggest", "--id", attached.id).stdout == text
    checked = daemon.cli_json("policy", "check", str(file))
    assert (checked["ok"], checked["warnings"]) == (True, [])
    return text, yaml.safe_load(text)


def lets_through(text: str, daemon: Netfenced, traffic: Traffic) -> dict[str, int]:
    """Put the suggested policy in force and repeat the traffic."""
    daemon.set_policy(yaml.safe_load(text))
    return traffic()


def test_what_was_seen_passes_with_the_suggestion_and_what_is_dangerous_does_not(
    daemon: Netfenced, traffic: Traffic, fenced: Attached, topology: Topology, workload: Workload, tmp_path: Path
) -> None:
    daemon.set_policy({"default": RULES})
    assert traffic() == ALL_THROUGH  # audit drops and denies nothing …
    info = daemon.info(fenced.id)
    assert (info.packets_blocked, info.dns_queries_blocked) == (0, 0)
    counters = daemon.counters(fenced.id)
    assert sum(counters.would_packets) == 3 * (len(ALL_THROUGH) - 6)  # … and counts all but names and the open address
    assert (info.audit, info.packets_would_block) == (True, sum(counters.would_packets))

    text, policy = suggested(daemon, fenced, tmp_path)
    (entry,) = policy["attachments"]
    assert policy["default"] == {"mode": "block_all"}
    assert entry["match"] == {"metadata": {"app": "ci"}}
    assert entry["mode"] == "allowlist"
    assert "audit" not in entry
    assert entry["allow_cidrs"] == [f"{OPEN4}/32", "203.0.113.82/31", f"{BESIDE4}/32", f"{ALONE6}/128"]
    assert entry["deny_cidrs"] == ["198.18.0.0/15"]
    names = ["kept.test", "asked.test", "good.test"]
    assert entry["dns"] == {"mode": "allowlist", "allow": names, "deny": ["evil.test"]}
    lines = text.splitlines()
    assert any('- "good.test"  # 1 query; 3 packets: udp/' in line for line in lines)
    assert any('- "203.0.113.82/31"  # 6 packets: udp/' in line for line in lines)
    for address, why in ((METADATA4, "credentials"), (INSIDE4, "special-purpose"), (DENIED4, "deny 198.18.0.0/15")):
        (line,) = [line for line in lines if f'"{address}/32"' in line]
        assert line.strip().startswith("# - ")
        assert why in line
    for name in ("evil.test", "alias.test"):
        assert any(line.strip().startswith(f'# - "{name}"') for line in lines)

    assert lets_through(text, daemon, traffic) == {**ALL_THROUGH, **NEVER_OPENED}
    assert topology.arrived(workload, UDP4, "203.0.113.85") == 0  # nothing beside what was seen
    assert traffic.ask("other.test") == REFUSED


def test_an_audit_of_block_all_gives_a_policy_too(
    daemon: Netfenced, traffic: Traffic, fenced: Attached, tmp_path: Path
) -> None:
    daemon.set_policy({"default": BLOCKED})
    assert traffic() == ALL_THROUGH
    assert daemon.info(fenced.id).mode == types_pb2.POLICY_MODE_BLOCK_ALL
    text, policy = suggested(daemon, fenced, tmp_path)
    (entry,) = policy["attachments"]
    # Without deny rules evil.test is a name as any other, and its address is not special here.
    names = ["alias.test", "asked.test", "evil.test", "good.test", "kept.test"]
    assert entry["dns"]["allow"] == names
    found = lets_through(text, daemon, traffic)
    assert found == {**ALL_THROUGH, DENIED4: 0, INSIDE4: 0, METADATA4: 0}  # 198.18.0.0/15 is special-purpose


def test_audit_opens_nothing(
    daemon: Netfenced, traffic: Traffic, topology: Topology, workload: Workload, fenced: Attached
) -> None:
    daemon.set_policy({"default": RULES})
    assert traffic.ask("good.test") == 0
    assert topology.arrived(workload, UDP4, GOOD4) == 3
    (judged,) = daemon.cli_json("why", "--id", fenced.id, GOOD4)["addresses"]
    assert (judged["verdict"], judged["lease_s"]) == ("would_drop", None)
    daemon.set_policy({"default": {**RULES, "audit": False}})
    assert topology.arrived(workload, UDP4, GOOD4) == 0  # no lease has stayed
    assert traffic.ask("good.test") == REFUSED


def test_names_that_dns_mode_denylist_let_through_become_rules(
    daemon: Netfenced, traffic: Traffic, topology: Topology, workload: Workload, fenced: Attached, tmp_path: Path
) -> None:
    daemon.set_policy({"default": {**RULES, "dns": {"mode": "denylist", "deny": ["evil.test"]}}})
    assert traffic.ask("good.test") == 0
    assert topology.arrived(workload, UDP4, GOOD4) == 3  # by its lease: nothing that audit would note
    _, policy = suggested(daemon, fenced, tmp_path)
    dns = policy["attachments"][0]["dns"]
    assert dns == {"mode": "allowlist", "allow": ["good.test"], "deny": ["evil.test"]}


def test_it_survives_a_restart_and_ends_with_the_attachment(
    daemon: Netfenced, traffic: Traffic, fenced: Attached, workload: Workload, tmp_path: Path
) -> None:
    daemon.set_policy({"default": RULES})
    traffic()
    before, _ = suggested(daemon, fenced, tmp_path)
    daemon.restart()
    after, _ = suggested(daemon, fenced, tmp_path)
    assert after == before
    daemon.detach(fenced.id)
    again = daemon.attach(interface=workload.host_if)
    daemon.set_policy({"default": RULES})
    _, policy = suggested(daemon, again, tmp_path)
    (entry,) = policy["attachments"]
    assert entry["match"] == {"interface": workload.host_if}
    assert (entry["allow_cidrs"], entry["dns"]["allow"]) == ([f"{OPEN4}/32"], ["kept.test"])
    daemon.detach(again.id)


def test_without_audit_there_is_nothing_to_suggest(daemon: Netfenced, fenced: Attached, tmp_path: Path) -> None:
    daemon.set_policy({"default": {**RULES, "audit": False}})
    refused = daemon.cli("suggest", "--id", fenced.id, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "`audit: true`" in refused.stderr
    nobody = daemon.cli("suggest", "--id", fenced.id[:-1] + "x", check=False)
    assert f"did you mean {fenced.id}" in nobody.stderr
    daemon.set_policy({"default": RULES})
    taken = tmp_path / "there.yaml"
    taken.write_text("mine")
    kept = daemon.cli("suggest", "--id", fenced.id, "--output", str(taken), check=False)
    assert (kept.returncode, taken.read_text()) == (1, "mine")
    assert "exists already" in kept.stderr
