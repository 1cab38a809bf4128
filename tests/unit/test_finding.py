"""Who was meant, where exactly one can have been."""

from __future__ import annotations

import socket

import pytest

from netfence.finding import interface_hint, unknown

FIRST, SECOND = "6f1c2a9e-1b2c-4d3e-8f90-a1b2c3d4e5f6", "6f99d0aa-7a7a-4b4b-9c9c-0d0d0d0d0d0d"
KNOWN = [(FIRST, "veth0"), (SECOND, "/sys/fs/cgroup/box")]


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("6f1c", FIRST),
        ("veth0", FIRST),
        ("/sys/fs/cgroup/box", SECOND),
        (SECOND[:-1] + "e", SECOND),
        (FIRST.upper().lower()[1:], FIRST),
    ],
)
def test_a_near_miss_is_told(wanted: str, meant: str) -> None:
    assert (
        str(unknown("why", wanted, KNOWN))
        == f"why: no attachment {wanted}; did you mean {meant} ({dict(KNOWN)[meant]})?"
    )


@pytest.mark.parametrize("wanted", ["6f", "nobody", "", "veth1"])
def test_nobody_is_told_where_several_or_none_can_be_meant(wanted: str) -> None:
    assert str(unknown("why", wanted, KNOWN)) == f"why: no attachment {wanted}; see `netfenced list`"


def test_a_long_id_is_cut() -> None:
    message = str(unknown("why", "x" * 100_000, KNOWN))
    assert len(message) < 200
    assert "100000 characters" in message


@pytest.mark.parametrize(
    ("wanted", "says"),
    [("vet0", "did you mean 'veth0'?"), ("tap7x", "see `ip link`"), ("nothing", "see `ip link`")],
    ids=["one", "several", "none"],
)
def test_an_interface_is_told_where_only_one_can_be_meant(
    wanted: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["lo", "veth0", "tap70", "tap71"]
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(names, 1)))
    assert interface_hint(wanted) == says
