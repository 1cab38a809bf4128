"""A client of `Watch` that keeps what it is told, for the tests of a daemon that is watched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from harness.daemon import Netfenced
from harness.deadline import wait_for
from netfence.api.client import DaemonClient
from netfence.v1 import daemon_pb2


class Watching:
    """A stream of decisions that a thread reads; a context manager. The daemon watches when the block begins."""

    def __init__(self, daemon: Netfenced, attachment_id: str = "", verdicts: Sequence[str] = ()) -> None:
        self._client = DaemonClient(daemon.socket)
        self._stream = self._client.watch(attachment_id, verdicts)
        self._thread = threading.Thread(target=self._read, name="watching", daemon=True)
        self.told: list[daemon_pb2.FlowEvent] = []
        self.failure: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.end()
        self._thread.join()
        self._client.__exit__(kind, error, trace)

    def _read(self) -> None:
        try:
            for event in self._stream:
                self.told.append(event)
        except Exception as error:  # noqa: BLE001 - for the test to look at
            self.failure = error

    @property
    def over(self) -> bool:
        """Tell whether the stream ended."""
        return not self._thread.is_alive()

    def ended(self) -> Exception | None:
        """Wait for the stream to end by itself; return what it ended with."""
        wait_for(lambda: self.over, "the stream to end")
        return self.failure

    def of(self, wanted: Callable[[daemon_pb2.FlowEvent], bool], count: int = 1) -> list[daemon_pb2.FlowEvent]:
        """Wait for so many events of a kind and return all that came."""
        wait_for(lambda: sum(map(wanted, self.told)) >= count, f"{count} such events")
        return [event for event in self.told if wanted(event)]
