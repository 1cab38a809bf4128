"""The program that never stops asking: one UDP datagram to each address, again and again, and a count of what was sent.

Run by `crash.Prober` with Python's standard library alone. Argument 1 is the CPU it stays on, argument 2 a JSON list of
addresses. It says "ready"; the end of its input ends it. Its last line is a JSON list of two numbers for each address:
datagrams that the kernel took, datagrams that it refused (EPERM, a cgroup's fence).
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys

PORT = 9
PAUSE_S = 0.0005


def main() -> None:
    """Do as the module says."""
    os.sched_setaffinity(0, {int(sys.argv[1])})
    addresses = json.loads(sys.argv[2])
    families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
    # Not connected: whatever comes back from one datagram is no reason not to send the next.
    sockets = [socket.socket(family, socket.SOCK_DGRAM) for family in families]
    counts = [[0, 0] for _ in addresses]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not select.select([0], [], [], PAUSE_S)[0]:
        for address, sock, count in zip(addresses, sockets, counts, strict=True):
            try:
                sock.sendto(b"probe", (address, PORT))
                count[0] += 1
            except PermissionError:
                count[1] += 1
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
