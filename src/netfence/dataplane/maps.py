"""BPF maps by descriptor: create, pin, look up, update, in batches where the kernel can.

Owns the system calls on maps. Refuses to know what the bytes in them mean (layout.py and plane.py do). Keys and values
are `bytes` of exactly the map's sizes. All calls block; those on maps of maps wait for RCU (milliseconds).
"""

from __future__ import annotations

import ctypes
import enum
import errno
import functools
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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


@functools.cache
def possible_cpus() -> int:
    """Count the CPUs a per-CPU value has room for (kernel: num_possible_cpus)."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii")
    return int(text.strip().replace(",", "-").split("-")[-1]) + 1


class Map:
    """One map by descriptor, which it owns: `close` or garbage collection closes it."""

    def __init__(self, fd: int, spec: MapSpec) -> None:
        self.fd = fd
        self.spec = spec
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

    def inner(self, key: bytes) -> Map | None:
        """Open the map that an array of maps holds at `key`."""
        found = self.lookup(key)
        if found is None or self.spec.inner is None:
            return None
        attr = _IdAttr(int.from_bytes(found[:4], "little" if _LITTLE else "big"), 0, 0)
        return Map(call(Cmd.MAP_GET_FD_BY_ID, attr), self.spec.inner)

    def memory(self) -> mmap.mmap:
        """Map the values of an mmapable array into memory, shared with the kernel."""
        stride = (self.spec.value_size + 7) // 8 * 8
        size = stride * self.spec.max_entries
        page = mmap.PAGESIZE
        return mmap.mmap(self.fd, (size + page - 1) // page * page)


_LITTLE = ctypes.c_uint16(1).value == memoryview(ctypes.c_uint16(1)).cast("B")[0]
