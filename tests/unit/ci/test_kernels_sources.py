"""ci/aptsources.py: finding a Debian mirror among what apt may be configured with."""

from __future__ import annotations

from pathlib import Path

import pytest

import aptsources
from aptsources import Source, configured, mirror_for, parse_deb822, parse_one_line, stanzas
from infrastructure import InfrastructureError

KEY = "/usr/share/keyrings/debian-archive-keyring.gpg"

# As Debian's images have it: comments within stanzas, a stanza per archive.
DEB822 = f"""\
Types: deb
# http://snapshot.example/archive/debian/20250520T000000Z
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: {KEY}

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: {KEY}
"""
ONE_LINE = f"""\
# the same, as it used to be written
deb [arch=amd64 signed-by={KEY}] http://mirror.example/debian bookworm main contrib  # and a comment
deb-src http://source.example/debian bookworm main
deb http://mirror.example/debian bookworm-updates main
deb [ signed-by={KEY} ] http://mirror.example/debian-security bookworm-security main
"""
# Vendors whose suite is called as Debian's; tailscale's and hashicorp's are like that.
VENDORS = """\
deb [signed-by=/vendor.gpg] https://vendor.example/stable/debian bookworm main
deb https://node.example/node_20.x nodistro main
deb https://pgdg.example/pub bookworm-pgdg main
deb https://docker.example/linux/debian bookworm stable
deb https://flat.example/ ./
"""

PARSERS = pytest.mark.parametrize("sources", [parse_deb822(DEB822), parse_one_line(ONE_LINE)], ids=["deb822", "list"])


@PARSERS
@pytest.mark.parametrize(
    ("suite", "uri"),
    [
        ("trixie-backports", "http://mirror.example/debian"),
        ("bookworm", "http://mirror.example/debian"),
        ("bullseye-security", "http://mirror.example/debian-security"),
    ],
)
def test_another_suite_comes_from_the_mirror_of_its_archive(sources: list[Source], suite: str, uri: str) -> None:
    assert mirror_for(suite, sources).uris == (uri,)


@PARSERS
def test_the_key_is_kept_and_the_rest_is_ours(sources: list[Source]) -> None:
    assert mirror_for("trixie-backports", sources).rendered("trixie-backports") == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie-backports\nComponents: main\n"
        f"Signed-By: {KEY}\n"
    )


@pytest.mark.parametrize("order", ["before", "after"])
def test_other_vendors_are_not_debian(order: str) -> None:
    debian, vendors = parse_deb822(DEB822), parse_one_line(VENDORS)
    sources = vendors + debian if order == "before" else debian + vendors
    assert mirror_for("bookworm", sources).uris == ("http://mirror.example/debian",)


NOT_DEBIAN = pytest.mark.parametrize(
    "line",
    [
        "deb http://ubuntu.example/ubuntu jammy main",
        "deb https://docker.example/linux/debian bookworm stable",
        "deb http://mirror.example/debian bookworm contrib  # not main",
    ],
    ids=["ubuntu", "docker", "contrib"],
)


@NOT_DEBIAN
@pytest.mark.parametrize(("suite", "path"), [("trixie-backports", "debian"), ("bullseye-security", "debian-security")])
def test_a_machine_without_a_mirror_asks_debian_itself(
    suite: str, path: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring = tmp_path / "keys.gpg"
    keyring.touch()
    monkeypatch.setattr(aptsources, "KEYRING", keyring)
    assert mirror_for(suite, parse_one_line(line)).rendered(suite) == (
        f"Types: deb\nURIs: http://deb.debian.org/{path}\nSuites: {suite}\nComponents: main\nSigned-By: {keyring}\n"
    )


@NOT_DEBIAN
def test_without_keys_it_is_infrastructure_and_says_what_to_do(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aptsources, "KEYRING", tmp_path / "none.gpg")
    with pytest.raises(InfrastructureError, match=r"^infrastructure: find a mirror for bookworm: .*; run ci/bootstrap"):
        mirror_for("bookworm", parse_one_line(line))


def test_a_key_within_the_entry_is_kept_whole() -> None:
    key = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n -----END PGP PUBLIC KEY BLOCK-----"
    text = DEB822.replace(f"Signed-By: {KEY}", f"Trusted: no\nSigned-By:{key}", 1)
    rendered = mirror_for("trixie", parse_deb822(text)).rendered("trixie")
    assert list(stanzas(rendered)) == [
        {
            "Types": "deb", "URIs": "http://mirror.example/debian", "Suites": "trixie", "Components": "main",
            "Trusted": "no",
            "Signed-By": key,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change", [("Types: deb\n", "Types: deb-src\n"), ("Types: deb\n", "Enabled: no\nTypes: deb\n")]
)
def test_what_apt_would_not_use_is_not_used(change: tuple[str, str]) -> None:
    assert parse_deb822(DEB822) != []
    assert parse_deb822(DEB822.replace(*change)) == []


def test_options_of_a_line_become_fields() -> None:
    line = (
        "deb [arch=arm64,i386 trusted=yes check-valid-until=no lang=none signed-by=/a.gpg,/b.gpg] http://m/d sid main\n"
    )
    (source,) = parse_one_line(line)
    assert source.options == (("Trusted", "yes"), ("Check-Valid-Until", "no"), ("Signed-By", "/a.gpg /b.gpg"))


def test_both_kinds_of_files_are_read_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://first.example/debian bookworm main\n")
    (tmp_path / "sources.list.d" / "a.sources").write_text(DEB822)
    (tmp_path / "sources.list.d" / "b.list").write_text(ONE_LINE)
    (tmp_path / "sources.list.d" / "c.sources.disabled").write_text(DEB822)
    read = [source.uris[0].removeprefix("http://").split(".")[0] for source in configured(tmp_path)]
    assert read == ["first", *["mirror"] * 5]
    assert configured(tmp_path / "nowhere") == []
