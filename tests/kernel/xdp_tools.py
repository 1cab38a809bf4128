"""What the tests of the XDP hook share: a fence in a mode of our choice, and programs for the workload's own hooks."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from harness.fence import Attachment, Fence
from netfence.dataplane import rawprog
from netfence.dataplane.hooks import xdp

XDP_MTU = 3000  # a veth wants a frame to fit into a page, with some room around it
SIOCETHTOOL = 0x8946
BPF_REDIRECT, BPF_SKB_VLAN_PUSH = 23, 18  # enum bpf_func_id
QUEUE_MAPPING = 12  # offset in struct __sk_buff


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
    with attachment:
        assert attachment.mechanism == f"xdp-{mode}"
        yield attachment


def _move(register: int, value: int) -> bytes:
    return rawprog.insn(0xB7, dst=register, imm=value)


def redirecting(ifindex: int) -> bytes:
    """Assemble a TC program that sends every packet out of another interface, as `mirred egress redirect` does."""
    return _move(1, ifindex) + _move(2, 0) + rawprog.insn(0x85, imm=BPF_REDIRECT) + rawprog.EXIT


def queueing(queue: int) -> bytes:
    """Assemble a TC program that chooses the send queue."""
    return _move(2, queue) + rawprog.insn(0x63, dst=1, src=2, off=QUEUE_MAPPING) + _move(0, -1) + rawprog.EXIT


def tagging(protocol: int, tci: int) -> bytes:
    """Assemble a TC program that puts a VLAN tag out of band (`protocol`: host order); one there goes into the data."""
    (network,) = struct.unpack("=H", struct.pack("!H", protocol))
    call = _move(2, network) + _move(3, tci) + rawprog.insn(0x85, imm=BPF_SKB_VLAN_PUSH)
    return call + _move(0, -1) + rawprog.EXIT
