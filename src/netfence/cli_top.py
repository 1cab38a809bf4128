"""`netfenced top`: a page on the terminal that shows where packets and queries go, or one table, or JSON.

Owns the rhythm and the terminal: whatever ends it, the terminal is given back. What is shown is `api.top`'s.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from netfence.command import connected, examples, finite, show_json, show_rows, until_interrupted

if TYPE_CHECKING:
    from netfence.api.client import DaemonClient, FlowStream
    from netfence.api.top import Snapshot, Tally

DROPS: Final = ("drop", "would_drop")

END_S: Final = 2.0
"""How long the thread that reads events has to end."""

Show = Callable[["Snapshot"], None]


@click.command(
    epilog=examples(
        """
netfenced top
netfenced top --interval 5
netfenced top --once
netfenced top --once --json | jq '.destinations[0]'
"""
    )
)
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.2, 3600),
    callback=finite,
    metavar="S",
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Look for one interval, print, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one document with --once, else one a line.")
def top(interval_s: float, *, once: bool, as_json: bool) -> int:
    """Show rates of all attachments, and the top dropped destinations and names.

    Destinations and names are counted since it began, of the drops that the daemon tells of; rates are of all packets
    and queries. Ends with Ctrl-C.
    """
    if not (once or as_json or sys.stdout.isatty()):
        raise click.UsageError("standard output is no terminal; use --once or --json", click.get_current_context())
    with until_interrupted(), _terminated_alike(), connected() as daemon, daemon.watch("", DROPS) as stream:
        if as_json:
            _run(daemon, stream, interval_s, _json if once else _json_line, once=once)
        elif once:
            _run(daemon, stream, interval_s, _print, once=True)
        else:
            with _screen() as show:
                _run(daemon, stream, interval_s, show, once=False)
    return 0


class Reader:
    """The thread that counts what the stream tells. `over` is set when the stream ended, by `failure` or not."""

    def __init__(self, stream: FlowStream, tally: Tally) -> None:
        self.over = threading.Event()
        self.failure: Exception | None = None
        self._stream, self._tally = stream, tally
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End stream and thread."""
        self._stream.end()
        self._thread.join(END_S)

    def _run(self) -> None:
        try:
            for event in self._stream:
                self._tally.add(event)
        except Exception as error:  # noqa: BLE001 - raised where the interval is waited for
            self.failure = error
        finally:
            self.over.set()


def _run(daemon: DaemonClient, stream: FlowStream, interval_s: float, show: Show, *, once: bool) -> None:
    """Look at the daemon every so often and show what was seen, until interrupted or the daemon goes away."""
    from netfence.api.top import LISTED, Meter, Snapshot, Tally  # noqa: PLC0415

    tally, meter = Tally(), Meter()
    reader = Reader(stream, tally)
    try:
        last = time.monotonic()
        meter.read(daemon.list_all(), last)
        while True:
            if reader.over.wait(interval_s):
                if reader.failure is not None:
                    raise reader.failure
                return
            now = time.monotonic()
            rates = meter.read(daemon.list_all(), now)
            show(Snapshot(time.time(), now - last, rates, *tally.most(LISTED)))
            last = now
            if once:
                return
    finally:
        reader.end()


@contextmanager
def _screen() -> Iterator[Show]:
    """Take the terminal's other screen, and give it back."""
    from rich.live import Live  # noqa: PLC0415 - rich takes 60 ms to import

    from netfence.api.top import page  # noqa: PLC0415

    with Live(screen=True, auto_refresh=False) as live:
        yield lambda snapshot: live.update(page(snapshot, live.console.height), refresh=True)


@contextmanager
def _terminated_alike() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end us as Ctrl-C does: the terminal has to be given back."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(snapshot: Snapshot) -> None:
    from netfence.api.top import headline, tables  # noqa: PLC0415

    click.echo(headline(snapshot))
    for head, rows in tables(snapshot):
        if rows:
            click.echo()
            show_rows(rows, head)


def _json(snapshot: Snapshot) -> None:
    from netfence.api.top import document  # noqa: PLC0415

    show_json(document(snapshot))


def _json_line(snapshot: Snapshot) -> None:
    from netfence.api.top import document  # noqa: PLC0415

    click.echo(json.dumps(document(snapshot)))
