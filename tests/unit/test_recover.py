"""Which rows of a damaged database are attachments still, and which were taken off after they were written."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.test_store import ROW

from netfence.recover import GONE, sift
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
