"""Which rows of a damaged database are attachments still, and which were taken off after they were written."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.test_store import ROW

from netfence import policy_codec
from netfence.dataplane.config import Fixed
from netfence.errors import PreconditionError
from netfence.kernel import Remembered
from netfence.policy.domain import DomainRule, DomainTable, RuleKind
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import DnsPolicy, Policy
from netfence.recover import GONE, Recovery, sift
from netfence.schema import Row

OLD = replace(ROW, id="old", policy="{}", attached_at=1.0)
OTHER = replace(
    OLD, id="other", slot=2, name="veth1", identity="8", dns_port=11001, boot_id="boot", policy="{}", attached_at=2.0
)


def ids(rows: list[Row]) -> list[str]:
    return [row.id for row in rows]


def test_what_shares_nothing_is_attached_again_and_counts_as_not_acknowledged() -> None:
    kept, taken_off = sift([OLD, OTHER], [])
    assert (kept, taken_off) == ([replace(OTHER, acked=False), replace(OLD, acked=False)], [])


@pytest.mark.parametrize(
    "shared",
    [
        {"slot": OLD.slot},
        {"dns_port": OLD.dns_port},
        {"name": OLD.name},
        {"identity": OLD.identity},
    ],
    ids=lambda shared: next(iter(shared)),
)
def test_of_two_that_share_what_is_one_attachments_alone_the_later_counts(shared: dict[str, object]) -> None:
    later = replace(OTHER, **shared)  # type: ignore[arg-type]
    for rows in ([OLD, later], [later, OLD]):
        kept, taken_off = sift(rows, [])
        assert (ids(kept), ids(taken_off)) == (["other"], ["old"])
    kept, taken_off = sift([later], [OLD])  # but what is there counts most
    assert (ids(kept), ids(taken_off)) == ([], ["other"])


def test_an_attach_that_was_never_finished_counts_less_than_a_finished_one() -> None:
    kept, taken_off = sift([OLD, replace(OTHER, slot=OLD.slot, policy=None)], [])
    assert (ids(kept), ids(taken_off)) == (["old"], ["other"])


def test_an_index_means_nothing_in_another_boot_and_what_is_gone_is_no_target() -> None:
    kept, _ = sift([OLD, replace(OTHER, identity=OLD.identity, boot_id="earlier")], [])
    assert len(kept) == 2
    gone = replace(OLD, name=GONE, identity="0")
    kept, _ = sift([replace(OTHER, name=GONE, identity="0")], [gone])
    assert len(kept) == 1


def recovered(saved: Row | None, *names: str) -> Row:
    """Make the row of what is pinned as "old", an interface that is gone."""
    fixed = Fixed("old", bytes((127, 0, 0, 1)), 11000, False, False)
    found = Remembered(1, fixed, 0, False, "tcx", 5.0, Policy(mode=Mode.ALLOWLIST, dns=DnsPolicy(DnsMode.ALLOWLIST)))

    async def remembered() -> dict[str, Remembered]:
        return {"old": found}

    plane: Any = SimpleNamespace(remembered=remembered)
    saved_rows = {"old": saved} if saved is not None else {}
    (row,) = asyncio.run(Recovery(plane, "boot").rows(names or ["old"], saved_rows))
    return row


def test_names_and_version_come_from_the_saved_row_where_its_policy_can_be_read() -> None:
    """One that cannot is of no version: whoever gives policies would take it for the one it gave, names and all."""
    rules = DomainTable.build([DomainRule("good.test", RuleKind.EXACT, allow=True)], expected=1)
    policy = Policy(mode=Mode.DENYLIST, dns=DnsPolicy(DnsMode.ALLOWLIST, domains=rules))
    text = policy_codec.encode(policy, policy_codec.Clock.now())
    saved = replace(OLD, policy=text, policy_version="v7", metadata={"tenant": "a"})
    for row, version, names in (
        (recovered(saved), "v7", 1),
        (recovered(replace(saved, policy="{damaged")), "", 0),
        (recovered(None), "", 0),
    ):
        told = policy_codec.decode(row.policy or "", policy_codec.Clock.now())
        assert (row.policy_version, len(told.dns.domains), told.mode) == (version, names, Mode.ALLOWLIST)
        assert (row.acked, row.slot, row.mechanism) == (False, 1, "tcx")
    assert recovered(saved).metadata == {"tenant": "a"}


def test_what_is_pinned_and_not_known_to_the_kernel_either_is_refused() -> None:
    with pytest.raises(PreconditionError, match="stranger is one"):
        recovered(None, "old", "stranger")
