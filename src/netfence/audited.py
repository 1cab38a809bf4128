"""The names that only audit let through, remembered for `suggest` (semantics.md 10): one bounded memory per attachment.

Knows nothing of packets: where they went the kernel remembers (`dataplane.flows.SeenMap`). Times play no part: what is
asked for often enough to be suggested is asked for again, and then it is the latest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from netfence.policy.prefix import address_text, parse_address

MAX_NAMES: Final = 1024
"""Names remembered of one attachment: a policy of more nobody reviews. Beyond them the one asked for longest ago is
forgotten, and counted: a workload that asks for ever new names cannot make us remember more."""

MAX_ADDRESSES: Final = 32
"""Addresses remembered of one name, the latest: those that a resolver gives in turn while a client still uses an older
one."""

MAX_CHAIN: Final = 8
"""Names remembered of what an answer leads to: real chains are shorter."""

MAX_BYTES: Final = 1 << 20
"""Memory of one attachment, about: 0.2 MB where names are like most, and a thousand as long as names can be would take
six. There may be two thousand attachments, and whoever asks for such names has as many as it likes."""

_NAME, _LINK, _ADDRESS = 200, 60, 150  # bytes that one takes beside its characters


@dataclass(slots=True)
class AuditedName:
    """A name: how often it was asked for, the packed addresses it got, and the names that its last answer led to."""

    queries: int = 0
    addresses: dict[bytes, None] = field(default_factory=dict)  # a set that keeps order: the latest last
    chain: tuple[str, ...] = ()

    def copy(self) -> AuditedName:
        """Return one that stays as this is now."""
        return AuditedName(self.queries, dict(self.addresses), self.chain)

    @property
    def bytes(self) -> int:
        """Return what it takes, about, without its name."""
        return _NAME + _ADDRESS * len(self.addresses) + _LINK * len(self.chain) + sum(map(len, self.chain))


class AuditMemory:
    """The audited names of one attachment, the one asked for last at the end."""

    def __init__(self) -> None:
        self._names: dict[str, AuditedName] = {}
        self._by_address: dict[bytes, str] = {}  # the name that an address was given to last
        self._bytes = 0
        self.forgotten = 0
        self.changes = 0  # moves with every note: whoever stores it knows whether it has to

    def __len__(self) -> int:
        return len(self._names)

    def note(self, name: str, addresses: Iterable[bytes], chain: Sequence[str] = ()) -> None:
        """Note one query for a name that is denied: the packed addresses of the answer, the names that it led to."""
        self.changes += 1
        known = self._pop(name) or AuditedName()
        known.queries += 1
        known.chain = tuple(chain[:MAX_CHAIN])
        for address in addresses:
            known.addresses.pop(address, None)
            known.addresses[address] = None
        while len(known.addresses) > MAX_ADDRESSES:
            del known.addresses[next(iter(known.addresses))]
        self._add(name, known)

    def _add(self, name: str, known: AuditedName) -> None:
        """Take a name in as the latest, and forget the oldest ones that there is no room for."""
        self._names[name] = known
        self._by_address.update(dict.fromkeys(known.addresses, name))
        self._bytes += len(name) + known.bytes
        while len(self._names) > MAX_NAMES or (self._bytes > MAX_BYTES and len(self._names) > 1):
            self._pop(next(iter(self._names)))
            self.forgotten += 1

    def _pop(self, name: str) -> AuditedName | None:
        known = self._names.pop(name, None)
        if known is not None:
            self._bytes -= len(name) + known.bytes
            for address in known.addresses:
                if self._by_address.get(address) == name:
                    del self._by_address[address]
        return known

    def name_of(self, address: bytes) -> str:
        """Return the name that the packed address was given to last; "" for one that is not remembered."""
        return self._by_address.get(address, "")

    def names(self) -> Iterator[tuple[str, AuditedName]]:
        """Yield every name with what is known of it, the one asked for longest ago first."""
        return iter(self._names.items())

    def copy(self) -> AuditMemory:
        """Return one that stays as this is now, for another thread."""
        memory = AuditMemory()
        memory._names = {name: known.copy() for name, known in self._names.items()}
        memory._by_address = dict(self._by_address)
        memory._bytes = self._bytes
        memory.forgotten = self.forgotten
        return memory

    def clear(self) -> None:
        """Forget everything: the attachment is over."""
        self.changes += 1
        self._names.clear()
        self._by_address.clear()
        self._bytes = self.forgotten = 0

    def dump(self) -> str:
        """Return it as text for the store: one JSON object.

        Written name by name: megabytes in one go would keep every other thread from the interpreter meanwhile.
        """
        names = [
            json.dumps([name, known.queries, list(map(address_text, known.addresses)), known.chain])
            for name, known in self._names.items()
        ]
        return f'{{"forgotten":{self.forgotten},"names":[{",".join(names)}]}}'

    @classmethod
    def load(cls, text: str) -> AuditMemory:
        """Read what `dump` wrote. Raises ValueError when it is damaged."""
        memory = cls()
        try:
            stored = json.loads(text)
            for name, queries, addresses, chain in stored["names"][-MAX_NAMES:]:
                packed = dict.fromkeys(parse_address(address) for address in addresses[-MAX_ADDRESSES:])
                memory._pop(str(name))
                memory._add(str(name), AuditedName(int(queries), packed, tuple(map(str, chain[:MAX_CHAIN]))))
            memory.forgotten += int(stored["forgotten"])
        except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"read audited names: damaged: {error!r}") from error
        return memory
