"""BPF maps by descriptor: create, pin, look up, update, in batches where the kernel can.

Owns the system calls on maps. Refuses to know what the bytes in them mean (layout.py and plane.py do). Keys and values
are `bytes` of exactly the map's sizes. All calls block; those on maps of maps wait for RCU (milliseconds).
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import functools
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from netfence.dataplane.links import obj_get, obj_pin
from netfence.dataplane.sysbpf import Cmd, call

BPF_ANY = 0
BPF_NOEXIST = 1
BPF_F_NO_PREALLOC = 1
BPF_F_MMAPABLE = 1 << 10
ENOTSUPP = 524  # kernel-internal, yet what 5.10 answers to batches on LPM tries

BATCH = 4096
"""Elements per system call in batches: bounds what one call pins down, costs nothing (measured flat from 1k on)."""


class MapType(enum.IntEnum):
    """`enum bpf_map_type`."""

    HASH = 1
    ARRAY = 2
    PERCPU_ARRAY = 6
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    CGROUP_STORAGE = 19
    RINGBUF = 27


@dataclass(frozen=True, slots=True)
class MapSpec:
    """What BPF_MAP_CREATE needs; sizes in bytes."""

    name: str
    type: MapType
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0
    inner: MapSpec | None = None


class _CreateAttr(ctypes.Structure):
    _fields_ = [
        ("map_type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("numa_node", ctypes.c_uint32),
        ("map_name", ctypes.c_char * 16),
    ]


class _ElementAttr(ctypes.Structure):
    _fields_ = [
        ("map_fd", ctypes.c_uint64),
        ("key", ctypes.c_char_p),
        ("value", ctypes.c_char_p),
        ("flags", ctypes.c_uint64),
    ]


class _BatchAttr(ctypes.Structure):
    _fields_ = [
        ("in_batch", ctypes.c_uint64),
        ("out_batch", ctypes.c_uint64),
        ("keys", ctypes.c_char_p),
        ("values", ctypes.c_char_p),
        ("count", ctypes.c_uint32),
        ("map_fd", ctypes.c_uint32),
        ("elem_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    ]


class _IdAttr(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint32), ("next_id", ctypes.c_uint32), ("open_flags", ctypes.c_uint32)]


class _InfoAttr(ctypes.Structure):
    _fields_ = [("bpf_fd", ctypes.c_uint32), ("info_len", ctypes.c_uint32), ("info", ctypes.c_uint64)]


_INFO_BYTES = 512  # more than `struct bpf_map_info` of 6.18; the kernel wants what it does not know to be zero


@functools.cache
def possible_cpus() -> int:
    """Count the CPUs a per-CPU value has room for (kernel: num_possible_cpus)."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii")
    return int(text.strip().replace(",", "-").split("-")[-1]) + 1


def u32(value: int) -> bytes:
    """Pack a number as 32-bit keys and values have it: native byte order."""
    return value.to_bytes(4, sys.byteorder)


class Map:
    """One map by descriptor, which it owns: `close` or garbage collection closes it.

    `pin` is where an array of maps is pinned; the maps in it are pinned beside it (`pin_inner`).
    """

    def __init__(self, fd: int, spec: MapSpec, pin: Path | None = None) -> None:
        self.fd, self.spec, self._pin = fd, spec, pin
        cpus = possible_cpus() if spec.type == MapType.PERCPU_ARRAY else 1
        self._value_bytes = (spec.value_size + 7) // 8 * 8 * cpus

    @classmethod
    def create(cls, spec: MapSpec) -> Map:
        """Make the map; raises OSError (EPERM: capability, EINVAL: kernel too old, ENOMEM)."""
        inner_fd = 0
        inner = None
        if spec.inner is not None:
            inner = cls.create(spec.inner)
            inner_fd = inner.fd
        name = spec.name.encode()[:15]
        attr = _CreateAttr(spec.type, spec.key_size, spec.value_size, spec.max_entries, spec.flags, inner_fd, 0, name)
        fd = call(Cmd.MAP_CREATE, attr)
        os.set_inheritable(fd, False)
        if inner is not None:
            inner.close()
        return cls(fd, spec)

    @classmethod
    def pinned(cls, pin: Path) -> Map:
        """Open a map whose spec only the kernel knows; raises OSError."""
        return cls._known(obj_get(pin), pin)

    @classmethod
    def _known(cls, fd: int, pin: Path | None = None) -> Map:
        info = _info(fd)
        kind, _, key_size, value_size, entries, flags = struct.unpack_from("=IIIIII", info)
        name = info[24:40].split(b"\0", 1)[0].decode("ascii", "replace")
        return cls(fd, MapSpec(name, MapType(kind), key_size, value_size, entries, flags), pin)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; the map lives on where it is pinned or used."""
        fd, self.fd = getattr(self, "fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def lookup(self, key: bytes) -> bytes | None:
        """Return the value (all CPUs' values, concatenated, of a per-CPU map), or None."""
        value = ctypes.create_string_buffer(self._value_bytes)
        attr = _ElementAttr(self.fd, key, ctypes.cast(value, ctypes.c_char_p), 0)
        try:
            call(Cmd.MAP_LOOKUP_ELEM, attr)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return value.raw

    def update(self, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
        """Set one element; raises OSError (E2BIG, ENOSPC: full; ENOMEM)."""
        call(Cmd.MAP_UPDATE_ELEM, _ElementAttr(self.fd, key, value, flags))

    def delete(self, key: bytes) -> bool:
        """Delete one element; tell whether it was there."""
        try:
            call(Cmd.MAP_DELETE_ELEM, _ElementAttr(self.fd, key, None, 0))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def keys(self) -> Iterator[bytes]:
        """Walk the keys; elements added or deleted meanwhile may be missed or seen twice."""
        key: bytes | None = None
        buffer = ctypes.create_string_buffer(self.spec.key_size)
        while True:
            try:
                call(Cmd.MAP_GET_NEXT_KEY, _ElementAttr(self.fd, key, ctypes.cast(buffer, ctypes.c_char_p), 0))
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                raise
            key = buffer.raw
            yield key

    def update_batch(self, keys: bytes, values: bytes) -> None:
        """Set many elements: concatenated keys and as many concatenated values.

        One system call per `BATCH`; one by one on kernels without batches for this type. Raises OSError; what was set
        before the failure stays set.
        """
        key_size, value_size = self.spec.key_size, self.spec.value_size
        total = len(keys) // key_size
        for start in range(0, total, BATCH):
            end = min(start + BATCH, total)
            part_keys, part_values = (
                keys[start * key_size : end * key_size],
                values[start * value_size : end * value_size],
            )
            attr = _BatchAttr(0, 0, part_keys, part_values, end - start, self.fd, 0, 0)
            try:
                call(Cmd.MAP_UPDATE_BATCH, attr)
            except OSError as error:
                if error.errno not in (ENOTSUPP, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                for at in range(end - start):
                    self.update(
                        part_keys[at * key_size : (at + 1) * key_size],
                        part_values[at * value_size : (at + 1) * value_size],
                    )

    def inner_id(self, key: bytes) -> int:
        """Return the id of the map that an array of maps holds at `key`, 0 for none; no other has it while it lives."""
        found = self.lookup(key)
        return int.from_bytes(found[:4], sys.byteorder) if found is not None else 0

    def inner(self, key: bytes, number: int | None = None) -> Map | None:
        """Open the map that an array of maps holds at `key`: by its pin, or by its id, which needs CAP_SYS_ADMIN.

        `number` is its id where that is known.
        """
        number = self.inner_id(key) if number is None else number
        if not number:
            return None
        fd = self._pinned_inner(key, number)
        if fd < 0:
            fd = call(Cmd.MAP_GET_FD_BY_ID, _IdAttr(number, 0, 0))
        return Map(fd, self.spec.inner) if self.spec.inner else Map._known(fd)

    def _pinned_inner(self, key: bytes, number: int) -> int:
        """Open the map with this id by its pin; -1 where there is none, or of an earlier one."""
        if self._pin is None:
            return -1
        try:
            fd = obj_get(_beside(self._pin, key))
        except FileNotFoundError:
            return -1
        if struct.unpack_from("=II", _info(fd))[1] == number:
            return fd
        os.close(fd)
        return -1

    def pin_inner(self, key: bytes, inner: Map) -> None:
        """Pin a map that is to be put in at `key`, instead of the one before it.

        Where that fails, because the bpffs is read-only or full, it is opened by its id.
        """
        if self._pin is not None:
            place = _beside(self._pin, key)
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)
                obj_pin(inner.fd, place)

    def memory(self) -> mmap.mmap:
        """Map the values of an mmapable array into memory, shared with the kernel."""
        stride = (self.spec.value_size + 7) // 8 * 8
        size = stride * self.spec.max_entries
        page = mmap.PAGESIZE
        return mmap.mmap(self.fd, (size + page - 1) // page * page)


def _info(fd: int) -> bytes:
    """Read a map's `struct bpf_map_info`."""
    info = ctypes.create_string_buffer(_INFO_BYTES)
    call(Cmd.OBJ_GET_INFO_BY_FD, _InfoAttr(fd, _INFO_BYTES, ctypes.addressof(info)))
    return info.raw


def _beside(pin: Path, key: bytes) -> Path:
    return pin.with_name(f"{pin.name}-{int.from_bytes(key, sys.byteorder)}")
