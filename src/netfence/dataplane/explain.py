"""The kernel's verdict on an address, told instead of given: `decide` of bpf/netfence.bpf.c, read from its own maps.

Judges the first packet (SYN) of a TCP connection to the address, to no DNS port; where a cgroup connects to the
unspecified address, that of the loopback, which the kernel puts in its place. So what a packet passes or drops by
itself (ARP, neighbour discovery, DHCP, DNS, replies, malformed headers) has no part in it. Reads the slot's word, the
tries, the lease and the kernel's clock, and writes nothing: neither a counter nor the last use of a lease. Owns no
state. tests/kernel/test_explain.py sends packets and compares: change `decide` and this together.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Final, Literal, NamedTuple

from netfence.dataplane.clock import Clock
from netfence.dataplane.layout import Layout
from netfence.dataplane.leases import kernel_address
from netfence.dataplane.maps import Map, u32
from netfence.dataplane.slotword import SlotWord
from netfence.policy.modes import FIRST_DROP, Mode, Reason
from netfence.policy.prefix import Key, bits_of, key_of, normal, parse_address

# Mirrors of bpf/always.h; tests/unit/dataplane/test_explain.py compares them.
METADATA: Final = frozenset({parse_address("169.254.169.254"), parse_address("fd00:ec2::254")})
METADATA_RULE: Final = {4: 16, 16: 64}
"""By address size in bytes: how long an allow rule must be to open the metadata address."""

_LINK_LOCAL: Final = {4: ("169.254.0.0", 16), 16: ("fe80::", 10)}
_LOOPBACK: Final = {4: ("127.0.0.0", 8), 16: ("::1", 128)}


class Rules(NamedTuple):
    """What the CIDR rules say of an address.

    `reason`: ALLOW_RULE or DENY_RULE, None where no live prefix covers it. `key` is that prefix, None too where a table
    is missing (denied: never guessed). `passed_over` are expired prefixes before it, longest first.
    """

    reason: Reason | None
    key: Key | None
    passed_over: tuple[Key, ...]


class Judged(NamedTuple):
    """What the kernel would do now, and what it looked at on the way.

    `rules` is None where rules and leases had no say. `would`: audit lets pass what `reason` drops. `lease_s`: how long
    the lease of the address lives on in seconds, negative for one that ran out, None without one; told also where it
    has no say.
    """

    reason: Reason
    would: bool
    mode: Mode
    start: bool
    rules: Rules | None
    lease_s: float | None

    @property
    def verdict(self) -> Literal["pass", "drop", "would_drop"]:
        """The verdict as the API words it."""
        if self.reason < FIRST_DROP:
            return "pass"
        return "would_drop" if self.would else "drop"


class Explainer:
    """Judges addresses as the programs on these maps do. For the event loop, where no policy changes meanwhile."""

    def __init__(self, maps: Mapping[str, Map], layout: Layout, clock: Clock) -> None:
        self._maps, self._layout, self._clock = maps, layout, clock
        self._config = layout.packer("config", "active", "flags")
        self._rule = layout.packer("rule", "allow", "deny", "length")
        self._lease_key = layout.packer("lease_key", "slot", "address")
        self._lease = layout.packer("lease", "expiry", "last_use")

    def judge(self, slot: int, address: bytes) -> Judged:
        """Judge a packed address (4 or 16 bytes) for a slot: some ten system calls. Raises OSError, ValueError."""
        address = normal(address)
        config = self._maps["config"].lookup(u32(slot))
        if config is None:
            raise ValueError(f"slot {slot} does not exist")
        active, flags = self._config.unpack(config[: self._config.size])
        word = SlotWord.decode(active, self._layout)
        if flags & self._layout.constants["FLAG_CGROUP"] and not any(address):
            address = parse_address("127.0.0.1" if len(address) == 4 else "::1")
        now = self._clock.now()
        expiry = self._lease_expiry(slot, address)
        lease_s = None if expiry is None else (expiry - now) / self._clock.hz
        live = word.leases and expiry is not None and expiry > now
        rules = None
        reason = self._before_rules(word, flags, address)
        if reason is None:
            rules = self._look_up(word, address, now)
            reason = self._by_rules(word, flags, address, rules, live=live)
        would = reason >= FIRST_DROP and word.audit and not word.start
        return Judged(reason, would, word.mode, word.start, rules, lease_s)

    def _before_rules(self, word: SlotWord, flags: int, address: bytes) -> Reason | None:
        """Tell what passes or drops whatever rules and leases say; None: they decide."""
        if word.mode is Mode.DISABLED:
            return Reason.DISABLED
        cgroup = flags & self._layout.constants["FLAG_CGROUP"]
        if cgroup and word.mode is not Mode.BLOCK_ALL and _within(address, _LOOPBACK):
            return Reason.LOOPBACK
        if word.mode is Mode.BLOCK_ALL:
            return Reason.START if word.start else Reason.BLOCK_ALL
        return None

    def _by_rules(self, word: SlotWord, flags: int, address: bytes, rules: Rules, *, live: bool) -> Reason:
        """Decide in a list mode: longest live rule → metadata → lease → link-local → the mode's default."""
        if rules.reason is Reason.DENY_RULE:
            return Reason.DENY_RULE
        if address in METADATA:
            enough = rules.key is not None and rules.key[-1] >= METADATA_RULE[len(address)]
            return Reason.ALLOW_RULE if enough else Reason.METADATA
        if rules.reason is not None:
            return rules.reason
        if live:
            return Reason.LEASE
        if flags & self._layout.constants["FLAG_LINK_LOCAL"] and _within(address, _LINK_LOCAL):
            return Reason.LINK_LOCAL
        return Reason.DEFAULT_PASS if word.mode is Mode.DENYLIST else Reason.DEFAULT_DROP

    def _look_up(self, word: SlotWord, address: bytes, now: int) -> Rules:
        """Find what the rules say, as `rule_lookup` does.

        An expired prefix hides what is shorter in the trie, so the trie is asked again, one bit shorter.
        """
        size = len(address)
        if not (word.rules4 if size == 4 else word.rules6):
            return Rules(None, None, ())
        inner = self._maps["rules4" if size == 4 else "rules6"].inner(u32(word.index))
        if inner is None:
            return Rules(Reason.DENY_RULE, None, ())
        passed_over: list[Key] = []
        length = bits_of(size)
        with closing(inner):
            for _ in range(self._layout.constants["TTL_NESTING"] + 1):
                found = inner.lookup(u32(length) + address)
                if found is None:
                    return Rules(None, None, tuple(passed_over))
                allow, deny, own = self._rule.unpack(found[: self._rule.size])
                key = key_of(address, own)
                if deny > now:
                    return Rules(Reason.DENY_RULE, key, tuple(passed_over))
                if allow > now:
                    return Rules(Reason.ALLOW_RULE, key, tuple(passed_over))
                passed_over.append(key)
                if not own:
                    return Rules(None, None, tuple(passed_over))
                length = own - 1
        return Rules(Reason.DENY_RULE, None, tuple(passed_over))

    def _lease_expiry(self, slot: int, address: bytes) -> int | None:
        found = self._maps["leases"].lookup(self._lease_key.pack(slot, kernel_address(address)))
        return None if found is None else int(self._lease.unpack(found[: self._lease.size])[0])


def _within(address: bytes, spaces: Mapping[int, tuple[str, int]]) -> bool:
    network, length = spaces[len(address)]
    return key_of(address, length) == key_of(parse_address(network), length)
