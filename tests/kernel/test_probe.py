"""probe on the running kernel: features by its version, capabilities by dropping them, mounts by making them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.deadline import SLOWNESS
from hooktools import bpffs, open_descriptors
from netfence.dataplane import links, probe, rawprog
from netfence.dataplane.rawprog import Helper, ProgType
from netfence.errors import PermissionDeniedError, PreconditionError


def first(name: str) -> tuple[int, int]:
    major, minor = probe.FIRST_KERNEL[name].split(".")
    return int(major), int(minor)


@pytest.mark.parametrize("name", list(probe.FIRST_KERNEL))
def test_every_feature_is_as_old_as_we_say(name: str) -> None:
    """Each way: a kernel that should have it has it, one that should not says which will."""
    verdict = probe.kernel_features()[name]
    if probe.kernel_version() >= first(name):
        assert verdict == "yes"
        assert probe.supports(name)
        probe.require_feature(name, "try it")
    else:
        assert verdict.startswith("no: ")
        assert verdict.endswith(f", first kernel {probe.FIRST_KERNEL[name]}")
        with pytest.raises(PreconditionError, match=f"try it: .* lacks {name}; use Linux {probe.FIRST_KERNEL[name]}"):
            probe.require_feature(name, "try it")


def test_probing_is_cheap_leaves_nothing_and_happens_once() -> None:
    probe.kernel_features.cache_clear()
    before = open_descriptors()
    start = time.thread_time()
    found = probe.kernel_features()
    assert time.thread_time() - start < 0.020 * SLOWNESS
    assert open_descriptors() == before
    assert probe.kernel_features() is found


def test_a_lacking_feature_names_its_first_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "kernel_features", lambda: {"tcx": "no: invalid argument, first kernel 6.6"})
    with pytest.raises(PreconditionError, match=r"attach to veth3: kernel \S+ lacks tcx; use Linux 6\.6 or later"):
        probe.require_feature("tcx", "attach to veth3")


def test_status_tells_it_all() -> None:
    with bpffs() as directory:
        told = probe.features(directory / "netfence")
        assert told["kernel"] == os.uname().release
        assert told["bpffs"] == "yes"
        assert set(told) >= {"hz", "cap_bpf", "cap_net_admin", "cap_sys_admin", "cap_perfmon", *probe.FIRST_KERNEL}
        assert all(isinstance(value, str) for value in told.values())


def test_hz_is_the_rate_of_jiffies() -> None:
    prog_fd = rawprog.load_raw(ProgType.SCHED_CLS, rawprog.calling(Helper.JIFFIES64))
    try:
        start_s, start = time.monotonic(), links.prog_test_run(prog_fd, bytes(14)).retval
        while time.monotonic() < start_s + 0.2:
            pass
        ticks = (links.prog_test_run(prog_fd, bytes(14)).retval - start) & 0xFFFFFFFF
        rate = ticks / (time.monotonic() - start_s)
        assert probe.hz() in (100, 250, 300, 1000)
        assert abs(rate - probe.hz()) < 0.15 * probe.hz()
    finally:
        os.close(prog_fd)


WITHOUT_CAPABILITIES = """
from netfence.dataplane import probe
from netfence.errors import PermissionDeniedError
print(probe.missing_capabilities())
try: probe.require_capabilities("start netfenced")
except PermissionDeniedError as error: print(error)
print(probe.kernel_features()["ringbuf"])
try: probe.require_feature("cgroup_link", "attach")
except PermissionDeniedError as error: print(error)
"""


def run_with(capabilities: str) -> list[str]:
    command = [
        "setpriv",
        f"--bounding-set={capabilities}",
        "--inh-caps=-all",
        sys.executable,
        "-c",
        WITHOUT_CAPABILITIES,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_missing_capabilities_are_named() -> None:
    lines = run_with("-all")
    assert lines == [
        "['CAP_BPF', 'CAP_NET_ADMIN']",
        "start netfenced: operation not permitted; needs CAP_BPF and CAP_NET_ADMIN",
        "no: not permitted, needs CAP_BPF and CAP_NET_ADMIN",
        "attach: cgroup_link not permitted, needs CAP_BPF and CAP_NET_ADMIN",
    ]


def test_sys_admin_stands_for_bpf() -> None:
    assert run_with("-all,+sys_admin")[0] == "['CAP_NET_ADMIN']"
    assert run_with("-all,+bpf,+net_admin")[0] == "[]"


def test_bpffs_is_told_from_other_directories(tmp_path: Path) -> None:
    with bpffs() as directory:
        for path in (directory, directory / "netfence", directory / "not" / "yet"):
            assert probe.on_bpffs(path)
            probe.require_bpffs(path)
    with pytest.raises(PreconditionError, match="mount -t bpf bpf /sys/fs/bpf"):
        probe.require_bpffs(tmp_path / "netfence")


def test_mount_points_with_blanks_are_read() -> None:
    """The kernel writes a blank in a mount point as backslash 040."""
    with bpffs() as directory:
        place = directory / "a b"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True)
        try:
            assert probe.mounts()[place.stat().st_dev] == ("tmpfs", str(place))
        finally:
            subprocess.run(["umount", str(place)], check=True)


def test_a_bind_mount_of_a_part_does_not_hide_the_whole(tmp_path: Path) -> None:
    with bpffs() as directory:
        part = directory / "part"
        part.mkdir()
        subprocess.run(["mount", "--bind", str(part), str(tmp_path)], check=True)
        try:
            assert probe.mounts()[tmp_path.stat().st_dev] == ("bpf", str(directory))
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)


def test_memlock_is_raised_only_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.setattr(probe, "kernel_version", lambda: (5, 11))
    probe.raise_memlock("start")
    monkeypatch.setattr(probe, "kernel_version", lambda: (5, 10))
    with pytest.raises(PermissionDeniedError, match="needs CAP_SYS_RESOURCE"):
        probe.raise_memlock("start")
