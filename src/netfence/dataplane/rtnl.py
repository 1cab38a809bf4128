"""A small blocking rtnetlink client: requests, dumps, and the few messages this project reads.

Own code instead of pyroute2 for two reasons found by trying 0.9.7: its `bpf` filter does not decode TCA_BPF_ID, so that
a foreign filter in front of ours could not be named, and its blocking calls cannot be made in a thread that runs an
event loop. Besides it costs 12 MB of resident modules. Source of the layouts: include/uapi/linux/{rtnetlink,if_link,
if_addr,pkt_sched,pkt_cls}.h.

Owns sockets, framing, and the kernel's error text. Refuses to know what a link is good for: see target, clsact, watch.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

SOL_NETLINK = 270
_OPT_CAP_ACK, _OPT_EXT_ACK, _OPT_STRICT_CHK = 10, 11, 12
_RECEIVE_BYTES = 1 << 16  # a dump message is at most 32 KiB, a single link without VFs a few
_TIMEOUT_S = 10.0  # the kernel answers at once unless the rtnl lock is held; never hang a pool thread for ever
_DUMP_TRIES = 5  # a dump that changed under our hands (NLM_F_DUMP_INTR) is taken again

NLM_F_REQUEST, NLM_F_ACK, NLM_F_ECHO, NLM_F_DUMP = 0x1, 0x4, 0x8, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
_NLM_F_DUMP_INTR, _NLM_F_ACK_TLVS = 0x10, 0x200
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLMSGERR_ATTR_MSG = 1
_NLA_NESTED, _NLA_TYPE_MASK = 0x8000, 0x3FFF

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46

_IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_EXT_MASK, _IFLA_XDP, _IFLA_ALT_IFNAME = 3, 10, 18, 29, 43, 53
XDP_SKB, XDP_DRV, XDP_HW = 1 << 1, 1 << 2, 1 << 3  # XDP_FLAGS_SKB_MODE ...: in the stack, the driver, the NIC
_XDP_PROG_IDS = {5: XDP_DRV, 6: XDP_SKB, 7: XDP_HW}  # IFLA_XDP_DRV_PROG_ID ...
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND = 1, 2, 4
_EXT_SKIP_STATS = 1 << 3  # RTEXT_FILTER_SKIP_STATS
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFNAME_MAX = 15

_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")


class NetlinkError(OSError):
    """The kernel refused a request; `strerror` carries its own explanation when it gave one."""


class Message(NamedTuple):
    """One netlink message without its header."""

    type: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class LinkRecord:
    """One network interface as rtnetlink tells it; `kind` "" means no IFLA_INFO_KIND, `master` 0 none."""

    family: int
    ifindex: int
    name: str
    arphrd: int
    kind: str
    slave_kind: str
    master: int
    info_data: bytes


@dataclass(frozen=True, slots=True)
class AddressRecord:
    """One interface address, packed in network order (4 or 16 bytes)."""

    ifindex: int
    address: bytes


class Rtnl:
    """One request socket; not shared between threads. A context manager."""

    def __init__(self) -> None:
        """Open the socket in the calling thread's network namespace."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sequence = 0
        try:
            for option in (_OPT_CAP_ACK, _OPT_EXT_ACK, _OPT_STRICT_CHK):
                self._socket.setsockopt(SOL_NETLINK, option, 1)
            self._socket.settimeout(_TIMEOUT_S)
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Close the socket."""
        self._socket.close()

    def request(self, kind: int, payload: bytes, flags: int = 0) -> list[Message]:
        """Send one request and wait for its acknowledgement; return what came before it. Raises NetlinkError."""
        self._send(kind, NLM_F_REQUEST | NLM_F_ACK | flags, payload)
        return list(self._replies())

    def dump(self, kind: int, payload: bytes) -> list[Message]:
        """Ask for all objects of a kind; raises NetlinkError, also when the table never held still."""
        for _ in range(_DUMP_TRIES):
            self._send(kind, NLM_F_REQUEST | NLM_F_DUMP, payload)
            try:
                return list(self._replies())
            except InterruptedError:
                continue
        raise NetlinkError(errno.EBUSY, f"the table changed during {_DUMP_TRIES} dumps")

    def _send(self, kind: int, flags: int, payload: bytes) -> None:
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(payload), kind, flags, self._sequence, 0)
        self._socket.sendto(header + payload, (0, 0))

    def _replies(self) -> Iterator[Message]:
        interrupted = False
        while True:
            data, _, flags, sender = self._socket.recvmsg(_RECEIVE_BYTES)
            if sender[0] != 0:  # only the kernel's own port number is believed
                continue
            if flags & socket.MSG_TRUNC:
                raise NetlinkError(errno.EMSGSIZE, "a netlink message is larger than our buffer")
            for kind, message_flags, sequence, payload in _messages(data):
                if sequence != self._sequence:
                    continue
                interrupted = interrupted or bool(message_flags & _NLM_F_DUMP_INTR)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    _raise_if_error(kind, message_flags, payload)
                    if interrupted:
                        raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
                    return
                yield Message(kind, payload)


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            return
        yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
        offset += length + 3 & ~3


def split(data: bytes) -> Iterator[Message]:
    """Split a received datagram into messages (for sockets that listen to groups)."""
    for kind, _, _, payload in _messages(data):
        yield Message(kind, payload)


def _raise_if_error(kind: int, flags: int, payload: bytes) -> None:
    code = -struct.unpack_from("=i", payload)[0] if len(payload) >= struct.calcsize("=i") else 0
    if code <= 0:
        return
    # NLMSG_ERROR carries the request's header behind the code (CAP_ACK: the header only), NLMSG_DONE does not.
    text = attributes(payload[4 + (_HEADER.size if kind == _NLMSG_ERROR else 0) :]) if flags & _NLM_F_ACK_TLVS else {}
    reason = text.get(_NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode("utf-8", "replace").strip()
    raise NetlinkError(code, f"{os.strerror(code)}: {reason}" if reason else os.strerror(code))


def attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute, padded to four bytes."""
    return _ATTR.pack(_ATTR.size + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *values: bytes) -> bytes:
    """Encode an attribute of attributes."""
    return attribute(kind | _NLA_NESTED, b"".join(values))


def attributes(data: bytes) -> dict[int, bytes]:
    """Decode a run of attributes; of a type that comes twice the last one counts."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + _ATTR.size <= len(data):
        length, kind = _ATTR.unpack_from(data, offset)
        if length < _ATTR.size or offset + length > len(data):
            break
        found[kind & _NLA_TYPE_MASK] = data[offset + _ATTR.size : offset + length]
        offset += length + 3 & ~3
    return found


def text(value: bytes) -> str:
    """Decode a NUL-ended string attribute."""
    return value.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def parse_link(payload: bytes) -> LinkRecord:
    """Decode a RTM_NEWLINK or RTM_DELLINK."""
    family, arphrd, ifindex, _, _ = _IFINFO.unpack_from(payload)
    found = attributes(payload[_IFINFO.size :])
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    return LinkRecord(
        family=family,
        ifindex=ifindex,
        name=text(found.get(_IFLA_IFNAME, b"")),
        arphrd=arphrd,
        kind=text(info.get(_INFO_KIND, b"")),
        slave_kind=text(info.get(_INFO_SLAVE_KIND, b"")),
        master=struct.unpack("=I", found[_IFLA_MASTER])[0] if _IFLA_MASTER in found else 0,
        info_data=info.get(_INFO_DATA, b""),
    )


def parse_address(payload: bytes) -> AddressRecord:
    """Decode a RTM_NEWADDR or RTM_DELADDR: the local address, not a point-to-point peer's."""
    _, _, _, _, ifindex = _IFADDR.unpack_from(payload)
    found = attributes(payload[_IFADDR.size :])
    return AddressRecord(ifindex, found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS, b""))


def get_link(rtnl: Rtnl, which: str | int) -> LinkRecord:
    """Read one interface by name (also an alternative name) or index; raises NetlinkError ENODEV."""
    payload = attribute(_IFLA_EXT_MASK, struct.pack("=I", _EXT_SKIP_STATS))
    index = which if isinstance(which, int) else 0
    if isinstance(which, str):
        name = os.fsencode(which)
        payload += attribute(_IFLA_IFNAME if len(name) <= _IFNAME_MAX else _IFLA_ALT_IFNAME, name + b"\0")
    (message, *_) = rtnl.request(RTM_GETLINK, _IFINFO.pack(0, 0, index, 0, 0) + payload)
    return parse_link(message.payload)


def get_xdp_modes(rtnl: Rtnl, ifindex: int) -> dict[int, int]:
    """Read an interface's XDP programs: XDP_DRV, XDP_SKB or XDP_HW → program id; raises NetlinkError ENODEV."""
    payload = attribute(_IFLA_EXT_MASK, struct.pack("=I", _EXT_SKIP_STATS))
    (message, *_) = rtnl.request(RTM_GETLINK, _IFINFO.pack(0, 0, ifindex, 0, 0) + payload)
    found = attributes(attributes(message.payload[_IFINFO.size :]).get(_IFLA_XDP, b""))
    return {mode: struct.unpack("=I", found[kind])[0] for kind, mode in _XDP_PROG_IDS.items() if kind in found}


def get_xdp_programs(rtnl: Rtnl, ifindex: int) -> list[int]:
    """Read the ids of an interface's XDP programs: the driver's, the stack's, the NIC's; raises NetlinkError ENODEV."""
    return list(get_xdp_modes(rtnl, ifindex).values())


def get_links(rtnl: Rtnl) -> list[LinkRecord]:
    """Read all interfaces of this network namespace."""
    payload = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(_IFLA_EXT_MASK, struct.pack("=I", _EXT_SKIP_STATS))
    return [parse_link(message.payload) for message in rtnl.dump(RTM_GETLINK, payload)]


def get_addresses(rtnl: Rtnl, family: int = 0, ifindex: int = 0) -> list[AddressRecord]:
    """Read interface addresses, of one family and one interface where given (filtered by the kernel)."""
    found = rtnl.dump(RTM_GETADDR, _IFADDR.pack(family, 0, 0, 0, ifindex))
    return [record for message in found if (record := parse_address(message.payload)).address]
