"""Audited names over a restart: what changed is stored, what was stored comes back, damage harms nothing."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs
from tests.unit.test_store import ROW

from netfence import remembering
from netfence.audited import AuditMemory
from netfence.errors import NetfenceError
from netfence.remembering import Remembering
from netfence.store import Store

A = bytes((192, 0, 2, 1))


class Attachment:
    def __init__(self) -> None:
        self.audited = AuditMemory()
        from netfence.remembering import log  # noqa: PLC0415 - a log is all it needs of an attachment

        self.log = log


def lifecycle(store: Any, attachment: Attachment) -> Any:
    live = SimpleNamespace(row=ROW, attachment=attachment, ended=False)
    return SimpleNamespace(parts=SimpleNamespace(store=store), all=lambda: [live])


def test_what_changed_is_stored_and_recalled(tmp_path: Path) -> None:
    async def test() -> None:
        store = Store.open(tmp_path / "data")
        await store.reserve(ROW)
        first, second = Attachment(), Attachment()
        keeper = Remembering(lifecycle(store, first))
        await keeper.save()
        assert await store.load_audited() == {}  # nothing to store
        first.audited.note("a.test", [A])
        await keeper.save()
        text = (await store.load_audited())[ROW.id]
        await store.save_audited(ROW.id, lambda: "")
        await keeper.save()  # nothing new
        assert await store.load_audited() == {ROW.id: ""}
        await store.save_audited(ROW.id, lambda: text)
        await Remembering(lifecycle(store, second)).recall()
        assert list(second.audited.names()) == list(first.audited.names())
        await store.save_audited(ROW.id, lambda: "damaged")
        third = Attachment()
        with capture_logs() as logs:
            await Remembering(lifecycle(store, third)).recall()
        assert [entry["event"] for entry in logs] == ["audited_names_not_recalled"]
        assert len(third.audited) == 0
        await store.close()

    asyncio.run(asyncio.wait_for(test(), 20))


def test_dns_is_served_while_names_are_read_and_what_it_hears_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        store, one = Store.open(tmp_path / "data"), Attachment()
        loop = asyncio.get_running_loop()

        class Reading(AuditMemory):
            @classmethod
            def load(cls, text: str) -> AuditMemory:
                assert threading.current_thread() is not threading.main_thread()
                asked = asyncio.run_coroutine_threadsafe(ask(), loop)  # answered: the loop is free
                asked.result(10)
                return AuditMemory.load(text)

        async def ask() -> None:
            one.audited.note("asked.test", [A])

        await store.reserve(ROW)
        before = AuditMemory()
        before.note("before.test", [A])
        await store.save_audited(ROW.id, before.dump)
        monkeypatch.setattr(remembering, "AuditMemory", Reading)
        await Remembering(lifecycle(store, one)).recall()
        assert [name for name, _ in one.audited.names()] == ["asked.test"]
        await store.close()

    asyncio.run(asyncio.wait_for(test(), 20))


def test_a_store_that_takes_nothing_is_tried_again() -> None:
    class Failing:
        def __init__(self) -> None:
            self.tries = 0

        async def save_audited(self, *_: object) -> None:
            self.tries += 1
            raise NetfenceError("disk full")

        async def load_audited(self) -> dict[str, str]:
            raise NetfenceError("disk gone")

    async def test() -> None:
        store, one = Failing(), Attachment()
        keeper = Remembering(lifecycle(store, one))
        with capture_logs() as logs:
            await keeper.recall()
            one.audited.note("a.test", [A])
            await keeper.save()
            await keeper.save()
        assert store.tries == 2
        assert [entry["log_level"] for entry in logs] == ["warning"] * 3

    asyncio.run(asyncio.wait_for(test(), 20))
