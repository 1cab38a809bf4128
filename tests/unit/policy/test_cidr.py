"""The CIDR table against a naive oracle: a list of `ipaddress` networks, scanned for every question."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfence.errors import ExhaustedError
from netfence.policy import cidr as cidr_module
from netfence.policy.cidr import NEVER, CidrTable, Entry, Key, Rule, cidr_text, parse_cidr, retry_length
from netfence.policy.limits import MAX_TTL_NESTING

NOW = 1000.0
LATER = 1060.0
MUCH_LATER = 5000.0

INTRANET = parse_cidr("10.0.0.0/8")
OFFICE = parse_cidr("10.1.0.0/16")
PRINTER = parse_cidr("10.1.2.3")
PRINTER_ADDRESS = bytes((10, 1, 2, 3))
ELSEWHERE_ADDRESS = bytes((192, 0, 2, 1))

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass
class Oracle:
    """Rules as written, newest last; every question scans them all."""

    rules: list[tuple[Network, bool, float]] = field(default_factory=list)

    def add(self, cidr: str, *, allow: bool, expiry: float) -> None:
        network = ipaddress.ip_network(cidr, strict=False)
        self.rules = [rule for rule in self.rules if rule[:2] != (network, allow)]
        self.rules.append((network, allow, expiry))

    def remove(self, cidr: str) -> None:
        network = ipaddress.ip_network(cidr, strict=False)
        self.rules = [rule for rule in self.rules if rule[0] != network]

    def judge(self, address: bytes, now: float) -> tuple[int, bool] | None:
        """Return (prefix length, allowed) of the deciding rule."""
        host = ipaddress.ip_address(address)
        if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped:
            host = host.ipv4_mapped
        live = [rule for rule in self.rules if rule[2] > now and rule[0].version == host.version and host in rule[0]]
        if not live:
            return None
        longest = max(network.prefixlen for network, _, _ in live)
        return longest, all(allow for network, allow, _ in live if network.prefixlen == longest)


# Few addresses and nested prefixes, so that rules meet: 10.0.0.0/8 and a00::/8 cut at some lengths.
ADDRESSES = st.sampled_from(
    [bytes((10, high, low, 0)) for high in (0, 1, 255) for low in (0, 128)]
    + [bytes((11, 0, 0, 1))]
    + [bytes((10, high, low)) + bytes(13) for high in (0, 1, 255) for low in (0, 128)]
    + [bytes(10) + b"\xff\xff" + bytes((10, 1, 128, 0))]
)
LENGTHS4 = st.sampled_from([0, 7, 8, 9, 16, 17, 32])
CIDRS = st.builds(
    lambda address, length: f"{ipaddress.ip_address(address)}/{min(length, len(address) * 8)}",
    ADDRESSES.filter(lambda address: address[:2] != b"\0\0"), LENGTHS4,
)  # fmt: skip
EXPIRIES = st.sampled_from([NEVER, NEVER, LATER, LATER + 1, LATER + 30])
MOMENTS = [NOW, LATER, LATER + 0.5, LATER + 1, MUCH_LATER]
STEPS = st.lists(st.tuples(st.sampled_from(["allow", "deny", "remove"]), CIDRS, EXPIRIES), max_size=15)


def played(steps: list[tuple[str, str, float]]) -> tuple[CidrTable, Oracle]:
    """Apply steps to both; what the table refuses (nesting: test_family) the oracle does not get."""
    table, oracle = CidrTable(), Oracle()
    for action, cidr, expiry in steps:
        key = parse_cidr(cidr)
        if action == "remove":
            table = table.without(key)
            oracle.remove(cidr)
            continue
        try:
            table = table.allow(key, expiry) if action == "allow" else table.deny(key, expiry)
        except ValueError:
            continue
        oracle.add(cidr, allow=action == "allow", expiry=expiry)
    return table, oracle


def judged(table: CidrTable, address: bytes, now: float) -> tuple[int, bool] | None:
    found = table.lookup(address, now)
    return None if found is None else (found[0][-1], found[1])


@given(STEPS, st.lists(ADDRESSES, min_size=1, max_size=5))
def test_lookup_agrees_with_the_oracle(steps: list[tuple[str, str, float]], addresses: list[bytes]) -> None:
    table, oracle = played(steps)
    for now in MOMENTS:
        swept = table.live(now)
        for address in addresses:
            assert judged(table, address, now) == oracle.judge(address, now)
            assert judged(swept, address, now) == oracle.judge(address, now), "removing what expired changes nothing"
        assert swept.next_expiry() > now
        assert not any(0 < expiry <= now for value in swept.entries.values() for expiry in value)


@given(STEPS)
def test_bulk_building_is_adding_one_by_one(steps: list[tuple[str, str, float]]) -> None:
    steps = [step for step in steps if step[0] != "remove"]
    table, oracle = played(steps)
    allow = [(parse_cidr(str(network)), expiry) for network, allowed, expiry in oracle.rules if allowed]
    deny = [(parse_cidr(str(network)), expiry) for network, allowed, expiry in oracle.rules if not allowed]
    built = CidrTable.build(allow, deny)
    assert built == table
    assert CidrTable.of(table.entries.items()) == table
    assert (built.size_of(4), built.size_of(16)) == (table.size_of(4), table.size_of(16))
    assert len(table) == len(table.entries) == len({network for network, _, _ in oracle.rules})


@given(STEPS)
def test_the_index_after_many_changes_is_that_of_a_new_table(steps: list[tuple[str, str, float]]) -> None:
    table, _ = played(steps)
    fresh = CidrTable.of(table.entries.items())
    for size in (4, 16):
        ours, theirs = table.family(size), fresh.family(size)
        assert (ours.counts, ours.timed_counts, ours.lengths) == (theirs.counts, theirs.timed_counts, theirs.lengths)
        assert ours.timed == theirs.timed
        assert ours.soonest <= theirs.soonest


@given(STEPS, STEPS)
def test_changes_lead_from_one_table_to_another(
    before: list[tuple[str, str, float]], after: list[tuple[str, str, float]]
) -> None:
    old, _ = played(before)
    new, _ = played(before + after)
    kernel: dict[Key, Entry] = dict(old.entries)
    for key, value in new.changes_since(old):
        assert kernel.get(key) != value, "only what differs"
        if value is None:
            del kernel[key]
        else:
            kernel[key] = value
    assert kernel == dict(new.entries)


def kernel_verdict(trie: list[tuple[Key, float, float, int | None]], address: bytes, now: float) -> bool | None:
    """Judge as the BPF program does: the trie's longest match, live or not; when expired, again with its length."""
    limit: int | None = 8 * len(address)
    for _ in range(MAX_TTL_NESTING + 1):  # the program's bound
        hits = [
            rule
            for rule in trie
            if limit is not None
            and rule[0][-1] <= limit
            and parse_cidr(f"{ipaddress.ip_address(address)}/{rule[0][-1]}") == rule[0]
        ]
        if not hits:
            return None
        _, allow, deny, limit = max(hits, key=lambda rule: rule[0][-1])
        if deny > now:
            return False
        if allow > now:
            return True
        if limit is None:
            return None
    raise AssertionError("the bound was too small")


@given(STEPS, st.lists(ADDRESSES.filter(lambda address: address[:2] != b"\0\0"), min_size=1, max_size=4))
def test_what_the_kernel_gets_says_the_same(steps: list[tuple[str, str, float]], addresses: list[bytes]) -> None:
    """`compiled` at NOW, read by the kernel's algorithm at any later moment without a sweep between."""
    table, oracle = played(steps)
    tries = {size: list(table.compiled(size, NOW)) for size in (4, 16)}
    for size, trie in tries.items():
        keys = [key for key, _, _, _ in trie]
        assert keys == sorted(keys)
        assert set(keys) == {key for key in table.entries if len(key) == size + 1}
    for now in MOMENTS:
        for address in addresses:
            expected = oracle.judge(address, now)
            assert kernel_verdict(tries[len(address)], address, now) == (expected and expected[1])


def test_compiled_leaves_out_what_is_expired() -> None:
    table = CidrTable().allow(INTRANET, LATER).deny(INTRANET).allow(OFFICE, LATER).allow(PRINTER)
    assert list(table.compiled(4, LATER)) == [(INTRANET, 0.0, NEVER, None), (PRINTER, NEVER, 0.0, None)]
    assert list(table.compiled(4, NOW)) == [
        (INTRANET, LATER, NEVER, None),
        (OFFICE, LATER, 0.0, 15),
        (PRINTER, NEVER, 0.0, None),
    ]


def test_retry_length() -> None:
    assert retry_length(PRINTER) == 31
    assert retry_length(parse_cidr("0.0.0.0/0")) is None


@pytest.mark.parametrize("family", [4, 16], ids=["ipv4", "ipv6"])
def test_an_allow_inside_a_deny_opens_a_hole(family: int) -> None:
    deny, allow = (INTRANET, OFFICE) if family == 4 else (parse_cidr("fd00::/8"), parse_cidr("fd00:1::/32"))
    inside, outside = allow[:-1], bytes((*deny[:1], 2, *deny[2:-1]))
    table = CidrTable().deny(deny)
    assert table.lookup(inside, NOW) == (deny, False)
    table = table.allow(allow)
    assert table.lookup(inside, NOW) == (allow, True)
    assert table.lookup(outside, NOW) == (deny, False)
    assert table.without(allow).lookup(inside, NOW) == (deny, False)


def test_mapped_addresses_are_judged_as_ipv4_and_never_by_ipv6_rules() -> None:
    mapped = bytes(10) + b"\xff\xff" + PRINTER_ADDRESS
    table = CidrTable().allow(parse_cidr("::/0"))
    assert table.lookup(mapped, NOW) is None
    assert table.deny(parse_cidr("::ffff:10.0.0.0/104")).lookup(PRINTER_ADDRESS, NOW) == (INTRANET, False)
    assert table.deny(INTRANET).lookup(mapped, NOW) == (INTRANET, False)


def test_readding_replaces_the_expiry_of_that_list_only() -> None:
    table = CidrTable().allow(INTRANET, LATER).deny(INTRANET, LATER + 9).allow(INTRANET)
    assert table.entries[INTRANET] == Entry(NEVER, LATER + 9)
    assert table.allow(INTRANET, NOW + 1).entries[INTRANET] == Entry(NOW + 1, LATER + 9)
    assert len(table) == 1


def test_without_removes_exactly_that_prefix_from_both_lists() -> None:
    table = CidrTable().allow(INTRANET).deny(INTRANET).allow(OFFICE)
    assert dict(table.without(INTRANET).entries) == {OFFICE: Entry(NEVER, 0.0)}
    assert table.without(PRINTER) is table


def test_live_without_anything_expired_is_the_same_table() -> None:
    table = CidrTable().allow(INTRANET, LATER).allow(OFFICE)
    assert table.live(NOW) is table
    assert table.next_expiry() == LATER
    assert table.live(LATER).next_expiry() == NEVER
    renewed = table.allow(INTRANET, LATER + 5)
    assert renewed.live(LATER) is renewed
    assert renewed.next_expiry() == LATER + 5, "known exactly once looked for"


def test_bulk_entries_of_one_expiry_are_shared() -> None:
    """What keeps the garbage collector from visiting 100,000 containers."""
    table = CidrTable.build([(INTRANET, LATER), (OFFICE, LATER), (PRINTER, LATER + 1)])
    assert table.entries[INTRANET] is table.entries[OFFICE]
    assert table.entries[INTRANET] is not table.entries[PRINTER]


def test_the_last_of_equal_keys_counts() -> None:
    assert CidrTable.build([(INTRANET, LATER), (INTRANET, NEVER)]).entries[INTRANET] == Entry(NEVER, 0.0)
    assert CidrTable.build([], [(INTRANET, NEVER), (INTRANET, LATER)]).entries[INTRANET] == Entry(0.0, LATER)


def test_rules_are_told_in_order() -> None:
    table = CidrTable().deny(PRINTER, LATER).allow(INTRANET).deny(INTRANET).allow(parse_cidr("::/0"))
    assert list(table.rules()) == [
        Rule("10.0.0.0/8", allow=True, expiry=NEVER),
        Rule("10.0.0.0/8", allow=False, expiry=NEVER),
        Rule("10.1.2.3/32", allow=False, expiry=LATER),
        Rule("::/0", allow=True, expiry=NEVER),
    ]


def test_a_full_table_refuses_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cidr_module, "MAX_CIDR_RULES", 2)
    full = CidrTable().allow(INTRANET).allow(parse_cidr("::/0"))
    with pytest.raises(ExhaustedError, match="2 CIDR entries already"):
        full.deny(OFFICE)
    with pytest.raises(ExhaustedError, match="3 CIDR entries"):
        CidrTable.build([(INTRANET, NEVER), (OFFICE, NEVER), (PRINTER, NEVER)])
    assert len(full.deny(INTRANET)) == 2, "the other list of a known prefix needs no room"
    assert len(full.without(INTRANET).allow(OFFICE)) == 2


def test_entries_is_a_mapping_of_both_families() -> None:
    table = CidrTable().allow(INTRANET).deny(parse_cidr("::/0"))
    assert sorted(map(cidr_text, table.entries)) == ["10.0.0.0/8", "::/0"]
    assert PRINTER not in table.entries
    assert b"" not in table.entries
    assert table.lookup(ELSEWHERE_ADDRESS, NOW) is None
    with pytest.raises(ValueError, match="4 or 16"):
        table.lookup(b"abc", NOW)
    with pytest.raises(TypeError):
        hash(table)
    assert repr(table) == "<CidrTable of 2 entries>"
