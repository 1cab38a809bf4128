"""links and rawprog on the running kernel: pins, facts, order, replacement, test runs."""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest

from hooktools import TC_ACT_SHOT, TCX_NEXT, bpffs, cgroup, inside_netns, needs_tcx, program, run, until
from netfence.dataplane import links, rawprog
from netfence.dataplane.links import AttachType, LinkType
from netfence.dataplane.rawprog import Helper, ProgType

FRAME = bytes(range(64))
EGRESS = AttachType.CGROUP_INET_EGRESS


def test_pin_outlives_the_descriptor() -> None:
    with bpffs() as directory, program(TCX_NEXT, name="pinned_one") as prog_fd:
        links.obj_pin(prog_fd, directory / "p")
        again = links.obj_get(directory / "p")
        try:
            assert again != prog_fd
            assert links.prog_info(again) == links.prog_info(prog_fd)
            assert links.prog_info(again).name == "pinned_one"
            assert links.prog_info(again).type == ProgType.SCHED_CLS
            assert os.get_inheritable(again) is False
        finally:
            os.close(again)
        with pytest.raises(FileExistsError):
            links.obj_pin(prog_fd, directory / "p")


def test_pin_errors_are_the_kernels_own(tmp_path: object) -> None:
    with bpffs() as directory, program(TCX_NEXT) as prog_fd:
        with pytest.raises(FileNotFoundError):
            links.obj_get(directory / "nothing")
        with pytest.raises(FileNotFoundError):
            links.obj_pin(prog_fd, directory / "no" / "such")
        with pytest.raises(PermissionError):
            links.obj_pin(prog_fd, type(directory)(str(tmp_path)) / "p")  # not a bpf file system


def test_same_code_has_the_same_tag_and_other_code_another() -> None:
    with program(1) as one, program(1) as same, program(2) as other:
        assert links.prog_info(one).tag == links.prog_info(same).tag
        assert links.prog_info(one).id != links.prog_info(same).id
        assert links.prog_info(one).tag != links.prog_info(other).tag
        found = links.prog_fd_by_id(links.prog_info(one).id)
        try:
            assert links.prog_info(found) == links.prog_info(one)
        finally:
            os.close(found)


@needs_tcx
def test_tcx_link_facts_order_and_update() -> None:
    with inside_netns(), program(TCX_NEXT) as first, program(TCX_NEXT) as second, program(TC_ACT_SHOT) as third:
        run("ip link add h0 type veth peer name w0")
        index = socket.if_nametoindex("h0")
        one = links.link_create_tcx(first, index, AttachType.TCX_INGRESS, before=True)
        two = links.link_create_tcx(second, index, AttachType.TCX_INGRESS, before=True)
        three = links.link_create_tcx(third, index, AttachType.TCX_INGRESS, before=False)
        try:
            ids = [links.prog_info(each).id for each in (second, first, third)]
            assert links.prog_query_tcx(index, AttachType.TCX_INGRESS) == ids
            assert links.prog_query_tcx(index, AttachType.TCX_EGRESS) == []
            info = links.link_info(one)
            assert (info.type, info.prog_id, info.target) == (LinkType.TCX, ids[1], index)
            assert info.attach_type == AttachType.TCX_INGRESS
            with pytest.raises(OSError, match="LINK_UPDATE") as caught:
                links.link_update(one, third, old_prog_fd=second)
            assert caught.value.errno == errno.EPERM
            assert links.link_info(one).prog_id == ids[1]
            with program(TCX_NEXT) as fourth:
                links.link_update(one, fourth, old_prog_fd=first)
                assert links.link_info(one).prog_id == links.prog_info(fourth).id
            links.link_detach(one)
            assert links.prog_query_tcx(index, AttachType.TCX_INGRESS) == [ids[0], ids[2]]
            links.link_detach(one)  # a second time is no error
            run("ip link del h0")
            assert links.link_info(two).target == 0
        finally:
            for each in (one, two, three):
                os.close(each)


def test_more_cgroup_programs_than_the_first_guess() -> None:
    """A query whose first room is too small asks again with more."""
    opened = []
    with cgroup() as path, program(1, ProgType.CGROUP_SKB, EGRESS) as prog_fd:
        cgroup_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with cgroup("c", path) as child:
                child_fd = os.open(child, os.O_RDONLY | os.O_DIRECTORY)
                opened = [links.link_create_cgroup(prog_fd, each, EGRESS) for each in (cgroup_fd, child_fd) * 40]
                assert len(links.prog_query_cgroup(cgroup_fd, EGRESS)) == 40
                assert len(links.prog_query_cgroup(child_fd, EGRESS, effective=True)) == 80
                os.close(child_fd)
        finally:
            for each in opened:
                os.close(each)
            os.close(cgroup_fd)


def test_cgroup_link_says_the_inode_as_its_cgroup() -> None:
    with cgroup() as path, program(1, ProgType.CGROUP_SKB, EGRESS) as prog_fd:
        cgroup_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        link_fd = links.link_create_cgroup(prog_fd, cgroup_fd, EGRESS)
        try:
            info = links.link_info(link_fd)
            assert (info.type, info.target, info.attach_type) == (LinkType.CGROUP, path.stat().st_ino, EGRESS)
        finally:
            os.close(link_fd)
            os.close(cgroup_fd)


def test_release_pin_detaches_even_what_somebody_else_holds() -> None:
    with bpffs() as directory, cgroup() as path, program(1, ProgType.CGROUP_SKB, EGRESS) as prog_fd:
        cgroup_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        link_fd = links.link_create_cgroup(prog_fd, cgroup_fd, EGRESS)
        try:
            links.obj_pin(link_fd, directory / "l")
            assert links.prog_query_cgroup(cgroup_fd, EGRESS) != []
            assert links.release_pin(directory / "l") is True
            assert links.prog_query_cgroup(cgroup_fd, EGRESS) == []
            assert links.release_pin(directory / "l") is False
            assert links.pinned_link_info(directory / "l") is None
        finally:
            os.close(link_fd)
            os.close(cgroup_fd)


@pytest.mark.parametrize("code", [0, 2, -1])
def test_run_returns_the_verdict_and_the_packet(code: int) -> None:
    with program(code) as prog_fd:
        result = links.prog_test_run(prog_fd, FRAME)
        assert result.retval == code & 0xFFFFFFFF
        assert result.data_out == FRAME


def test_run_repeats_and_takes_a_context() -> None:
    # return skb->mark (offset 8), after storing 7 in skb->priority (offset 32)
    code = (
        rawprog.insn(0x61, dst=0, src=1, off=8)
        + rawprog.insn(0xB7, dst=2, imm=7)
        + rawprog.insn(0x63, dst=1, src=2, off=32)
        + rawprog.EXIT
    )
    prog_fd = rawprog.load_raw(ProgType.SCHED_CLS, code)
    try:
        context = struct.pack("=II", 0, 0) + struct.pack("=I", 42) + bytes(180)
        result = links.prog_test_run(prog_fd, FRAME, repeat=1000, ctx_in=context)
        assert result.retval == 42
        assert struct.unpack_from("=I", result.ctx_out, 32) == (7,)
        assert 0 <= result.duration_ns < 10_000
        with pytest.raises(OSError, match="TEST_RUN") as caught:
            links.prog_test_run(prog_fd, FRAME, out_len=10)
        assert caught.value.errno == errno.ENOSPC
    finally:
        os.close(prog_fd)


def test_jiffies_move() -> None:
    prog_fd = rawprog.load_raw(ProgType.SCHED_CLS, rawprog.calling(Helper.JIFFIES64))
    try:
        start = links.prog_test_run(prog_fd, FRAME).retval
        until(lambda: links.prog_test_run(prog_fd, FRAME).retval != start, 0.5)
    finally:
        os.close(prog_fd)


def test_load_tells_what_the_verifier_said() -> None:
    with pytest.raises(OSError, match=r"R0 !read_ok") as caught:
        rawprog.load_raw(ProgType.SCHED_CLS, rawprog.EXIT)
    assert caught.value.errno == errno.EACCES
