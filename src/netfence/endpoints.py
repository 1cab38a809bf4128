"""Where the DNS servers of attachments listen: one address with a port each, or one address each with port 53.

Owns the choice and the book of what is taken, and, for a CIDR outside 127/8, the addresses on a dummy interface
`netfence0`. Whether an endpoint is free is decided by binding it, not by looking. Knows no DNS and no policy.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import structlog

from netfence.dataplane import rtnl
from netfence.errors import ExhaustedError, NetfenceError, PermissionDeniedError, PreconditionError

DUMMY = "netfence0"
DNS_PORT = 53
MAX_TRIES = 8192  # endpoints tried for one attachment: more than the default port range has

RT_SCOPE_UNIVERSE = 0
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x02, 0x200
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFLA_IFNAME, IFLA_LINKINFO, INFO_KIND = 3, 18, 1
IFF_UP = 1

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Bind = Callable[[str, int], Awaitable[None]]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address and port, UDP and TCP."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return ``host:port``, IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def packed(self) -> bytes:
        """Return the address packed, 4 or 16 bytes."""
        return _packed(self.host)

    @property
    def loopback(self) -> bool:
        """Tell whether only this host itself can reach it."""
        return ipaddress.ip_address(self.host).is_loopback


@functools.lru_cache(maxsize=4096)  # `why` asks for those of all attachments: 40 ms of IPv6 ones otherwise
def _packed(host: str) -> bytes:
    return ipaddress.ip_address(host).packed


class Endpoints(Protocol):
    """Hands out endpoints."""

    async def reserve(self, bind: Bind) -> Endpoint:
        """Find a free endpoint and bind it by ``await bind(host, port)``; OSError of it means taken or impossible.

        Raises ExhaustedError when none is free, PreconditionError when the address is none of this host's.
        """
        ...

    async def claim(self, endpoint: Endpoint) -> None:
        """Take a stored endpoint again after a restart, without binding it; idempotent.

        It is taken also when an address cannot be put in place, of which NetfenceError tells.
        """
        ...

    async def release(self, endpoint: Endpoint) -> None:
        """Give an endpoint back. Idempotent; failures are logged."""
        ...

    async def tidy(self) -> None:
        """Remove what a daemon before us left of endpoints that nobody has claimed. Failures are logged."""
        ...


def make(listen_addr: str, port_min: int, port_max: int) -> Endpoints:
    """Choose by the form of `dns.listen_addr`: an address, or a CIDR."""
    if "/" in listen_addr:
        network = ipaddress.ip_network(listen_addr, strict=False)
        return AddressEndpoints(network)
    return PortEndpoints(str(ipaddress.ip_address(listen_addr)), port_min, port_max)


class PortEndpoints:
    """One address, a port for each attachment: next after the last one given, so that ports are reused late."""

    def __init__(self, host: str, port_min: int, port_max: int) -> None:
        self._host, self._min, self._max = host, port_min, port_max
        self._taken: set[int] = set()
        self._next = port_min

    async def reserve(self, bind: Bind) -> Endpoint:
        """Bind the first free port."""
        failure: OSError | None = None
        for _ in range(self._max - self._min + 1):
            port, self._next = self._next, self._next + 1 if self._next < self._max else self._min
            if port in self._taken:
                continue
            self._taken.add(port)
            try:
                await bind(self._host, port)
            except OSError as error:
                self._taken.discard(port)
                failure = _judge(error, self._host, port)
            except BaseException:
                self._taken.discard(port)
                raise
            else:
                return Endpoint(self._host, port)
        raise ExhaustedError(
            f"reserve a DNS port on {self._host}: none free in {self._min}-{self._max}"
            f" ({len(self._taken)} used by attachments{f', the last tried: {failure.strerror}' if failure else ''});"
            " widen dns.port_min..dns.port_max, or use a CIDR as dns.listen_addr"
        )

    async def claim(self, endpoint: Endpoint) -> None:
        """Note a port as taken."""
        self._taken.add(endpoint.port)

    async def release(self, endpoint: Endpoint) -> None:
        """Note a port as free."""
        self._taken.discard(endpoint.port)

    async def tidy(self) -> None:
        """Do nothing: of a port nothing stays."""


class AddressEndpoints:
    """An address of a CIDR for each attachment, port 53; on lo for 127/8, else on the dummy interface."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._dummy = None if network.is_loopback else Dummy()
        self._taken: set[str] = set()
        self._hosts = self._cycle()

    async def reserve(self, bind: Bind) -> Endpoint:
        """Bind port 53 of the next free address."""
        for _ in range(min(self._network.num_addresses, MAX_TRIES)):
            host = next(self._hosts)
            if host in self._taken:
                continue
            self._taken.add(host)
            try:
                if self._dummy is not None:
                    await asyncio.to_thread(self._dummy.add, host)
                await bind(host, DNS_PORT)
            except OSError as error:
                await self.release(Endpoint(host, DNS_PORT))
                _judge(error, host, DNS_PORT)
            except BaseException:
                await self.release(Endpoint(host, DNS_PORT))
                raise
            else:
                return Endpoint(host, DNS_PORT)
        raise ExhaustedError(
            f"reserve a DNS address in {self._network}: none free ({len(self._taken)} used by attachments);"
            " use a larger CIDR as dns.listen_addr"
        )

    async def claim(self, endpoint: Endpoint) -> None:
        """Put an address back in place."""
        self._taken.add(endpoint.host)
        if self._dummy is not None:
            await asyncio.to_thread(self._dummy.add, endpoint.host)

    async def release(self, endpoint: Endpoint) -> None:
        """Take an address away again."""
        if self._dummy is not None and endpoint.host in self._taken:
            try:
                await asyncio.to_thread(self._dummy.remove, endpoint.host)
            except NetfenceError as error:
                log.warning("dns_address_not_removed", address=endpoint.host, error=str(error))
        self._taken.discard(endpoint.host)

    async def tidy(self) -> None:
        """Take addresses of the network off the dummy interface that a death left there before or behind their row."""
        if self._dummy is None:
            return
        try:
            removed = await asyncio.to_thread(self._dummy.keep_only, frozenset(self._taken), self._network)
        except NetfenceError as error:
            log.warning("dns_address_not_removed", address=str(self._network), error=str(error))
        else:
            if removed:
                log.info("dns_addresses_tidied", addresses=removed)

    def _cycle(self) -> Iterator[str]:
        """Yield the network's hosts for ever, without its own and the broadcast address of IPv4."""
        size = self._network.num_addresses
        first, last = (1, size - 2) if size > 2 else (0, size - 1)
        if self._network.version == 6:
            last = size - 1
        while True:
            for offset in range(first, min(last, first + (1 << 20)) + 1):
                yield str(self._network[offset])


class Dummy:
    """The dummy interface `netfence0`, made when first needed and removed with its last address. Blocks.

    One thread at a time: between looking for a last address and removing the interface nobody may add one.
    """

    def __init__(self) -> None:
        self._one = threading.Lock()

    def add(self, host: str) -> None:
        """Put an address on it; one that is there already is fine. Raises PreconditionError."""
        try:
            with self._one, rtnl.Rtnl() as netlink:
                index = self._index(netlink)
                netlink.request(rtnl.RTM_NEWADDR, _address(host, index), rtnl.NLM_F_CREATE | rtnl.NLM_F_REPLACE)
        except OSError as error:
            raise _explain(f"add {host} to dummy interface {DUMMY}", error) from error

    def remove(self, host: str) -> None:
        """Take an address off it. Raises PreconditionError."""
        try:
            with self._one, rtnl.Rtnl() as netlink:
                try:
                    link = rtnl.get_link(netlink, DUMMY)
                    netlink.request(rtnl.RTM_DELADDR, _address(host, link.ifindex))
                except OSError as error:
                    if error.errno not in (errno.ENODEV, errno.EADDRNOTAVAIL):
                        raise
                    return
                if not self._own(netlink, link) and link.kind == "dummy":
                    netlink.request(rtnl.RTM_DELLINK, _link(link.ifindex, 0, 0))
        except OSError as error:
            raise _explain(f"remove {host} from dummy interface {DUMMY}", error) from error

    def keep_only(self, hosts: Collection[str], network: Network) -> list[str]:
        """Take all other addresses of `network` off it, and itself if it has none then; return them.

        Nothing of an interface that is no dummy: somebody else made that. Raises PreconditionError.
        """
        removed: list[str] = []
        try:
            with self._one, rtnl.Rtnl() as netlink:
                link = rtnl.get_link(netlink, DUMMY)
                if link.kind != "dummy":
                    return []
                for address in self._own(netlink, link):
                    if address not in network or str(address) in hosts:
                        continue
                    try:
                        netlink.request(rtnl.RTM_DELADDR, _address(str(address), link.ifindex))
                    except OSError as error:
                        if error.errno != errno.EADDRNOTAVAIL:  # of another prefix length: not ours
                            raise
                    else:
                        removed.append(str(address))
                if not self._own(netlink, link):
                    netlink.request(rtnl.RTM_DELLINK, _link(link.ifindex, 0, 0))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise _explain(f"remove addresses from dummy interface {DUMMY}", error) from error
        return removed

    def _own(self, netlink: rtnl.Rtnl, link: rtnl.LinkRecord) -> list[Address]:
        """Return what somebody gave it."""
        found = rtnl.get_addresses(netlink, ifindex=link.ifindex)
        return [ipaddress.ip_address(one.address) for one in found if not _automatic(one.address)]

    def _index(self, netlink: rtnl.Rtnl) -> int:
        try:
            return rtnl.get_link(netlink, DUMMY).ifindex
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
        kind = rtnl.nested(IFLA_LINKINFO, rtnl.attribute(INFO_KIND, b"dummy"))
        name = rtnl.attribute(IFLA_IFNAME, DUMMY.encode() + b"\0")
        netlink.request(rtnl.RTM_NEWLINK, _link(0, IFF_UP, IFF_UP) + name + kind, rtnl.NLM_F_CREATE | rtnl.NLM_F_EXCL)
        return rtnl.get_link(netlink, DUMMY).ifindex


def _link(index: int, flags: int, change: int) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, change)


def _address(host: str, index: int) -> bytes:
    address = ipaddress.ip_address(host)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    # No duplicate address detection: the address must be usable at once, and nobody else is on the link.
    flags = struct.pack("=I", IFA_F_NODAD | IFA_F_NOPREFIXROUTE)
    head = struct.pack("=BBBBI", family, address.max_prefixlen, IFA_F_NODAD, RT_SCOPE_UNIVERSE, index)
    values = (rtnl.attribute(kind, address.packed) for kind in (IFA_LOCAL, IFA_ADDRESS))
    return head + b"".join(values) + rtnl.attribute(IFA_FLAGS, flags)


def _automatic(address: bytes) -> bool:
    """Tell whether the kernel gave the interface this address by itself (IPv6 link-local)."""
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80


def _explain(what: str, error: OSError) -> NetfenceError:
    why = error.strerror or os.strerror(error.errno or 0)
    if error.errno in (errno.EPERM, errno.EACCES):
        return PermissionDeniedError(f"{what}: {why}; needs CAP_NET_ADMIN")
    return PreconditionError(
        f"{what}: {why}; load the kernel module `dummy`, or set dns.listen_addr to an address of this host"
        " or to a CIDR inside 127.0.0.0/8"
    )


def _judge(error: OSError, host: str, port: int) -> OSError:
    """Return the error when another endpoint may do; raise what none of them would cure."""
    if error.errno == errno.EADDRINUSE:
        return error
    what = f"bind DNS server to {host} port {port}: {error.strerror or error}"
    if error.errno == errno.EADDRNOTAVAIL:
        raise PreconditionError(f"{what}; set dns.listen_addr to an address of this host") from error
    if error.errno in (errno.EACCES, errno.EPERM):
        raise PermissionDeniedError(f"{what}; needs CAP_NET_BIND_SERVICE") from error
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise ExhaustedError(f"{what}; raise the limit of open files (LimitNOFILE)") from error
    raise PreconditionError(f"{what}; check dns.listen_addr") from error
