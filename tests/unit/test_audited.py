"""The memory of audited names: bounded, the latest stay, and it comes back from its text."""

from __future__ import annotations

import pytest

from netfence.audited import MAX_ADDRESSES, MAX_BYTES, MAX_CHAIN, MAX_NAMES, AuditMemory

A, B = bytes((192, 0, 2, 1)), bytes(15) + b"\1"


def names(memory: AuditMemory) -> list[str]:
    return [name for name, _ in memory.names()]


def test_queries_addresses_and_the_last_chain_are_kept() -> None:
    memory = AuditMemory()
    memory.note("a.test", [A], ["cdn.test"])
    memory.note("b.test", [])
    memory.note("a.test", [B, A], ["other.test"])
    known = dict(memory.names())
    assert (known["a.test"].queries, list(known["a.test"].addresses)) == (2, [B, A])
    assert known["a.test"].chain == ("other.test",)
    assert (known["b.test"].queries, known["b.test"].addresses, len(memory)) == (1, {}, 2)
    assert names(memory) == ["b.test", "a.test"]  # the one asked for last at the end


def test_an_address_is_known_by_the_name_that_it_was_given_to_last() -> None:
    memory = AuditMemory()
    assert memory.name_of(A) == ""
    memory.note("a.test", [A])
    memory.note("b.test", [A, B])
    assert (memory.name_of(A), memory.name_of(B)) == ("b.test", "b.test")
    memory.note("a.test", [A])
    assert (memory.name_of(A), memory.copy().name_of(A), AuditMemory.load(memory.dump()).name_of(A)) == ("a.test",) * 3
    memory.note("b.test", [number.to_bytes(4, "big") for number in range(MAX_ADDRESSES)])
    assert memory.name_of(B) == ""  # pushed out
    for number in range(MAX_NAMES):
        memory.note(f"n{number}.test", [])
    assert memory.name_of(A) == ""
    assert memory._by_address == {}
    memory.note("a.test", [A])
    memory.clear()
    assert memory.name_of(A) == ""


def test_whatever_a_workload_asks_it_stays_bounded() -> None:
    memory = AuditMemory()
    memory.note("first.test", [A])
    for number in range(MAX_NAMES):
        if number % 100 == 0:
            memory.note("used.test", [A])
        memory.note(f"n{number}.test", [])
    assert len(memory) == MAX_NAMES
    assert "first.test" not in names(memory)
    assert "used.test" in names(memory)
    assert memory.forgotten == 2
    addresses = [number.to_bytes(4, "big") for number in range(MAX_ADDRESSES + 5)]
    memory.note("many.test", addresses, ["link.test"] * (MAX_CHAIN + 1))
    known = dict(memory.names())["many.test"]
    assert list(known.addresses) == addresses[5:]
    assert len(known.chain) == MAX_CHAIN


def test_names_as_long_as_can_be_take_no_more_memory() -> None:
    def asked(length: int, addresses: int, links: int) -> AuditMemory:
        memory = AuditMemory()
        for number in range(MAX_NAMES):
            many = [number.to_bytes(15, "big") + bytes([low]) for low in range(addresses)]
            for _ in range(2):  # what is asked for again counts once
                memory.note(f"{number:x}".rjust(length, "x"), many, ["y" * length] * links)
        return memory

    usual, longest = asked(30, 4, 2), asked(253, MAX_ADDRESSES, MAX_CHAIN)
    assert (len(usual), usual.forgotten) == (MAX_NAMES, 0)
    assert 100 < len(longest) < MAX_NAMES
    assert longest.forgotten == MAX_NAMES - len(longest)
    assert len(longest.dump()) < 2 * MAX_BYTES
    assert names(longest)[-1] == f"{MAX_NAMES - 1:x}".rjust(253, "x")
    again = AuditMemory.load(longest.dump())
    assert (names(again), again.forgotten) == (names(longest), longest.forgotten)
    again.note("z" * 253, [bytes([low]) * 16 for low in range(MAX_ADDRESSES)], ["y" * 253] * MAX_CHAIN)
    assert len(again) == len(longest)  # it knows how much came back


def test_it_comes_back_from_its_text() -> None:
    memory = AuditMemory()
    memory.note("a.test", [A, B], ["cdn.test"])
    memory.note('evil"\n.test', [])
    memory.forgotten = 3
    again = AuditMemory.load(memory.copy().dump())
    assert (list(again.names()), again.forgotten) == (list(memory.names()), 3)
    assert again.changes == 0
    copy = memory.copy()
    memory.note("a.test", [A])
    memory.clear()
    assert (len(memory), memory.forgotten, len(copy)) == (0, 0, 2)
    assert dict(copy.names())["a.test"].queries == 1


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"names": [["a"]], "forgotten": 0}', '{"names": 1, "forgotten": 0}',
     '{"names": [["a", 1e999, [], []]], "forgotten": 0}', "[" * 100_000],
    ids=lambda text: text[:50],
)  # fmt: skip
def test_damage_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="damaged"):
        AuditMemory.load(text)
