"""Tap and tun devices with the test in the place of the VM: what it writes is what the workload sends."""

from __future__ import annotations

import fcntl
import os
import select
import struct

from harness.netns import NetNs

TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
FRAME_MAX = 65536


class TunTap:
    """One device in `netns`, up, gone when closed. `send` takes frames on a tap, IP packets on a tun."""

    def __init__(self, netns: NetNs, name: str, *, tap: bool) -> None:
        self.name = name
        self.netns = netns
        self.tap = tap
        with netns.inside():
            self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            flags = (IFF_TAP if tap else IFF_TUN) | IFF_NO_PI
            try:
                fcntl.ioctl(self._fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            except OSError:
                os.close(self._fd)
                raise
        netns.ip(f"link set dev {name} up")

    def let_writes_wait(self) -> None:
        """Have a tap's XDP program run on the bytes; otherwise, as with QEMU, a packet is made of them first."""
        os.set_blocking(self._fd, True)

    def send(self, packet: bytes) -> None:
        """Send as the workload."""
        os.write(self._fd, packet)

    def receive(self, timeout_s: float = 5.0) -> bytes:
        """Receive what the host sends to the workload; TimeoutError if nothing comes."""
        ready, _, _ = select.select([self._fd], [], [], timeout_s)
        if not ready:
            message = f"nothing on {self.name} for {timeout_s:g} s"
            raise TimeoutError(message)
        return os.read(self._fd, FRAME_MAX)

    def close(self) -> None:
        """Remove the device."""
        os.close(self._fd)
