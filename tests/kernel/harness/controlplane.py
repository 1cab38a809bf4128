"""A control plane in a process of its own that a test scripts: raw gRPC, good and bad behaviour alike.

    with ControlPlaneProcess(topology.host) as plane:                # 127.0.0.1:50051 of the host
        with Netfenced(topology.host, tmp_path, policy=None, config=plane.config()) as daemon:
            plane.on_subscribed(commands.ack("", mode="allowlist", allow=["203.0.113.0/24"]))
            attached = daemon.attach(interface="veth0")
            plane.send(commands.deny_cidr(attached.id, "203.0.113.7", nonce="1"))
            assert plane.wait_event("command_result", nonce="1").ok

Streams are numbered from 0 in the order they were opened, over restarts too. Times are CLOCK_MONOTONIC seconds, taken
in the control plane's process. Everything seen stays in `seen`, whatever becomes of the process; a moment after it was
seen, so wait for it, or `settle` before you say that something has not come.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self, TypeVar

from google.protobuf.message import Message

from harness.netns import NetNs
from harness.spawn import spawn
from netfence.v1 import control_pb2

T = TypeVar("T")

PROGRAM = Path(__file__).with_name("controlplane_main.py")
ADDRESS = "127.0.0.1:50051"
TIMEOUT_S = 10.0
RECONNECT_S = 40.0  # the daemon's longest pause is 30 s, after streams that were short
HANG = "HANG"
SYNC_ACK = control_pb2.ControlCommand(sync_ack=control_pb2.SyncAck())

Command = control_pb2.ControlCommand
DnsDecision = control_pb2.DnsQueryResponse | str  # a response, the name of a status code, or HANG


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Files of a control plane that serves TLS; with `client_ca` it is mutual."""

    key: Path
    cert: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """Something that happened: ``opened``, ``event``, ``half_closed``, ``closed`` (of a stream) or ``query``."""

    kind: str
    at: float
    stream: int = -1
    event: control_pb2.DaemonEvent = field(default_factory=control_pb2.DaemonEvent)
    request: control_pb2.DnsQueryRequest = field(default_factory=control_pb2.DnsQueryRequest)
    asked: int = 0  # QueryDns calls that waited for an answer at that moment, this one included
    metadata: Mapping[str, str | bytes] = field(default_factory=dict)
    identity: Sequence[str] = ()  # common names of the client's certificate
    how: str = ""  # a stream was closed: "lost" (the daemon's doing), "ended CODE" (ours) or "killed"

    @property
    def name(self) -> str:
        """The kind of the event: ``sync``, ``subscribed``, ``heartbeat`` …; empty for what is no event."""
        return self.event.WhichOneof("event") or ""

    @property
    def body(self) -> Any:
        """What the event carries."""
        return getattr(self.event, self.name)


class ControlPlaneProcess:
    """The process and what it has seen. A context manager; `kill` and `start` may be called inside."""

    def __init__(
        self,
        netns: NetNs,
        address: str = ADDRESS,
        *,
        tls: ServerTls | None = None,
        without: Sequence[str] = (),
    ) -> None:
        """Prepare to listen on `address` (``host:port``) in `netns`; `without`: methods it does not implement."""
        self.netns = netns
        self.address = address
        self.tls = tls
        self.seen: list[Seen] = []
        self._without = tuple(without)
        self._rules: dict[str, Any] = {
            "on_open": [], "on_sync": [raw(SYNC_ACK)], "on_subscribed": [], "refusal": None, "names": {},
            "other_names": "UNIMPLEMENTED",
        }  # fmt: skip
        self._numbers = itertools.count()
        self._answers: dict[int, Any] = {}
        self._changed = threading.Condition()
        self._saying = threading.RLock()  # one thread at a time changes rules, and writes to the process
        self._process: Any = None
        self._link: Connection | None = None
        self._reader: threading.Thread | None = None
        self._ended = True

    def config(self, **control_plane: Any) -> dict[str, Any]:
        """Give a daemon's configuration that makes it connect here; keywords are keys of `control_plane`."""
        return {"control_plane": {"url": self.address, **control_plane}}

    # -- life ----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the process and return when it listens; what it answers is as it was."""
        assert self._process is None
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = spawn([sys.executable, str(PROGRAM)], netns=self.netns, stdin=theirs.fileno())
        self._ended = False
        self._link = Connection(ours.detach())
        self._reader = threading.Thread(target=self._read, args=(self._link,), daemon=True)
        self._reader.start()
        self._ask("rules", rules=self._rules)
        tls = None
        if self.tls is not None:
            client_ca = "" if self.tls.client_ca is None else str(self.tls.client_ca)
            tls = {"key": str(self.tls.key), "cert": str(self.tls.cert), "client_ca": client_ca}
        self._ask("serve", address=self.address, first_stream=len(self.streams), tls=tls, without=self._without)

    def kill(self) -> None:
        """End it without a chance to say anything (kill -9). Everything that it saw is in `seen` then."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        assert self._reader is not None
        assert self._link is not None
        self._reader.join()  # it has read to the end
        self._link.close()
        self._process = self._link = self._reader = None
        self.seen += [Seen("closed", time.monotonic(), stream, how="killed") for stream in sorted(self._open())]

    @property
    def running(self) -> bool:
        """Tell whether there is a process."""
        return self._process is not None

    def restart(self) -> None:
        """Kill it and start it on the same address."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Stop the process (SIGSTOP): its connections stand and are silent. Only `thaw` and `kill` may follow."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let it go on (SIGCONT)."""
        self._process.send_signal(signal.SIGCONT)

    def _read(self, link: Connection) -> None:
        while True:
            try:
                number, content = link.recv()
            except (EOFError, OSError):
                break
            with self._changed:
                if number is None:
                    self.seen.append(_seen(content))
                else:
                    self._answers[number] = content
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _ask(self, method: str, **arguments: Any) -> Any:
        number = next(self._numbers)
        with self._saying:
            assert self._link is not None
            self._link.send((number, method, arguments))
        answer = self._wait(lambda: [self._answers.pop(number)] if number in self._answers else [], f"{method} to end")
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _wait(self, condition: Callable[[], T], what: str, timeout_s: float = TIMEOUT_S) -> T:
        with self._changed:
            found: list[T] = []

            def met() -> bool:
                found[:] = [condition()]
                return bool(found[0]) or self._ended

            self._changed.wait_for(met, timeout_s)
            if not found[0]:
                said = "the control plane has ended" if self._ended else f"waited {timeout_s:g} s"
                message = f"{said}: {what}; seen: {self.story()}"
                raise TimeoutError(message)
            return found[0]

    # -- how it answers ------------------------------------------------------------------------------------------------

    def _rule(self, **rules: Any) -> None:
        with self._saying:
            self._rules.update(rules)
            if self.running:
                self._ask("rules", rules=self._rules)

    def on_open(self, *commands: Command) -> None:
        """Send these as soon as a stream is open, before anything is read."""
        self._rule(on_open=[raw(command) for command in commands])

    def on_sync(self, *commands: Command) -> None:
        """Answer SyncRequest with these (default: SyncAck)."""
        self._rule(on_sync=[raw(command) for command in commands])

    def on_subscribed(
        self, *commands: Command, metadata: Mapping[str, str] | None = None, target: str = "", delay_s: float = 0.0
    ) -> None:
        """Answer Subscribed with these, under its id where a command has none; no commands: with silence.

        Without `metadata` and `target` this replaces every rule; with them the rule for the same, and it comes before
        the others, for the targets that have them.
        """
        rule = {
            "commands": [raw(command) for command in commands],
            "metadata": dict(metadata or {}), "target": target, "delay_s": delay_s,
        }  # fmt: skip
        for_whom = (rule["metadata"], target)
        with self._saying:
            others = [
                other for other in self._rules["on_subscribed"] if (other["metadata"], other["target"]) != for_whom
            ]
            self._rule(on_subscribed=[rule, *(others if any(for_whom) else [])])

    def refuse_streams(self, code: str = "OK", details: str = "") -> None:
        """End every new stream at once with this status."""
        self._rule(refusal=(code, details))

    def accept_streams(self) -> None:
        """Serve new streams again."""
        self._rule(refusal=None)

    def on_query(self, names: Mapping[str, DnsDecision], others: DnsDecision = "UNIMPLEMENTED") -> None:
        """Answer QueryDns by name (as on the wire, with the final dot); replaces what was said before."""
        packed = {name: _decision(decision) for name, decision in names.items()}
        self._rule(names=packed, other_names=_decision(others))

    # -- what it does --------------------------------------------------------------------------------------------------

    def send(self, *commands: Command | bytes, stream: int | None = None) -> float:
        """Send commands, or raw bytes, on a stream (default: the open one); return when the first was written."""
        number = self.stream if stream is None else stream
        return float(self._ask("send", stream=number, commands=[raw(command) for command in commands]))

    def flood(self, *commands: Command | bytes) -> None:
        """Send on the open stream as fast as the daemon takes it, and do not wait."""
        packed = [raw(command) for command in commands]
        with self._saying:
            assert self._link is not None
            self._link.send((next(self._numbers), "send", {"stream": self.stream, "commands": packed}))

    def end(self, code: str = "OK", details: str = "", stream: int | None = None) -> None:
        """End a stream (default: the open one) with a status."""
        self._ask("end", stream=self.stream if stream is None else stream, code=code, details=details)

    def stop_reading(self) -> None:
        """Read nothing more of what daemons send, but for one message that is waited for already."""
        self._ask("read_on", reading=False)

    def read_on(self) -> None:
        """Read again."""
        self._ask("read_on", reading=True)

    def release(self) -> None:
        """Answer the questions that hang, by what `on_query` says now."""
        self._ask("release")

    def settle(self) -> None:
        """Wait until everything that the process has seen until now is in `seen`: what is not there has not come."""
        self._ask("settle")

    # -- what it saw ---------------------------------------------------------------------------------------------------

    @property
    def streams(self) -> list[Seen]:
        """Every stream ever opened."""
        return self._of_kind("opened")

    @property
    def stream(self) -> int:
        """The number of the only open stream; waits for it."""
        return self._wait(lambda: [*self._open()], "a stream to be open", RECONNECT_S)[0]

    @property
    def queries(self) -> list[Seen]:
        """Every QueryDns call."""
        return self._of_kind("query")

    def _of_kind(self, kind: str) -> list[Seen]:
        return [seen for seen in list(self.seen) if seen.kind == kind]

    def _open(self) -> set[int]:
        found: set[int] = set()
        for seen in list(self.seen):
            if seen.kind == "opened":
                found.add(seen.stream)
            elif seen.kind == "closed":
                found.discard(seen.stream)
        return found

    def events(self, name: str = "", *, stream: int | None = None, since: int = 0, **fields: Any) -> list[Seen]:
        """Give events of that name, stream and fields, from the `since`-th thing seen on."""
        return [
            seen
            for seen in self.seen[since:]
            if seen.kind == "event"
            and name in {"", seen.name}
            and stream in {None, seen.stream}
            and all(getattr(seen.body, field) == value for field, value in fields.items())
        ]

    def wait_seen(self, name: str, *, timeout_s: float = TIMEOUT_S, **which: Any) -> Seen:
        """Wait for an event as `events` finds it, and return the first with its time and stream."""
        return self._wait(lambda: self.events(name, **which), f"event {name} {which}", timeout_s)[0]

    def wait_event(self, name: str, *, timeout_s: float = TIMEOUT_S, **which: Any) -> Any:
        """Wait for an event as `events` finds it, and return what the first carries."""
        return self.wait_seen(name, timeout_s=timeout_s, **which).body

    def wait_streams(self, count: int, timeout_s: float = RECONNECT_S) -> Seen:
        """Wait until so many streams were opened in all; return that one's opening."""
        return self._wait(lambda: self.streams[count - 1 : count], f"{count} streams", timeout_s)[0]

    def wait_closed(self, stream: int, timeout_s: float = TIMEOUT_S) -> Seen:
        """Wait for the end of a stream."""

        def closed() -> list[Seen]:
            return [seen for seen in self._of_kind("closed") if seen.stream == stream]

        return self._wait(closed, f"stream {stream} to end", timeout_s)[0]

    def wait_queries(self, count: int, timeout_s: float = TIMEOUT_S) -> list[Seen]:
        """Wait until QueryDns was called so often in all; return the calls."""
        return self._wait(lambda: self.queries if len(self.queries) >= count else [], f"{count} queries", timeout_s)

    def story(self) -> str:
        """Tell what was seen, for the message of a failed test."""
        return ", ".join(
            f"{seen.stream}:{seen.name or seen.kind}{seen.how and f'({seen.how})'}" for seen in self.seen[-40:]
        )


def raw(command: Message | bytes) -> bytes:
    """Give the bytes of a message, or the bytes."""
    return command if isinstance(command, bytes) else command.SerializeToString()


def _decision(decision: DnsDecision) -> bytes | str:
    return decision if isinstance(decision, str) else raw(decision)


def _seen(content: dict[str, Any]) -> Seen:
    data = content.pop("data", b"")
    if content["kind"] == "event":
        content["event"] = control_pb2.DaemonEvent.FromString(data)
    elif content["kind"] == "query":
        content["request"] = control_pb2.DnsQueryRequest.FromString(data)
    return Seen(**content)
