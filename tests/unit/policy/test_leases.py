"""The lease book: holds, renewals, dropping by name, expiry, and the bounds on what it remembers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from netfence.policy import leases as leases_module
from netfence.policy.leases import LeaseBook, lease_expiry

WEB = bytes((192, 0, 2, 1))
CDN = bytes((192, 0, 2, 2))
CDN6 = bytes((0x20, 0x01, 0x0D, 0xB8)) + bytes(11) + b"\x02"


@pytest.mark.parametrize(
    ("ttl_s", "expected"),
    [
        pytest.param(0.0, 1000 + 300 + 60, id="zero-is-the-minimum"),
        pytest.param(299.0, 1000 + 300 + 60, id="below-the-minimum"),
        pytest.param(400.0, 1000 + 400 + 60, id="between"),
        pytest.param(1e9, 1000 + 3600 + 60, id="above-the-maximum"),
    ],
)
def test_lease_expiry(ttl_s: float, expected: float) -> None:
    assert lease_expiry(1000.0, ttl_s, 300.0, 60.0, 3600.0) == expected


def book_of(*holds: tuple[str, bytes, float]) -> LeaseBook:
    book = LeaseBook()
    for name, address, expiry in holds:
        book.hold(name, address, expiry)
    return book


def test_an_address_held_by_two_names_stays_until_both_are_dropped() -> None:
    book = book_of(("a", CDN, 10.0), ("b", CDN, 10.0), ("a", WEB, 10.0))
    assert book.drop_names(lambda name: name != "a") == [WEB]
    assert book.names_of(CDN) == ("b",)
    assert WEB not in book
    assert book.drop_names(lambda name: name != "b") == [CDN]
    assert len(book) == 0
    assert book.expired(1e9) == []


def test_keep_is_asked_once_for_each_name() -> None:
    book = book_of(*(("a", bytes((10, 0, 0, host)), 10.0) for host in range(100)))
    asked: list[str] = []

    def keep(name: str) -> bool:
        asked.append(name)
        return True

    assert book.drop_names(keep) == []
    assert asked == ["a"]
    assert len(book) == 100


def test_renewing_never_shortens() -> None:
    book = book_of(("a", WEB, 20.0))
    assert book.hold("a", WEB, 10.0) == 20.0
    assert book.hold("b", WEB, 15.0) == 20.0
    assert book.hold("a", WEB, 30.0) == 30.0
    assert book.expiry(WEB) == 30.0
    assert book.expiry(CDN) is None


def test_what_a_dropped_name_asked_for_longer_is_shortened_for_the_others() -> None:
    book = book_of(("a", WEB, 100.0), ("b", WEB, 20.0), ("b", CDN, 50.0), ("a", CDN, 40.0))
    shortened: dict[bytes, float] = {}
    assert book.drop_names(lambda name: name == "b", shortened.__setitem__) == []
    assert shortened == {WEB: 20.0}
    assert book.expiry(WEB) == 20.0
    assert book.expired(20.0) == [WEB]


def test_expired_tells_until_forgotten_and_renewal_takes_it_back() -> None:
    book = book_of(("a", WEB, 10.0), ("a", CDN, 20.0))
    assert book.expired(9.9) == []
    assert book.expired(10.0) == [WEB]
    assert book.expired(15.0) == [WEB]
    assert set(book.expired(20.0)) == {WEB, CDN}
    assert book.names_of(WEB) == ("a",), "the kernel may keep it for connections, so its names are still known"
    book.hold("a", WEB, 30.0)
    assert book.expired(25.0) == [CDN]
    assert book._due == {CDN}, "a renewed lease is not looked at with every call"
    book.forget(CDN)
    book.forget(CDN)
    assert book.expired(25.0) == []
    assert book.expired(30.0) == [WEB]


def test_would_add_counts_new_addresses_once() -> None:
    book = book_of(("a", WEB, 10.0))
    assert book.would_add([WEB, CDN, CDN, CDN6]) == 2
    assert book.would_add([]) == 0
    assert len(book) == 1


def test_names_of_one_address_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "MAX_NAMES_PER_LEASE", 3)
    book = book_of(("a", WEB, 10.0), ("b", WEB, 10.0), ("c", WEB, 10.0), ("a", WEB, 11.0), ("d", WEB, 10.0))
    assert book.names_of(WEB) == ("c", "a", "d"), "b asked longest ago"
    assert book.drop_names(lambda name: name == "b") == [WEB], "forgotten, it no longer holds: closed, never left open"


def test_holds_in_all_are_bounded_and_every_address_keeps_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "MAX_HOLDS", 10)
    book = LeaseBook()
    for number in range(1000):
        book.hold(f"n{number}", WEB if number % 2 else CDN, 10.0)
    book.hold("late", CDN6, 10.0)
    assert sum(1 for _ in book.export()) <= 10 + 1
    assert book.names_of(CDN6) == ("late",)
    assert book.names_of(WEB)[-1] == "n999"
    assert len(book._by_name) == sum(1 for _ in book.export())


def test_export_and_restore() -> None:
    book = book_of(("a", WEB, 100.0), ("b", WEB, 20.0), ("b", CDN6, 50.0))
    copy = LeaseBook.restore(book.export())
    assert sorted(copy.export()) == sorted(book.export()) == [
        (CDN6, "b", 50.0), (WEB, "a", 100.0), (WEB, "b", 20.0),
    ]  # fmt: skip
    assert copy.expiry(WEB) == 100.0
    assert copy.expired(60.0) == [CDN6]
    assert set(copy.addresses()) == {WEB, CDN6}


def test_the_queue_does_not_grow_with_renewals_and_forgetting() -> None:
    book = LeaseBook()
    for number in range(20_000):
        book.hold("a", number.to_bytes(4, "big"), float(number))
        book.hold("a", number.to_bytes(4, "big"), float(number) + 0.5)
        if number >= 100:
            book.forget((number - 100).to_bytes(4, "big"))
    assert len(book) == 100
    assert len(book._queue) <= 2 * len(book) + 65


NAMES = st.sampled_from(["a", "b", "c"])
ADDRESSES = st.sampled_from([WEB, CDN, CDN6])
TIMES = st.integers(1, 30).map(float)


class LeaseMachine(RuleBasedStateMachine):
    """The book beside a plain dict of (address, name) → expiry."""

    def __init__(self) -> None:
        super().__init__()
        self.book = LeaseBook()
        self.holds: dict[tuple[bytes, str], float] = {}

    @rule(name=NAMES, address=ADDRESSES, expiry=TIMES)
    def hold(self, name: str, address: bytes, expiry: float) -> None:
        self.holds[address, name] = max(expiry, self.holds.get((address, name), 0.0))
        assert self.book.hold(name, address, expiry) == self.until(address)

    def until(self, address: bytes) -> float:
        return max(expiry for (held, _), expiry in self.holds.items() if held == address)

    @rule(dropped=st.sets(NAMES))
    def drop(self, dropped: set[str]) -> None:
        before = {address for address, _ in self.holds}
        self.holds = {key: expiry for key, expiry in self.holds.items() if key[1] not in dropped}
        after = {address for address, _ in self.holds}
        assert set(self.book.drop_names(lambda name: name not in dropped)) == before - after

    @rule(address=ADDRESSES)
    def forget(self, address: bytes) -> None:
        self.book.forget(address)
        self.holds = {key: expiry for key, expiry in self.holds.items() if key[0] != address}

    @rule(now=TIMES)
    def expire(self, now: float) -> None:
        addresses = {address for address, _ in self.holds}
        assert set(self.book.expired(now)) == {address for address in addresses if self.until(address) <= now}

    @invariant()
    def same_holds(self) -> None:
        assert {(address, name): expiry for address, name, expiry in self.book.export()} == self.holds
        assert len(self.book) == len({address for address, _ in self.holds})


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.tuples(NAMES, ADDRESSES, TIMES), max_size=20))
def test_expiry_is_the_latest_that_was_asked_for(holds: list[tuple[str, bytes, float]]) -> None:
    book = book_of(*holds)
    for address in {address for _, address, _ in holds}:
        assert book.expiry(address) == max(expiry for _, held, expiry in holds if held == address)


def test_names_and_the_addresses_that_they_hold_are_told() -> None:
    book = LeaseBook()
    book.hold("a", WEB, 10)
    book.hold("a", CDN, 10)
    book.hold("b", CDN, 20)
    assert (set(book.names()), set(book.addresses_of("a")), book.addresses_of("b")) == ({"a", "b"}, {WEB, CDN}, (CDN,))
    book.drop_names(lambda name: name != "a")
    assert (list(book.names()), book.addresses_of("a")) == (["b"], ())
