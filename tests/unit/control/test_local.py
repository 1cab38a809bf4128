"""The local control plane: who is given what, when it is given again, and what a bad file changes (nothing)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from netfence.control.local import LocalControl, NoControl, load_policy_file
from netfence.control.port import AttachmentView, ConnectionState, UnsubscribeReason
from netfence.errors import ExhaustedError, NotFoundError, PreconditionError, UnavailableError
from netfence.policy.commands import BulkUpdate, Command
from netfence.policy.modes import Mode

VETH = AttachmentView("v", "veth0", "interface", {"tenant": "acme"})
TAP = AttachmentView("t", "tap0", "interface")

TWO = """
attachments:
  - {match: {interface: "veth*"}, mode: allowlist, allow_cidrs: ["192.0.2.0/24"], dns: {mode: disabled}}
  - {match: {interface: "tap*"}, mode: denylist}
"""
TAP_CHANGED = TWO.replace("denylist", "disabled")


class Host:
    """Keeps what it is told to apply."""

    def __init__(self, *views: AttachmentView) -> None:
        self.views = list(views)
        self.applied: list[tuple[str, Command, str]] = []
        self.failures: dict[str, Exception] = {}
        self.changed = asyncio.Event()

    def attachments(self) -> Sequence[AttachmentView]:
        return self.views

    async def apply(self, attachment_id: str, command: Command, version: str = "") -> None:
        if (failure := self.failures.get(attachment_id)) is not None:
            raise failure
        self.applied.append((attachment_id, command, version))
        self.changed.set()

    @property
    def told(self) -> list[str]:
        """Whom something was applied to."""
        return [attachment_id for attachment_id, _, _ in self.applied]


class Bench:
    """A control on a file, running against a host."""

    def __init__(self, path: Path, *views: AttachmentView) -> None:
        self.path = path
        self.path.write_text(TWO)
        self.host = Host(*views)
        self.control = LocalControl(load_policy_file(path))

    async def reload(self, text: str) -> None:
        """Write the file and have it read."""
        self.path.write_text(text)
        await self.control.reload()


def on_bench(
    path: Path, work: Callable[[Bench], Awaitable[None]], *views: AttachmentView, running: bool = True
) -> None:
    async def test() -> None:
        bench = Bench(path, *views)
        if not running:
            await work(bench)
            return
        task = asyncio.ensure_future(bench.control.run(bench.host))
        try:
            await asyncio.sleep(0)  # it begins its own first look
            async with bench.control._reloading:
                """The first look is over; later ones find nothing changed."""
            await work(bench)
            assert not task.done()
        finally:
            task.cancel()

    asyncio.run(asyncio.wait_for(test(), 20))


def test_subscribe_gives_the_matching_rule(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.control.subscribe(VETH)
        assert isinstance(first.update, BulkUpdate)
        assert (first.update.mode, first.update.allow_cidrs) == (Mode.ALLOWLIST, ("192.0.2.0/24",))
        assert first.version.startswith("file:")
        nobody = await bench.control.subscribe(AttachmentView("n", "/box", "cgroup"))
        assert nobody.update == BulkUpdate(mode=Mode.BLOCK_ALL)

    on_bench(tmp_path / "p.yaml", work)


def test_the_port_tells_who_decides(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        assert bench.control.state is ConnectionState.CONNECTED
        assert bench.control.address == f"file:{tmp_path}/p.yaml"
        bench.control.check("veth0")
        with pytest.raises(UnavailableError, match=r"control_plane\.url"):
            await bench.control.query_dns("v", "pypi.org", "A")

    on_bench(tmp_path / "p.yaml", work)


def test_who_comes_right_behind_an_edit_gets_what_it_says(tmp_path: Path) -> None:
    """Not what it said before, until the watch has waited for the writer to be done."""

    async def work(bench: Bench) -> None:
        await bench.control.subscribe(VETH)
        bench.path.write_text(TAP_CHANGED)
        first = await bench.control.subscribe(TAP)
        assert first.update.mode == Mode.DISABLED
        bench.path.write_text("default: {mode: neither}")
        assert await bench.control.subscribe(TAP) == first
        assert bench.host.told == []  # the others hear of it by the watch
        step = bench.control.subscribe(TAP)  # what has errors is not read once more for each who comes
        with pytest.raises(StopIteration):
            step.send(None)

    on_bench(tmp_path / "p.yaml", work, running=False)


def test_subscribe_does_not_suspend(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        step = bench.control.subscribe(VETH)
        with pytest.raises(StopIteration):  # it ran to its end in one go: see ControlPort.subscribe
            step.send(None)

    on_bench(tmp_path / "p.yaml", work, running=False)


def test_a_reload_reaches_only_those_whose_rule_changed(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        for view in (VETH, TAP):
            await bench.control.subscribe(view)
        await bench.reload("# moved down a line" + TAP_CHANGED)
        assert bench.host.told == ["t"]
        _, command, version = bench.host.applied[0]
        assert isinstance(command, BulkUpdate)
        assert command.mode == Mode.DISABLED
        assert version.startswith("file:")
        await bench.reload(TAP_CHANGED + "default: {mode: disabled}\n")
        assert bench.host.told == ["t"]
        await bench.reload("default: {mode: disabled}")
        assert bench.host.told == ["t", "v"]  # for the tap the default says the same

    on_bench(tmp_path / "p.yaml", work)


def test_an_edit_elsewhere_keeps_the_very_update_of_a_rule(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        before = await bench.control.subscribe(VETH)
        await bench.reload(TAP_CHANGED)
        assert (await bench.control.subscribe(VETH)).update is before.update

    on_bench(tmp_path / "p.yaml", work)


def test_a_running_ttl_is_not_begun_anew_by_an_edit_elsewhere(tmp_path: Path) -> None:
    timed = TWO.replace('"192.0.2.0/24"', '{cidr: "192.0.2.0/24", ttl: 1h}')

    async def work(bench: Bench) -> None:
        await bench.reload(timed)
        await bench.control.subscribe(VETH)
        await bench.reload(timed.replace("denylist", "disabled"))
        assert bench.host.told == []
        await bench.reload(timed.replace("1h", "2h"))
        assert bench.host.told == ["v"]

    on_bench(tmp_path / "p.yaml", work)


def test_a_bad_file_changes_nothing_and_every_error_is_logged(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.control.subscribe(VETH)
        with capture_logs() as logs:
            await bench.reload("attachments: [{mode: shut}]\nfoo: 1")
        assert bench.host.told == []
        assert [entry.get("error", entry["event"]).split(": ")[1] for entry in logs[:3]] == [
            "attachments[0].match", "attachments[0].mode", "foo",
        ]  # fmt: skip
        assert (logs[-1]["event"], logs[-1]["errors"]) == ("policy_file_refused", 3)
        assert (await bench.control.subscribe(VETH)).update.mode == Mode.ALLOWLIST
        bench.path.unlink()
        await bench.control.reload()
        assert bench.host.told == []

    on_bench(tmp_path / "p.yaml", work)


def test_one_failure_keeps_no_other_from_its_update_and_is_tried_again(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        for view in (VETH, TAP):
            await bench.control.subscribe(view)
        bench.host.failures["v"] = ExhaustedError("full")
        with capture_logs() as logs:
            await bench.reload("default: {mode: disabled}")
        assert bench.host.told == ["t"]
        assert [entry["error"] for entry in logs if entry["event"] == "policy_not_applied"] == ["full"]
        bench.host.failures.clear()
        await bench.control.reload()
        assert bench.host.told == ["t", "v"]

    on_bench(tmp_path / "p.yaml", work)


def test_who_is_gone_gets_nothing(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        for view in (VETH, TAP):
            await bench.control.subscribe(view)
        await bench.control.unsubscribe("v", UnsubscribeReason.DETACHED)
        await bench.control.unsubscribe("unknown", UnsubscribeReason.ERROR, "never was")
        bench.host.failures["t"] = NotFoundError("gone meanwhile")
        await bench.reload("default: {mode: disabled}")
        bench.host.failures.clear()
        await bench.reload("default: {mode: disabled, audit: true}")
        assert bench.host.told == []

    on_bench(tmp_path / "p.yaml", work)


def test_a_renamed_interface_is_matched_by_its_new_name(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.control.subscribe(VETH)
        bench.host.views = [replace(VETH, target="tap9")]
        await bench.reload(TWO + "\n# touched")
        assert [(who, command.mode) for who, command, _ in bench.host.applied] == [("v", Mode.DENYLIST)]  # type: ignore[union-attr]

    on_bench(tmp_path / "p.yaml", work)


def test_restored_attachments_catch_up_with_a_file_that_changed_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(TWO)
    rules = load_policy_file(tmp_path / "p.yaml").rules
    restored = (replace(VETH, policy_version=rules[0].version), replace(TAP, policy_version="file:old"))

    async def work(bench: Bench) -> None:
        assert bench.host.told == ["t"]

    on_bench(tmp_path / "p.yaml", work, *restored)


def test_a_changed_file_is_seen_without_being_told(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.control.subscribe(VETH)
        bench.path.write_text("default: {mode: disabled}")
        await asyncio.wait_for(bench.host.changed.wait(), 5)
        assert bench.host.told == ["v"]

    on_bench(tmp_path / "p.yaml", work)


def test_with_nobody_to_decide_attach_is_refused_naming_both_keys() -> None:
    async def test() -> None:
        control = NoControl()
        with pytest.raises(PreconditionError, match=r"veth0.*control_plane\.url.*policy_file"):
            control.check("veth0")
        with pytest.raises(PreconditionError, match=r"veth0.*control_plane\.url.*policy_file"):
            await control.subscribe(VETH)
        with pytest.raises(UnavailableError):
            await control.query_dns("v", "a", "A")
        await control.reload()
        await control.unsubscribe("v", UnsubscribeReason.REMOVED)
        assert (control.state, control.address) == (ConnectionState.DISCONNECTED, "")
        task = asyncio.ensure_future(control.run(Host()))
        with capture_logs() as logs:
            await asyncio.sleep(0)
        assert logs[0]["event"] == "no_policy_source"
        assert not task.done()
        task.cancel()

    asyncio.run(test())


def test_a_defect_with_one_attachment_reaches_the_others(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.host.applied.clear()
        bench.host.failures["v"] = KeyError("slot")
        with capture_logs() as logs:
            await bench.reload("default: {mode: disabled}")
        assert bench.host.told == ["t"]
        assert "policy_not_applied" in [entry["event"] for entry in logs]
        del bench.host.failures["v"]
        await bench.control.reload()
        assert bench.host.told == ["t", "v"]

    on_bench(tmp_path / "p.yaml", work, *(replace(view, policy_version="old") for view in (VETH, TAP)))


def test_one_whose_detach_failed_follows_the_file_again(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        view = replace(VETH, policy_version="old")
        bench.host.views.append(view)
        bench.host.failures["v"] = NotFoundError("it is being detached")
        await bench.reload("default: {mode: disabled}")
        assert bench.host.told == []
        del bench.host.failures["v"]
        await bench.control.reload()
        assert bench.host.told == ["v"]

    on_bench(tmp_path / "p.yaml", work)
