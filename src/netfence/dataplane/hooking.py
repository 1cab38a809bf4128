"""Which programs go onto which hooks of a target, in which order, under which pins.

Owns the choice between tcx and clsact and the names under ``links/``. Everything here blocks (tcx waits for RCU).

XDP never stands alone: it drops early, and the TC filter behind it judges whatever came around it (decision 0012).
So TC goes on first and comes off last, and an XDP program that somebody takes away opens nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from netfence.dataplane import links, probe
from netfence.dataplane.cgroups import CgroupTarget
from netfence.dataplane.failure import explain
from netfence.dataplane.hooks import cgroup, clsact, tcx, xdp
from netfence.dataplane.hooks.chain import Side
from netfence.dataplane.loader import Loaded
from netfence.dataplane.target import Direction, InterfaceTarget, side_of

MAIN, INBOUND, QDISC, XDP = "main", "inbound", "qdisc", "xdp"
CGROUP_PROGRAMS = {
    "connect4": "nf_connect4",
    "connect6": "nf_connect6",
    "sendmsg4": "nf_sendmsg4",
    "sendmsg6": "nf_sendmsg6",
    "egress": "nf_cgroup_egress",
}
"""Hook → program."""


class Hooks:
    """Puts the loaded programs onto targets; pins are ``<directory>/<attachment>-<hook>``."""

    CGROUP = cgroup.MECHANISM

    def __init__(self, loaded: Loaded, directory: Path, *, tcx: bool) -> None:
        self._programs, self._directory, self._tcx = loaded.programs, directory, tcx
        self._ids = {name: links.prog_info(fd).id for name, fd in loaded.programs.items()}

    @property
    def tc_mechanism(self) -> str:
        """Return how TC filters hang on interfaces here."""
        return tcx.MECHANISM if self._tcx else clsact.MECHANISM

    def mechanism(self, ifindex: int, name: str) -> str:
        """Tell what fences an interface now: which XDP where XDP is in force, else how TC filters hang."""
        return xdp.in_force(self._pin(name, XDP), ifindex) or self.tc_mechanism

    def attach_interface(self, target: InterfaceTarget, direction: Direction, name: str, *, with_xdp: bool) -> str:
        """Put the filter onto the side where the workload's packets pass; return the mechanism.

        `with_xdp`: XDP in front of it, in direction WORKLOAD only.
        """
        if with_xdp:
            probe.require_feature("xdp_link", f"attach xdp on {target.name}")
        self._attach_tc(target, direction, name)
        return self._attach_xdp(target, name) if with_xdp else self.tc_mechanism

    def put_back_interface(self, target: InterfaceTarget, direction: Direction, name: str, *, with_xdp: bool) -> bool:
        """Attach what is not in force on this very device; False when something was not.

        Programs of another build are replaced by ours between two packets.
        """
        side = side_of(direction)
        if self._tcx:
            whole = self._put_back_tcx(target, side, name, MAIN, "nf_tc")
        else:
            there = clsact.attached(target.ifindex, side)
            whole = there is not None
            if there != self._ids["nf_tc"]:
                self._attach_tc(target, direction, name)
        if with_xdp:
            whole = self._put_back_xdp(target, name) and whole
        return whole

    def _put_back_xdp(self, target: InterfaceTarget, name: str) -> bool:
        pin = self._pin(name, XDP)
        there = xdp.attached(pin, target.ifindex)
        if there and self._is_ours(pin, "nf_xdp"):
            return True
        xdp.detach(pin)  # another build's, behind which TC fences; or what is left of a link that somebody took off
        self._attach_xdp(target, name)
        return there

    def _put_back_tcx(self, target: InterfaceTarget, side: Side, name: str, hook: str, program: str) -> bool:
        pin = self._pin(name, hook)
        if tcx.attached(pin, target.ifindex, side):
            if not self._is_ours(pin, program):
                tcx.detach(self._pin(name, f"{hook}_new"))  # of a move ahead that was cut short
                tcx.replace(pin, self._programs[program])
            return True
        for left in (pin, self._pin(name, f"{hook}_new")):  # of a link that somebody took off
            tcx.detach(left)
        tcx.attach(self._programs[program], target.ifindex, target.name, side, pin)
        return False

    def _put_back_cgroup(self, target: CgroupTarget, name: str, hook: str, program: str, attach_type: str) -> bool:
        pin, fresh = self._pin(name, hook), self._pin(name, f"{hook}_new")
        there = cgroup.program(pin, target.cgroup_id)
        if there == self._ids[program]:
            return True
        cgroup.detach(fresh)  # of a start that was cut short
        if not there:
            cgroup.detach(pin)  # what is left of a link that somebody took off
        cgroup.attach(self._programs[program], target.fd, target.path, cgroup.ATTACH_TYPES[attach_type], fresh)
        # Another build's link goes with its pin; until then both judge. Ours does not take its place in that link,
        # because it would look for the slot in the storage of the other build's map.
        fresh.rename(pin)
        return there != 0

    def _is_ours(self, pin: Path, program: str) -> bool:
        return links.pinned_prog_id(pin) == self._ids[program]

    def _attach_tc(self, target: InterfaceTarget, direction: Direction, name: str) -> None:
        side = side_of(direction)
        if self._tcx:
            tcx.attach(self._programs["nf_tc"], target.ifindex, target.name, side, self._pin(name, MAIN))
            return
        clsact.attach(self._programs["nf_tc"], target.ifindex, target.name, side, self._pin(name, QDISC))
        self._mark(name)

    def _attach_xdp(self, target: InterfaceTarget, name: str) -> str:
        return xdp.attach(self._programs["nf_xdp"], target.ifindex, target.name, self._pin(name, XDP))

    def require_changeable(self, name: str) -> None:
        """Raise what the last step of a detach would, before the first: what is taken off until then opens the fence.

        A clsact filter and a cgroup's slot go without a word from the bpffs, whose pins may not go (read-only).
        """
        if not any(self._pin(name, hook).exists() for hook in (MAIN, INBOUND, QDISC, XDP, *CGROUP_PROGRAMS)):
            return  # an attach that the bpffs refused is taken back
        try:
            os.utime(self._directory)
        except OSError as error:
            raise explain(f"detach {name}: change {self._directory}", error, "make it writable") from error

    def detach_interface(self, target: InterfaceTarget, name: str) -> None:
        """Take all programs off; idempotent."""
        xdp.detach(self._pin(name, XDP))
        if self._tcx:
            for hook in (MAIN, f"{MAIN}_new", INBOUND):
                tcx.detach(self._pin(name, hook))
            return
        for direction in Direction:
            clsact.detach(target.ifindex, side_of(direction), self._pin(name, QDISC))
        for pin in (self._pin(name, MAIN), self._pin(name, f"{MAIN}_new")):
            if pin.exists():  # a read-only bpffs refuses to remove what is not there, too
                pin.unlink()
        clsact.forget(self._pin(name, QDISC))

    @contextlib.contextmanager
    def cgroup_storage(self, target: CgroupTarget) -> Iterator[None]:
        """Have the cgroup's storage, which comes with the first program of ours, before anything judges by it."""
        note = links.link_create_cgroup(self._programs["nf_cgroup_inbound"], target.fd, cgroup.ATTACH_TYPES["ingress"])
        try:
            yield
        finally:
            os.close(note)

    def attach_cgroup(self, target: CgroupTarget, name: str) -> None:
        """Attach what is not in force on this very cgroup; programs of another build are replaced by ours."""
        for hook, program in CGROUP_PROGRAMS.items():
            self._put_back_cgroup(target, name, hook, program, hook)

    def cgroup_state(self, target: CgroupTarget, name: str) -> tuple[bool, bool]:
        """Tell whether every program is in force on this very cgroup, and whether each is ours, not another build's."""
        running = [cgroup.program(self._pin(name, hook), target.cgroup_id) for hook in CGROUP_PROGRAMS]
        return all(running), running == [self._ids[program] for program in CGROUP_PROGRAMS.values()]

    def detach_cgroup(self, name: str) -> None:
        """Take all programs off; idempotent."""
        for hook in (*CGROUP_PROGRAMS, INBOUND):
            for pin in (self._pin(name, hook), self._pin(name, f"{hook}_new")):
                cgroup.detach(pin)

    def attach_inbound(self, target: InterfaceTarget | CgroupTarget, direction: Direction | None, name: str) -> bool:
        """Have the program that notes connections begun from outside on the opposite hook; False when it was not."""
        if isinstance(target, CgroupTarget):
            return self._put_back_cgroup(target, name, INBOUND, "nf_cgroup_inbound", "ingress")
        side, program = side_of(direction or Direction.WORKLOAD).opposite, "nf_tc_inbound"
        if self._tcx:
            return self._put_back_tcx(target, side, name, INBOUND, program)
        there = clsact.attached(target.ifindex, side)
        if there != self._ids[program]:
            clsact.attach(self._programs[program], target.ifindex, target.name, side, self._pin(name, QDISC))
        return there is not None

    def in_front(self, target: InterfaceTarget | CgroupTarget, direction: Direction | None, name: str) -> list[str]:
        """Describe the foreign programs that see packets before ours."""
        del name
        if isinstance(target, CgroupTarget):
            ours = links.prog_info(self._programs["nf_cgroup_egress"]).id
            return [str(one) for one in cgroup.in_front(target.fd, cgroup.ATTACH_TYPES["egress"], ours)]
        ours = links.prog_info(self._programs["nf_tc"]).id
        module = tcx if self._tcx else clsact
        return [str(one) for one in module.in_front(target.ifindex, side_of(direction or Direction.WORKLOAD), ours)]

    def move_ahead(self, target: InterfaceTarget | CgroupTarget, direction: Direction | None, name: str) -> None:
        """Put ours in front of the foreign programs that it can pass: of a cgroup's none, they cannot pass for it."""
        if isinstance(target, CgroupTarget):
            return
        side, program = side_of(direction or Direction.WORKLOAD), self._programs["nf_tc"]
        if not self._tcx:
            clsact.move_ahead(program, target.ifindex, target.name, side)
            return
        pin, fresh = self._pin(name, MAIN), self._pin(name, f"{MAIN}_new")
        if tcx.attached(pin, target.ifindex, side):
            tcx.move_ahead(program, target.ifindex, target.name, side, pin, fresh)

    def of_others(self) -> set[str]:
        """Return the names of attachments of which a hook runs another build's program."""
        ours = set(self._ids.values())
        pins = [pin for pin in self._directory.glob("*-*") if not pin.is_dir()]
        return {pin.name.rpartition("-")[0] for pin in pins if links.pinned_prog_id(pin) not in ours}

    def _pin(self, name: str, hook: str) -> Path:
        return self._directory / f"{name}-{hook}"

    def _mark(self, name: str) -> None:
        """Pin the program where a link would be: clsact filters have none, and the directory tells what is in force."""
        fresh = self._pin(name, f"{MAIN}_new")
        fresh.unlink(missing_ok=True)
        links.obj_pin(self._programs["nf_tc"], fresh)
        fresh.rename(self._pin(name, MAIN))

    def close(self) -> None:
        """Close the program descriptors."""
        for fd in self._programs.values():
            os.close(fd)
