"""Random policies and random packets: the kernel's verdict (BPF_PROG_TEST_RUN) against a Python oracle; no difference.

The reason is compared, not only pass or drop, and the counters of each world with what the oracle counted. No hook is
attached: the slot is bound to the loopback index that test runs carry, or compiled into the cgroup program.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

import pytest

from frames import Frame, random_frame
from harness import warm
from harness.deadline import SLOWNESS
from harness.fence import MAX_LEASES
from harness.needs import needs
from netfence.dataplane import compile as child
from netfence.dataplane import links, loader
from netfence.dataplane.plane import DataPlane, Static
from netfence.dataplane.slotword import SlotWord
from netfence.errors import InvalidError
from netfence.policy.commands import AllowCidr, BulkUpdate, CidrSpec, Command, DenyCidr, RemoveCidr, apply
from netfence.policy.modes import FIRST_DROP, Mode, Reason
from netfence.policy.policy import EMPTY, Policy
from oracle import OracleLease, OracleRule, World, decide, unmapped

WORLDS = int(os.environ.get("NETFENCE_DIFFERENTIAL_WORLDS", "20"))
PACKETS = 800 if SLOWNESS == 1 else 34  # per world and hook: 20 worlds x 3 hooks x 800 = 48,000; emulated 2,040
LOOPBACK_IFINDEX = 1  # what a test run without context carries
SHORT_S = 0.25
PASS_DROP = {"tc": (0xFFFFFFFF, 2), "xdp": (2, 1), "cgroup": (1, 0)}

HOSTS = [
    ipaddress.ip_address(text)
    for text in (
        "198.51.100.1",
        "198.51.100.2",
        "198.51.101.1",
        "10.1.2.3",
        "10.1.2.4",
        "169.254.169.254",
        "169.254.1.1",
        "127.0.0.1",
        "255.255.255.255",
        "224.0.0.251",
        "10.53.0.1",
        "2001:db8::1",
        "2001:db8::2",
        "2001:db8:0:1::1",
        "fd00:ec2::254",
        "fe80::1",
        "ff02::1",
        "ff02::2",
        "ff02::1:2",
        "ff02::16",
        "ff02::1:ff00:1",
        "ff05::2",
        "::1",
        "::ffff:198.51.100.1",
        "::ffff:169.254.169.254",
        "2001:db8:aaaa::1",
    )
]
LENGTHS = {4: (0, 8, 15, 16, 17, 24, 31, 32), 6: (0, 16, 32, 48, 63, 64, 65, 127, 128)}
OWN_DNS = (ipaddress.ip_address("10.53.0.1"), 11000)
FOREIGN_DNS = (ipaddress.ip_address("127.0.0.1"), 11001)  # on the loopback, which else passes from a cgroup
SLOT, FOREIGN_SLOT = 1, 2


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as one:
        yield one


@pytest.fixture(scope="module")
def plane(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataPlane]:
    data_dir = tmp_path_factory.mktemp("data")
    with warm.bpffs(tmp_path_factory.mktemp("bpffs"), data_dir, MAX_LEASES) as mounted:
        one = runner.run(DataPlane.open(mounted / warm.PINS, data_dir, Mode.BLOCK_ALL, max_leases_total=MAX_LEASES))
        assert (one.allocate_slot(), one.allocate_slot()) == (SLOT, FOREIGN_SLOT)
        yield one
        for name in warm.EMPTIED:  # then the next test takes the rest over
            for key in list(one._loaded.maps[name].keys()):
                one._loaded.maps[name].delete(key)
        runner.run(one.close(detach=False))


@pytest.fixture(scope="module")
def cgroup_program(plane: DataPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Load the cgroup program with the slot compiled in: a test run gives it fresh, empty storage."""
    pins = plane._bpffs_dir / "programs-test"
    pins.mkdir()
    layout = tmp_path_factory.mktemp("layout") / "layout.json"
    job = child.Job(str(loader.bpf_sources()), str(plane._bpffs_dir / "maps"), str(pins), str(layout), MAX_LEASES, SLOT)
    subprocess.run([sys.executable, "-m", child.__name__, json.dumps(dataclasses.asdict(job))], check=True)
    program = links.obj_get(pins / "nf_cgroup_egress")
    shutil.rmtree(pins)
    yield program
    os.close(program)


def _random_rules(rng: random.Random) -> list[tuple[str, bool, float]]:
    rules = []
    for _ in range(rng.choice([0, 3, 10, 25])):
        host = unmapped(rng.choice(HOSTS))
        length = rng.choice(LENGTHS[host.version])
        network = ipaddress.ip_network((host, length), strict=False)
        ttl_s = rng.choice([0, 0, 3600, SHORT_S])
        rules.append((str(network), rng.random() < 0.5, ttl_s))
    return rules


def _policy(rng: random.Random, mode: Mode, *, audit: bool) -> tuple[Policy, list[tuple[str, bool, float]]]:
    """Make a policy by one bulk update and some single commands, and the rules that are left in the oracle's terms."""
    while True:
        rules = _random_rules(rng)
        last = {(cidr, allow): ttl_s for cidr, allow, ttl_s in rules}
        specs = [
            [CidrSpec(cidr, ttl_s) for (cidr, allow), ttl_s in last.items() if allow is wanted]
            for wanted in (True, False)
        ]
        with contextlib.suppress(InvalidError):  # TTL entries nested too deep: draw again
            bulk = BulkUpdate(mode=int(mode), allow_cidrs=specs[0], deny_cidrs=specs[1], dns=None, audit=audit)
            policy = apply(EMPTY, bulk, time.monotonic())
            return policy, [(cidr, allow, ttl_s) for (cidr, allow), ttl_s in last.items()]


async def _single_commands(
    plane: DataPlane, rng: random.Random, policy: Policy, rules: list[tuple[str, bool, float]]
) -> tuple[Policy, list[tuple[str, bool, float]]]:
    """Change the policy in force by a few single-rule commands: the in-place path."""
    for _ in range(rng.choice([0, 0, 4, 8])):
        host = unmapped(rng.choice(HOSTS))
        cidr = str(ipaddress.ip_network((host, rng.choice(LENGTHS[host.version])), strict=False))
        kind = rng.choice(["allow", "deny", "remove"])
        if kind == "remove" and rules:
            cidr = rng.choice(rules)[0]
        commands: dict[str, Command] = {
            "allow": AllowCidr(cidr, 0),
            "deny": DenyCidr(cidr, 0),
            "remove": RemoveCidr(cidr),
        }
        command = commands[kind]
        new = apply(policy, command, time.monotonic())
        await plane.apply(SLOT, new, policy)
        policy = new
        if kind == "remove":
            rules = [rule for rule in rules if rule[0] != cidr]
        else:
            rules = [rule for rule in rules if rule[:2] != (cidr, kind == "allow")] + [(cidr, kind == "allow", 0)]
    return policy, rules


def _bind(plane: DataPlane, static: Static, world: World) -> None:
    """Put the world's fixed part into the kernel without a hook: test runs carry the loopback index."""
    plane._slots[SLOT] = SlotWord()
    plane._write_maps(SLOT, static)
    plane._slots[FOREIGN_SLOT] = SlotWord()
    foreign = dataclasses.replace(static, dns_address=world.foreign_dns[0].packed, dns_port=world.foreign_dns[1])
    plane._write_maps(FOREIGN_SLOT, foreign)
    plane._set_interface(LOOPBACK_IFINDEX, SLOT)


def _inbound(plane: DataPlane, rng: random.Random, world: World) -> None:
    """Let some peers begin a connection: their SYN goes through the program of the opposite hook."""
    for host in rng.sample(HOSTS, 6):
        own = ipaddress.ip_address("192.0.2.10" if host.version == 4 else "2001:db8:ffff::10")
        if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped:
            continue
        peer_port, own_port = rng.choice([(443, 40000), (5555, 8080)])
        syn = Frame(
            source=host, destination=own, protocol="tcp", flags="S", source_port=peer_port, destination_port=own_port
        )
        links.prog_test_run(plane._loaded.programs["nf_tc_inbound"], syn.build())
        if world.replies != "off":
            world.inbound.add((host, own, peer_port, own_port))


def _leases(plane: DataPlane, rng: random.Random, world: World) -> None:
    """Open leases, some to run out before the packets come; some used by TCP while live."""
    for host in {unmapped(host) for host in rng.sample(HOSTS, 8)}:
        live = rng.random() < 0.5
        used = rng.random() < 0.5
        plane.open_leases(SLOT, [host.packed], time.monotonic() + (3600 if live else SHORT_S))
        world.leases[host] = OracleLease(live=live, used=used)


def _use(plane: DataPlane, world: World) -> None:
    for host, lease in world.leases.items():
        if lease.used:
            key = plane._leases._key.pack(
                SLOT, b"\0" * 10 + b"\xff\xff" + host.packed if host.version == 4 else host.packed
            )
            value = plane._leases._map.lookup(key)
            assert value is not None
            expiry, _ = plane._leases._value.unpack(value)
            plane._leases._map.update(key, plane._leases._value.pack(expiry, plane.clock.now()))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("hook", ["tc", "xdp", pytest.param("cgroup", marks=needs("test runs of cgroup programs"))])
def test_kernel_and_oracle_agree(
    hook: Literal["tc", "xdp", "cgroup"],
    plane: DataPlane,
    cgroup_program: int,
    runner: asyncio.Runner,
    record_property: Callable[[str, object], None],
) -> None:
    seen: Counter[Reason] = Counter()
    for seed in range(WORLDS):
        rng = random.Random(f"{hook} {seed}")
        mode = rng.choice([Mode.ALLOWLIST, Mode.ALLOWLIST, Mode.DENYLIST, Mode.DENYLIST, Mode.BLOCK_ALL, Mode.DISABLED])
        world = World(
            mode=mode,
            audit=rng.random() < 0.2,
            rules=[],
            leases={},
            own_dns=OWN_DNS,
            foreign_dns=FOREIGN_DNS,
            own_addresses=[ipaddress.ip_address("2001:db8:aaaa::1")],
            allow_dhcp=rng.random() < 0.7,
            allow_link_local=rng.random() < 0.5,
            replies=rng.choice(["off", "host", "host"]),
            hook=hook,
        )
        static = Static(
            dns_address=OWN_DNS[0].packed,
            dns_port=OWN_DNS[1],
            cgroup=world.cgroup,
            xdp=hook == "xdp",
            allow_dhcp=world.allow_dhcp,
            allow_link_local=world.allow_link_local,
            replies=world.replies,
            own_addresses=tuple(address.packed for address in world.own_addresses),
        )
        _bind(plane, static, world)
        program = cgroup_program if world.cgroup else plane._loaded.programs[f"nf_{hook}"]
        try:
            policy, rules = _policy(rng, mode, audit=world.audit)
            runner.run(plane.apply(SLOT, policy, None))
            policy, rules = runner.run(_single_commands(plane, rng, policy, rules))
            world.rules = [
                OracleRule(ipaddress.ip_network(cidr), allow, ttl_s != SHORT_S) for cidr, allow, ttl_s in rules
            ]
            _leases(plane, rng, world)
            _use(plane, world)
            _inbound(plane, rng, world)
            deadline = time.monotonic() + SHORT_S + 0.05
            while time.monotonic() < deadline:
                time.sleep(0.01)  # until what is short-lived has expired
            counted = _compare(plane, program, rng, world, seed)
            seen.update(counted)
        finally:
            runner.run(_unbind(plane))
    record_property("packets", sum(seen.values()))
    record_property("reasons", {reason.name: count for reason, count in seen.items()})
    expected = set(Reason) - {Reason.START, Reason.CONNECT, Reason.UNREADABLE, Reason.DAEMON}
    expected -= {Reason.ARP, Reason.VLAN_DEPTH, Reason.DHCP} if hook == "cgroup" else {Reason.LOOPBACK}
    if WORLDS * PACKETS >= 16_000:
        assert expected <= set(seen), f"never drawn: {expected - set(seen)}"


async def _unbind(plane: DataPlane) -> None:
    plane._set_interface(LOOPBACK_IFINDEX, 0)
    index = plane._slots[SLOT].index
    for slot in (SLOT, FOREIGN_SLOT):
        plane._clear(slot)
        plane._slots[slot] = SlotWord()
        plane._write_word(slot, plane._slots[slot])
    if index:
        plane._give_back(index)
        await asyncio.gather(*plane._tasks)


def _compare(plane: DataPlane, program: int, rng: random.Random, world: World, seed: int) -> Counter[Reason]:
    passed, dropped = PASS_DROP[world.hook]
    counted: Counter[Reason] = Counter()
    before = plane.counters(SLOT)
    for _ in range(PACKETS):
        frame = random_frame(rng, HOSTS, [OWN_DNS[1], FOREIGN_DNS[1]])
        if world.cgroup:
            frame.tags = ()
            if frame.ethertype != "ip":
                continue
        if frame.cut is not None:
            # The kernel refuses an skb that is shorter than an untagged IP header; test_shapes sends such frames.
            plain = frame.ethertype == "ip" and not frame.tags and world.hook != "xdp"
            frame.cut = max(frame.cut, 14 + (20 if frame.version == 4 else 40) if plain else 15)
            if frame.cut >= len(dataclasses.replace(frame, cut=None).build()):
                frame.cut = None
        raw = frame.build()
        reason = decide(world, frame)
        got = links.prog_test_run(program, raw).retval
        would = world.audit and reason >= FIRST_DROP
        want = passed if reason < FIRST_DROP or would else dropped
        after = plane.counters(SLOT)
        before_list, after_list = (one.would_packets if would else one.packets for one in (before, after))
        moved = {
            Reason(index).name: b - a
            for index, (a, b) in enumerate(zip(before_list, after_list, strict=True))
            if a != b
        }
        # What XDP lets pass is counted by the TC program behind it.
        counts = {} if world.hook == "xdp" and want == passed else {reason.name: 1}
        assert (got, moved) == (want, counts), f"seed {seed}: {frame}\n{raw.hex()}\n{world}"
        before = after
        counted[reason] += 1
    return counted
