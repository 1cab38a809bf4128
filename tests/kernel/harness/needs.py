"""Skips that are earned (style.md 17): each names what it waits for, and fails where that is there.

@needs("tcx")                        # skipped before Linux 6.6; from 6.6 on the test runs, and fails if tcx is missing
except ...: without_link_kind("vlan")  # `ip` refused to make one: skipped where the kernel's own evidence says the same

`earned` is what tests/kernel/conftest.py asks of every skip of a run: one without such a reason is a failure.
"""

from __future__ import annotations

import functools
import gzip
import os
import re
from pathlib import Path
from typing import NoReturn

import pytest

from netfence.dataplane import probe

FIRST_KERNEL = {
    **probe.FIRST_KERNEL,
    # used by tests alone:
    "BPF_F_PREORDER of cgroup links": "6.16",
    "BIG TCP over ipv4": "6.3",
    "BIG TCP over ipv6": "5.19",
    "channels of a veth": "5.15",
    "IPv6 SYN-ACKs of cgroups": "6.12",  # before, the kernel asks no program about them; not seen between 6.2 and 6.11
    "UDP segments that a veth takes whole": "5.11",
    "test runs of cgroup programs": "6.14",  # before, they have no `data_end`: every packet looks truncated
}

LINK_KINDS = {
    "bond": ("BONDING", "bonding"),
    "dummy": ("DUMMY", "dummy"),
    "gre": ("NET_IPGRE", "ip_gre"),
    "ifb": ("IFB", "ifb"),
    "ipvlan": ("IPVLAN", "ipvlan"),
    "macvtap": ("MACVTAP", "macvtap"),
    "vlan": ("VLAN_8021Q", "8021q"),
    "vrf": ("NET_VRF", "vrf"),
    "wireguard": ("WIREGUARD", "wireguard"),
}
"""Kinds of links that not every kernel is built with: option of the kernel's configuration, name of the module."""

NO_NIC = "this machine has no NIC: nothing in /sys/class/net has a device"
IN_GUEST = "this is a guest of ci/vm.py: it has no network to fetch a kernel from, nor a place to keep it"
_BUILT_WITHOUT = re.compile(r"this kernel was built without CONFIG_\w+\b.*")


def needs(feature: str) -> pytest.MarkDecorator:
    """Skip the test on kernels before the feature's first; KeyError for a feature without one."""
    return pytest.mark.skipif(is_before(feature), reason=_waits(feature))


def wait_for_kernel(feature: str) -> None:
    """Do the same from inside a test, for what only some of its parameters need."""
    if is_before(feature):
        pytest.skip(_waits(feature))


def is_before(feature: str) -> bool:
    """Tell whether the running kernel is older than the feature's first; KeyError for a feature without one."""
    return probe.kernel_version() < version(FIRST_KERNEL[feature])


def _waits(feature: str) -> str:
    return f"{feature}: waits for kernel {FIRST_KERNEL[feature]}"


def version(text: str) -> tuple[int, int]:
    """Read "6.6"."""
    major, minor = text.split(".")
    return int(major), int(minor)


def without_link_kind(kind: str) -> NoReturn:
    """Skip because links of that kind cannot be made; fail where the kernel has them, or gives no evidence."""
    option, module = LINK_KINDS[kind]
    configuration, modules = _configuration(), _modules()
    configured = configuration.get(option, "n") if configuration else None
    if configured == "n" or (configured is None and modules and module not in modules):
        none = "" if modules else " and has no modules"
        pytest.skip(f"this kernel was built without CONFIG_{option}{none}")
    if configured is None and not modules:
        pytest.fail(f"no {kind} links, and nothing tells why: neither a configuration nor modules of {_release()}")
    found = f"CONFIG_{option}={configured}" if configured else f"the module {module}"
    pytest.fail(f"no {kind} links, although this kernel has {found}; are its modules at /lib/modules/{_release()}?")


def without_nic() -> NoReturn:
    """Skip because the machine has no network hardware; fail where sysfs knows better."""
    found = [each.name for each in Path("/sys/class/net").iterdir() if (each / "device").exists()]
    if found:
        pytest.fail(f"no link without a kind, although {', '.join(found)} is hardware")
    pytest.skip(NO_NIC)


def not_in_guest() -> None:
    """Skip where a machine would have to run in a machine; `userspace` leaves the test out of most such runs before."""
    if _is_guest():
        pytest.skip(IN_GUEST)


def earned(reason: str) -> bool:
    """Tell whether the reason is one of ours, and true on the running kernel."""
    feature, _, _ = reason.partition(":")
    if feature in FIRST_KERNEL:
        return reason == _waits(feature) and is_before(feature)
    if reason == IN_GUEST:
        return _is_guest()
    return reason == NO_NIC or _BUILT_WITHOUT.fullmatch(reason) is not None


def _is_guest() -> bool:
    """Tell whether virtme-ng, which ci/vm.py boots with, started this kernel."""
    return "virtme_" in Path("/proc/cmdline").read_text()


def _release() -> str:
    return os.uname().release


@functools.cache
def _configuration() -> dict[str, str]:
    """Read the running kernel's configuration: option → "y", "m", "n" or a value; empty when it is told nowhere."""
    for path in (
        Path("/proc/config.gz"),
        Path(f"/boot/config-{_release()}"),
        Path(f"/lib/modules/{_release()}/config"),
    ):
        if path.exists():
            data = path.read_bytes()
            return _parsed((gzip.decompress(data) if path.suffix == ".gz" else data).decode())
    return {}


def _parsed(text: str) -> dict[str, str]:
    found = dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE))
    return {**dict.fromkeys(re.findall(r"^# CONFIG_(\w+) is not set$", text, re.MULTILINE), "n"), **found}


@functools.cache
def _modules() -> frozenset[str]:
    """Name the modules that the running kernel has, in files or built in; empty when there is no such directory."""
    directory = Path(f"/lib/modules/{_release()}")
    lists = [directory / "modules.dep", directory / "modules.builtin"]
    text = "\n".join(each.read_text() for each in lists if each.exists())
    return frozenset(re.findall(r"([^/\s]+)\.ko(?:\.\w+)?(?=:|\s|$)", text, re.MULTILINE))
