"""Where the server listens, and who may connect: addresses, tokens, TLS, admission, shutdown."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
import trustme
from tests.unit.controlplane.fake_daemon import FakeDaemon, daemons, until
from tests.unit.controlplane.harness import Policies, all_are, run, serving

from netfence.controlplane import ControlPlane, Daemon, Limits, Peer, ServerTls, State, token_file
from netfence.controlplane import plane as plane_module
from netfence.controlplane import server as server_module
from netfence.controlplane.book import Book
from netfence.controlplane.hush import Hush
from netfence.controlplane.plane import raise_open_files
from netfence.controlplane.server import _options, split_address
from netfence.controlplane.tokens import TokenCheck
from netfence.errors import InvalidError, NetfenceError, PreconditionError


async def outcome(daemon: FakeDaemon) -> str:
    """Connect and tell how it went: ``OK`` or the status of the stream."""
    async with daemon:
        return "OK" if daemon.synced else daemon.status.name if daemon.status else ""


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7443", ("127.0.0.1", 7443)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:1", ("localhost", 1)),
        ("", None),
        ("7443", None),
        (":7443", None),
        ("host:", None),
        ("host:x", None),
        ("host:65536", None),
        ("::1:7443", None),
        ("[host]:7443", None),
        ("host:٣", None),
    ],
)
def test_split_address(text: str, address: tuple[str, int] | None) -> None:
    if address is not None:
        assert split_address(text) == address
        return
    with pytest.raises(InvalidError) as caught:
        split_address(text)
    assert "host:port" in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "localhost:0"])
def test_free_port_of_loopback(address: str) -> None:
    async def test() -> None:
        plane = ControlPlane(Policies())
        assert plane.address == ""
        async with plane.serving(address):
            host, port = split_address(plane.address)
            assert port > 0
            assert address.startswith(("[", host))
            assert await outcome(FakeDaemon(plane.address)) == "OK"
        assert plane.address == ""

    run(test())


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.com:0"])
def test_plaintext_that_others_could_read_is_refused(address: str) -> None:
    async def test() -> None:
        with pytest.raises(PreconditionError) as caught:
            async with ControlPlane(Policies()).serving(address):
                pass
        assert "without TLS" in str(caught.value)

    run(test())


def test_plaintext_may_be_wanted() -> None:
    async def test() -> None:
        plane = ControlPlane(Policies())
        async with plane.serving("0.0.0.0:0", insecure=True):
            address = f"127.0.0.1:{split_address(plane.address)[1]}"
            assert await outcome(FakeDaemon(address)) == "OK"

    run(test())


def test_two_control_planes_never_share_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when both found it free: with gRPC's default each would get half of the daemons."""
    monkeypatch.setattr(server_module, "_probe", lambda *_: None)

    async def test() -> None:
        async with serving(Policies()) as plane:
            with pytest.raises(PreconditionError):
                async with ControlPlane(Policies()).serving(plane.address):
                    pass

    run(test())


def test_address_in_use_is_told() -> None:
    async def test() -> None:
        async with serving(Policies()) as plane:
            for address, why in (
                (plane.address, "address already in use"),
                ("192.0.2.1:0", "cannot assign requested address"),
            ):
                with pytest.raises(PreconditionError) as caught:
                    async with ControlPlane(Policies()).serving(address, insecure=True):
                        pass
                assert f"listen on {address}: {why}" in str(caught.value)
            with socket.socket() as other:
                other.bind(("127.0.0.1", 0))
                other.listen()
                with pytest.raises(PreconditionError):
                    async with ControlPlane(Policies()).serving(f"127.0.0.1:{other.getsockname()[1]}"):
                        pass

    run(test())


def test_unix_socket_is_for_the_owner_and_gone_afterwards(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "plane.sock"
        plane = ControlPlane(Policies())
        async with plane.serving(f"unix:{path}"):
            assert plane.address == f"unix:{path}"
            assert stat.S_IMODE(path.lstat().st_mode) == 0o600
            assert await outcome(FakeDaemon(plane.address, {"a": {}})) == "OK"
            with pytest.raises(PreconditionError):
                async with ControlPlane(Policies()).serving(f"unix:{path}"):
                    pass
            assert await outcome(FakeDaemon(plane.address)) == "OK"
        assert not os.listdir(tmp_path)  # noqa: PTH208

    run(test())


def test_bad_unix_socket(tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(NetfenceError):
            async with ControlPlane(Policies()).serving(f"unix:{tmp_path}/none/plane.sock"):
                pass

    run(test())


def test_plane_serves_once_at_a_time_and_again_afterwards() -> None:
    async def test() -> None:
        plane = ControlPlane(Policies())
        async with plane.serving("127.0.0.1:0"), FakeDaemon(plane.address, {"a": {}}):
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            with pytest.raises(RuntimeError):
                async with plane.serving("127.0.0.1:0"):
                    pass
        async with plane.serving("127.0.0.1:0"), FakeDaemon(plane.address, {"b": {}}):
            await until(lambda: all_are(plane, State.IN_SYNC, 1))

    run(test())


def test_error_inside_serving_passes_as_it_is() -> None:
    async def test() -> None:
        with pytest.raises(KeyError):
            async with serving(Policies()):
                raise KeyError("mine")

    run(test())


def test_end_sends_the_daemons_away_and_leaves_no_task() -> None:
    async def test() -> None:
        before = asyncio.all_tasks()
        policies = Policies()
        daemon = FakeDaemon("", {"a": {}, "b": {}})
        async with serving(policies) as plane:
            daemon.address = plane.address
            await daemon.connect()
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            policies.gate.clear()
            update = asyncio.ensure_future(plane.update())
            await until(lambda: policies.waiting)
        await daemon.until(lambda: daemon.status is grpc.StatusCode.UNAVAILABLE)
        assert "stopping" in daemon.details
        assert {result.outcome.value for result in await update} == {"disconnected"}
        await daemon.drop()
        await until(lambda: asyncio.all_tasks() <= before)

    run(test())


PROGRAM = """
from netfence.controlplane import ControlPlane, Policy

async def policy_for(attachment):
    return Policy("block_all")

ControlPlane(policy_for).run("unix:{path}")
print("ended well")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_ends_by_signals(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "plane.sock"

    async def test() -> None:
        with subprocess.Popen(  # noqa: ASYNC220 - waited for in a thread
            [sys.executable, "-c", PROGRAM.format(path=path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                await until(path.exists)
                async with FakeDaemon(f"unix:{path}", {"a": {}}) as daemon:
                    await daemon.until(lambda: daemon.commands)
                    process.send_signal(signal.SIGHUP)  # ignored
                    await daemon.heartbeat(a=1)
                    await daemon.attach("b")
                    await daemon.until(lambda: len(daemon.commands) == 2)
                    process.send_signal(number)
                    await daemon.until(lambda: daemon.status)
                out, err = await asyncio.to_thread(process.communicate)
            finally:
                process.kill()
        assert process.returncode == 0, err
        assert b"ended well" in out
        assert b"Traceback" not in err
        assert not path.exists()

    run(test())


def test_clients_may_ping_often() -> None:
    """GRPC's default ends connections that are pinged more than once in five minutes without data."""
    options = dict(_options(Limits()))
    assert options["grpc.http2.min_ping_interval_without_data_ms"] <= 10_000
    assert options["grpc.keepalive_permit_without_calls"] == 1


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "status"),
    [
        ("right", "OK"),
        ("other", "OK"),
        (None, "UNAUTHENTICATED"),
        ("wrong", "UNAUTHENTICATED"),
        ("", "UNAUTHENTICATED"),
    ],
)
def test_tokens(token: str | None, status: str) -> None:
    async def test() -> None:
        async with serving(Policies(), tokens={"right", "other"}) as plane:
            assert await outcome(FakeDaemon(plane.address, token=token)) == status

    run(test())


def test_questions_need_the_token_too() -> None:
    async def test() -> None:
        async with serving(Policies(), tokens="right") as plane, FakeDaemon(plane.address, token="wrong") as daemon:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await daemon.query("a", "x.")
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    run(test())


def test_function_is_asked_on_every_connect() -> None:
    tokens: list[str] = ["one"]

    def read() -> list[str]:
        if not tokens:
            raise OSError("gone")
        return tokens

    async def test() -> None:
        async with serving(Policies(), tokens=read) as plane:
            assert await outcome(FakeDaemon(plane.address, token="one")) == "OK"
            tokens[:] = ["two"]
            assert await outcome(FakeDaemon(plane.address, token="one")) == "UNAUTHENTICATED"
            assert await outcome(FakeDaemon(plane.address, token="two")) == "OK"
            tokens.clear()
            assert await outcome(FakeDaemon(plane.address, token="two")) == "UNAUTHENTICATED"

    run(test())


@pytest.mark.parametrize("tokens", ["", [], {"good", ""}], ids=["empty", "none", "one-empty"])
def test_empty_tokens_are_refused(tokens: str | list[str] | set[str]) -> None:
    with pytest.raises(InvalidError):
        TokenCheck(tokens)


@pytest.mark.parametrize(
    "header", ["right", "Custom right", "Basic right", "Bearer", "Bearer ", "Bearer right ", "bearer  right"]
)
def test_other_forms_of_the_header_are_not_accepted(header: str) -> None:
    assert TokenCheck("right").accepted(header) is None
    assert TokenCheck("right").accepted("bearer right") == "right"


def test_token_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# ours\none\n\n two \n")
    read = token_file(path)
    assert read() == {"one", "two"}
    path.write_text("three\n")
    assert read() == {"three"}
    path.write_text("# nothing any more\n")
    assert read() == {"three"}
    path.unlink()
    assert read() == {"three"}
    path.write_text("four\n")
    assert read() == {"four"}


@pytest.mark.parametrize(
    "content", [None, b"", b"# only this\n", b"\xff\n"], ids=["missing", "empty", "comment", "binary"]
)
def test_bad_token_file_is_refused_at_the_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidError) as caught:
        token_file(path)
    assert str(path) in str(caught.value)


# -- TLS ---------------------------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority and files made by it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = trustme.CA()
        self.roots = self.ca.cert_pem.bytes()

    def files(self, *names: str, common_name: str | None = None) -> tuple[Path, Path]:
        """Write a certificate for these names, in place of the last one, and its key."""
        issued = self.ca.issue_cert(*names, common_name=common_name)
        paths = self.directory / "cert.pem", self.directory / "key.pem"
        for path, content in zip(paths, (b"".join(one.bytes() for one in issued.cert_chain_pems), None), strict=True):
            new = path.with_suffix(".new")
            new.write_bytes(issued.private_key_pem.bytes() if content is None else content)
            new.rename(path)
        return paths

    def client(self, *names: str) -> grpc.ChannelCredentials:
        """Return a client's credentials, with a certificate where it has names."""
        if not names:
            return grpc.ssl_channel_credentials(self.roots)
        issued = self.ca.issue_cert(*names, common_name="the-common-name")
        chain = b"".join(one.bytes() for one in issued.cert_chain_pems)
        return grpc.ssl_channel_credentials(self.roots, issued.private_key_pem.bytes(), chain)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_tls(authority: Authority) -> None:
    async def test() -> None:
        cert, key = authority.files("localhost", "127.0.0.1")
        plane = ControlPlane(Policies())
        async with plane.serving("0.0.0.0:0", tls=ServerTls(cert, key)):
            address = f"127.0.0.1:{split_address(plane.address)[1]}"
            assert await outcome(FakeDaemon(address, credentials=authority.client())) == "OK"
            stranger = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
            assert await outcome(FakeDaemon(address, credentials=stranger)) == "UNAVAILABLE"
            assert await outcome(FakeDaemon(address)) == "UNAVAILABLE"

    run(test())


def test_mutual_tls_wants_a_certificate_of_the_client_ca(authority: Authority, tmp_path: Path) -> None:
    async def test() -> None:
        cert, key = authority.files("127.0.0.1")
        client_ca = tmp_path / "ca.pem"
        client_ca.write_bytes(authority.roots)
        other = Authority(tmp_path)
        other_client = other.ca.issue_cert("host-1")
        forged = grpc.ssl_channel_credentials(
            authority.roots, other_client.private_key_pem.bytes(), other_client.cert_chain_pems[0].bytes()
        )
        async with serving(Policies(), tls=ServerTls(cert, key, client_ca)) as plane:
            assert await outcome(FakeDaemon(plane.address, credentials=authority.client("host-1"))) == "OK"
            assert await outcome(FakeDaemon(plane.address, credentials=authority.client())) == "UNAVAILABLE"
            assert await outcome(FakeDaemon(plane.address, credentials=forged)) == "UNAVAILABLE"

    run(test())


def test_tls_files_are_read_again_and_streams_stay(authority: Authority) -> None:
    async def test() -> None:
        cert, key = authority.files("127.0.0.1")
        async with (
            serving(Policies(), tls=ServerTls(cert, key)) as plane,
            FakeDaemon(plane.address, {"a": {}}, credentials=authority.client()) as old,
        ):
            old_roots = authority.client()
            authority.ca = trustme.CA()
            authority.roots = authority.ca.cert_pem.bytes()
            authority.files("127.0.0.1")
            second = FakeDaemon(plane.address, daemon_id="second", credentials=authority.client())
            assert await outcome(second) == "OK"
            assert await outcome(FakeDaemon(plane.address, daemon_id="third", credentials=old_roots)) == "UNAVAILABLE"
            assert old.status is None

    run(test())


@pytest.mark.parametrize("damage", ["other key", "no key", "garbage"])
def test_tls_files_that_do_not_fit_leave_the_last_ones(authority: Authority, damage: str) -> None:
    async def test() -> None:
        cert, key = authority.files("127.0.0.1")
        async with serving(Policies(), tls=ServerTls(cert, key)) as plane:
            if damage == "other key":
                key.write_bytes(authority.ca.issue_cert("127.0.0.1").private_key_pem.bytes())
            elif damage == "no key":
                key.unlink()
            else:
                cert.write_bytes(b"garbage")
            assert await outcome(FakeDaemon(plane.address, credentials=authority.client())) == "OK"

    run(test())


@pytest.mark.parametrize("damage", ["other key", "no key", "garbage", "garbage client CA"])
def test_bad_tls_files_are_refused_at_the_start(authority: Authority, tmp_path: Path, damage: str) -> None:
    cert, key = authority.files("127.0.0.1")
    client_ca = tmp_path / "ca.pem"
    client_ca.write_bytes(authority.roots)
    if damage == "other key":
        key.write_bytes(authority.ca.issue_cert("127.0.0.1").private_key_pem.bytes())
    elif damage == "no key":
        key.unlink()
    elif damage == "garbage":
        cert.write_bytes(b"garbage")
    else:
        client_ca.write_bytes(b"garbage")

    async def test() -> None:
        with pytest.raises(InvalidError) as caught:
            async with ControlPlane(Policies()).serving("127.0.0.1:0", tls=ServerTls(cert, key, client_ca)):
                pass
        named = {"no key": key, "garbage client CA": client_ca}.get(damage, cert)
        assert str(named) in str(caught.value)

    run(test())


# -- admission ---------------------------------------------------------------------------------------------------------


def test_admission_by_certificate(authority: Authority, tmp_path: Path) -> None:
    seen: list[Peer] = []

    def admit(daemon: Daemon, peer: Peer) -> bool:
        seen.append(peer)
        return daemon.id in peer.certificate_names

    async def test() -> None:
        cert, key = authority.files("127.0.0.1")
        client_ca = tmp_path / "ca.pem"
        client_ca.write_bytes(authority.roots)
        tls = ServerTls(cert, key, client_ca)
        async with serving(Policies(), tls=tls, admit=admit, tokens="secret") as plane:
            mine = authority.client("host-1.example")
            good = FakeDaemon(plane.address, daemon_id="host-1.example", credentials=mine, token="secret")
            assert await outcome(good) == "OK"
            bad = FakeDaemon(plane.address, daemon_id="host-2.example", credentials=mine, token="secret")
            assert await outcome(bad) == "PERMISSION_DENIED"
            assert [status.daemon.id for status in plane.daemons] == ["host-1.example"]
            assert seen[0].certificate_names == ("host-1.example", "the-common-name")
            assert seen[0].token == "secret"
            assert "secret" not in repr(seen[0])

    run(test())


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


async def yes(_daemon: Daemon, _peer: Peer) -> bool:
    return True


async def no(_daemon: Daemon, _peer: Peer) -> bool:
    return False


@pytest.mark.parametrize(
    ("admit", "expected"),
    [(yes, "OK"), (no, "PERMISSION_DENIED"), (lambda *_: "true enough", "PERMISSION_DENIED")],
    ids=["async-yes", "async-no", "not-a-bool"],
)
def test_admission_is_by_true_alone(admit: Any, expected: str) -> None:
    async def test() -> None:
        async with serving(Policies(), admit=admit) as plane:
            assert await outcome(FakeDaemon(plane.address)) == expected

    run(test())


def _broken_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep(_: Book) -> None:
        raise KeyError("defect")

    monkeypatch.setattr(Book, "sweep", sweep)
    monkeypatch.setattr("netfence.controlplane.plane.SWEEP_S", 0.01)


def test_end_of_the_work_ends_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that lives on and decides nothing would never be restarted."""
    _broken_sweep(monkeypatch)

    async def test() -> None:
        with pytest.raises(NetfenceError, match="restart"):
            async with serving(Policies()):
                await asyncio.sleep(30)
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]

    run(test())


def test_end_of_the_work_ends_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _broken_sweep(monkeypatch)
    late = threading.Timer(10, os.kill, (os.getpid(), signal.SIGTERM))  # which ends it well
    late.start()
    with pytest.raises(NetfenceError, match="restart"):
        ControlPlane(Policies()).run("127.0.0.1:0")
    late.cancel()


def test_what_waited_for_its_turn_at_the_end_is_asked_about_when_served_again() -> None:
    async def test() -> None:
        policies = Policies()
        policies.gate.clear()
        plane = ControlPlane(policies, limits=Limits(decisions=1, decisions_per_daemon=1))
        async with plane.serving("127.0.0.1:0"), daemons(3, plane.address):
            await until(lambda: policies.waiting and len(plane.attachments) == 3)
        policies.gate.set()
        async with plane.serving("127.0.0.1:0"), daemons(3, plane.address):
            await until(lambda: all_are(plane, State.IN_SYNC, 3))

    run(test())


@pytest.mark.parametrize("proof", ["", "insecure", "local", "client_ca", "tokens", "admit"])
def test_address_that_anybody_may_connect_to_is_warned_of(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proof: str
) -> None:
    monkeypatch.setattr(plane_module, "hush", Hush(structlog.get_logger("test")))

    async def test() -> None:
        cert, key = authority.files("127.0.0.1")
        client_ca = tmp_path / "ca.pem"
        client_ca.write_bytes(authority.roots)
        tls = None if proof == "insecure" else ServerTls(cert, key, client_ca if proof == "client_ca" else None)
        plane = ControlPlane(Policies(), admit=yes if proof == "admit" else None)
        address = "127.0.0.1:0" if proof == "local" else "0.0.0.0:0"
        with structlog.testing.capture_logs() as logs:
            async with plane.serving(
                address, tls=tls, tokens="secret" if proof == "tokens" else None, insecure=tls is None
            ):
                pass
        warned = [entry for entry in logs if entry["event"] == "anybody_may_connect"]
        assert bool(warned) == (proof in {"", "insecure"})

    run(test())


def test_open_files_that_cannot_be_raised_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr("resource.setrlimit", refuse)
    raise_open_files()
