"""Which capabilities which configuration needs, and what is said of those that are missing."""

from __future__ import annotations

import grp
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from netfence import privileges
from netfence.config import Config, Dns
from netfence.dataplane import probe
from netfence.errors import PermissionDeniedError

ALWAYS = ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]


def needed(**config: Any) -> list[str]:
    return [need.capability for need in privileges.needs(Config(**config)) if need.capability not in ALWAYS]


def test_what_every_configuration_needs() -> None:
    assert [need.capability for need in privileges.needs(Config())] == ALWAYS


@pytest.mark.parametrize(
    ("dns", "wanted"),
    [
        ({}, []),
        ({"port_min": 1024}, []),
        ({"port_min": 1023}, ["CAP_NET_BIND_SERVICE"]),
        ({"listen_addr": "127.53.0.0/16"}, ["CAP_NET_BIND_SERVICE"]),
        ({"listen_addr": "127.53.0.1", "port_min": 11000}, []),
    ],
)
def test_ports_that_are_privileged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dns: dict[str, Any], wanted: list[str]
) -> None:
    first = tmp_path / "ip_unprivileged_port_start"
    monkeypatch.setattr(privileges, "_UNPRIVILEGED_PORTS", first)
    first.write_text("1024\n")
    assert needed(dns=dns) == wanted
    first.write_text("53\n")
    assert needed(dns=dns) == []


def test_groups_of_the_socket() -> None:
    own = {os.getegid(), *os.getgroups()}
    ours = grp.getgrgid(os.getegid()).gr_name
    other = next(entry.gr_name for entry in grp.getgrall() if entry.gr_gid not in own)
    assert needed(socket_group=ours) == []
    assert needed(socket_group=other) == ["CAP_CHOWN"]
    assert needed(socket_group=str(os.getegid())) == []
    assert needed(socket_group=str(max(own) + 1)) == ["CAP_CHOWN"]
    assert needed(socket_group="no-such-group") == []  # which is another fault, told elsewhere


@pytest.mark.parametrize(
    ("version", "hard", "wanted"),
    [
        ((5, 10), resource.RLIM_INFINITY, []),
        ((5, 10), 8 << 20, ["CAP_SYS_RESOURCE"]),
        ((5, 11), 8 << 20, []),
    ],
)
def test_locked_memory_on_old_kernels(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], hard: int, wanted: list[str]
) -> None:
    monkeypatch.setattr(probe, "kernel_version", lambda: version)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (hard, hard))
    assert needed() == wanted


def test_each_missing_one_is_told_and_then_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    held = 1 << probe.CAPABILITIES["CAP_NET_ADMIN"]
    monkeypatch.setattr(probe, "effective_capabilities", lambda: held)
    with capture_logs() as logs, pytest.raises(PermissionDeniedError) as raised:
        privileges.require(Config(dns=Dns(port_min=53)))
    lacking = ["CAP_BPF", "CAP_PERFMON", "CAP_NET_BIND_SERVICE"]
    assert str(raised.value) == f"start netfenced: operation not permitted; needs {' and '.join(lacking)}"
    told = [(entry["event"], entry["log_level"], entry["capability"]) for entry in logs]
    optional = ("capability_not_held", "info", "CAP_SYS_ADMIN")
    assert told == [optional, *(("capability_missing", "error", name) for name in lacking)]
    assert logs[-1]["needed_for"] == "bind DNS servers to port 53 (dns.port_min is 53)"
    assert logs[-1]["remedy"].endswith("start as root; or ports from 1024 on")


def test_cap_sys_admin_stands_for_those_that_were_split_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held = sum(1 << probe.CAPABILITIES[name] for name in ("CAP_SYS_ADMIN", "CAP_NET_ADMIN"))
    monkeypatch.setattr(probe, "effective_capabilities", lambda: held)
    with capture_logs() as logs:
        privileges.require(Config())
    assert logs == []
