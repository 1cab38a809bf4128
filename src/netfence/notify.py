"""Telling systemd how far we are (sd_notify(3)): a datagram to $NOTIFY_SOCKET, nothing where there is none."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(*lines: str) -> None:
    """Send the lines (``READY=1``, ``STATUS=…``) as one datagram; a service manager that is gone is no failure."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto("\n".join(lines).encode(), address)


def extend(seconds: float) -> None:
    """Ask for so long from now on for the start or stop that is under way, whatever its time-out; to be asked again."""
    notify(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")


def watchdog_s() -> float | None:
    """Return how long the service manager waits for a ping before it ends us; None where it does not, or means another.

    As sd_watchdog_enabled(3) reads $WATCHDOG_USEC and $WATCHDOG_PID.
    """
    told, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not (told.isascii() and told.isdecimal()) or pid not in ("", str(os.getpid())):
        return None
    return int(told) / 1e6 or None
