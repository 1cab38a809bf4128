"""What a kernel test says about the data plane: hook × mode × family, for the matrix of results (ci/matrix.py).

Owns the answer to "which cells of the matrix does this test fill"; tests of the daemon and the control plane fill none.
For each of the three the first of these that speaks is believed:

1. `MODULES` under ``module::test``, where one test of a module is not like the others;
2. the test's parameters: words of its id (``tcx``, ``ipv6``, ``allowlist``) and values (packets, addresses);
3. `MODULES` under ``module::Class``, then under ``module``.

A module that is not in `MODULES` fills no cell, whatever its ids say. A new module that drives packets through a fence
belongs into the table; tests/unit/ci/test_covers.py misses it otherwise.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from netfence.policy.modes import Mode, Reason

HOOKS = ("tcx", "clsact", "xdp native", "xdp generic", "cgroup")
AUDIT = "audit"
MODES = (*(mode.name.lower() for mode in Mode), AUDIT)
FAMILIES = ("ipv4", "ipv6")
TC = "tc"
"""The hook on an interface that the daemon chooses by itself: tcx where the kernel has it, else clsact."""


@dataclass(frozen=True, slots=True)
class Covers:
    """Cells of the matrix: every combination of the three. An empty part: nothing said."""

    hooks: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    families: tuple[str, ...] = ()

    def otherwise(self, other: Covers) -> Covers:
        """Fill what is not said here from `other`."""
        return Covers(self.hooks or other.hooks, self.modes or other.modes, self.families or other.families)

    def properties(self, *, has_tcx: bool) -> list[tuple[str, str]]:
        """Say it as properties of a JUnit test case: several values stand in one, with commas between."""
        chosen = "tcx" if has_tcx else "clsact"
        hooks = [chosen if hook == TC else hook for hook in self.hooks]
        told = {"hook": hooks, "mode": self.modes, "family": self.families}
        return [(name, ", ".join(values)) for name, values in told.items() if values]


NEITHER = ("-",)  # no IP family at all: ARP, LLDP
_ALLOWLIST = ("allowlist",)
_LISTS = ("allowlist", "denylist")
_TC = Covers((TC,), _ALLOWLIST, FAMILIES)
_CGROUP = Covers(("cgroup",), _ALLOWLIST, FAMILIES)

MODULES: Mapping[str, Covers] = {
    "test_atomic": Covers((TC,), _ALLOWLIST, ("ipv4",)),
    "test_atomic::test_a_replacement_that_fails_leaves_the_old_policy": Covers(modes=_LISTS),
    "test_big_packets": _TC,
    "test_carry": Covers(),  # the maps alone
    "test_cgroup": _CGROUP,
    "test_cgroup::test_ipv4_mapped_destinations_are_judged_as_ipv4": Covers(families=("ipv6",)),
    "test_cgroup::test_mapped_unconnected_datagrams_are_judged_as_ipv4": Covers(families=("ipv6",)),
    "test_cgroup::test_the_metadata_address_is_refused_in_denylist": Covers(modes=("denylist",)),
    "test_cgroup::test_audit_lets_connect_pass_and_reports_it": Covers(modes=(AUDIT,)),
    "test_cgroup::test_loopback_does_not_pass_before_the_first_policy": Covers(modes=("block_all",)),
    "test_cgroup::test_the_own_dns_server_is_reached_in_every_mode": Covers(modes=MODES[:-1]),
    "test_cgroup::test_another_attachments_dns_server_is_not_reached": Covers(modes=MODES[:-1]),
    "test_cgroup_packets": _CGROUP,
    "test_cgroup_packets::test_raw_packets_are_judged_by_their_own_header_not_by_sendto": Covers(families=("ipv4",)),
    "test_cgroup_packets::test_raw_ipv6_packets_are_judged_by_their_own_header": Covers(families=("ipv6",)),
    "test_commands_property": Covers(),  # the maps alone: no packet flows
    "test_connections": _TC,
    "test_differential": Covers(modes=MODES, families=FAMILIES),
    "test_dns_source": Covers((TC,), ("block_all",), ("ipv4",)),
    "test_dns_source::test_a_raw_socket_of_a_cgroup_is_no_exception": Covers(("cgroup",)),
    "test_flows": _TC,
    "test_flows::test_a_refused_connect_is_told_of": Covers(("cgroup",)),
    "test_explain": Covers(modes=MODES, families=FAMILIES),
    "test_forged_replies": _TC,
    "test_hooks::TestTcx": Covers(("tcx",)),
    "test_hooks::TestClsact": Covers(("clsact",)),
    "test_hooks::TestCgroup": Covers(("cgroup",)),
    "test_hooks::test_attach_times": Covers(("clsact", "cgroup")),  # and tcx, where the kernel has it
    "test_links::test_tcx_link_facts_order_and_update": Covers(("tcx",)),
    "test_replies": _TC,
    "test_shape_settings": _TC,
    "test_shape_settings::test_the_metadata_address_wants_a_rule_of_its_own": Covers(modes=MODES),
    "test_shape_settings::test_hosts_solicit_from_their_global_address": Covers(families=("ipv6",)),
    "test_shape_settings::test_the_own_dns_server_at_an_ipv6_address": Covers(modes=("block_all",), families=("ipv6",)),
    "test_shape_settings::test_link_local_passes_where_the_setting_says_so": Covers(modes=("allowlist", "block_all")),
    "test_shapes": Covers((TC,), MODES, FAMILIES),
    "test_shapes::test_an_ipv4_mapped_destination_meets_the_ipv4_rules": Covers(modes=_ALLOWLIST, families=("ipv6",)),
    "test_shapes::test_arp_always_passes": Covers(modes=("block_all", *_LISTS), families=NEITHER),
    "test_takeover": Covers((TC,), ("denylist",), ("ipv4",)),
    "test_throughput": Covers((TC,), _ALLOWLIST, FAMILIES),
    "test_verdict": Covers((TC,), (), FAMILIES),
    "test_verdict::test_mode_changes_bite_at_once": Covers(modes=MODES[:-1]),
    "test_verdict::test_audit_drops_nothing_and_counts_what_would_be": Covers(modes=(AUDIT,)),
    "test_xdp": Covers(("xdp native",), _ALLOWLIST, FAMILIES),
    "test_xdp::test_tags_that_xdp_does_not_see_hide_nothing": Covers(modes=_LISTS),
    "test_xdp_around": Covers(("xdp native",), _ALLOWLIST, ("ipv4",)),
    "test_xdp_replies": Covers(("xdp native",), _ALLOWLIST, FAMILIES),
}


def covers(module: str, test: str, test_id: str = "", values: Iterable[object] = ()) -> Covers:
    """Tell what a test covers.

    `test` is its name within the module, ``TestTcx::test_drops`` in a class; `test_id` and `values` are those of its
    parameters, "" and nothing where it has none.
    """
    if not any(name.partition("::")[0] == module for name in MODULES):
        return Covers()
    own = MODULES.get(f"{module}::{test}", Covers())
    outer = MODULES.get(f"{module}::{test.partition('::')[0]}", Covers())
    return own.otherwise(_told(test_id, values)).otherwise(outer).otherwise(MODULES.get(module, Covers()))


def _told(test_id: str, values: Iterable[object]) -> Covers:
    """Read the parameters."""
    words = test_id.split("-")
    # A packet first: a shape may be called "ipv6-as-ipv4".
    families = tuple(_families(values))[:1] or tuple(each for each in FAMILIES if each in words)
    return Covers(_hooks(words), tuple(mode for mode in MODES if mode in words), families)


def _hooks(words: list[str]) -> tuple[str, ...]:
    if "xdp" in words:
        return ("xdp generic" if "generic" in words else "xdp native",)
    if "interface" in words:
        return (TC,)
    return tuple(each for each in ("tcx", "clsact", "cgroup", TC) if each in words)


def _families(values: Iterable[object]) -> Iterator[str]:
    """Give the families that the values speak of: a case's or a shape's packet, an address."""
    for value in values:
        if getattr(value, "reason", None) is Reason.NOT_IP:
            yield NEITHER[0]
        elif number := getattr(getattr(value, "shape", value), "family", None):
            yield f"ipv{number}"
        elif isinstance(value, str):
            try:
                yield f"ipv{ipaddress.ip_address(value).version}"
            except ValueError:
                continue
