"""Bounds that would let nothing happen are refused, all at once."""

from __future__ import annotations

import pytest

from netfence.controlplane import Limits
from netfence.errors import InvalidError


def test_bounds_are_positive() -> None:
    with pytest.raises(InvalidError) as caught:
        Limits(decisions=0, policy_timeout_s=-1, events_per_s=float("nan"))
    assert [fault.partition(":")[0] for fault in caught.value.errors] == [
        "policy_timeout_s",
        "decisions",
        "events_per_s",
    ]
    assert Limits(forget_after_s=0).forget_after_s == 0
