"""`netfenced controlplane`: a policy file for a fleet, served by the kit, with a page that shows how it goes.

Owns the process: its signals, when the file is read again, what is shown. `cli` reads the options. What is shown goes
through a thread of its own, because a terminal that is stopped or a pipe that nobody reads must not stop the daemons'
policies.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import io
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import structlog
import uvloop

from netfence import log as logs
from netfence.control.filewatch import FileWatch
from netfence.controlplane import status
from netfence.controlplane.filepolicies import FilePolicies
from netfence.controlplane.plane import ControlPlane, raise_open_files
from netfence.controlplane.tls import ServerTls
from netfence.controlplane.tokens import token_file

SHOW_S: Final = 1.0
"""Least time between two documents or pages."""

LOG_LINES: Final = 6
"""Lines of the log below the page."""

END_S: Final = 1.0
"""How long the last document or page has when we end."""

UPDATE_S: Final = 60.0
"""How long the daemons' results to a new file are waited for, before the log tells what is there."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    policy: Path
    listen: str
    tls: ServerTls | None = None
    token_file: Path | None = None
    insecure: bool = False
    as_json: bool = False


def run(options: Options) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status. Raises NetfenceError when it cannot start."""
    screen: Screen | None = None
    stream = None
    if options.as_json:
        screen = JsonLines()
    elif sys.stdout.isatty():
        tail = LogTail()
        stream = tail if sys.stderr.isatty() else None  # in a file it is wanted whole
        screen = Page(tail)
    logs.set_up("info", "console" if stream is not None else "auto", stream)
    raise_open_files()
    return uvloop.run(_Process(options, screen).main())


class _Process:
    """One life of the command."""

    def __init__(self, options: Options, screen: Screen | None) -> None:
        self._options = options
        self._screen = screen
        self._reload = asyncio.Event()
        self._retry_refused = False
        self._stop = asyncio.Event()

    async def main(self) -> int:
        """Start, serve until told to stop, stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        options = self._options
        watch = FileWatch(options.policy)  # before the first reading, so that no change is missed
        try:
            policies = await asyncio.to_thread(FilePolicies, options.policy)
            tokens = None if options.token_file is None else token_file(options.token_file)
            plane = ControlPlane(policies.policy_for)
            async with plane.serving(options.listen, tls=options.tls, tokens=tokens, insecure=options.insecure):
                with self._showing(plane, policies) as show:
                    await self._work(plane, policies, watch, show)
        finally:
            watch.close()
        return 0

    async def _work(
        self, plane: ControlPlane, policies: FilePolicies, watch: FileWatch, show: Callable[[], None]
    ) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._watch(watch), name="watch the policy file"),
                group.create_task(self._follow(plane, policies, group), name="follow the policy file"),
                group.create_task(self._show(plane, policies, show), name="show"),
            ]
            await self._stop.wait()
            for task in tasks:
                task.cancel()

    def _hang_up(self) -> None:
        self._retry_refused = True
        self._reload.set()

    async def _watch(self, watch: FileWatch) -> None:
        while True:
            await watch.changed()
            self._reload.set()

    async def _follow(self, plane: ControlPlane, policies: FilePolicies, group: asyncio.TaskGroup) -> None:
        """Read the file again whenever it changed, and bring the daemons up to date; a newer file does not wait."""
        telling: asyncio.Task[None] | None = None
        try:
            while True:
                await self._reload.wait()
                self._reload.clear()
                if not policies.take(await asyncio.to_thread(policies.read)):
                    continue
                if telling is not None:
                    telling.cancel()
                telling = group.create_task(self._tell(plane, policies), name="tell of the update")
        finally:
            if telling is not None:
                telling.cancel()

    async def _tell(self, plane: ControlPlane, policies: FilePolicies) -> None:
        log.info("policy_file_loaded", file=str(policies.path), rules=policies.rules)
        retry_refused, self._retry_refused = self._retry_refused, False
        results = await plane.update(timeout_s=UPDATE_S, retry_refused=retry_refused)
        log.info("policies_updated", results=str(results))

    async def _show(self, plane: ControlPlane, policies: FilePolicies, show: Callable[[], None]) -> None:
        """Show what has changed, at most once in `SHOW_S`."""
        shown: object = None
        while True:
            state = (plane.changes, policies.errors, policies.rules)
            if state != shown:
                show()
                shown = state
            await asyncio.sleep(SHOW_S)

    @contextlib.contextmanager
    def _showing(self, plane: ControlPlane, policies: FilePolicies) -> Iterator[Callable[[], None]]:
        """Give a function that shows the present state; at the end the last one is shown, within `END_S`."""
        if self._screen is None:
            yield lambda: None
            return
        showing = Showing(self._screen)

        def show() -> None:
            showing.offer(
                status.Snapshot(
                    time.time(),
                    plane.address,
                    str(policies.path),
                    policies.rules,
                    policies.errors,
                    plane.daemons,
                    plane.attachments,
                )
            )

        try:
            yield show
        finally:
            showing.end()


class Screen(Protocol):
    """Where snapshots are shown; used by one thread."""

    def begin(self) -> None:
        """Take the terminal."""
        ...

    def show(self, snapshot: status.Snapshot) -> None:
        """Show one."""
        ...

    def end(self) -> None:
        """Give it back."""
        ...


class Showing:
    """The thread that shows: the newest snapshot, when the one before is out. It never holds up whoever offers."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._snapshots: queue.SimpleQueue[status.Snapshot | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="show", daemon=True)  # it may be stuck when we end
        self._thread.start()

    def offer(self, snapshot: status.Snapshot) -> None:
        """Show a snapshot in place of one that still waits."""
        with contextlib.suppress(queue.Empty):
            self._snapshots.get_nowait()
        self._snapshots.put(snapshot)

    def end(self) -> None:
        """Show what waits and give the terminal back, if it takes no longer than `END_S`."""
        self._snapshots.put(None)
        self._thread.join(END_S)

    def _run(self) -> None:
        try:
            self._screen.begin()
            try:
                while (snapshot := self._snapshots.get()) is not None:
                    self._screen.show(snapshot)
            finally:
                self._screen.end()
        except Exception as error:  # noqa: BLE001 - nobody reads any more, or not what we write
            log.warning("status_not_shown", error=str(error), effect="policies are served all the same")


class JsonLines:
    """One JSON document a line on stdout."""

    def begin(self) -> None:
        """Do nothing."""

    def show(self, snapshot: status.Snapshot) -> None:
        """Write a line, all of it, past Python's buffer."""
        data = status.line(snapshot).encode(errors="replace")
        while data:
            data = data[os.write(sys.stdout.fileno(), data) :]

    def end(self) -> None:
        """Do nothing."""


class LogTail(io.StringIO):
    """Keeps the last lines of the log, for the page."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: collections.deque[str] = collections.deque(maxlen=LOG_LINES)

    def write(self, text: str) -> int:
        """Take whole lines, which is what structlog writes."""
        self.lines.extend(text.splitlines())
        return len(text)


class Page:
    """A page on the terminal."""

    def __init__(self, tail: LogTail) -> None:
        from rich.live import Live  # noqa: PLC0415 - rich takes 60 ms to import

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # its encoding may lack our lines and the daemons' names
        self._tail = tail
        self._live = Live(screen=True, auto_refresh=False)

    def begin(self) -> None:
        """Turn to the terminal's other screen."""
        self._live.start()

    def show(self, snapshot: status.Snapshot) -> None:
        """Draw the page."""
        lines: Sequence[str] = tuple(self._tail.lines)
        self._live.update(status.page(snapshot, lines, self._live.console.height), refresh=True)

    def end(self) -> None:
        """Turn back."""
        self._live.stop()
