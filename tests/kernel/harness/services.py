"""Servers for the internet end: threads of this process on sockets made inside a namespace."""

from __future__ import annotations

import contextlib
import http.server
import socket
import socketserver
import threading
from typing import Any, Self

from harness.netns import NetNs


class Server:
    """A server thread; `hits` counts what reached it. Use as a context manager."""

    def __init__(self, netns: NetNs, server: type[socketserver.BaseServer], host: str, port: int, handler: Any) -> None:
        self.hits = 0
        outer = self

        class Counting(handler):
            def setup(self) -> None:
                outer.hits += 1
                super().setup()

        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = type(
            "Bound", (server,), {"address_family": family, "allow_reuse_address": True, "daemon_threads": True}
        )
        with netns.inside():
            self._server = bound((host, port), Counting)
        self.address = (host, int(self._server.server_address[1]))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.request.recv(65536):
                self.request.sendall(data)


class _DatagramEcho(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, sock = self.request
        sock.sendto(data, self.client_address)


def tcp_echo(netns: NetNs, host: str, port: int) -> Server:
    """Send every byte back."""
    return Server(netns, socketserver.ThreadingTCPServer, host, port, _Echo)


def udp_echo(netns: NetNs, host: str, port: int) -> Server:
    """Send every datagram back."""
    return Server(netns, socketserver.ThreadingUDPServer, host, port, _DatagramEcho)


def web(netns: NetNs, host: str, port: int, body: bytes) -> Server:
    """Answer every GET with `body`."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # named by http.server
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # named by http.server
            """Say nothing."""

    return Server(netns, http.server.ThreadingHTTPServer, host, port, Page)
