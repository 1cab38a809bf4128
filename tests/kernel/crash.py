"""A fleet of workloads, a control plane that changes its mind, and a daemon that is killed in the middle of it.

A `Fleet` knows of each member what must be true of it: what was said to it last and answered (then that is in force),
and what was being said when the daemon was killed (then that, or what was there before, is). `check` compares this
with what the daemon says, what is stored, what is pinned, and what packets meet. Two anchors are attached for the whole
life of a fleet, and a process in each never stops probing: not one packet to a denied address may arrive, not one to
an allowed address may be lost, with the daemon or without it.

| destinations | in every policy | IPv4 | IPv6 |
|---|---|---|---|
| kept | allowed, always; probed | 203.0.113.100 + member | 2001:db8:77::100 + member |
| asked | allowed, always; by `check` | 203.0.113.110 + member | 2001:db8:77::110 + member |
| shut | denied, always; probed | 203.0.113.150 + member | 2001:db8:78::100 + member |
| marker | allowed in one policy of `MARKERS` | 192.0.2.100 + n | |
| learned | leases of `good.test` and below | 203.0.113.80 | 2001:db8:b::80 |
"""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from control_commands import ack, bulk, dns, policy_hash
from daemons import Fenced
from flood import FarEnd
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.controlplane import Command, ControlPlaneProcess
from harness.deadline import wait_for
from harness.netns import NetNs
from harness.packets import UDP4, UDP6
from harness.spawn import spawn, stop
from harness.topology import Topology, Workload
from harness.wire import harness_cpu
from netfence.api.client import RefusedError, UnreachableError
from netfence.api.views import HookWish
from netfence.policy_codec import Clock, decode
from netfence.store import DATABASE

PROBER = Path(__file__).with_name("prober.py")
PROBES = (47, 67)  # bytes of its IPv4 and its IPv6 frames
KEPT = ("203.0.113.96/27", "2001:db8:77::/64")
LEARNED4, LEARNED6 = "203.0.113.80", "2001:db8:b::80"
RECORDS = (f"good.test. 300 IN A {LEARNED4}", f"good.test. 300 IN AAAA {LEARNED6}")
MARKERS = 100
LARGE = 3000  # rules: enough for a kill to come while they are written
CHURNED = 4  # by TC twice, by XDP, and a cgroup
XDP, CGROUP = 2, 3
LONGEST_S = 0.2  # from the first operation to the kill
START_S = 0.8  # a start that is killed too: about as long as a whole one
AT_ONCE = 3


def kept(member: int) -> tuple[str, str]:
    """Give the addresses that are always allowed, for the probers."""
    return f"203.0.113.{100 + member}", f"2001:db8:77::{100 + member}"


def asked(member: int) -> tuple[str, str]:
    """Give the addresses that are always allowed, for others: the probers' packets are counted exactly."""
    return f"203.0.113.{110 + member}", f"2001:db8:77::{110 + member}"


def shut(member: int) -> tuple[str, str]:
    """Give the addresses that are never allowed."""
    return f"203.0.113.{150 + member}", f"2001:db8:78::{100 + member}"


def marker(number: int) -> str:
    """Give the address that only this policy and those `MARKERS` later allow."""
    return f"192.0.2.{100 + number % MARKERS}"


@dataclass(frozen=True)
class Said:
    """One policy of a member: its number, and whether it is a large one."""

    number: int
    large: bool = False

    @property
    def version(self) -> str:
        """What the control plane calls it."""
        return f"v{self.number}"

    def _allowed(self) -> list[str]:
        filler = [f"10.{one >> 8}.{one & 255}.0/24" for one in range(LARGE)] if self.large else []
        return [*KEPT, f"{marker(self.number)}/32", *filler]

    def ack(self) -> Command:
        """Say it in answer to Subscribed."""
        return ack(allow=self._allowed(), dns=DNS, version=self.version)

    def bulk(self, attachment_id: str, nonce: str) -> Command:
        """Say it as a command."""
        return bulk(attachment_id, allow=self._allowed(), dns=DNS, version=self.version, nonce=nonce)

    def hash(self) -> str:
        """Compute the hash that the daemon has to tell."""
        return policy_hash("allowlist", self._allowed(), dns_mode="allowlist", more=["allow_domain good.test 1"])


DNS = dns("allowlist", [("good.test", True)])


class Prober:
    """The process of `prober.py`."""

    def __init__(self, addresses: Sequence[str], netns: NetNs, cgroup: Cgroup | None = None) -> None:
        argv = [sys.executable, "-I", "-S", str(PROBER), str(harness_cpu()), json.dumps(addresses)]
        self._process = spawn(argv, netns=netns, cgroup=cgroup, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def end(self) -> list[list[int]]:
        """Stop it; per address how many datagrams the kernel took and refused."""
        told, _ = self._process.communicate()
        counts: list[list[int]] = json.loads(told)
        return counts

    def close(self) -> None:
        """End it, whatever it does."""
        stop(self._process)


@dataclass
class Member:
    """A workload, and what must be true of it. `id` "" and `maybe` False: it is not attached."""

    number: int
    target: Workload | Cgroup
    agent: Agent
    id: str = ""
    dns: tuple[str, int] = ("", 0)
    maybe: bool = False  # its attach or detach was not answered
    said: list[Said] = field(default_factory=list)  # what may be in force: the last answered, and what was not
    learned: bool = False
    leaked: int = 0  # what had arrived at its shut addresses when it was last fenced
    blocked: int = 0

    @property
    def anchor(self) -> bool:
        """Tell whether it stays attached."""
        return self.number >= CHURNED

    @property
    def name(self) -> str:
        """Give its target's name."""
        return self.target.host_if if isinstance(self.target, Workload) else str(self.target.path)


class Fleet:
    """See the module. Close it at the end; `end` says that all went well."""

    def __init__(self, topology: Topology, directory: Path, seed: int, *, tcx: bool) -> None:
        self.random = random.Random(seed)
        self.story: list[str] = []
        self.starts: list[float] = []
        self._topology = topology
        self._numbers = self._gone = 0
        with ExitStack() as stack:
            addresses = [address for number in range(CHURNED + 2) for address in (*kept(number), *shut(number))]
            topology.ignore(*PROBES)
            self._far = stack.enter_context(closing(FarEnd(topology, addresses)))
            self.plane = stack.enter_context(ControlPlaneProcess(topology.host))
            groups = [Cgroup(f"{name}-{id(self):x}") for name in ("churned", "anchor")]
            for group in groups:
                stack.callback(group.remove)
            targets: list[Workload | Cgroup] = [topology.add_veth() for _ in range(CHURNED)]
            targets[CGROUP:CGROUP] = [groups[0]]
            targets.append(groups[1])
            config = self.plane.config()
            self.daemon = stack.enter_context(Fenced(topology, directory, tcx=tcx, policy=None, config=config))
            self._stream = self.plane.stream
            self.members = [
                Member(number, target, stack.enter_context(Agent(**self._inside(target))))
                for number, target in enumerate(targets)
            ]
            for member in self.members[CHURNED:]:
                self._attach(member)
            self._probers = [
                stack.enter_context(
                    closing(Prober([*kept(each.number), *shut(each.number)], **self._inside(each.target)))
                )
                for each in self.members[CHURNED:]
            ]
            self._close = stack.pop_all()

    def _inside(self, target: Workload | Cgroup) -> dict[str, Any]:
        if isinstance(target, Workload):
            return {"netns": target.netns}
        return {"netns": self._topology.host, "cgroup": target}

    def close(self) -> None:
        """End everything."""
        self._close.close()

    # -- what happens to it --------------------------------------------------------------------------------------------

    def cycle(self, *, kill: bool = True) -> None:
        """Do a few things at once, and see that all is well; `kill` the daemon in the middle, and start it again."""
        chosen = self.random.sample(self.members, self.random.randint(1, AT_ONCE))
        work = [(member, self._choose(member)) for member in chosen]
        removal = self._make_target() if self.random.random() < 0.3 else None
        early_s = self.random.uniform(0, START_S) if kill and self.random.random() < 0.3 else None
        pause_s = self.random.uniform(0, LONGEST_S)
        names = [f"{do.__name__.strip('_')} {member.number}" for member, do in work] + ["removal"] * bool(removal)
        self.story.append(", ".join(names) + (f", kill after {1000 * pause_s:.0f} ms" if kill else ""))
        if early_s is not None:
            self.story[-1] += f", and its next start after {1000 * early_s:.0f} ms"
        with ThreadPoolExecutor(AT_ONCE + 1) as pool:
            futures: list[Future[None]] = [pool.submit(do, member) for member, do in work]
            if removal:
                futures.append(pool.submit(removal))
            if kill:
                time.sleep(pause_s)
                self.daemon.kill()
            for future in futures:
                future.result()
        if early_s is not None:
            self.daemon.launch()
            time.sleep(early_s)
            self.daemon.kill()
        if kill:
            began = time.monotonic()
            self.daemon.start()
            self.starts.append(time.monotonic() - began)
            self._stream = self.plane.stream
        self.check()

    def rest(self) -> None:
        """Detach all but the anchors."""
        for member in self.members[:CHURNED]:
            if member.id:
                self._detach(member)

    def _choose(self, member: Member) -> Callable[[Member], None]:
        if not member.id:
            return self._attach
        if member.anchor:
            return self.random.choice([self._change, self._change, self._resolve])
        return self.random.choice([self._change, self._change, self._resolve, self._resolve, self._detach])

    def _say(self) -> Said:
        self._numbers += 1
        return Said(self._numbers, large=self._numbers % 4 == 0)

    def _attach(self, member: Member) -> None:
        said = self._say()
        self.plane.on_subscribed(said.ack(), target=member.name)
        member.said, member.maybe, member.learned, member.blocked = [said], True, False, 0
        try:
            if isinstance(member.target, Workload):
                hook: HookWish = "xdp" if member.number == XDP else "auto"
                attached = self.daemon.attach(interface=member.target.host_if, hook=hook)
            else:
                attached = self.daemon.attach(cgroup=member.target)
        except (UnreachableError, RefusedError):
            self._killed()
            return
        member.id, member.dns, member.maybe = attached.id, attached.dns, False
        member.leaked = self._leaked(member)

    def _detach(self, member: Member) -> None:
        self._holds(member)
        member.maybe = True
        try:
            self.daemon.detach(member.id)
        except UnreachableError:
            self._killed()
            return
        member.id, member.maybe = "", False

    def _killed(self) -> None:
        """Whatever failed: the daemon's death, which may be seen a moment later, is the only good reason."""
        wait_for(lambda: not self.daemon.alive, "the daemon to be dead")

    def _change(self, member: Member) -> None:
        said = self._say()
        member.said.append(said)
        nonce = f"nonce-{said.number}"
        try:
            self.plane.send(said.bulk(member.id, nonce), stream=self._stream)
        except (LookupError, RuntimeError, OSError):  # the stream went with the daemon
            self._killed()
            return
        wait_for(lambda: not self.daemon.alive or self.plane.events("command_result", nonce=nonce), "a result")
        for seen in self.plane.events("command_result", nonce=nonce):
            assert (seen.body.ok, seen.body.version, seen.body.policy_hash) == (True, said.version, said.hash())
            member.said = [said]

    def _resolve(self, member: Member) -> None:
        name = f"{'' if self.random.random() < 0.5 else 'www.'}good.test"
        try:
            answer = member.agent.query(member.dns, name, timeout_s=2)
        except (TimeoutError, OSError):
            self._killed()
            return
        member.learned |= [str(record.rdata) for record in answer.rr] == [LEARNED4]

    def _make_target(self) -> Callable[[], None]:
        """Attach something, and return what removes it."""
        self._gone += 1
        name = f"gone{self._gone}"
        said = self._say()
        if self.random.random() < 0.5:
            group = Cgroup(f"{name}-{id(self):x}")
            self.plane.on_subscribed(said.ack(), target=str(group.path))
            self.daemon.attach(cgroup=group)
            return group.remove
        self._topology.host.ip(f"link add {name} type veth peer name {name}p", f"link set {name} up")
        self.plane.on_subscribed(said.ack(), target=name)
        self.daemon.attach(interface=name, direction="workload")
        return lambda: self._topology.host.ip(f"link del {name}")

    # -- what must be true of it ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare what is with what must be."""
        wait_for(lambda: not any("gone" in one.target for one in self.daemon.attachments()), "the removed")
        listed = {info.target: info for info in self.daemon.attachments()}
        for member in self.members:
            info = listed.pop(member.name, None)
            if info is None:
                assert member.maybe or not member.id, f"{member.name} was lost"
                member.id, member.maybe, member.learned = "", False, False
                self._is_open(member)
                continue
            if member.maybe and not member.id:  # its attach was not answered, and done all the same
                host, _, port = info.dns_address.rpartition(":")
                member.id, member.dns = info.id, (host, int(port))
            if member.maybe:  # it may have been open while it was attached or detached
                member.leaked = self._leaked(member)
            member.maybe = False
            self._as_said(member, info)
            assert self._stored()[member.id] == member.said[0].hash()
            self._holds(member)
            self._enforced(member)
        assert not listed, f"attached by nobody: {listed}"
        ids = {member.id for member in self.members if member.id}
        # Of a removed target these go last.
        wait_for(
            lambda: self._pinned() == set(self._stored()) == ids, "pins and rows of what is attached, and no others"
        )
        defects = [entry for entry in self.daemon.events() if "exception" in entry or entry["level"] == "critical"]
        assert not defects, defects

    def _pinned(self) -> set[str]:
        return {pin.rpartition("-")[0] for pin in self.daemon.link_pins()}

    def _stored(self) -> dict[str, str]:
        """Return the hash of each policy that is stored, by the attachment's id."""
        clock = Clock.now()
        with closing(sqlite3.connect(f"file:{self.daemon.directory / 'data' / DATABASE}?mode=ro", uri=True)) as state:
            return {row[0]: decode(row[1], clock).hash() for row in state.execute("SELECT id, policy FROM attachments")}

    def _as_said(self, member: Member, info: Any) -> None:
        """See that the daemon says it has one of the policies that it may have, which is the only one from now on."""
        assert info.id == member.id
        assert info.dns_address == "{}:{}".format(*member.dns)
        said = {one.version: one for one in member.said}.get(info.policy_version)
        assert said is not None, f"{member.name} has {info.policy_version}, of {member.said}"
        assert info.policy_hash == said.hash()
        member.said = [said]
        assert info.packets_blocked >= member.blocked
        member.blocked = info.packets_blocked

    def _enforced(self, member: Member) -> None:
        """See by packets that it has that policy whole, and what names had opened."""
        said = member.said[0]
        allowed = [*asked(member.number), marker(said.number)]
        if member.learned:
            allowed.append(LEARNED4)
        others = [number for number in range(MARKERS) if number != said.number % MARKERS]
        denied = [*shut(member.number), marker(self.random.choice(others))]
        if isinstance(member.target, Workload):
            assert [self._arrived(member.target, address) for address in allowed] == [3] * len(allowed), allowed
            assert [self._arrived(member.target, address) for address in denied] == [0] * len(denied), denied
            return
        for address in (one for one in allowed if ":" not in one):
            with member.agent.udp() as sock:
                sock.sendto(b"x", (address, 9))
        for address in (one for one in denied if ":" not in one):
            with member.agent.udp() as sock:
                try:
                    sock.sendto(b"x", (address, 9))
                except PermissionError:
                    continue
            message = f"{member.name} reached {address}"
            raise AssertionError(message)

    def _is_open(self, member: Member) -> None:
        """See that nothing is left of the fence of what is not attached."""
        if isinstance(member.target, Workload):
            assert [self._arrived(member.target, address) for address in shut(member.number)] == [3, 3]
            return
        before = self._leaked(member)
        with member.agent.udp() as sock:
            sock.sendto(b"x", (shut(member.number)[0], 9))
        wait_for(lambda: self._leaked(member) == before + 1, "a datagram of a cgroup without a fence")

    def _arrived(self, workload: Workload, address: str) -> int:
        return self._topology.arrived(workload, UDP6 if ":" in address else UDP4, address)

    def _counts(self, member: Member) -> list[int]:
        return self._far.counts()[4 * member.number : 4 * member.number + 4]

    def _leaked(self, member: Member) -> int:
        return sum(self._counts(member)[2:])

    def _holds(self, member: Member) -> None:
        assert self._leaked(member) == member.leaked, f"{member.name}: packets passed to {shut(member.number)}"

    def end(self) -> list[list[int]]:
        """Stop probing: nothing denied may have arrived, nothing allowed may be lost. Detach all; return the counts."""
        found = []
        for member, prober in zip(self.members[CHURNED:], self._probers, strict=True):
            sent = prober.end()
            took = [count for count, _ in sent[:2]]
            wait_for(lambda: self._counts(member)[:2] == took, f"{took} packets to {kept(member.number)} to arrive")  # noqa: B023 - called here
            arrived = self._counts(member)
            assert arrived[2:] == [0, 0], f"{member.name}: {arrived[2:]} packets passed to {shut(member.number)}"
            assert [refused for _, refused in sent[:2]] == [0, 0], f"{member.name} was refused {kept(member.number)}"
            found.append([count for pair in sent for count in pair])
        for member in self.members:
            if member.id:
                self.daemon.detach(member.id)
        return found
