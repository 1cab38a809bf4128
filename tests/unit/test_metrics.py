"""The text of a page is the library's, whatever pieces it is written in; names follow Prometheus' rules; docs agree."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from netfence.metrics import FAMILIES, MAX_TARGET, PIECE, SLICE_S, Pace, Page, target_label, text_of
from netfence.tally import Durations

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


class All(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def full_page() -> Page:
    page = Page()
    durations = Durations((0.1, 1.0))
    durations.note(0.5)
    for family in FAMILIES:
        if family.kind == "histogram":
            page.add_durations(family.name, durations, 3)
            continue
        for number in range(3 * PIECE + 1 if family.labels else 1):
            page.add(family.name, number / 4, *[f"{label}-{number}" for label in family.labels])
    return page


@pytest.mark.parametrize("page", [full_page(), Page()], ids=["full", "empty"])
def test_pieces_make_the_page_that_the_library_writes(page: Page) -> None:
    assert asyncio.run(text_of(page.metrics(), Pace())) == generate_latest(All(page.metrics()))


def test_the_page_can_be_read() -> None:
    text = asyncio.run(text_of(full_page().metrics(), Pace())).decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert len(found) == len(FAMILIES)
    buckets = {
        sample.labels.get("le", sample.name[-5:]): sample.value
        for sample in found["netfence_policy_switch_duration_seconds"].samples
    }
    assert buckets == {"0.1": 3, "1.0": 4, "+Inf": 4, "count": 4, "s_sum": 0.5}


def test_labels_are_those_that_were_declared() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Page().add("netfence_packets", 1, "an-id", "pass")
    with pytest.raises(KeyError):
        Page().add("netfence_nonsense", 1)


def test_the_loop_has_its_turns_while_a_page_is_written() -> None:
    async def work() -> float:
        longest = 0.0
        done = asyncio.Event()

        async def others() -> None:
            nonlocal longest
            while not done.is_set():
                last = time.thread_time()
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - last)

        page = full_page().metrics()
        task = asyncio.create_task(others())
        await asyncio.sleep(0)
        await text_of(page, Pace())
        done.set()
        await task
        return longest

    # The best of several, and CPU time: the machine may be busy with others. In one go it would be some thirty slices.
    assert min(asyncio.run(work()) for _ in range(5)) < 5 * SLICE_S


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_names_follow_the_conventions(family: object) -> None:
    (found,) = [one for one in FAMILIES if one is family]
    assert re.fullmatch(r"netfence(_[a-z]+)+", found.name)
    assert not found.name.endswith(("_total", "_info", "_count", "_sum", "_bucket"))
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", label) for label in found.labels)
    assert ("duration" in found.name) == (found.kind == "histogram") == found.name.endswith("_seconds")
    assert found.help.endswith(".")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("veth0", "veth0"),
        ("/sys/fs/cgroup/a\nb", r"/sys/fs/cgroup/a\nb"),
        ("/sys/fs/cgroup/\udcff\x1b[2J", r"/sys/fs/cgroup/\udcff\x1b[2J"),
        ("/" + "x" * 5000, "…" + "x" * MAX_TARGET),
    ],
    ids=["interface", "line-end", "no-utf8", "long"],
)
def test_a_cgroups_name_cannot_break_the_page(name: str, label: str) -> None:
    page = Page()
    assert target_label(name) == label
    rest = ["x"] * (len(next(one for one in FAMILIES if one.name == "netfence_attachment").labels) - 2)
    page.add("netfence_attachment", 1, "an-id", target_label(name), *rest)
    text = asyncio.run(text_of(page.metrics(), Pace())).decode()
    (family,) = [one for one in text_string_to_metric_families(text) if one.name == "netfence_attachment_info"]
    assert family.samples[0].labels["target"] == label


def test_the_documentation_has_every_metric_and_no_other() -> None:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `netfence_")]
    assert rows == [family.row for family in FAMILIES]
