"""What the files may contain, and that a rotation is taken whole, whatever way the files are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from tests.unit.control.pki import SERVER_NAME, Pair, Pki, replace_file, swap_volume, write_private

from netfence.config import ControlPlane, Tls
from netfence.control import credentials
from netfence.control.credentials import MAX_TOKEN_BYTES, Credentials, Secrets, load
from netfence.control.filewatch import FileWatch
from netfence.errors import InvalidError

NAMES = ("ca", "cert", "key", "token")
SOON_S = 10.0


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


@pytest.fixture(scope="module")
def one(pki: Pki) -> Pair:
    return pki.client()


@pytest.fixture(scope="module")
def two(pki: Pki) -> Pair:
    return pki.client()


class Place:
    """A directory with the four files, good ones at first."""

    def __init__(self, directory: Path, pki: Pki, pair: Pair) -> None:
        self.directory = directory
        self.first = {"ca": pki.ca, "cert": pair.cert, "key": pair.key, "token": b"first\n"}
        self.settings = ControlPlane(
            url=("cp.example:443",),
            tls=Tls(ca=self["ca"], cert=self["cert"], key=self["key"], server_name=SERVER_NAME),
            token_file=self["token"],
        )
        self.write(self.first)

    def __getitem__(self, name: str) -> Path:
        return self.directory / name

    def write(self, contents: dict[str, bytes]) -> None:
        for name, content in contents.items():
            write_private(self[name], content)

    def faults(self) -> tuple[str, ...]:
        with pytest.raises(InvalidError) as raised:
            load(self.settings)
        return raised.value.errors


@pytest.fixture
def place(tmp_path: Path, pki: Pki, one: Pair) -> Place:
    return Place(tmp_path, pki, one)


def test_good_files_are_loaded(place: Place, pki: Pki, one: Pair) -> None:
    secrets = load(place.settings)
    assert secrets == Secrets(pki.ca, one.cert, one.key, "first", SERVER_NAME)
    assert secrets.warnings == ()


def test_secrets_are_not_printed(place: Place, one: Pair) -> None:
    shown = repr(load(place.settings))
    assert "first" not in shown
    assert one.key.decode().splitlines()[1] not in shown


def test_nothing_configured_is_nothing() -> None:
    assert load(ControlPlane()) == Secrets()


def test_a_bundle_with_comments_is_good(place: Place, pki: Pki) -> None:
    place.write({"ca": "# Zürich\n".encode() + pki.ca + b"\n# Other\n" + Pki().ca})
    assert load(place.settings).ca == place["ca"].read_bytes()


def garbled(pem: bytes) -> bytes:
    lines = pem.splitlines(keepends=True)
    return b"".join([*lines[:2], b"AAAA\n", *lines[3:]])


def encrypted(key: bytes) -> bytes:
    command = ["openssl", "pkcs8", "-topk8", "-passout", "pass:x"]
    return subprocess.run(command, input=key, stdout=subprocess.PIPE, check=True).stdout


BAD: list[tuple[str, str, Callable[[Pki, Pair], bytes], str, str]] = [
    ("ca-empty", "ca", lambda _p, _o: b"", "tls.ca", "not a certificate in PEM"),
    ("ca-text", "ca", lambda _p, _o: b"hello\n", "tls.ca", "not a certificate in PEM"),
    ("ca-garbled", "ca", lambda p, _o: garbled(p.ca), "tls.ca", "not a certificate in PEM"),
    ("ca-half-garbled", "ca", lambda p, _o: p.ca + garbled(p.ca), "tls.ca", "not a certificate in PEM"),
    ("ca-is-a-key", "ca", lambda _p, o: o.key, "tls.ca", "not a certificate in PEM"),
    ("ca-trusted", "ca", lambda p, _o: p.ca.replace(b" CERT", b" TRUSTED CERT"), "tls.ca", "not a certificate in PEM"),
    ("ca-der", "ca", lambda p, _o: ssl.PEM_cert_to_DER_cert(p.ca.decode()), "tls.ca", "not a certificate in PEM"),
    ("cert-text", "cert", lambda _p, _o: b"hello\n", "tls.cert", "not a certificate in PEM"),
    ("cert-garbled", "cert", lambda _p, o: garbled(o.cert), "tls.cert", "not a certificate in PEM"),
    ("cert-other", "cert", lambda p, _o: p.client().cert, "tls.key", "belongs to another certificate"),
    ("cert-ca-first", "cert", lambda p, o: p.ca + o.cert, "tls.key", "intermediates after the certificate"),
    ("key-text", "key", lambda _p, _o: b"hello\n", "tls.key", "not a private key in PEM"),
    ("key-garbled", "key", lambda _p, o: garbled(o.key), "tls.key", "not a usable private key"),
    ("key-other", "key", lambda p, _o: p.client().key, "tls.key", "belongs to another certificate"),
    ("key-encrypted", "key", lambda _p, o: encrypted(o.key), "tls.key", "encrypted"),
    ("token-empty", "token", lambda _p, _o: b"\n", "token_file", "empty"),
    ("token-space", "token", lambda _p, _o: b"Bearer x", "token_file", "byte 7 is 0x20"),
    ("token-two-lines", "token", lambda _p, _o: b"a\nb\n", "token_file", "byte 2 is 0x0a"),
    ("token-utf8", "token", lambda _p, _o: "é".encode(), "token_file", "byte 1 is 0xc3"),
    ("token-long", "token", lambda _p, _o: b"x" * (MAX_TOKEN_BYTES + 1), "token_file", "longer than"),
    ("ca-huge", "ca", lambda p, _o: p.ca + bytes(credentials.MAX_FILE_BYTES), "tls.ca", "longer than"),
]


@pytest.mark.parametrize(("name", "make", "key", "why"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_content_is_named(
    name: str, make: Callable[[Pki, Pair], bytes], key: str, why: str, place: Place, pki: Pki, one: Pair
) -> None:
    place.write({name: make(pki, one)})
    (fault,) = place.faults()
    named = place[key.removeprefix("tls.").removesuffix("_file")]
    assert fault.startswith(f"control_plane.{key}: {named}: ")
    assert why in fault


def test_a_token_is_never_told(place: Place) -> None:
    place.write({"token": b"s3cret token"})
    assert "s3cret" not in " ".join(place.faults())


def test_every_fault_is_told_at_once(place: Place) -> None:
    place["ca"].unlink()
    place.write({"cert": b"", "key": b"", "token": b""})
    assert [fault.partition(": ")[0] for fault in place.faults()] == [
        "control_plane.tls.ca",
        "control_plane.tls.cert",
        "control_plane.tls.key",
        "control_plane.token_file",
    ]


def absent(path: Path) -> None:
    path.unlink()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "why"),
    [(absent, "no such file or directory; create it"), (directory, "not a regular file"), (pipe, "not a regular file")],
    ids=["absent", "directory", "pipe"],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_named(name: str, make: Callable[[Path], None], why: str, place: Place) -> None:
    make(place[name])
    (fault,) = place.faults()
    assert f": {place[name]}: {why}" in fault


@pytest.mark.parametrize(("name", "warns"), [("ca", False), ("cert", False), ("key", True), ("token", True)])
def test_secrets_that_all_can_read_warn(name: str, warns: bool, place: Place) -> None:
    place[name].chmod(0o644)
    warnings = load(place.settings).warnings
    assert [str(place[name]) in warning for warning in warnings] == [True] * warns


def test_an_expired_certificate_warns(place: Place, pki: Pki) -> None:
    pair = pki.expired()
    place.write({"cert": pair.cert, "key": pair.key})
    (warning,) = load(place.settings).warnings
    assert "control_plane.tls.cert" in warning
    assert "expired at 20" in warning


def test_a_token_in_plaintext_warns(tmp_path: Path) -> None:
    path = write_private(tmp_path / "token", b"x")
    (warning,) = load(ControlPlane(url=("cp.example:443",), token_file=path, insecure=True)).warnings
    assert "plaintext" in warning
    assert load(ControlPlane(url=("localhost:443",), token_file=path)).warnings == ()


class Watched:
    """Credentials whose `watch` runs."""

    def __init__(self, settings: ControlPlane) -> None:
        self.credentials = Credentials(settings, load(settings))
        self.used = self.credentials.current

    async def new(self) -> Secrets:
        self.used = await asyncio.wait_for(self.credentials.changed(self.used), SOON_S)
        return self.used


def watching(settings: ControlPlane, scenario: Callable[[Watched], Awaitable[None]]) -> None:
    """Run a scenario beside `watch`."""

    async def test() -> None:
        watched = Watched(settings)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(watched.credentials.watch())
            await scenario(watched)
            task.cancel()

    run(test())


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


async def until(told: list[Any], event: str, times: int = 1) -> None:
    """Wait until the log told something."""
    async with asyncio.timeout(SOON_S):
        while events(told).count(event) < times:  # noqa: ASYNC110 - a list cannot be awaited
            await asyncio.sleep(0.01)


def events(told: Iterable[Any]) -> list[str]:
    return [entry["event"] for entry in told]


def in_place(place: Place, contents: dict[str, bytes]) -> None:
    place.write(contents)


def renamed(place: Place, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        replace_file(place[name], content)


def away_and_back(place: Place, contents: dict[str, bytes]) -> None:
    for name in contents:
        place[name].unlink()
    place.write(contents)


@pytest.mark.parametrize("replace", [in_place, renamed, away_and_back])
def test_a_rotation_is_taken_whole(
    replace: Callable[[Place, dict[str, bytes]], None], place: Place, pki: Pki, two: Pair
) -> None:
    async def scenario(watched: Watched) -> None:
        other = Pki().ca + pki.ca
        replace(place, {"ca": other, "cert": two.cert, "key": two.key, "token": b"second"})
        assert await watched.new() == Secrets(other, two.cert, two.key, "second", SERVER_NAME)
        replace(place, {"token": b"third"})
        assert (await watched.new()).token == "third"

    with capture_logs() as told:
        watching(place.settings, scenario)
    assert events(told).count("credentials_loaded") == 2
    assert "credentials_refused" not in events(told)


def test_files_replaced_shortly_after_one_another_are_one_rotation(
    place: Place, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "QUIET_S", 1.0)

    async def scenario(watched: Watched) -> None:
        for name in ("token", "other"):  # `other` is nothing to the credentials: what they see of the token, they saw
            watch = FileWatch(place[name])
            replace_file(place[name], b"second")
            await asyncio.wait_for(watch.changed(), SOON_S)
            watch.close()
        both = pki.ca + Pki().ca
        replace_file(place["ca"], both)
        assert (await watched.new()).token == "second"
        assert watched.used.ca == both

    watching(place.settings, scenario)


def test_a_kubernetes_volume(tmp_path: Path, pki: Pki, one: Pair, two: Pair) -> None:
    directory = tmp_path / "volume"
    directory.mkdir()
    place = Place(tmp_path, pki, one)
    for name in NAMES:
        place[name].unlink()
    place.directory = directory
    swap_volume(directory, place.first)
    settings = ControlPlane(
        url=("cp.example:443",),
        tls=Tls(ca=place["ca"], cert=place["cert"], key=place["key"]),
        token_file=place["token"],
    )

    async def scenario(watched: Watched) -> None:
        for token in ("second", "third"):  # twice: the first swap moves what the links point to
            swap_volume(directory, {**place.first, "cert": two.cert, "key": two.key, "token": token.encode()})
            assert await watched.new() == Secrets(pki.ca, two.cert, two.key, token)

    with capture_logs() as told:
        watching(settings, scenario)
    assert events(told) == ["credentials_loaded"] * 2


def test_half_a_rotation_waits_for_the_other_half(place: Place, two: Pair) -> None:
    async def scenario(watched: Watched) -> None:
        replace_file(place["cert"], two.cert)
        await until(told, "credentials_unsettled")
        assert watched.credentials.current == watched.used
        replace_file(place["key"], two.key)
        assert (await watched.new()).key == two.key

    with capture_logs() as told:
        watching(place.settings, scenario)
    assert "credentials_refused" not in events(told)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "MAX_ROTATION_S", 0.5)


@pytest.mark.usefixtures("_quick")
def test_half_a_rotation_that_stays_one_is_told_and_can_still_be_completed(place: Place, two: Pair) -> None:
    async def scenario(watched: Watched) -> None:
        replace_file(place["cert"], two.cert)
        await until(told, "credentials_refused")
        assert watched.credentials.current == watched.used
        replace_file(place["key"], two.key)
        assert (await watched.new()).key == two.key

    with capture_logs() as told:
        watching(place.settings, scenario)
    assert events(told).count("credentials_refused") == 1


@pytest.mark.usefixtures("_quick")
def test_garbage_is_told_once_and_changes_nothing(place: Place) -> None:
    async def scenario(watched: Watched) -> None:
        replace_file(place["ca"], b"garbage")
        await until(told, "credentials_refused")
        for tries in (2, 3):
            replace_file(place["ca"], b"garbage")
            await until(told, "loaded_again", tries)
        assert events(told).count("credentials_refused") == 1
        replace_file(place["ca"], b"other garbage")
        await until(told, "credentials_refused", 2)
        assert watched.credentials.current == watched.used
        replace_file(place["ca"], place.first["ca"])
        replace_file(place["token"], b"second")
        assert (await watched.new()).token == "second"
        renamed(place, {"ca": b"other garbage", "token": place.first["token"]})
        await until(told, "credentials_refused", 3)  # the same content as the second time, but news again

    load_ = Credentials._load

    async def loud(self: Credentials, *, report: bool) -> bool:
        good = await load_(self, report=report)
        if report:
            credentials.log.debug("loaded_again")
        return good

    with capture_logs() as told, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Credentials, "_load", loud)
        watching(place.settings, scenario)
    refused = next(entry for entry in told if entry["event"] == "credentials_refused")
    assert refused["log_level"] == "error"
    assert str(place["ca"]) in refused["errors"][0]


def test_a_change_before_the_watch_is_seen(place: Place) -> None:
    async def test() -> None:
        watched = Watched(place.settings)
        place.write({"token": b"second"})
        async with asyncio.TaskGroup() as group:
            task = group.create_task(watched.credentials.watch())
            assert (await watched.new()).token == "second"
            task.cancel()

    run(test())


def test_the_same_content_again_is_no_change(place: Place) -> None:
    async def scenario(watched: Watched) -> None:
        for name in NAMES:
            replace_file(place[name], place.first[name])
        replace_file(place["token"], b"first")  # without its newline it is the same token
        replace_file(place["key"], place.first["key"])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watched.credentials.changed(watched.used), 1)

    with capture_logs() as told:
        watching(place.settings, scenario)
    assert events(told) == []


def test_who_asks_late_is_told_at_once(place: Place) -> None:
    async def test() -> None:
        watched = Watched(place.settings)
        place.write({"token": b"second"})
        await watched.credentials.reload()
        assert (await watched.new()).token == "second"

    run(test())


def test_everybody_who_waits_is_told(place: Place) -> None:
    async def test() -> None:
        watched = Watched(place.settings)
        waiting = [asyncio.create_task(watched.credentials.changed(watched.used)) for _ in range(3)]
        place.write({"token": b"second"})
        await watched.credentials.reload()
        assert [secrets.token for secrets in await asyncio.gather(*waiting)] == ["second"] * 3

    run(test())


def test_reload_tells_faults_every_time_and_keeps_the_old(place: Place) -> None:
    async def test() -> None:
        watched = Watched(place.settings)
        place["key"].unlink()
        for _ in range(2):
            await watched.credentials.reload()
        assert watched.credentials.current == watched.used

    with capture_logs() as told:
        run(test())
    assert events(told) == ["credentials_refused"] * 2


def test_warnings_are_logged_when_taken(place: Place) -> None:
    async def test() -> None:
        place["key"].chmod(0o644)
        watched = Watched(place.settings)
        assert events(told) == ["credentials_warning"]
        place.write({"token": b"second"})
        await watched.credentials.reload()

    with capture_logs() as told:
        run(test())
    assert events(told) == ["credentials_warning"] * 2 + ["credentials_loaded"]


def descriptors() -> list[str]:
    """Return what the credentials may have open; gRPC's threads, left by other tests, open and close others."""
    kinds = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - descriptors, not files
        with contextlib.suppress(FileNotFoundError):
            kinds.append(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115 - no path of a file
    return sorted(kind for kind in kinds if "inotify" in kind or "memfd:netfence" in kind)


def test_watching_gives_everything_back(place: Place) -> None:
    async def scenario(watched: Watched) -> None:
        place.write({"token": b"second"})
        await watched.new()

    before = descriptors()
    watching(place.settings, scenario)
    assert descriptors() == before


def test_files_of_different_moments_are_read_again(place: Place, two: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    read = credentials._read_file

    def late(key: str, path: Path) -> credentials._File:
        found = read(key, path)
        if key == "tls.cert" and path.read_bytes() != two.cert:  # between the certificate and the key
            renamed(place, {"cert": two.cert, "key": two.key})
        return found

    monkeypatch.setattr(credentials, "_read_file", late)
    assert load(place.settings).cert == two.cert
