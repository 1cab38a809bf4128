"""What this machine's apt is configured with, and which of it is a mirror of Debian.

Pure but for `configured`, which reads files. sources.list(5) tells both formats; deb822 is also the format of apt's
package metadata, so `debfetch` reads those with `stanzas`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infrastructure import InfrastructureError

APT_CONFIGURATION = Path("/etc/apt")
DEBIAN = "http://deb.debian.org"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")  # what is not signed by these keys is not taken

# Names of Debian's own suites: other vendors use them too, so a source must also look like an archive of Debian.
_SUITE = re.compile(
    r"(buster|bullseye|bookworm|trixie|forky|duke|sid|stable|oldstable|oldoldstable|testing|unstable)"
    r"(-updates|-backports|-proposed-updates|-security|/updates)?"
)
# Fields of a source that we set ourselves; all others (Signed-By, Trusted, Check-Valid-Until …) are kept as they are.
_OURS = frozenset({"types", "uris", "suites", "components", "enabled", "architectures"})
_ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)")


@dataclass(frozen=True)
class Source:
    """An entry of the machine's sources; `options` are its other fields as (deb822 name, value)."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    @property
    def is_debian(self) -> bool:
        """Tell whether this can be an archive of Debian itself."""
        return "main" in self.components and any(_SUITE.fullmatch(suite) for suite in self.suites)

    @property
    def is_security(self) -> bool:
        """Tell whether it is the archive of the security suites, which is a mirror of its own."""
        return any(suite.endswith(("-security", "/updates")) for suite in self.suites)

    def rendered(self, suite: str) -> str:
        """Write it as a deb822 stanza that asks for `suite` instead."""
        own = f"Types: deb\nURIs: {' '.join(self.uris)}\nSuites: {suite}\nComponents: main\n"
        return own + "".join(f"{name}: {value}\n" for name, value in self.options)


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Split deb822 text into its stanzas: field name → value; continuation lines are kept, comments are not."""
    fields: dict[str, str] = {}
    name = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t" and name:
            fields[name] += "\n" + line
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()


def parse_deb822(text: str) -> list[Source]:
    """Read a *.sources file; disabled entries and sources of source code are left out."""
    found = []
    for stanza in stanzas(text):
        low = {name.lower(): value for name, value in stanza.items()}
        if "deb" not in low.get("types", "").split() or low.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        uris, suites, components = (tuple(low.get(name, "").split()) for name in ("uris", "suites", "components"))
        options = tuple((name, value) for name, value in stanza.items() if name.lower() not in _OURS)
        found.append(Source(uris, suites, components, options))
    return found


def parse_one_line(text: str) -> list[Source]:
    """Read a *.list file: `deb [option=value …] uri suite component…` (sources.list(5))."""
    found = []
    for line in text.splitlines():
        entry = _ONE_LINE.fullmatch(line.partition("#")[0].strip())
        if entry is None:
            continue
        pairs = [option.partition("=") for option in (entry["options"] or "").split()]
        # deb822 fields have the same names but for these three, which a kernel does not need.
        options = tuple(
            (name.title(), value.replace(",", " "))
            for name, _, value in pairs
            if name not in ("arch", "lang", "target")
        )
        found.append(Source((entry["uri"],), (entry["suite"],), tuple(entry["components"].split()), options))
    return found


def configured(root: Path = APT_CONFIGURATION) -> list[Source]:
    """Read all sources of the machine, in apt's order."""
    files = [root / "sources.list", *sorted((root / "sources.list.d").glob("*"))]
    parsers = {".list": parse_one_line, ".sources": parse_deb822}
    return [
        source
        for file in files
        if file.suffix in parsers and file.is_file()
        for source in parsers[file.suffix](file.read_text(encoding="utf-8", errors="surrogateescape"))
    ]


def mirror_for(suite: str, sources: list[Source]) -> Source:
    """Choose the machine's mirror that should have `suite`; Debian's own where the machine has none, as on Ubuntu.

    An archive that also has an `-updates` suite goes first: other vendors have suites called bookworm, but not those.
    Raises InfrastructureError where nothing on this machine can tell whether an archive is Debian's.
    """
    security = suite.endswith("-security")
    fit = [source for source in sources if source.is_debian and source.is_security == security]
    updated = {uri for source in fit for uri in source.uris if any(name.endswith("-updates") for name in source.suites)}
    for source in sorted(fit, key=lambda source: updated.isdisjoint(source.uris)):
        return source
    if not KEYRING.exists():
        raise InfrastructureError(
            f"find a mirror for {suite}: no source in {APT_CONFIGURATION} is Debian's, and without {KEYRING} nothing"
            " else can be believed; run ci/bootstrap, or install debian-archive-keyring"
        )
    uri = f"{DEBIAN}/debian-security" if security else f"{DEBIAN}/debian"
    return Source((uri,), (suite,), ("main",), (("Signed-By", str(KEYRING)),))
