"""Watch interfaces on the event loop: gone, renamed, addresses, our clsact filter taken away (semantics.md 23).

Owns one netlink socket that listens to links, addresses and traffic control of this network namespace, and the memory
of which interfaces matter. Refuses to do anything about what it sees: it calls back with a value of `events`, on the
loop's thread. Cgroups are watched by `cgroup_watch`.

Everything here runs on the loop's thread and never waits: `watch` asks the kernel one question of some 30 µs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from netfence.dataplane import rtnl
from netfence.dataplane.events import (
    AddressesChanged,
    Event,
    HookGone,
    HostAddressesChanged,
    LinkGone,
    LinkNew,
    LinkRenamed,
    Resync,
)
from netfence.dataplane.failure import explain
from netfence.dataplane.hooks import clsact
from netfence.dataplane.rtnl import Message, Rtnl
from netfence.errors import NetfenceError

_GROUPS = 0x1 | 0x8 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_TC, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_SO_RCVBUFFORCE, _SO_MEMINFO = 33, 55
_MEMINFO = struct.Struct("=9I")  # the ninth is SK_MEMINFO_DROPS
_NETLINK_NO_ENOBUFS = 5
_BUFFER_BYTES = 4 << 20  # some 2000 link messages: a thousand interfaces made at once do not overflow it
_RECEIVE_BYTES = 1 << 16
_DATAGRAMS_PER_TURN = 64  # then the loop serves others; about 1 ms
_CHECKS_PER_TURN = 100  # interfaces looked at again after an overflow; about 3 ms
_AGAIN_S = 1.0  # before an interface is looked at again that could not be: no descriptors, no memory
_TCMSG = struct.Struct("=BxxxiIII")

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Watched:
    name: str
    master: int


class LinkWatcher:
    """Calls back with what happens to the interfaces it was told to watch."""

    def __init__(self, callback: Callable[[Event], None]) -> None:
        self._callback = callback
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket: socket.socket | None = None
        self._known: set[int] = set()
        self._watched: dict[int, _Watched] = {}
        self._drops = 0
        self._unchecked: list[int] = []  # events of these may have been lost, and they were not looked at yet
        self._next_check: asyncio.Handle | None = None

    def open(self) -> None:
        """Start listening, in this thread's namespace, on the running loop. Raises NetfenceError."""
        try:
            self._socket = _listen()
            with Rtnl() as netlink:
                self._known = {link.ifindex for link in rtnl.get_links(netlink)}
        except OSError as error:
            self.close()
            raise explain("listen to interface changes", error) from error
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._on_readable)

    def close(self) -> None:
        """Stop listening; idempotent."""
        if self._next_check is not None:
            self._next_check.cancel()
            self._next_check = None
        if self._socket is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._socket)
            self._socket.close()
        self._socket = None

    def watch(self, ifindex: int, name: str) -> None:
        """Tell from now on what happens to the interface, which was called `name` when it was resolved.

        What happened between resolving and this call is told too, in the loop's next turn.
        """
        self._watched[ifindex] = _Watched(name, 0)
        record = self._check(ifindex, later=True)
        if record is not None:
            self._watched[ifindex].master = record.master

    def unwatch(self, ifindex: int) -> None:
        """Forget the interface; call before detaching, so that our own removal is not told."""
        self._watched.pop(ifindex, None)

    def _on_readable(self) -> None:
        dirty: set[int] = set()
        host_changed = False
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                data, sender = self._receive()
            except BlockingIOError:
                self._drained()
                break
            if sender != 0:  # only the kernel's own port number is believed
                continue
            for message in rtnl.split(data):
                if message.type in (rtnl.RTM_NEWADDR, rtnl.RTM_DELADDR):
                    host_changed = True
                    dirty |= self._concerned(rtnl.parse_address(message.payload).ifindex)
                else:
                    dirty |= self._on_message(message)
        # One event per interface and turn: a bridge with a thousand ports gets an address in two messages.
        for ifindex in dirty & self._watched.keys():
            self._emit(AddressesChanged(ifindex))
        if host_changed:
            self._emit(HostAddressesChanged())

    def _receive(self) -> tuple[bytes, int]:
        if self._socket is None:  # closed by a callback of this very turn
            raise BlockingIOError
        data, (port, _) = self._socket.recvfrom(_RECEIVE_BYTES)
        return data, port

    def _on_message(self, message: Message) -> set[int]:
        """Handle a link or tc message; return the watched interfaces whose addresses may be others now."""
        if message.type == rtnl.RTM_NEWLINK:
            return self._on_new_link(message.payload)
        if message.type == rtnl.RTM_DELLINK:
            record = rtnl.parse_link(message.payload)
            if record.family == socket.AF_UNSPEC:  # AF_BRIDGE: only left its bridge
                self._known.discard(record.ifindex)
                self._gone(record.ifindex)
        elif message.type in (rtnl.RTM_DELQDISC, rtnl.RTM_DELTFILTER):
            self._on_removed_hook(message)
        return set()

    def _on_new_link(self, payload: bytes) -> set[int]:
        record = rtnl.parse_link(payload)
        if record.family != socket.AF_UNSPEC:
            return set()
        if record.ifindex not in self._known:
            self._known.add(record.ifindex)
            self._emit(LinkNew(record.ifindex, record.name))
        watched = self._watched.get(record.ifindex)
        if watched is None:
            return set()
        if record.name != watched.name:
            watched.name = record.name
            self._emit(LinkRenamed(record.ifindex, record.name))
        if record.master != watched.master:
            watched.master = record.master
            return {record.ifindex}
        return set()

    def _on_removed_hook(self, message: Message) -> None:
        _, ifindex, handle, parent, _ = _TCMSG.unpack_from(message.payload)
        if ifindex not in self._watched:
            return
        if message.type == rtnl.RTM_DELQDISC:
            concerns_us = parent == clsact.QDISC_PARENT
        else:  # handle 0: every filter of a priority
            concerns_us = parent in clsact.PARENT.values() and handle in (0, clsact.HANDLE)
        if concerns_us:
            self._emit(HookGone(ifindex))

    def _concerned(self, ifindex: int) -> set[int]:
        """Of the watched interfaces find those whose own or whose bridge's addresses are `ifindex`'s."""
        return {each for each, watched in self._watched.items() if ifindex in (each, watched.master)}

    def _gone(self, ifindex: int) -> None:
        if self._watched.pop(ifindex, None) is not None:
            self._emit(LinkGone(ifindex))

    def _drained(self) -> None:
        """With the queue empty, see whether the kernel had to drop messages; if so look at everything again."""
        drops = _drops(self._socket) if self._socket is not None else self._drops
        if drops == self._drops:
            return
        self._drops = drops
        self._emit(Resync())
        self._unchecked = list(self._watched)
        if self._next_check is not None:
            self._next_check.cancel()
        self._check_some()

    def _check_some(self) -> None:
        """Look at some of the `_unchecked`, at the rest in a later turn; after a pause where one could not be."""
        pause_s, done = 0.0, 0
        for ifindex in self._unchecked[:_CHECKS_PER_TURN]:
            try:
                if ifindex in self._watched:
                    self._check(ifindex, later=False)
            except NetfenceError as error:
                pause_s = _AGAIN_S
                log.warning(
                    "targets_not_looked_at", left=len(self._unchecked) - done, error=str(error), next_try_s=pause_s
                )
                break
            done += 1
        del self._unchecked[:done]
        self._next_check = None
        if self._unchecked and self._loop is not None and self._socket is not None:
            self._next_check = self._loop.call_later(pause_s, self._check_some)

    def _check(self, ifindex: int, *, later: bool) -> rtnl.LinkRecord | None:
        """Ask the kernel about a watched interface and tell what we missed; None when it is gone."""
        try:
            with Rtnl() as netlink:
                record = rtnl.get_link(netlink, ifindex)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise explain(f"look at interface {ifindex}", error) from error
            self._watched.pop(ifindex, None)
            self._tell(LinkGone(ifindex), later=later)
            return None
        watched = self._watched[ifindex]
        if record.name != watched.name:
            watched.name = record.name
            self._tell(LinkRenamed(ifindex, record.name), later=later)
        return record

    def _tell(self, event: Event, *, later: bool) -> None:
        if later and self._loop is not None:
            self._loop.call_soon(self._emit, event)
        else:
            self._emit(event)

    def _emit(self, event: Event) -> None:
        """Call back; a failing receiver is reported to the loop and costs no later event."""
        try:
            self._callback(event)
        except Exception as error:  # noqa: BLE001 - whatever the receiver raises, the watcher goes on
            if self._loop is not None:
                self._loop.call_exception_handler({"message": f"receiver of {event} failed", "exception": error})


def _listen() -> socket.socket:
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
    )
    try:
        with contextlib.suppress(PermissionError):  # then the default of the host
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        # An overflow is learnt from the socket's drop counter. The usual ENOBUFS would come with POLLERR, at which
        # libuv (uvloop) stops polling a descriptor for ever (seen); and the kernel drops less without it.
        sock.setsockopt(rtnl.SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
        sock.bind((0, _GROUPS))
    except BaseException:
        sock.close()
        raise
    return sock


def _drops(sock: socket.socket) -> int:
    """Read how many messages the kernel could not queue since the socket was made (wraps at 32 bit)."""
    return int(_MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))[8])
