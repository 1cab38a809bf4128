"""Which capabilities netfenced needs with this configuration on this kernel, and what for.

Owns what a start says about those that are missing. What the process has is `dataplane.probe`'s to find out.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from netfence.api.unix_socket import group_id
from netfence.config import Config
from netfence.dataplane import probe
from netfence.endpoints import DNS_PORT
from netfence.errors import InvalidError

_UNPRIVILEGED_PORTS = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")

# What is lost without those that the service does without.
OPTIONAL = {"CAP_SYS_ADMIN": "foreign programs in front of ours are told by number, without name"}

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Need:
    """A capability and what it is for; `instead`: what else gives the same."""

    capability: str
    needed_for: str
    instead: str = ""


def needs(config: Config) -> Iterator[Need]:
    """Tell every capability that is needed, held or not."""
    for capability in probe.ALWAYS_NEEDED:
        yield Need(capability, probe.PURPOSES[capability])
    if probe.charges_memlock() and resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] != resource.RLIM_INFINITY:
        yield Need("CAP_SYS_RESOURCE", probe.PURPOSES["CAP_SYS_RESOURCE"], "LimitMEMLOCK=infinity in the service")
    dns = config.dns
    lowest, key = (DNS_PORT, "listen_addr") if "/" in dns.listen_addr else (dns.port_min, "port_min")
    first_free = int(_UNPRIVILEGED_PORTS.read_text(encoding="ascii"))
    if lowest < first_free:
        value = getattr(dns, key)
        what = f"bind DNS servers to port {lowest} (dns.{key} is {value})"
        yield Need("CAP_NET_BIND_SERVICE", what, f"ports from {first_free} on")
    if config.socket_group is not None and _is_foreign(config.socket_group):
        what = f"give the socket to group {config.socket_group} (socket_group)"
        yield Need("CAP_CHOWN", what, f"SupplementaryGroups={config.socket_group} in the service")


def require(config: Config) -> None:
    """Log each missing capability with what it is for, then raise PermissionDeniedError naming all that are needed."""
    for capability, effect in OPTIONAL.items():
        if not probe.has_capability(capability):
            log.info("capability_not_held", capability=capability, effect=effect)
    missing = [need for need in needs(config) if not probe.has_capability(need.capability)]
    for need in missing:
        remedy = f"add {need.capability} to CapabilityBoundingSet= of the service, or start as root"
        remedy = f"{remedy}; or {need.instead}" if need.instead else remedy
        log.error("capability_missing", capability=need.capability, needed_for=need.needed_for, remedy=remedy)
    if missing:
        probe.require_capabilities("start netfenced", *(need.capability for need in missing))


def _is_foreign(group: str) -> bool:
    """Tell whether there is such a group and we are not in it; what a group that is not there means is said later."""
    try:
        return group_id(group) not in {os.getegid(), *os.getgroups()}
    except InvalidError:
        return False
