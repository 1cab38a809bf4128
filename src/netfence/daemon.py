"""The composition root: makes all parts, starts them in order, runs them, and stops them in reverse.

Owns the process: event loop, signals, service manager, background tasks. What the parts do is theirs: attachments are
`lifecycle`'s, taking over is `restore`'s. Filters outlive every way this process can end, but one: a clean stop of a
daemon that has started, with `enforcement.on_shutdown: detach`.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from functools import partial
from typing import Any

import structlog
import uvloop

from netfence import __version__, endpoints, log, privileges, watchdog
from netfence.api.service import serve
from netfence.api.views import (
    AttachmentInfoView,
    AttachSpec,
    ExplanationView,
    FlowVerdict,
    FlowView,
    StatusView,
    SuggestionView,
)
from netfence.config import Config, Loaded, system_upstreams
from netfence.control.credentials import load as load_secrets
from netfence.control.local import LocalControl, NoControl, load_policy_file
from netfence.control.port import ControlPort, UnsubscribeReason
from netfence.control.remote import RemoteControl
from netfence.dns.cache import SharedCache
from netfence.dns.settings import DnsSettings
from netfence.dns.upstream import Resolver
from netfence.errors import NetfenceError
from netfence.explaining import explain
from netfence.flows import Flows
from netfence.hosting import Host
from netfence.kernel import Kernel
from netfence.lifecycle import Lifecycle, Parts
from netfence.metrics_collector import Collector
from netfence.metrics_http import MetricsPlace
from netfence.notify import extend, notify, watchdog_s
from netfence.policy.modes import Mode
from netfence.policy_codec import Clock, seconds_since
from netfence.remembering import Remembering
from netfence.restore import restore
from netfence.store import Claim, Store
from netfence.suggesting import suggest
from netfence.targets import TargetKeeper, Watchers

MAINTAIN_S = 30.0  # between two sweeps of every attachment: expired entries count for nothing, they only take room
GRACE_S = 5.0  # for calls under way at a clean stop
AT_ONCE = 8  # attachments ended side by side: four wait for the kernel (see `plane.WORKERS`), others for the store
STEP_S = 30.0  # how long taking one fence off may last: what hangs is not waited for
LIST_PIECE = 200  # attachments whose counters are read in one go, some 2 ms
GC_THRESHOLD = (2_000, 20, 100)  # rules are hundreds of thousands of objects: few walks over all of them
RESTART_S = 1.0  # before background work that failed begins again
SWITCH_S = 0.001  # how long a thread at work on a large policy may keep the loop from its turn (Python's own: 5 ms)

events = structlog.get_logger(__name__)


def run(loaded: Loaded) -> int:
    """Run the daemon until SIGTERM or SIGINT; return the exit status. Raises NetfenceError when it cannot start."""
    log.set_up(loaded.config.log_level, loaded.config.log_format)
    faulthandler.enable(2)  # the service manager's watchdog ends a daemon that hangs by SIGABRT: tell where it hangs
    _raise_open_files()
    gc.set_threshold(*GC_THRESHOLD)
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_Process(loaded).main())
        except BaseExceptionGroup as group:  # of the task group: one failure is the rule
            raise _first(group) from group
    return 0


class _Process:
    """One life of the daemon."""

    def __init__(self, loaded: Loaded) -> None:
        self._config, self._told = loaded.config, loaded.told()
        self._stop = asyncio.Event()
        self._ready = False
        self._detached = False  # by a clean stop: nothing else may take pins away
        self._metrics = MetricsPlace(self._config.metrics.listen)

    async def main(self) -> None:
        """Start, run until told to stop, stop."""
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self._stop.set()
            if not self._ready and task is not None:
                task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        try:
            await self._start_and_run()
        except asyncio.CancelledError:
            if not self._stop.is_set():
                raise
            events.info("stopped_while_starting")

    async def _start_and_run(self) -> None:
        config = self._config
        control = await make_control(config)
        privileges.require(config)
        async with AsyncExitStack() as stack:
            stack.callback(self._metrics.close)
            no_metrics = await self._metrics.open()
            claim = await asyncio.to_thread(Claim, config.data_dir)
            stack.callback(claim.close)
            mode = Mode[config.enforcement.start_mode.upper()]
            leases = config.dns.max_leases_total
            plane = await Kernel.open(config.bpffs_dir, config.data_dir, mode, max_leases_total=leases)
            stack.push_async_callback(self._let_go, plane)
            # Behind the kernel: where the programs of a new version do not load, the old version can still read this.
            store = await asyncio.to_thread(Store.open, config.data_dir, claim)
            stack.push_async_callback(store.close)
            control.introduce(self._daemon_id(store), seconds_since(store.contact, Clock.now()))
            if no_metrics is not None and not (plane.pinned() or await store.load() or store.saved):
                raise no_metrics
            dns = dns_settings(config)
            resolver = Resolver(dns)
            stack.push_async_callback(resolver.close)
            watchers = Watchers()
            stack.callback(watchers.close)
            watchers.open()
            parts = Parts(
                config=config,
                plane=plane,
                store=store,
                control=control,
                endpoints=endpoints.make(config.dns.listen_addr, config.dns.port_min, config.dns.port_max),
                dns=dns,
                cache=SharedCache(config.dns.max_lease),
                resolver=resolver,
                watch=watchers,
                boot_id=Clock.now().boot_id,
            )
            lifecycle = Lifecycle(parts)
            stack.push_async_callback(end_all, lifecycle, detach=False)
            await self._run(lifecycle, TargetKeeper(lifecycle, watchers))

    async def _let_go(self, plane: Kernel) -> None:
        await plane.close(detach=self._detached)

    def _daemon_id(self, store: Store) -> str:
        return self._config.daemon_id or store.daemon_id

    async def _run(self, lifecycle: Lifecycle, keeper: TargetKeeper) -> None:
        """Take over what is there, open the API, serve until told to stop."""
        parts, config = lifecycle.parts, self._config
        host = Host(lifecycle)
        async with asyncio.TaskGroup() as group:
            await keeper.read_host_addresses()
            background = Background(group)
            outcomes = await restore(lifecycle, background.start)
            names = Remembering(lifecycle)
            await names.recall()
            flows = Flows(parts.plane, lambda: [live for live in lifecycle.every() if live.attached])
            daemon = Daemon(lifecycle, background, self._daemon_id(parts.store), flows, self._told)
            background.keep(keeper.run, "targets")
            background.keep(keeper.look_round, "hooks")
            background.keep(lambda: parts.control.run(host), "control")
            background.keep(lambda: _maintain(lifecycle, names), "maintenance")
            if config.metrics.listen is not None:
                background.keep(lambda: self._metrics.serve(Collector(lifecycle, flows).text), "metrics")
            background.keep(flows.run, "flows")
            api = await serve(daemon, config.socket, config.socket_group)
            try:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, daemon.reload)
                gc.collect()
                gc.freeze()  # what the start made stays: never walk it again
                self._ready = True
                restored = {outcome.value.replace(" ", "_"): count for outcome, count in outcomes.items()}
                events.info("ready", version=__version__, socket=str(config.socket), **restored)
                notify("READY=1", f"STATUS={_summary(lifecycle)}")
                if (limit_s := watchdog_s()) is not None:
                    background.keep(partial(_feed_watchdog, lifecycle, limit_s), "watchdog")
                await self._stop.wait()
                notify("STOPPING=1")
                kept = "removed" if config.enforcement.on_shutdown == "detach" else "kept"
                events.info("stopping", attachments=len(lifecycle), filters=kept)
            finally:
                flows.close()  # or those who watch would be waited for
                await api.close(GRACE_S)
            if config.enforcement.on_shutdown == "detach":
                await end_all(lifecycle, detach=True)  # here, while the control plane can be told
                self._detached = True
            else:
                await names.save()
            await parts.control.drain()
            background.cancel()


class Background:
    """Work beside everything else. None of it can end the daemon: filters would stay as they are, unattended."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run work once; its failure is logged."""

        async def logged() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001 - reported, and the daemon goes on
                events.exception("background_work_failed", task=name, error=str(error))

        task = self._group.create_task(logged(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def keep(self, loop: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """Run what never ends; should it fail, that is logged, and it begins again."""

        async def again() -> None:
            while True:
                try:
                    await loop()
                except Exception as error:  # noqa: BLE001 - the same
                    events.exception("background_work_failed", task=name, error=str(error), next_try_s=RESTART_S)
                await asyncio.sleep(RESTART_S)

        self.start(again(), name)

    def cancel(self) -> None:
        """Stop all of it."""
        for task in list(self._tasks):
            task.cancel()


class Daemon:
    """The daemon as its local API sees it (`api.service.DaemonPort`)."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        background: Background,
        daemon_id: str,
        flows: Flows,
        told: Mapping[str, tuple[object, str]],
    ) -> None:
        self._lifecycle, self._background, self._daemon_id = lifecycle, background, daemon_id
        self._flows, self._told = flows, told
        self._began = time.monotonic()

    async def attach(self, spec: AttachSpec) -> AttachmentInfoView:
        """Fence a target; see `Lifecycle.attach`."""
        live = await self._lifecycle.attach(spec)
        self._background.start(self._lifecycle.warn(live), f"warn {live.row.id}")
        return self._lifecycle.info(live)

    async def detach(self, attachment_id: str) -> None:
        """Take a fence off; see `Lifecycle.detach`."""
        await self._lifecycle.detach(attachment_id)

    async def list(self) -> Sequence[AttachmentInfoView]:
        """Return every attachment, oldest first."""
        found = []
        for count, live in enumerate(self._lifecycle.all()):
            found.append(self._lifecycle.info(live))
            if count % LIST_PIECE == LIST_PIECE - 1:
                await asyncio.sleep(0)
        return found

    async def status(self) -> StatusView:
        """Return what `netfenced status` shows."""
        parts = self._lifecycle.parts
        return StatusView(
            version=__version__,
            daemon_id=self._daemon_id,
            hostname=socket.gethostname(),
            control_plane_state=int(parts.control.state),
            control_plane_address=parts.control.address,
            attachment_count=len(self._lifecycle),
            uptime_s=time.monotonic() - self._began,
            kernel_release=parts.plane.kernel_release,
            features=parts.plane.features,
            config=self._told,
        )

    async def explain(self, attachment_id: str, subject: str) -> ExplanationView:
        """Tell what would happen to a name or an address; see `explaining`."""
        return await explain(self._lifecycle, attachment_id, subject)

    async def suggest(self, attachment_id: str) -> SuggestionView:
        """Make a policy of what audit mode let through; see `suggesting`."""
        return await suggest(self._lifecycle, attachment_id)

    def watch(
        self, attachment_id: str, verdicts: Collection[FlowVerdict]
    ) -> AbstractContextManager[AsyncIterable[FlowView]]:
        """Give what is decided from now on; see `Flows.watch`."""
        return self._flows.watch(attachment_id, verdicts)

    def reload(self) -> None:
        """Read the files again that decide policies (SIGHUP)."""
        self._background.start(self._lifecycle.parts.control.reload(), "reload")


async def _feed_watchdog(lifecycle: Lifecycle, limit_s: float) -> None:
    """Ping while the store's thread and the data plane's workers answer; the questions change nothing."""
    parts = lifecycle.parts
    questions: dict[str, watchdog.Question] = {
        "store": lambda: parts.store.save_counters({}),
        "data plane": parts.plane.answer,
    }
    await watchdog.feed(questions, limit_s, lambda: _summary(lifecycle))


def _summary(lifecycle: Lifecycle) -> str:
    return f"{len(lifecycle)} attachments"


async def _maintain(lifecycle: Lifecycle, names: Remembering) -> None:
    """Keep tables free of what expired, and what is stored near what is known, until cancelled."""
    stored: dict[str, tuple[int, int]] = {}
    while True:
        await asyncio.sleep(MAINTAIN_S)
        for live in lifecycle.all():
            try:
                await live.attachment.maintain(time.monotonic())
            except Exception as error:
                live.attachment.log.exception("maintenance_failed", error=str(error))
        stored = await _store_counters(lifecycle, stored)
        await names.save()


async def _store_counters(lifecycle: Lifecycle, stored: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Store the query counters that differ from `stored`; return all of them."""
    now = {live.row.id: (live.attachment.queries_allowed, live.attachment.queries_blocked) for live in lifecycle.all()}
    changed = {name: counts for name, counts in now.items() if stored.get(name) != counts}
    try:
        if changed:
            await lifecycle.parts.store.save_counters(changed)
    except NetfenceError as error:
        events.warning("counters_not_stored", error=str(error))
    return now


async def end_all(lifecycle: Lifecycle, *, detach: bool) -> None:
    """End the DNS servers; with `detach` take the fences off too, and have the service manager wait for each."""
    await _store_counters(lifecycle, {})
    waiting = iter(lifecycle.all())

    async def end_some() -> None:
        for live in waiting:
            try:
                if detach:
                    extend(STEP_S)
                    await lifecycle.end(live, UnsubscribeReason.DETACHED)
                else:
                    await live.attachment.close()
                    await live.server.close()
            except Exception as error:
                live.attachment.log.exception("not_ended", error=str(error))

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(end_some())


async def make_control(config: Config) -> ControlPort:
    """Choose who decides: a control plane, a policy file, or nobody.

    Raises InvalidError: a bad policy file, or bad TLS files.
    """
    if config.control_plane.url:
        if config.policy_file is not None:
            events.info("policy_file_not_used", file=str(config.policy_file), why="control_plane.url is set")
        secrets = await asyncio.to_thread(load_secrets, config.control_plane)
        return RemoteControl(config.control_plane, secrets, config.metadata)
    if config.policy_file is None:
        return NoControl()
    return LocalControl(await asyncio.to_thread(load_policy_file, config.policy_file))


def dns_settings(config: Config) -> DnsSettings:
    """Return what the DNS servers need of the configuration."""
    dns = config.dns
    upstreams = dns.upstreams if dns.upstreams is not None else system_upstreams()
    if not upstreams:
        events.warning("no_upstreams", remedy="set dns.upstreams", effect="names do not resolve")
    return DnsSettings(
        upstreams=upstreams,
        timeout_s=dns.timeout,
        attempts=dns.attempts,
        reject_rcode=dns.reject_rcode,
        min_lease_s=dns.min_lease,
        lease_grace_s=dns.lease_grace,
        max_lease_s=dns.max_lease,
        allow_private=dns.allow_private_keys,
        search_domains=dns.search_domains,
        max_qps=dns.max_qps,
    )


def _raise_open_files() -> None:
    """Lift the soft limit of open files: each attachment has two sockets, a cgroup one more descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the failure a group is about: the first that is no NetfenceError (a defect), else the first."""
    known, defects = group.split(NetfenceError)
    found: BaseException = defects or known or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
