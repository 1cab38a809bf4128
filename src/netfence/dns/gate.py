"""What a DNS server needs of its attachment and of the control plane: the two protocols.

The attachment implements `Gate`; a server never sees more of it than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from netfence.policy.policy import Policy


class ProxyAnswer(Protocol):
    """A control plane's decision about one name (semantics.md 14).

    `ips` are packed addresses to answer with instead of asking upstream; `ttl_s` 0 means not given.
    """

    @property
    def allow(self) -> bool:
        """Tell whether the name may be resolved."""
        ...

    @property
    def add_to_filter(self) -> bool:
        """Tell whether the addresses are to be opened."""
        ...

    @property
    def ips(self) -> Sequence[bytes]:
        """Return the addresses to answer with, packed; empty: ask upstream."""
        ...

    @property
    def ttl_s(self) -> float:
        """Return how long the decision (and the answer made of `ips`) holds, in seconds; 0 when not given."""
        ...


class Gate(Protocol):
    """An attachment as its DNS server sees it. Every method but `ask_control_plane` returns within microseconds."""

    @property
    def policy(self) -> Policy:
        """Return the policy of this moment."""
        ...

    @property
    def generation(self) -> int:
        """Return a number that changes with every policy change: ready replies and decisions of others are void."""
        ...

    def learn(self, name: str, addresses: Sequence[bytes], ttl_s: float) -> None:
        """Open leases for packed addresses of `name` in the kernel now; the answer is sent after it returned.

        `name` is the name as asked for, its search domain included: it holds the leases, and later policies have to
        judge it with the search domains (`netfence.policy.search.judge_asked`), or a denial of it leaves them open.
        `ttl_s` is the least TTL on the chain, before any clamp. Raises NetfenceError: the client gets SERVFAIL.
        """
        ...

    def note_query(self, allowed: bool) -> None:
        """Count one query, as allowed or blocked."""
        ...

    def note_audit(self, name: str, addresses: Sequence[bytes], why: str, chain: Sequence[str] = ()) -> None:
        """Report a name that was answered only because of `audit` (semantics.md 10), with its addresses, not opened.

        `chain` are the names that the answer leads to.
        """
        ...

    async def ask_control_plane(self, name: str, qtype: str) -> ProxyAnswer:
        """Ask about `name` (no final dot; `qtype` like ``"A"``). Raises NetfenceError: the client gets SERVFAIL."""
        ...
