"""The example is a whole control plane, short, and does what it says: run as its reader runs it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.unit.controlplane.fake_daemon import FakeDaemon, until
from tests.unit.controlplane.harness import run

from netfence.controlplane import Attachment, ControlPlane, Daemon, Policy
from netfence.policy.modes import Mode

EXAMPLE = Path(__file__).parents[3] / "examples/controlplane"


async def line_of(stream: asyncio.StreamReader, pattern: str) -> re.Match[str]:
    """Read lines until one has the pattern."""
    seen = []
    while line := (await stream.readline()).decode():
        seen.append(line)
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"no {pattern!r} in {seen}")


def test_example_serves_its_file_and_follows_it(tmp_path: Path) -> None:
    file = tmp_path / "policies.yaml"
    shutil.copy(EXAMPLE / "policies.yaml", file)

    async def test() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(EXAMPLE / "control_plane.py"),
            str(file),
            "--listen",
            f"unix:{tmp_path}/plane.sock",
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONWARNINGS": "error"},
        )
        assert process.stdout is not None
        try:
            address = (await line_of(process.stdout, r"serving at (\S+)"))[1]
            attachments = {"b": {"role": "build"}, "w": {"role": "browse"}, "x": {}}
            async with FakeDaemon(address, attachments) as daemon:
                await daemon.until(lambda: len(daemon.commands) == 3)
                assert daemon.applied["x"].mode is Mode.BLOCK_ALL
                assert daemon.applied["b"].judge_name("a.pypi.org").allowed
                assert len(daemon.applied["b"].cidrs) == 3
                assert list((await daemon.query("w", "intranet.example.")).ips) == ["10.0.0.80"]
                assert not (await daemon.query("w", "elsewhere.example.")).allow

                text = file.read_text()
                file.write_text(text.replace("10.0.13.0/24", "10.0.13.0/240"))
                await line_of(process.stdout, r"10\.0\.13\.0/240")
                assert len(daemon.commands) == 3
                file.write_text(text.replace("default: nothing", "default: build"))
                await line_of(process.stdout, r"1 applied, 2 unchanged")
                assert daemon.applied["x"] == daemon.applied["b"]
                process.kill()
                await daemon.until(lambda: daemon.status is grpc.StatusCode.UNAVAILABLE)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    run(test())


def test_example_is_short() -> None:
    assert len((EXAMPLE / "control_plane.py").read_text().splitlines()) < 100


def guide_program(number: int) -> str:
    text = (EXAMPLE.parents[1] / "docs/control-plane.md").read_text()
    programs: list[str] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return programs[number]


def test_guide_pushes_changes(tmp_path: Path) -> None:
    async def test() -> None:
        address = f"unix:{tmp_path}/s"
        names: dict[str, Any] = {"__name__": "guide"}
        exec(guide_program(1).replace("127.0.0.1:7443", address), names)
        program = asyncio.create_task(names["main"]())
        await until((tmp_path / "s").exists)
        async with FakeDaemon(address, {"a": {"tenant": "acme"}, "x": {}}) as daemon:
            await daemon.until(lambda: len(daemon.commands) == 2)
            assert (await daemon.query("a", "www.PyPI.org.")).allow
            names["POLICIES"]["acme"] = Policy("denylist")
            names["changed"].put_nowait("acme")
            await daemon.until(lambda: daemon.applied["a"].mode is Mode.DENYLIST)
        program.cancel()
        await asyncio.wait({program})

    run(test())


def test_guide_begins_with_a_program_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    monkeypatch.setattr(ControlPlane, "run", lambda _plane, address: served.append(address))
    names: dict[str, Any] = {}
    exec(guide_program(0), names)
    assert served == ["127.0.0.1:7443"]
    build = Attachment("a", "veth0", Daemon("d"), {"role": "build"})
    assert asyncio.run(names["policy_for"](build)).rules.mode is Mode.ALLOWLIST
    assert asyncio.run(names["policy_for"](Attachment("a", "veth0", Daemon("d")))).rules.mode is Mode.BLOCK_ALL


@pytest.mark.parametrize("name", ["control_plane.py", "policies.yaml"])
def test_example_uses_the_public_names_only(name: str) -> None:
    imported = re.findall(r"^(?:from|import) (netfence\S*)", (EXAMPLE / name).read_text(), re.MULTILINE)
    assert set(imported) <= {"netfence.controlplane"}
