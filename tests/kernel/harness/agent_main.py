"""The program inside: opens and drives sockets as it is told, one JSON line per request and per answer.

Run by `agent.Agent` with Python's standard library alone, so that it starts in milliseconds. It pins itself to one CPU
(argument 1): packets it sends stay in order with those the test sends from the same CPU (see wire.py).
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]


class Sockets:
    """The sockets this process has, by number; each public method is one request."""

    def __init__(self) -> None:
        self.open: dict[int, socket.socket] = {}

    def _add(self, sock: socket.socket) -> int:
        self.open[sock.fileno()] = sock
        return sock.fileno()

    def socket(self, family: int, kind: int, protocol: int) -> Answer:
        """Make a socket."""
        return {"handle": self._add(socket.socket(family, kind, protocol))}

    def setsockopt(self, handle: int, level: int, option: int, value: Any) -> Answer:
        """Set an option to a number, or to bytes given in base64."""
        self.open[handle].setsockopt(level, option, base64.b64decode(value) if isinstance(value, str) else value)
        return {}

    def bind(self, handle: int, address: list[Any]) -> Answer:
        """Bind."""
        self.open[handle].bind(tuple(address))
        return {}

    def listen(self, handle: int) -> Answer:
        """Listen."""
        self.open[handle].listen()
        return {}

    def accept(self, handle: int, timeout_s: float) -> Answer:
        """Accept one connection."""
        self.open[handle].settimeout(timeout_s)
        connection, address = self.open[handle].accept()
        return {"handle": self._add(connection), "address": address}

    def connect(self, handle: int, address: list[Any], timeout_s: float) -> Answer:
        """Connect."""
        self.open[handle].settimeout(timeout_s)
        self.open[handle].connect(tuple(address))
        return {}

    def send(self, handle: int, data: str, address: list[Any] | None) -> Answer:
        """Send to the connected peer, or to `address`."""
        raw = base64.b64decode(data)
        sock = self.open[handle]
        return {"sent": sock.send(raw) if address is None else sock.sendto(raw, tuple(address))}

    def receive(self, handle: int, size: int, timeout_s: float) -> Answer:
        """Receive once."""
        self.open[handle].settimeout(timeout_s)
        data, address = self.open[handle].recvfrom(size)
        return {"data": base64.b64encode(data).decode(), "address": address}

    def name(self, handle: int) -> Answer:
        """Tell the socket's own address."""
        return {"address": self.open[handle].getsockname()}

    def close(self, handle: int) -> Answer:
        """Close."""
        self.open.pop(handle).close()
        return {}


def answer(sockets: Sockets, request: dict[str, Any]) -> Answer:
    """Do one request; an OSError is an answer too."""
    method: Callable[..., Answer] = getattr(sockets, request.pop("do"))
    try:
        return method(**request)
    except TimeoutError as error:
        return {"timeout": str(error) or "timed out"}
    except OSError as error:
        return {"errno": error.errno, "error": str(error)}


def main() -> None:
    """Serve requests until standard input closes."""
    os.sched_setaffinity(0, {int(sys.argv[1])})
    sockets = Sockets()
    for line in sys.stdin:
        print(json.dumps(answer(sockets, json.loads(line)), default=repr), flush=True)


if __name__ == "__main__":
    main()
