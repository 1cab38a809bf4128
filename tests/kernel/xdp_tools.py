"""What the tests of the XDP hook share: a fence in a mode of our choice, and programs for the workload's own hooks."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from harness.fence import Attachment, Fence
from harness.netns import NetNs
from netfence.dataplane import links, rawprog
from netfence.dataplane.hooks import xdp
from netfence.dataplane.links import AttachType
from netfence.dataplane.rawprog import ProgType

XDP_MTU = 3000  # a veth wants a frame to fit into a page, with some room around it
SIOCETHTOOL = 0x8946
XDP_PASS = 2
BPF_REDIRECT, BPF_SKB_VLAN_PUSH, BPF_SKB_STORE_BYTES = 23, 18, 9  # enum bpf_func_id
MARK, QUEUE_MAPPING = 8, 12  # offsets in struct __sk_buff
TO_MAC, TO_IPV4 = 0, 30  # offsets in a frame


@contextlib.contextmanager
def generic_only() -> Iterator[None]:
    """Attach in generic mode where there would be native: no device here has the former alone."""
    with patch.object(xdp, "MECHANISMS", {xdp.GENERIC: xdp.MECHANISMS[xdp.GENERIC]}):
        yield


@contextlib.contextmanager
def fenced_by_xdp(fence: Fence, name: str, mode: str, **static: Any) -> Iterator[Attachment]:
    """Fence an interface by XDP, `mode` "native" or "generic"."""
    with generic_only() if mode == "generic" else contextlib.nullcontext():
        attachment = fence.interface(name, xdp=True, **static)
    fence.topology.queues(name)
    with attachment:
        assert attachment.mechanism == f"xdp-{mode}"
        yield attachment


@contextlib.contextmanager
def foreign_xdp(netns: NetNs, ifname: str, mode: int = xdp.NATIVE) -> Iterator[int]:
    """Have somebody else's XDP program on an interface; give its id."""
    with contextlib.ExitStack() as stack:
        program = rawprog.load_raw(
            ProgType.XDP, rawprog.returning(XDP_PASS), expected_attach_type=AttachType.XDP, name="somebody"
        )
        stack.callback(os.close, program)
        with netns.inside():
            link = links.link_create_xdp(program, socket.if_nametoindex(ifname), mode)
        stack.callback(os.close, link)
        yield links.prog_info(program).id


def _move(register: int, value: int) -> bytes:
    return rawprog.insn(0xB7, dst=register, imm=value)


def redirecting(ifindex: int) -> bytes:
    """Assemble a TC program that sends every packet out of another interface, as `mirred egress redirect` does."""
    return _move(1, ifindex) + _move(2, 0) + rawprog.insn(0x85, imm=BPF_REDIRECT) + rawprog.EXIT


def queueing(queue: int) -> bytes:
    """Assemble a TC program that chooses the send queue."""
    return _move(2, queue) + rawprog.insn(0x63, dst=1, src=2, off=QUEUE_MAPPING) + _move(0, -1) + rawprog.EXIT


def queueing_by_mark() -> bytes:
    """Assemble a TC program that sends each packet by the queue that its mark names."""
    load = rawprog.insn(0x61, dst=2, src=1, off=MARK)
    return load + rawprog.insn(0x63, dst=1, src=2, off=QUEUE_MAPPING) + _move(0, -1) + rawprog.EXIT


def _storing(offset: int, data: bytes) -> bytes:
    """Write up to 8 bytes of the packet whose context is in r6."""
    words = struct.unpack("=ii", data.ljust(8, b"\0"))
    insns = b"".join(rawprog.insn(0x62, dst=10, off=at, imm=word) for at, word in zip((-8, -4), words, strict=True))
    insns += rawprog.insn(0xBF, dst=1, src=6) + _move(2, offset)
    insns += rawprog.insn(0xBF, dst=3, src=10) + rawprog.insn(0x07, dst=3, imm=-8)
    return insns + _move(4, len(data)) + _move(5, 0) + rawprog.insn(0x85, imm=BPF_SKB_STORE_BYTES)


def turning(mac: bytes, ipv4: bytes, ifindex: int, *, queue: int) -> bytes:
    """Assemble a TC program that sends every frame on by another interface, to other addresses, its queue as mark."""
    changes = _storing(TO_MAC, mac) + _storing(TO_IPV4, ipv4)
    mark = _move(2, queue) + rawprog.insn(0x63, dst=6, src=2, off=MARK)
    return rawprog.insn(0xBF, dst=6, src=1) + changes + mark + redirecting(ifindex)


def tagging(protocol: int, tci: int) -> bytes:
    """Assemble a TC program that puts a VLAN tag out of band (`protocol`: host order); one there goes into the data."""
    (network,) = struct.unpack("=H", struct.pack("!H", protocol))
    call = _move(2, network) + _move(3, tci) + rawprog.insn(0x85, imm=BPF_SKB_VLAN_PUSH)
    return call + _move(0, -1) + rawprog.EXIT
