"""The program that floods: sends the same packets again and again with `sendmmsg`, as fast as one CPU can.

Run by `flood.Sender` with Python's standard library alone, so that it starts in milliseconds. Argument 1 is the
CPU it stays on, argument 2 a JSON list of sources, each ``{"device": name}`` (whole frames, AF_PACKET) or ``{"to":
[host, port]}`` (a connected UDP socket) with its ``"packets"`` in hexadecimal. Packets are made once, before the first
is sent. A cycle is every packet of every source once, in that order.

It says "ready", as JSON. Then a line with a number wants at least that many packets, rounded up to whole cycles;
0 means: until the next line comes. The answer is one JSON line: how many `cycles`; how many packets were `refused`
(EPERM, a fence's word; what a full queue turned away is counted by the device); how many were sent `again`, because
`sendmmsg` does not tell why it stopped half way; when the first system call `began` and the last `ended`, in seconds of
CLOCK_MONOTONIC.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import socket
import sys
import time
from typing import Any


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_char_p), ("length", ctypes.c_size_t)]


class _Header(ctypes.Structure):
    """struct msghdr, which ends with padding."""

    _fields_ = [
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class _Message(ctypes.Structure):
    """struct mmsghdr: a message, and how many bytes of it were sent."""

    _fields_ = [("header", _Header), ("sent", ctypes.c_uint32)]


_libc = ctypes.CDLL(None, use_errno=True)


class Source:
    """One socket and what it sends."""

    def __init__(self, told: dict[str, Any]) -> None:
        packets = [bytes.fromhex(each) for each in told["packets"]]
        self.count = len(packets)
        self._iovecs = (_Iovec * self.count)(*[_Iovec(each, len(each)) for each in packets])
        self._messages = (_Message * self.count)()
        for message, iovec in zip(self._messages, self._iovecs, strict=True):
            message.header.iov, message.header.iov_count = ctypes.pointer(iovec), 1
        if "device" in told:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._socket.bind((told["device"], 0))
        else:
            host, port = told["to"]
            self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.connect((host, port))
        self.refused = self.again = 0

    def hand_over(self, at: int = 0) -> int:
        """Hand the packets from the one at `at` on to the kernel; how many it took, -1 (see errno) if not the first."""
        return int(_libc.sendmmsg(self._socket.fileno(), ctypes.byref(self._messages[at]), self.count - at, 0))

    def send(self) -> None:
        """Send every packet once."""
        at = 0
        while at < self.count:
            sent = self.hand_over(at)
            if sent < 0:  # the first packet
                error = ctypes.get_errno()
                if error not in (errno.EPERM, errno.ENOBUFS):
                    raise OSError(error, os.strerror(error))
                self.refused += error == errno.EPERM
            else:
                self.again += sent < self.count - at
            at += abs(sent)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def blast(sources: list[Source], packets: int) -> dict[str, float]:
    """Send so many packets, or until there is something to read."""
    wanted = -(-packets // sum(each.count for each in sources))
    cycles = 0
    for source in sources:
        source.refused = source.again = 0
    began = time.monotonic()
    while cycles < wanted or (wanted == 0 and not select.select([0], [], [], 0)[0]):
        for source in sources:
            source.send()
        cycles += 1
    ended = time.monotonic()
    refused, again = sum(each.refused for each in sources), sum(each.again for each in sources)
    return {"cycles": cycles, "refused": refused, "again": again, "began": began, "ended": ended}


def main() -> None:
    """Do as the module says until there is no more to read."""
    os.sched_setaffinity(0, {int(sys.argv[1])})
    sources = [Source(each) for each in json.loads(sys.argv[2])]
    sys.stdout.write(json.dumps("ready") + "\n")
    sys.stdout.flush()
    # Unbuffered: what `select` does not see here has not been written.
    with open(0, "rb", buffering=0) as requests:
        while line := requests.readline():
            if line.strip():
                sys.stdout.write(json.dumps(blast(sources, int(line))) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
