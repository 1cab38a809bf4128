"""`netfenced controlplane`: the real process, with daemons that speak the wire."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
import trustme
from tests.unit.controlplane.fake_daemon import FakeDaemon, until
from tests.unit.controlplane.harness import run

from netfence.control.policyfile import load_policy_file
from netfence.controlplane.book import Book
from netfence.controlplane.command import Options, Showing, _Process
from netfence.controlplane.status import Snapshot
from netfence.errors import NetfenceError
from netfence.policy.modes import Mode

NETFENCED = Path(sys.executable).with_name("netfenced")

POLICY = """
attachments:
  - match: {metadata: {tenant: acme}, interface: "veth*"}
    mode: allowlist
    allow_cidrs: [10.0.0.0/16, {cidr: 192.0.2.7, ttl: 1h}]
    dns: {mode: allowlist, allow: ["*.pypi.org"]}
  - match: {cgroup: "/sys/*"}
    mode: denylist
default: {mode: block_all}
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


def read(path: Path) -> str:
    return path.read_text()


def write(path: Path, text: str) -> None:
    path.write_text(text)


def _has_updated(process: Process, times: int) -> bool:
    return len(process.events("policies_updated")) == times


def version_of_default(path: Path, text: str) -> str:
    write(path, text)
    default = load_policy_file(path).default
    assert default is not None
    return default.version


class Process:
    """The running command; its stdout and stderr are read as they come."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address
        self.out: list[str] = []
        self.err: list[str] = []

    def documents(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in map(json.loads, self.err) if event["event"] == name]

    async def until(self, condition: Callable[[], Any]) -> None:
        await until(condition, lambda: f"out {self.out[-2:]} err {self.err[-5:]}")

    async def read(self, stream: asyncio.StreamReader, lines: list[str]) -> None:
        async for line in stream:
            lines.append(line.decode())  # noqa: PERF401 - seen by the test as they come


@contextlib.asynccontextmanager
async def command(policy: Path, *more: str, listen: str | None = None) -> AsyncIterator[Process]:
    """Run the command on a unix socket beside the policy file, and end it well."""
    address = listen or f"unix:{policy.parent}/plane.sock"
    made = await asyncio.create_subprocess_exec(
        NETFENCED,
        "controlplane",
        "--policy",
        str(policy),
        "--listen",
        address,
        *more,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    process = Process(made, address)
    assert made.stdout is not None
    assert made.stderr is not None
    readers = asyncio.gather(process.read(made.stdout, process.out), process.read(made.stderr, process.err))
    try:
        await process.until(lambda: process.events("control_plane_ready"))
        process.address = process.events("control_plane_ready")[0]["address"]
        yield process
        if made.returncode is None:
            made.send_signal(signal.SIGTERM)
        assert await made.wait() == 0, process.err
    finally:
        if made.returncode is None:
            made.kill()
        await readers
    assert not any("Traceback" in line for line in process.err), process.err


def failing(*args: str) -> tuple[int, str]:
    """Run a command that fails at once; return its status and stderr, whose form is checked."""
    done = subprocess.run([NETFENCED, "controlplane", *args], capture_output=True, text=True, timeout=30, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert lines
    assert all(line.startswith("netfenced: ") for line in lines), lines
    assert done.stdout == ""
    return done.returncode, "\n".join(lines)


def test_daemons_get_the_policies_of_the_file(policy: Path) -> None:
    async def test() -> None:
        async with command(policy) as process:
            attachments = {"a": {"tenant": "acme"}, "b": {}}
            async with FakeDaemon(process.address, attachments) as daemon:
                await daemon.until(lambda: len(daemon.commands) == 2)
                assert daemon.applied["a"].mode is Mode.ALLOWLIST
                assert len(daemon.applied["a"].cidrs) == 2
                assert daemon.applied["b"].mode is Mode.BLOCK_ALL
                assert daemon.versions["a"].startswith("file:")
                await daemon.attach("new", {"tenant": "acme"})
                await daemon.until(lambda: daemon.applied["new"] == daemon.applied["a"])
                assert daemon.kinds("new") == ["subscribed_ack"]

    run(test())


def test_change_reaches_only_whom_it_is_about(policy: Path) -> None:
    async def test() -> None:
        async with (
            command(policy) as process,
            FakeDaemon(process.address, {"a": {"tenant": "acme"}, "b": {}}) as daemon,
        ):
            await daemon.until(lambda: len(daemon.commands) == 2)
            write(policy, POLICY.replace("default: {mode: block_all}", "default: {mode: denylist}"))
            await daemon.until(lambda: daemon.applied["b"].mode is Mode.DENYLIST)
            await process.until(lambda: process.events("policies_updated"))
            assert process.events("policies_updated")[0]["results"] == "1 applied, 1 unchanged"
            assert len(daemon.commands) == 3

    run(test())


def test_hangup_reads_the_file_again(policy: Path) -> None:
    async def test() -> None:
        async with command(policy) as process:
            process.process.send_signal(signal.SIGHUP)
            await process.until(lambda: process.events("policies_updated"))

    run(test())


def test_hangup_sends_again_what_was_refused(policy: Path) -> None:
    async def test() -> None:
        async with command(policy) as process, FakeDaemon(process.address, {"a": {}}) as daemon:
            await daemon.until(lambda: daemon.commands)
            changed = POLICY.replace("default: {mode: block_all}", "default: {mode: denylist}")
            daemon.refuses.add(version_of_default(policy.with_name("other.yaml"), changed))
            write(policy, changed)
            for number in range(1, 4):
                await process.until(functools.partial(_has_updated, process, number))
                assert process.events("policies_updated")[-1]["results"] == "1 refused"
                assert len(daemon.commands) == 1 + number
                process.process.send_signal(signal.SIGHUP)
            await process.until(functools.partial(_has_updated, process, 4))
            write(policy, changed + "# a change that is none: no reason to try again\n")
            await process.until(functools.partial(_has_updated, process, 5))
            assert len(daemon.commands) == 5
            daemon.refuses.clear()
            process.process.send_signal(signal.SIGHUP)
            await daemon.until(lambda: daemon.applied["a"].mode is Mode.DENYLIST)

    run(test())


def test_bad_file_changes_nothing_and_is_reported(policy: Path) -> None:
    async def test() -> None:
        async with (
            command(policy, "--json") as process,
            FakeDaemon(process.address, {"a": {"tenant": "acme"}}) as daemon,
        ):
            await daemon.until(lambda: daemon.commands)
            write(policy, POLICY.replace("10.0.0.0/16", "10.0.0.0/160").replace("denylist", "open"))
            await process.until(lambda: process.events("policy_file_refused"))
            errors = [event["error"] for event in process.events("policy_file_error")]
            assert len(errors) == 2
            assert re.match(rf"{re.escape(str(policy))}:5: .*10\.0\.0\.0/160", errors[0])
            await process.until(lambda: not process.documents()[-1]["policy_file"]["ok"])
            assert process.documents()[-1]["policy_file"]["errors"] == errors
            await daemon.connect()  # who connects now gets the file before
            await daemon.attach("new", {"tenant": "acme"})
            await daemon.until(lambda: "new" in daemon.versions)
            assert daemon.versions["new"] == daemon.versions["a"]
            write(policy, POLICY)
            await process.until(lambda: process.documents()[-1]["policy_file"]["ok"])

    run(test())


def test_json_is_one_document_a_line_on_each_change(policy: Path) -> None:
    async def test() -> None:
        async with command(policy, "--json") as process:
            await process.until(lambda: process.out)
            first = process.documents()[0]
            assert first["policy_file"] == {"path": str(policy), "ok": True, "rules": 2, "errors": []}
            assert (first["daemons"], first["attachments"]) == ([], [])
            daemon = FakeDaemon(process.address, {"a": {"tenant": "acme"}})
            daemon.refuses.add("nothing")
            async with daemon:
                await process.until(lambda: process.documents()[-1]["attachments"])
                await process.until(lambda: process.documents()[-1]["attachments"][0]["state"] == "in sync")
                await daemon.heartbeat(a=5)
                await process.until(lambda: process.documents()[-1]["attachments"][0]["counters"])
                last = process.documents()[-1]
                attachment, host = last["attachments"][0], last["daemons"][0]
                assert attachment["counters"]["packets_allowed"] == 5
                assert attachment["policy_version"] == attachment["wanted_version"] == daemon.versions["a"]
                assert attachment["metadata"] == {"tenant": "acme"}
                assert (host["daemon_id"], host["hostname"], host["connected"]) == ("daemon-1", "host-1", True)
                burst = len(process.out)
                for number in range(200):
                    await daemon.heartbeat(a=number)
                await process.until(
                    lambda: process.documents()[-1]["attachments"][0]["counters"]["packets_allowed"] == 199
                )
                assert len(process.out) - burst <= 3  # at most one a second
            await process.until(lambda: not process.documents()[-1]["daemons"][0]["connected"])

    run(test())


def test_reader_that_is_gone_does_not_end_the_service(policy: Path) -> None:
    async def test() -> None:
        ours, theirs = os.pipe()
        process = await asyncio.create_subprocess_exec(
            NETFENCED,
            "controlplane",
            "--policy",
            str(policy),
            "--json",
            "--listen",
            f"unix:{policy.parent}/s",
            stdout=theirs,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(theirs)
        os.close(ours)
        try:
            assert process.stderr is not None
            async for line in process.stderr:
                if b"status_not_shown" in line:
                    break
            async with FakeDaemon(f"unix:{policy.parent}/s", {"a": {}}) as daemon:
                await daemon.until(lambda: daemon.commands)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()

    run(test())


def test_reader_that_does_not_read_does_not_stop_the_service(policy: Path) -> None:
    """A full pipe: documents wait, policies do not, and neither does the end."""

    async def test() -> None:
        ours, theirs = os.pipe()
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
        path = policy.parent / "s"
        process = await asyncio.create_subprocess_exec(
            NETFENCED, "controlplane", "--policy", str(policy), "--json", "--listen", f"unix:{path}",
            stdout=theirs, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        try:
            await until(path.exists)
            many = {f"a{number}": {"filler": "x" * 100} for number in range(100)}
            async with FakeDaemon(f"unix:{path}", many) as daemon:
                await daemon.until(lambda: len(daemon.commands) == 100)
                await asyncio.sleep(1.5)  # a document of 50 kB is stuck
                await daemon.attach("new")
                await daemon.until(lambda: "new" in daemon.versions)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
        finally:
            os.close(ours)
            if process.returncode is None:
                process.kill()

    run(test())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_page_on_a_terminal(policy: Path, encoding: str) -> None:
    async def test() -> None:
        ours, theirs = pty.openpty()
        environment = {key: value for key, value in os.environ.items() if key not in {"COLUMNS", "LINES"}}
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        path = policy.parent / "s"
        process = await asyncio.create_subprocess_exec(
            NETFENCED, "controlplane", "--policy", str(policy), "--listen", f"unix:{path}",
            stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm-256color", "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        os.close(theirs)
        seen = bytearray()
        loop = asyncio.get_running_loop()

        def read() -> None:
            try:
                seen.extend(os.read(ours, 65536))
            except OSError:  # the other end is closed
                loop.remove_reader(ours)

        loop.add_reader(ours, read)
        try:
            await until(path.exists)
            daemon = FakeDaemon(f"unix:{path}", {"good": {}, "evil": {"x": "\x1b[31mred [bold]"}}, hostname="box-7")
            daemon.metadata["good"]["name"] = "b\u00fcro"
            async with daemon:
                await daemon.until(lambda: len(daemon.commands) == 2)
                for text in (b"box-7", b"veth-good", b"in sync", b"policy file", b"1 connected", b"daemon_connected"):
                    await until(lambda text=text: text in seen, text.decode())  # type: ignore[misc]
                await until(lambda: b"\\x1b[31mred [bold]" in seen, "escaped metadata")
                write(policy, "nonsense: 1\n")
                await until(lambda: b"REFUSED" in seen, "the file's error")
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
            await until(lambda: b"\x1b[?1049l" in seen, "the terminal is given back")
            assert b"Traceback" not in seen
        finally:
            loop.remove_reader(ours)
            os.close(ours)
            if process.returncode is None:
                process.kill()

    run(test())


def test_many_daemons_need_many_open_files(policy: Path) -> None:
    async def test() -> None:
        script = 'ulimit -Sn 256 && exec "$0" controlplane --policy "$1" --listen unix:"$1".s'
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", script, NETFENCED, str(policy), stderr=asyncio.subprocess.DEVNULL
        )
        try:
            await until(policy.with_name("policy.yaml.s").exists)
            limits = read(Path(f"/proc/{process.pid}/limits"))
            soft, hard = re.search(r"Max open files +(\d+) +(\d+)", limits).groups()  # type: ignore[union-attr]
            assert soft == hard
        finally:
            process.kill()
            await process.wait()

    run(test())


def test_tls_and_tokens(policy: Path, tmp_path: Path) -> None:
    ca = trustme.CA()
    issued, client = ca.issue_cert("127.0.0.1"), ca.issue_cert("host-1")
    cert, key, client_ca, tokens = (tmp_path / name for name in ("cert", "key", "ca", "tokens"))
    cert.write_bytes(b"".join(one.bytes() for one in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    client_ca.write_bytes(ca.cert_pem.bytes())
    tokens.write_text("first\n")
    files = ["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", client_ca, "--token-file", tokens]
    credentials = grpc.ssl_channel_credentials(
        ca.cert_pem.bytes(), client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
    )

    async def test() -> None:
        async with command(policy, *map(str, files), listen="127.0.0.1:0") as process:
            async with FakeDaemon(process.address, credentials=credentials, token="first") as daemon:
                assert daemon.synced
            async with FakeDaemon(process.address, credentials=credentials, token="wrong") as daemon:
                assert daemon.status is grpc.StatusCode.UNAUTHENTICATED
            tokens.write_text("second\n")
            async with FakeDaemon(process.address, credentials=credentials, token="second") as daemon:
                assert daemon.synced
            nobody = grpc.ssl_channel_credentials(ca.cert_pem.bytes())
            async with FakeDaemon(process.address, credentials=nobody, token="second") as daemon:
                assert daemon.status is grpc.StatusCode.UNAVAILABLE

    run(test())


def test_bad_usage(policy: Path) -> None:
    for args, text in (
        ([], "--policy"),
        (["--policy", "/nonexistent"], "/nonexistent"),
        (["--policy", str(policy), "--tls-cert", "x"], "--tls-key"),
        (["--policy", str(policy), "--tls-key", "x"], "--tls-cert"),
        (["--policy", str(policy), "--tls-client-ca", "x"], "--tls-client-ca"),
    ):
        status, said = failing(*args)
        assert status == 2
        assert text in said
        assert "controlplane --help" in said


def test_failures_to_start(policy: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("default: {mode: open, dns: {mode: proxy}}\n")
    missing = tmp_path / "missing"
    for args, texts in (
        (["--policy", str(bad)], [f"{bad}:1: default.mode", f"{bad}:1: default.dns.mode: 'proxy'"]),
        (["--policy", str(policy), "--listen", "nowhere"], ["'nowhere'", "host:port"]),
        (["--policy", str(policy), "--listen", "0.0.0.0:0"], ["without TLS", "--insecure"]),
        (["--policy", str(policy), "--token-file", str(missing)], [str(missing)]),
        (["--policy", str(policy), "--tls-cert", str(missing), "--tls-key", str(policy)], [str(missing)]),
    ):
        status, said = failing(*args)
        assert status == 1, said
        for text in texts:
            assert text in said


def test_address_in_use(policy: Path) -> None:
    async def test() -> None:
        async with command(policy, listen="127.0.0.1:0") as process:
            args = ("--policy", str(policy), "--listen", process.address)
            status, said = await asyncio.to_thread(failing, *args)
            assert status == 1
            assert f"listen on {process.address}: address already in use" in said
        async with command(policy) as process:
            args = ("--policy", str(policy), "--listen", process.address)
            status, said = await asyncio.to_thread(failing, *args)
            assert status == 1
            assert "another process is listening on it" in said

    run(test())


class Unwritable:
    """A screen that fails in a way of its own, as an encoding that lacks a character does."""

    def begin(self) -> None:
        pass

    def show(self, _snapshot: Snapshot) -> None:
        "\u2026".encode("ascii")

    def end(self) -> None:
        pass


def test_screen_that_fails_is_told_of() -> None:
    with structlog.testing.capture_logs() as logs:
        showing = Showing(Unwritable())
        showing.offer(Snapshot(0.0, "", "", 0, (), (), ()))
        showing.end()
    assert [entry["event"] for entry in logs] == ["status_not_shown"]


def test_end_of_the_work_ends_the_command(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep(_: Book) -> None:
        raise KeyError("defect")

    monkeypatch.setattr(Book, "sweep", sweep)
    monkeypatch.setattr("netfence.controlplane.plane.SWEEP_S", 0.01)
    process = _Process(Options(policy, f"unix:{policy.parent}/s"), None)
    with pytest.raises(NetfenceError, match="restart"):
        asyncio.run(asyncio.wait_for(process.main(), 10))
