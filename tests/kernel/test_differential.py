"""Random policies and random packets: the kernel's verdict (BPF_PROG_TEST_RUN) against a Python oracle; no difference.

The reason is compared, not only pass or drop, and the counters of each world with what the oracle counted. No hook is
attached: the slot is bound to the loopback index that test runs carry, or compiled into the cgroup program.

Frames come described (frames.py: the oracle judges what was meant), or from scapy's `fuzz` (packet_fuzz.py: the oracle
judges what packet_reader.py reads; what it cannot read must be dropped). `NETFENCE_SEED=…` repeats the latter.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from frames import Frame, random_frame
from harness import warm
from harness.deadline import SLOWNESS
from harness.fence import MAX_LEASES
from harness.needs import is_before, needs
from netfence.dataplane import compile as child
from netfence.dataplane import links, loader
from netfence.dataplane.plane import DataPlane, Static
from netfence.dataplane.slotword import SlotWord
from netfence.errors import InvalidError
from netfence.policy.commands import AllowCidr, BulkUpdate, CidrSpec, Command, DenyCidr, RemoveCidr, apply
from netfence.policy.modes import FIRST_DROP, Mode, Reason
from netfence.policy.policy import EMPTY, Policy
from oracle import OracleLease, OracleRule, World, decide, unmapped
from packet_fuzz import PacketFuzz
from packet_reader import Reading, read

WORLDS = int(os.environ.get("NETFENCE_DIFFERENTIAL_WORLDS", "20" if SLOWNESS == 1 else "10"))
FIRST_WORLD = WORLDS * int(os.environ.get("NETFENCE_PART", "0/1").partition("/")[0])  # each kernel has its own
_EMULATED = 100 if is_before("test runs of cgroup programs") else 67  # 2,000 of all hooks together
PACKETS = 800 if SLOWNESS == 1 else _EMULATED  # per world and hook: 20 worlds x 3 hooks x 800 = 48,000
LOOPBACK_IFINDEX = 1  # what a test run without context carries
SHORT_S = 0.25
Hook = Literal["tc", "xdp", "cgroup"]
HOOKS = ["tc", "xdp", pytest.param("cgroup", marks=needs("test runs of cgroup programs"))]
Tell = Callable[[str, object], None]
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


@pytest.fixture
def program(hook: Hook, plane: DataPlane, tmp_path: Path) -> Iterator[int]:
    """Give what a test run runs: for cgroups with the slot compiled in, because it gives them fresh, empty storage."""
    if hook != "cgroup":
        yield plane._loaded.programs[f"nf_{hook}"]
        return
    (programs,) = plane._bpffs_dir.glob("programs-*")
    pin = programs / "test_egress"  # kept beside the others for the next module (warm.py): compiling takes long
    if not pin.exists():
        _compile_for_tests(plane, pin, tmp_path / "layout.json")
    program = links.obj_get(pin)
    yield program
    os.close(program)


def _compile_for_tests(plane: DataPlane, pin: Path, layout: Path) -> None:
    pins = plane._bpffs_dir / "testing"
    pins.mkdir()
    (maps,) = plane._bpffs_dir.glob("maps-*")
    name = "nf_cgroup_egress"
    job = child.Job(str(loader.bpf_sources()), str(maps), str(pins), str(layout), MAX_LEASES, SLOT, programs=[name])
    subprocess.run([sys.executable, "-m", child.__name__, json.dumps(dataclasses.asdict(job))], check=True)
    (pins / name).rename(pin)
    pins.rmdir()


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
    plane._write_maps(SLOT, static, "judged")
    plane._slots[FOREIGN_SLOT] = SlotWord()
    foreign = dataclasses.replace(static, dns_address=world.foreign_dns[0].packed, dns_port=world.foreign_dns[1])
    plane._write_maps(FOREIGN_SLOT, foreign, "foreign")
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
    for host in dict.fromkeys(unmapped(host) for host in rng.sample(HOSTS, 8)):  # a set has another order in each run
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


@contextlib.contextmanager
def _in_force(plane: DataPlane, runner: asyncio.Runner, rng: random.Random, hook: Hook, mode: Mode) -> Iterator[World]:
    """Draw a world and put it into the kernel; what is short-lived in it has expired."""
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
    try:
        policy, rules = _policy(rng, mode, audit=world.audit)
        runner.run(plane.apply(SLOT, policy, None))
        policy, rules = runner.run(_single_commands(plane, rng, policy, rules))
        world.rules = [OracleRule(ipaddress.ip_network(cidr), allow, ttl_s != SHORT_S) for cidr, allow, ttl_s in rules]
        _leases(plane, rng, world)
        _use(plane, world)
        _inbound(plane, rng, world)
        deadline = time.monotonic() + SHORT_S + 0.05
        while time.monotonic() < deadline:
            time.sleep(0.01)  # until what is short-lived has expired
        yield world
    finally:
        runner.run(_unbind(plane))


def _ever(hook: Hook) -> set[Reason]:
    """Return the reasons that a hook counts under in a test run."""
    never = {Reason.START, Reason.CONNECT, Reason.UNREADABLE, Reason.DAEMON}
    return (
        set(Reason) - never - ({Reason.ARP, Reason.VLAN_DEPTH, Reason.DHCP} if hook == "cgroup" else {Reason.LOOPBACK})
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("hook", HOOKS)
def test_kernel_and_oracle_agree(
    hook: Hook,
    plane: DataPlane,
    program: int,
    runner: asyncio.Runner,
    record_property: Tell,
) -> None:
    seen: Counter[Reason] = Counter()
    for seed in range(FIRST_WORLD, FIRST_WORLD + WORLDS):
        rng = random.Random(f"{hook} {seed}")
        mode = rng.choice([Mode.ALLOWLIST, Mode.ALLOWLIST, Mode.DENYLIST, Mode.DENYLIST, Mode.BLOCK_ALL, Mode.DISABLED])
        with _in_force(plane, runner, rng, hook, mode) as world:
            seen.update(_compare(plane, program, rng, world, seed))
    record_property("packets", sum(seen.values()))
    record_property("reasons", {reason.name: count for reason, count in seen.items()})
    expected = _ever(hook)
    assert sum(seen.values()) >= 0.9 * WORLDS * PACKETS  # all but what never meets the program of a cgroup
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


FUZZ_WORLDS, FUZZ_PACKETS = (2, 1500) if SLOWNESS == 1 else (1, 40)  # per hook
FUZZ_MODES = (Mode.ALLOWLIST, Mode.DENYLIST, Mode.BLOCK_ALL, Mode.ALLOWLIST, Mode.DENYLIST, Mode.DISABLED)
NIGHTLY_WORLDS, NIGHTLY_PACKETS = 30, 3000  # per hook
NIGHTLY_LEAST = {"tc": 90_000, "xdp": 90_000, "cgroup": 20_000}  # a cgroup never meets most; 200,000 together
UNREADABLE = {
    Reason.NOT_IP, Reason.VLAN_DEPTH, Reason.TRUNCATED, Reason.UNREADABLE, Reason.EXT_HEADERS, Reason.SOURCE_ROUTE
}  # fmt: skip
NEVER_RUN = "the kernel runs no program on it"
IP_ETHERTYPES = (b"\x08\x00", b"\x86\xdd")


@dataclasses.dataclass
class _Fuzzing:
    """The place where fuzzed frames are judged: by the kernel, and by the oracle after a reading of its own."""

    plane: DataPlane
    program: int
    world: World
    counts: Counter[str] = dataclasses.field(default_factory=Counter)

    def judge(self, raw: bytes) -> None:
        """Compare both verdicts on a frame, and where it was counted."""
        reading = read(raw)
        if self.world.cgroup and raw[12:14] not in IP_ETHERTYPES:
            return  # nothing else meets the program of a cgroup
        expected = self._expected(reading)
        before = self.plane.counters(SLOT)
        try:
            got = links.prog_test_run(self.program, raw).retval
        except OSError as error:
            if error.errno != errno.EINVAL or (reading is not None and len(raw) > 14):
                raise
            self.counts[NEVER_RUN] += 1  # too short for the kernel
            return
        after = self.plane.counters(SLOT)
        moved = [
            (list_name, Reason(index))
            for list_name in ("packets", "would_packets")
            for index, (a, b) in enumerate(zip(getattr(before, list_name), getattr(after, list_name), strict=True))
            if a != b
        ]
        passed, dropped = PASS_DROP[self.world.hook]
        lets_pass = {reason for reason in expected if reason < FIRST_DROP or self.world.audit}
        if not moved:  # what XDP lets pass is counted by the TC program behind it
            assert self.world.hook == "xdp"
            assert got == passed
            assert lets_pass, f"passes, but is to be dropped: {expected}"
            self.counts["passed on"] += 1
            return
        [(list_name, reason)] = moved
        assert reason in expected, f"counted as {reason.name}, but it is {[one.name for one in expected]}"
        assert got == (passed if reason in lets_pass else dropped), f"{reason.name} returned {got}"
        assert (list_name == "would_packets") == (reason >= FIRST_DROP and self.world.audit)
        self.counts[reason.name] += 1

    def _expected(self, reading: Reading | None) -> set[Reason]:
        """Say under which reason the frame may be counted: any of those for what cannot be read, else the one."""
        if self.world.mode is Mode.DISABLED:
            return {Reason.DISABLED}
        if reading is None:
            return UNREADABLE
        decided = {decide(self.world, reading.frame)}
        return decided | {Reason.TRUNCATED} if reading.doubtful else decided


def _fuzz(
    plane: DataPlane, program: int, runner: asyncio.Runner, hook: Hook, size: tuple[int, int], tell: Tell
) -> Counter[str]:
    """Compare frames in so many worlds, so many in each; count what became of them."""
    seed = int(os.environ.get("NETFENCE_SEED") or random.SystemRandom().randrange(1 << 32))
    worlds, packets = size
    counts: Counter[str] = Counter()
    for number in range(worlds):
        rng = random.Random(f"{seed} {hook} {number}")
        fuzz = PacketFuzz(f"{seed} {hook} {number}", HOSTS, OWN_DNS, FOREIGN_DNS)
        with _in_force(plane, runner, rng, hook, FUZZ_MODES[number % len(FUZZ_MODES)]) as world:
            place = _Fuzzing(plane, program, world, counts)
            for raw in itertools.chain(fuzz.cut_everywhere(), itertools.islice(fuzz.frames(), packets)):
                try:
                    place.judge(raw)
                except BaseException as error:
                    error.add_note(f"NETFENCE_SEED={seed}, {hook}, world {number}: {world}\n{raw.hex()}\n{read(raw)}")
                    raise
    tell("packets", counts.total())
    tell("reasons", dict(counts))
    return counts


@pytest.mark.timeout(120)
@pytest.mark.parametrize("hook", HOOKS)
def test_kernel_and_oracle_agree_on_fuzzed_frames(
    hook: Hook, plane: DataPlane, program: int, runner: asyncio.Runner, record_property: Tell
) -> None:
    _fuzz(plane, program, runner, hook, (FUZZ_WORLDS, FUZZ_PACKETS), record_property)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("hook", HOOKS)
def test_kernel_and_oracle_agree_on_many_more_fuzzed_frames(
    hook: Hook, plane: DataPlane, program: int, runner: asyncio.Runner, record_property: Tell
) -> None:
    seen = _fuzz(plane, program, runner, hook, (NIGHTLY_WORLDS, NIGHTLY_PACKETS), record_property)
    assert seen.total() >= NIGHTLY_LEAST[hook]
    expected = _ever(hook) - {Reason.REPLY}  # a matter of luck: few worlds drop what a reply passes
    if hook == "xdp":
        expected = {reason for reason in expected if reason >= FIRST_DROP}
    assert {reason.name for reason in expected} <= set(seen)
