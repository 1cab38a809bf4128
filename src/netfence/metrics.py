"""The metrics by name, and their text: which series there are, and how a page of them is written out.

Every family is declared in `FAMILIES` once; docs/reference/metrics.md tells the same (a test compares them). Values
come from `metrics_collector`, the page goes out by `metrics_http`.

**Label values are bounded**: ids of attachments there are at this moment (at most `MAX_ATTACHMENTS`), words of our own,
and the configured upstreams. No name that was asked for, no address of a packet, no metadata and no version of a policy
is a label value. The name of a target is one, in `netfence_attachment_info` alone.

A page of a thousand attachments takes a tenth of a second to make, on the event loop, which answers DNS too: so it is
made in slices of `SLICE_S`, between which the loop serves everybody else. In a thread it would be worse: each of the
loop's own system calls would have to win the interpreter back. OpenMetrics is not offered: the same content takes the
library twice as long to write.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import Final, Literal, NamedTuple

from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from netfence.tally import Durations
from netfence.text import printable

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

SLICE_S: Final = 0.001
"""How long a page is worked on before the loop has its turn."""

PIECE: Final = 100
"""Samples written out in one go, half a millisecond."""

MAX_TARGET: Final = 256
"""Characters of a target's name that are told, the last ones; a cgroup's path may have 4096."""

Kind = Literal["counter", "gauge", "histogram", "info"]


class Family(NamedTuple):
    """A metric: its name as Prometheus knows it, without `_total`, `_info`, `_bucket`, `_sum` and `_count`."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str

    @property
    def exposed(self) -> str:
        """Return its name with the suffix that it has on the page."""
        return self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")

    @property
    def row(self) -> str:
        """Return its row of the table in docs/reference/metrics.md."""
        labels = ", ".join(f"`{label}`" for label in self.labels)
        return f"| `{self.exposed}` | {self.kind} | {labels} | {self.help} |"


_BY_VERDICT: Final = ("attachment", "verdict", "reason")

FAMILIES: Final = (
    Family("netfence_build", "info", ("version", "build"), "Version of netfenced, and build id of its BPF programs."),
    Family("netfence_kernel", "info", ("release", "tc"), "Release of the kernel, and how TC filters hang on it."),
    Family("netfence_kernel_feature", "gauge", ("feature",), "Whether kernel and process have a feature (1) or not."),
    Family("netfence_attachments", "gauge", (), "Attachments in force."),
    Family("netfence_attachments_limit", "gauge", (), "Attachments that one daemon can have."),
    Family("netfence_attaches", "counter", ("result",), "Attaches asked for, by outcome: ok, or the kind of error."),
    Family(
        "netfence_attachment",
        "info",
        ("attachment", "target", "kind", "hook", "mechanism", "direction", "mode", "dns_mode", "audit"),
        "What an attachment fences and how; join on attachment.",
    ),
    Family("netfence_packets", "counter", _BY_VERDICT, "Packets since the attach, counted by the kernel."),
    Family("netfence_bytes", "counter", _BY_VERDICT, "Bytes of these packets."),
    Family("netfence_rules", "gauge", ("attachment", "kind"), "Rules of the policy in force: ipv4, ipv6, domain."),
    Family("netfence_leases", "gauge", ("attachment",), "Addresses that DNS answers have opened."),
    Family("netfence_leases_limit", "gauge", (), "Leases that one attachment may have (dns.max_leases)."),
    Family("netfence_lease_table_used", "gauge", (), "Leases of all attachments."),
    Family("netfence_lease_table_limit", "gauge", (), "Leases that all attachments may have (dns.max_leases_total)."),
    Family(
        "netfence_lease_refusals",
        "counter",
        ("attachment",),
        "Answers withheld because their addresses could not be opened: a table was full.",
    ),
    Family(
        "netfence_inbound_not_noted",
        "counter",
        ("attachment",),
        "SYNs from outside that were not noted for want of room; answers to them are dropped.",
    ),
    Family(
        "netfence_audit_not_remembered",
        "counter",
        ("attachment", "kind"),
        "What suggest lacks for want of room: packets to more destinations, and names.",
    ),
    Family("netfence_watch_streams", "gauge", (), "Streams of watch and top that are open."),
    Family("netfence_watch_streams_limit", "gauge", (), "Streams that may be open at once."),
    Family("netfence_watch_refusals", "counter", (), "Streams refused because as many as may be were open."),
    Family("netfence_hooks_put_back", "counter", (), "Hooks that somebody took away and netfenced put back."),
    Family("netfence_programs_in_front", "gauge", ("attachment",), "Foreign programs that see packets before us."),
    Family("netfence_policy_commands", "counter", ("result",), "Commands to policies: ok, or the kind of error."),
    Family("netfence_policy_switch_duration_seconds", "histogram", (), "Time to compile and switch a policy."),
    Family("netfence_dns_queries", "counter", ("attachment", "decision"), "DNS queries: allowed or blocked."),
    Family(
        "netfence_dns_would_block",
        "counter",
        ("attachment",),
        "DNS queries that only audit mode answered; also allowed.",
    ),
    Family("netfence_dns_replies", "counter", ("attachment", "rcode"), "DNS replies by rcode."),
    Family("netfence_dns_query_duration_seconds", "histogram", (), "Time from reading a query to sending its reply."),
    Family(
        "netfence_dns_cache_lookups",
        "counter",
        ("attachment", "result"),
        "Queries met by a ready-made reply, the cache, or neither.",
    ),
    Family("netfence_dns_cache_entries", "gauge", (), "Answers in the shared cache."),
    Family("netfence_dns_cache_limit", "gauge", (), "Answers that the shared cache can hold."),
    Family(
        "netfence_dns_over_limit",
        "counter",
        ("limit",),
        "DNS queries and connections refused because there were too many.",
    ),
    Family("netfence_dns_upstream_queries", "counter", ("upstream",), "Questions sent to upstreams, retries included."),
    Family("netfence_dns_upstream_failures", "counter", ("upstream", "reason"), "Questions without a useful answer."),
    Family("netfence_control_plane_state", "gauge", ("state",), "1 for the state it is in: connected, and so on."),
    Family("netfence_control_plane_stale", "gauge", (), "1 while everything is blocked because it is away too long."),
    Family("netfence_control_plane_connects", "counter", (), "Streams that the control plane acknowledged."),
    Family("netfence_control_plane_losses", "counter", (), "Acknowledged streams that were lost."),
    Family("netfence_control_plane_connect_failures", "counter", (), "Tries that came to no acknowledged stream."),
    Family(
        "netfence_control_plane_commands", "counter", ("kind", "result"), "Commands received, and what came of them."
    ),
    Family(
        "netfence_control_plane_command_duration_seconds",
        "histogram",
        (),
        "Time from a command's arrival to its result.",
    ),
    Family("netfence_control_plane_events_waiting", "gauge", (), "Events that wait to be told to the control plane."),
)


class Page:
    """The samples of one scrape, by family, in the order of `FAMILIES`; families without a sample are told too."""

    def __init__(self) -> None:
        self._made = {one.name: Metric(one.name, one.help, one.kind) for one in FAMILIES}
        self._heads = {one.name: (one.exposed, one.labels, self._made[one.name].samples) for one in FAMILIES}

    def add(self, name: str, value: float, *labels: str) -> None:
        """Add one sample of a counter, gauge or info to the family `name`; `labels` in the order declared."""
        exposed, names, samples = self._heads[name]
        samples.append(Sample(exposed, dict(zip(names, labels, strict=True)), value))

    def add_durations(self, name: str, durations: Durations, at_once: int = 0) -> None:
        """Add a histogram; `at_once` more took next to nothing."""
        samples = self._made[name].samples
        count = 0
        for bound, count in durations.cumulative(at_once):
            samples.append(Sample(f"{name}_bucket", {"le": bound}, count))
        samples.append(Sample(f"{name}_count", {}, count))
        samples.append(Sample(f"{name}_sum", {}, durations.sum_s))

    def metrics(self) -> list[Metric]:
        """Return all of it."""
        return list(self._made.values())


class Pace:
    """Gives the loop its turn whenever a slice is over."""

    def __init__(self) -> None:
        self._until = time.monotonic() + SLICE_S

    async def turn(self) -> None:
        """Let the loop serve others if the slice is over."""
        if time.monotonic() > self._until:
            await asyncio.sleep(0)
            self._until = time.monotonic() + SLICE_S


async def text_of(metrics: Iterable[Metric], pace: Pace) -> bytes:
    """Write metrics out in the text format, version 0.0.4."""
    parts = []
    for metric in metrics:
        for start in range(0, len(metric.samples) or 1, PIECE):
            parts.append(_piece(metric, start))
            await pace.turn()
    return b"".join(parts)


def target_label(name: str) -> str:
    """Return a target's name as a label value: a cgroup's may have any octets in it."""
    text = printable(name)
    return text if len(text) <= MAX_TARGET else f"…{text[-MAX_TARGET:]}"


class _One(Collector):
    """A collector of one metric, for the library's writer."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def _piece(metric: Metric, start: int) -> bytes:
    """Write some samples of a family; HELP and TYPE, a line each, stand before the first of them alone."""
    if len(metric.samples) <= PIECE:
        return generate_latest(_One(metric))
    part = Metric(metric.name, metric.documentation, metric.type)
    part.samples = metric.samples[start : start + PIECE]
    text = generate_latest(_One(part))
    return text.split(b"\n", 2)[2] if start else text
