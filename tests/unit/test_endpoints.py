"""Where DNS servers listen, on this host's own loopback: binding decides, ports are reused late, nothing is kept."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Self

import pytest
from structlog.testing import capture_logs

from netfence.dataplane import rtnl
from netfence.endpoints import AddressEndpoints, Dummy, Endpoint, Endpoints, PortEndpoints, make
from netfence.errors import ExhaustedError, NetfenceError, PermissionDeniedError, PreconditionError


class Binder:
    """Binds UDP sockets and keeps them."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.failure: int | None = None

    async def bind(self, host: str, port: int) -> None:
        if self.failure is not None:
            raise OSError(self.failure, os.strerror(self.failure))
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.bind((host, port))
        except OSError:
            sock.close()
            raise
        self.stack.callback(sock.close)


def reserve(endpoints: Endpoints, count: int, binder: Binder | None = None) -> list[Endpoint]:
    async def work() -> list[Endpoint]:
        used = binder or Binder()
        with ExitStack() as stack:
            if binder is None:
                stack.callback(used.stack.close)
            return [await endpoints.reserve(used.bind) for _ in range(count)]

    return asyncio.run(work())


@pytest.fixture
def base() -> int:
    """Give a port with three free ones after it."""
    for first in range(41000, 60000, 4):
        with ExitStack() as stack:
            try:
                for port in range(first, first + 4):
                    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                    sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    pytest.fail("no free ports on this machine")


def test_each_attachment_gets_a_port_and_a_foreign_one_is_passed_over(base: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as foreign:
        foreign.bind(("127.0.0.1", base + 1))
        found = reserve(make("127.0.0.1", base, base + 3), 3)
    assert [each.port for each in found] == [base, base + 2, base + 3]


def test_no_port_left_is_told_with_the_remedy_and_a_released_one_is_found(base: int) -> None:
    endpoints = PortEndpoints("127.0.0.1", base, base + 1)
    first, _ = reserve(endpoints, 2)
    with pytest.raises(ExhaustedError, match=rf"none free in {base}-{base + 1} .*widen dns\.port_min"):
        reserve(endpoints, 1)
    asyncio.run(endpoints.release(first))
    assert reserve(endpoints, 1) == [first]


def test_ports_are_reused_as_late_as_possible(base: int) -> None:
    endpoints = PortEndpoints("127.0.0.1", base, base + 2)
    (first,) = reserve(endpoints, 1)
    asyncio.run(endpoints.release(first))
    assert [each.port for each in reserve(endpoints, 3)] == [base + 1, base + 2, base]


def test_a_claimed_port_is_not_given_again(base: int) -> None:
    endpoints = PortEndpoints("127.0.0.1", base, base + 1)
    asyncio.run(endpoints.claim(Endpoint("127.0.0.1", base)))
    assert reserve(endpoints, 1)[0].port == base + 1


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (errno.EADDRNOTAVAIL, PreconditionError, "set dns.listen_addr to an address of this host"),
        (errno.EACCES, PermissionDeniedError, "CAP_NET_BIND_SERVICE"),
        (errno.EMFILE, ExhaustedError, "LimitNOFILE"),
        (errno.EAFNOSUPPORT, PreconditionError, "check dns.listen_addr"),
    ],
    ids=["not-ours", "privileged", "no-files", "other"],
)
@pytest.mark.parametrize("listen", ["127.0.0.1", "127.53.0.0/24"], ids=["address", "cidr"])
def test_what_no_other_port_cures_is_told_at_once(
    base: int, listen: str, number: int, kind: type[NetfenceError], says: str
) -> None:
    endpoints = make(listen, base, base + 3)
    binder = Binder()
    binder.failure = number
    with pytest.raises(kind, match=says):
        reserve(endpoints, 1, binder)
    binder.failure = errno.EADDRINUSE
    with pytest.raises(ExhaustedError):
        reserve(endpoints, 1, binder)


def test_an_address_of_this_host_is_really_wanted(base: int) -> None:
    with pytest.raises(PreconditionError, match=r"192\.0\.2\.1"):
        reserve(PortEndpoints("192.0.2.1", base, base), 1)


def test_in_a_loopback_cidr_each_attachment_has_an_address_and_port_53(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netfence.endpoints.DNS_PORT", 41053)  # binding 53 wants root
    endpoints = make("127.53.0.0/29", 1, 2)
    assert isinstance(endpoints, AddressEndpoints)
    found = reserve(endpoints, 6)
    assert [each.host for each in found] == [f"127.53.0.{host}" for host in range(1, 7)]
    assert {each.port for each in found} == {41053}
    with pytest.raises(ExhaustedError, match=r"127\.53\.0\.0/29: none free .* larger CIDR"):
        reserve(endpoints, 1)
    asyncio.run(endpoints.release(found[2]))
    assert reserve(endpoints, 1) == [found[2]]


def test_an_endpoint_tells_its_forms() -> None:
    assert str(Endpoint("127.0.0.1", 53)) == "127.0.0.1:53"
    assert str(Endpoint("::1", 53)) == "[::1]:53"
    assert (Endpoint("::1", 53).loopback, Endpoint("192.0.2.1", 53).loopback) == (True, False)
    assert Endpoint("192.0.2.1", 53).packed == b"\xc0\x00\x02\x01"


@dataclass
class Links:
    """A host whose only interface is `netfence0`, as rtnetlink tells of it."""

    kind: str | None = "dummy"  # None: there is none
    addresses: dict[str, int] = field(default_factory=dict)  # address → prefix length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""

    def get_link(self, *_: object) -> SimpleNamespace:
        if self.kind is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return SimpleNamespace(ifindex=5, kind=self.kind)

    def get_addresses(self, *_: object, **__: object) -> list[SimpleNamespace]:
        return [SimpleNamespace(address=ipaddress.ip_address(one).packed) for one in self.addresses]

    def request(self, kind: int, payload: bytes, *_: object) -> None:
        if kind == rtnl.RTM_DELLINK:
            self.kind = None
            return
        assert kind == rtnl.RTM_DELADDR
        _, length, _, _, _ = struct.unpack_from("=BBBBI", payload)
        address = str(ipaddress.ip_address(rtnl.attributes(payload[8:])[2]))
        if self.addresses.get(address) != length:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        del self.addresses[address]

    def put(self, monkeypatch: pytest.MonkeyPatch) -> Self:
        monkeypatch.setattr(rtnl, "Rtnl", lambda: self)
        monkeypatch.setattr(rtnl, "get_link", self.get_link)
        monkeypatch.setattr(rtnl, "get_addresses", self.get_addresses)
        return self


@pytest.mark.parametrize(
    ("network", "ours", "left", "others"),
    [
        ("169.254.100.0/24", "169.254.100.1", "169.254.100.7", {"169.254.100.9": 24, "10.0.0.1": 32}),
        ("fd00:53::/64", "fd00:53::1", "fd00:53::7", {"fd00:53::9": 64, "fd00:54::1": 128, "fe80::1": 64}),
    ],
    ids=["ipv4", "ipv6"],
)
def test_what_nobody_claimed_is_taken_off_our_interface_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, network: str, ours: str, left: str, others: dict[str, int]
) -> None:
    bits = ipaddress.ip_address(ours).max_prefixlen
    links = Links(addresses={ours: bits, left: bits, **others}).put(monkeypatch)
    endpoints = make(network, 1, 2)
    assert isinstance(endpoints, AddressEndpoints)
    endpoints._taken.add(ours)
    asyncio.run(endpoints.tidy())
    assert links.addresses == {ours: bits, **others}
    links.kind = "bridge"  # somebody else's, of our name
    endpoints._taken.clear()
    asyncio.run(endpoints.tidy())
    assert links.addresses == {ours: bits, **others}


@pytest.mark.parametrize("addresses", [{}, {"169.254.100.7": 32}, {"169.254.100.7": 32, "169.254.100.8": 32}], ids=len)
def test_our_interface_goes_with_the_last_of_what_nobody_claimed(
    monkeypatch: pytest.MonkeyPatch, addresses: dict[str, int]
) -> None:
    links = Links(addresses=dict(addresses)).put(monkeypatch)
    with capture_logs() as logs:
        asyncio.run(make("169.254.100.0/24", 1, 2).tidy())
        assert links.kind is None
        asyncio.run(make("169.254.100.0/24", 1, 2).tidy())  # there is none
    assert [one["addresses"] for one in logs] == ([[*addresses]] if addresses else [])


def test_what_cannot_be_tidied_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(rtnl, "Rtnl", refuse)
    with capture_logs() as logs:
        asyncio.run(make("169.254.100.0/24", 1, 2).tidy())
    assert [one["event"] for one in logs] == ["dns_address_not_removed"]
    asyncio.run(make("127.53.0.0/24", 1, 2).tidy())
    asyncio.run(make("127.0.0.1", 1, 2).tidy())


def test_nobody_adds_an_address_while_the_interface_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = 0
    most = 0

    class Netlink:
        def __enter__(self) -> Self:
            nonlocal busy, most
            busy += 1
            most = max(most, busy)
            time.sleep(0.02)  # others have all the time to come in between
            return self

        def __exit__(self, *_: object) -> None:
            nonlocal busy
            busy -= 1

        def request(self, *_: object) -> None:
            """Do it."""

    monkeypatch.setattr(rtnl, "Rtnl", Netlink)
    monkeypatch.setattr(rtnl, "get_link", lambda *_: SimpleNamespace(ifindex=5, kind="dummy"))
    monkeypatch.setattr(rtnl, "get_addresses", lambda *_, **__: [])
    dummy = Dummy()
    with ThreadPoolExecutor(4) as pool:
        works = [pool.submit(work, "192.0.2.1") for work in (dummy.add, dummy.remove, dummy.add, dummy.remove)]
    for work in works:
        work.result()
    assert most == 1
