"""A process inside a network namespace and a cgroup whose sockets the test drives: cheap, precise, one call at a time.

agent = Agent(netns=topology.host, cgroup=cgroup)
agent.udp().sendto(tag.payload, ("203.0.113.10", 9))      # PermissionError where the fence refuses
with agent.connect("203.0.113.80", 80) as connection:
    connection.send(b"hello")
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self, TypeAlias

import dnslib

from harness.cgroup import Cgroup
from harness.netns import NetNs
from harness.spawn import spawn, stop
from harness.wire import harness_cpu

Address: TypeAlias = tuple[str, int]

TIMEOUT_S = 2.0
PROGRAM = Path(__file__).with_name("agent_main.py")


class RemoteSocket:
    """A socket in the agent. Methods raise what the call raised there: OSError with its errno, or TimeoutError."""

    def __init__(self, agent: Agent, handle: int) -> None:
        self._agent = agent
        self._handle = handle

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        return self._agent.ask(do, handle=self._handle, **arguments)

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """Set a socket option."""
        self._ask(
            "setsockopt",
            level=level,
            option=option,
            value=value if isinstance(value, int) else base64.b64encode(value).decode(),
        )

    def bind(self, address: Address) -> None:
        """Bind to host and port."""
        self._ask("bind", address=address)

    def listen(self) -> None:
        """Listen for connections."""
        self._ask("listen")

    def accept(self, timeout_s: float = TIMEOUT_S) -> RemoteSocket:
        """Wait for one connection."""
        return RemoteSocket(self._agent, int(self._ask("accept", timeout_s=timeout_s)["handle"]))

    def connect(self, address: Address, timeout_s: float = TIMEOUT_S) -> None:
        """Connect to host and port."""
        self._ask("connect", address=address, timeout_s=timeout_s)

    def send(self, data: bytes) -> int:
        """Send to the connected peer."""
        return int(self._ask("send", data=base64.b64encode(data).decode(), address=None)["sent"])

    def sendto(self, data: bytes, address: Address) -> int:
        """Send to host and port (raw sockets: port 0)."""
        return int(self._ask("send", data=base64.b64encode(data).decode(), address=address)["sent"])

    def recv(self, size: int = 65536, timeout_s: float = TIMEOUT_S) -> bytes:
        """Receive what comes next; b"" at the end of a stream."""
        return base64.b64decode(self._ask("receive", size=size, timeout_s=timeout_s)["data"])

    def name(self) -> Address:
        """Tell this socket's own host and port."""
        address = self._ask("name")["address"]
        return str(address[0]), int(address[1])

    def close(self) -> None:
        """Close it."""
        self._ask("close")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Agent:
    """The process. It lives until `close`, or until this process ends."""

    def __init__(self, netns: NetNs | None = None, cgroup: Cgroup | None = None) -> None:
        argv = [sys.executable, "-I", "-S", str(PROGRAM), str(harness_cpu())]
        self._process = spawn(argv, netns=netns, cgroup=cgroup, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ask("socket", family=socket.AF_UNIX, kind=socket.SOCK_DGRAM, protocol=0)  # it runs, and where it should

    @property
    def pid(self) -> int:
        """The process id (the shell that joined the cgroup has become the agent)."""
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            message = f"the agent ended with {process.wait()} at {do}"
            raise RuntimeError(message)
        answer: dict[str, Any] = json.loads(line)
        if "timeout" in answer:
            raise TimeoutError(answer["timeout"])
        if "errno" in answer:
            number = answer["errno"]
            raise OSError(number, os.strerror(number) if number else answer["error"])
        return answer

    def open(self, family: int, kind: int, protocol: int = 0) -> RemoteSocket:
        """Make any socket."""
        return RemoteSocket(self, int(self.ask("socket", family=family, kind=kind, protocol=protocol)["handle"]))

    def udp(self, family: int = socket.AF_INET) -> RemoteSocket:
        """Make a UDP socket."""
        return self.open(family, socket.SOCK_DGRAM)

    def tcp(self, family: int = socket.AF_INET) -> RemoteSocket:
        """Make a TCP socket."""
        return self.open(family, socket.SOCK_STREAM)

    def connect(self, host: str, port: int, timeout_s: float = TIMEOUT_S) -> RemoteSocket:
        """Open a TCP connection to an address of either family."""
        connection = self.tcp(family_of(host))
        try:
            connection.connect((host, port), timeout_s)
        except OSError:
            connection.close()
            raise
        return connection

    def query(self, server: Address, name: str, qtype: str = "A", *, tcp: bool = False, edns: bool = True,
              timeout_s: float = 5.0) -> dnslib.DNSRecord:  # fmt: skip
        """Ask a name server, over UDP or TCP, and return its parsed answer."""
        question = dnslib.DNSRecord.question(name, qtype)
        if edns:
            question.add_ar(dnslib.EDNS0(udp_len=1232))
        raw = question.pack()
        if tcp:
            with self.connect(*server, timeout_s=timeout_s) as connection:
                connection.send(len(raw).to_bytes(2, "big") + raw)
                size = int.from_bytes(receive_exactly(connection, 2, timeout_s))
                answer = receive_exactly(connection, size, timeout_s)
        else:
            with self.udp(family_of(server[0])) as sock:
                sock.connect(server)
                sock.send(raw)
                answer = sock.recv(timeout_s=timeout_s)
        return dnslib.DNSRecord.parse(answer)

    def close(self) -> None:
        """End the process and with it its sockets."""
        stop(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def family_of(host: str) -> int:
    """Tell the address family of a textual address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def receive_exactly(connection: RemoteSocket, size: int, timeout_s: float) -> bytes:
    """Read `size` bytes of a stream."""
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data), timeout_s)
        if not more:
            message = f"the stream ended after {len(data)} of {size} bytes"
            raise ConnectionError(message)
        data += more
    return data
