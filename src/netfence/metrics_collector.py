"""What every part of the daemon has counted, read at the moment of a scrape and put on a page.

Packet counters are the kernel's and go on over restarts of the daemon; all others begin with it. A page is kept for a
multiple of the time it took to make: whoever asks again and again gets the last one, and the daemon keeps its time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Final

from prometheus_client import ProcessCollector

from netfence import __version__
from netfence.control.port import ConnectionState, ControlPort
from netfence.control.remote import RemoteControl
from netfence.dns.limits import MAX_CACHE_ENTRIES
from netfence.flows import MAX_WATCHERS, Flows
from netfence.lifecycle import Lifecycle, Live
from netfence.metrics import Pace, Page, target_label, text_of
from netfence.policy.limits import MAX_ATTACHMENTS
from netfence.policy.modes import Reason, is_drop
from netfence.tasks import finish

KEEP: Final = 4
"""For this many times as long as it took to make, a page is handed out again: scrapes have a fifth of our time."""

_REASONS: Final = tuple((int(reason), "drop" if is_drop(reason) else "pass", reason.name.lower()) for reason in Reason)


class Collector:
    """See the module. Use it only on the event loop."""

    def __init__(self, lifecycle: Lifecycle, flows: Flows) -> None:
        self._lifecycle, self._flows = lifecycle, flows
        self._process = ProcessCollector(registry=None)
        self._one = asyncio.Lock()
        self._text = b""
        self._keep_until = float("-inf")

    async def text(self) -> bytes:
        """Return the page, made now or a moment ago."""
        async with self._one:
            if time.monotonic() >= self._keep_until:
                await finish(self._renew(), "metrics page")  # work done counts, whoever went away
            return self._text

    async def _renew(self) -> None:
        began = time.monotonic()
        self._text = await self._make()
        ended = time.monotonic()
        self._keep_until = ended + KEEP * (ended - began)

    async def _make(self) -> bytes:
        page, pace, lifecycle = Page(), Pace(), self._lifecycle
        for live in lifecycle.all():
            if live.ended:  # meanwhile: its slot may be another's
                continue
            self._add_attachment(page, live)
            await pace.turn()
        self._add_daemon(page)
        self._add_dns(page)
        _add_control(page, lifecycle.parts.control)
        return await text_of([*page.metrics(), *self._process.collect()], pace)

    def _add_attachment(self, page: Page, live: Live) -> None:
        attachment, row, add = live.attachment, live.row, page.add
        policy, one = attachment.policy, row.id
        modes = policy.mode.name.lower(), policy.dns.mode.name.lower(), str(policy.audit).lower()
        target = target_label(row.name)
        add("netfence_attachment", 1, one, target, row.kind, row.hook, row.mechanism, row.direction, *modes)
        self._add_packets(page, one, row.slot)
        for kind, count in _rules(live):
            if count:
                add("netfence_rules", count, one, kind)
        add("netfence_leases", attachment.leases, one)
        add("netfence_lease_refusals", attachment.refused_leases, one)
        if live.in_front:
            add("netfence_programs_in_front", len(live.in_front), one)
        _add_queries(page, live)
        plane = self._lifecycle.parts.plane
        if missed := plane.inbound_missed(row.slot):
            add("netfence_inbound_not_noted", missed, one)
        missed = plane.seen_missed(row.slot)
        for kind, count in (("packets", missed), ("names", attachment.audited.forgotten)):
            if count:
                add("netfence_audit_not_remembered", count, one, kind)

    def _add_packets(self, page: Page, one: str, slot: int) -> None:
        counters, add = self._lifecycle.parts.plane.counters(slot), page.add
        for reason, verdict, word in _REASONS:
            if counters.packets[reason]:
                add("netfence_packets", counters.packets[reason], one, verdict, word)
                add("netfence_bytes", counters.bytes[reason], one, verdict, word)
            if counters.would_packets[reason]:
                add("netfence_packets", counters.would_packets[reason], one, "would_drop", word)
                add("netfence_bytes", counters.would_bytes[reason], one, "would_drop", word)

    def _add_daemon(self, page: Page) -> None:
        lifecycle, add = self._lifecycle, page.add
        plane, tally, dns = lifecycle.parts.plane, lifecycle.tally, lifecycle.parts.config.dns
        add("netfence_build", 1, __version__, plane.build)
        add("netfence_kernel", 1, plane.kernel_release, plane.tc_mechanism)
        for feature, told in plane.features.items():
            if told.partition(":")[0] in ("yes", "no"):  # the others tell a number or a name
                add("netfence_kernel_feature", told == "yes", feature)
        add("netfence_attachments", len(lifecycle))
        add("netfence_attachments_limit", MAX_ATTACHMENTS)
        add("netfence_leases_limit", dns.max_leases)
        add("netfence_lease_table_used", len(lifecycle.table))
        add("netfence_lease_table_limit", dns.max_leases_total)
        add("netfence_watch_streams", len(self._flows))
        add("netfence_watch_streams_limit", MAX_WATCHERS)
        add("netfence_watch_refusals", self._flows.refused)
        add("netfence_hooks_put_back", tally.hooks_put_back)
        for name, counts in {"netfence_attaches": tally.attaches, "netfence_policy_commands": tally.commands}.items():
            for result, count in counts.items():
                add(name, count, result)
        page.add_durations("netfence_policy_switch_duration_seconds", tally.switches)

    def _add_dns(self, page: Page) -> None:
        totals, cache, add = self._lifecycle.dns_totals, self._lifecycle.parts.cache, page.add
        upstreams = self._lifecycle.parts.resolver.counts
        page.add_durations("netfence_dns_query_duration_seconds", totals.durations, totals.ready)
        add("netfence_dns_cache_entries", len(cache))
        add("netfence_dns_cache_limit", MAX_CACHE_ENTRIES)
        over = {
            "max_qps": totals.over_rate,
            "waiting": totals.over_waiting,
            "connections": totals.over_connections,
            "upstream": upstreams.refused,
        }
        for limit, count in over.items():
            add("netfence_dns_over_limit", count, limit)
        for upstream, count in upstreams.asked.items():
            add("netfence_dns_upstream_queries", count, upstream)
        for (upstream, reason), count in upstreams.failed.items():
            add("netfence_dns_upstream_failures", count, upstream, reason)


def _rules(live: Live) -> Iterator[tuple[str, int]]:
    policy = live.attachment.policy
    yield "ipv4", policy.cidrs.size_of(4)
    yield "ipv6", policy.cidrs.size_of(16)
    yield "domain", len(policy.dns.domains)


def _add_queries(page: Page, live: Live) -> None:
    attachment, one, add = live.attachment, live.row.id, page.add
    for decision, count in zip(("allowed", "blocked"), attachment.queries, strict=True):
        add("netfence_dns_queries", count, one, decision)
    if attachment.audited_names:
        add("netfence_dns_would_block", attachment.audited_names, one)
    for rcode, count in live.server.counts.replies().items():
        add("netfence_dns_replies", count, one, rcode)
    for result, count in live.server.counts.lookups().items():
        if count:
            add("netfence_dns_cache_lookups", count, one, result)


def _add_control(page: Page, control: ControlPort) -> None:
    add = page.add
    for state in ConnectionState:
        add("netfence_control_plane_state", control.state == state, state.name.lower())
    add("netfence_control_plane_stale", control.stale)
    if not isinstance(control, RemoteControl):  # a policy file, or nobody: there is no stream
        return
    add("netfence_control_plane_connects", control.connects)
    add("netfence_control_plane_losses", control.losses)
    add("netfence_control_plane_connect_failures", control.failures)
    for (kind, result), count in control.counts.by_kind.items():
        add("netfence_control_plane_commands", count, kind, result)
    page.add_durations("netfence_control_plane_command_duration_seconds", control.counts.durations)
    add("netfence_control_plane_events_waiting", control.events_waiting)
