"""Debian packages of any suite, through apt, without touching the system's apt.

Owns a private apt (own lists, own empty status, nothing is ever installed) whose one source is a mirror that this
machine's apt is configured with, keys and options included, asked for another suite. apt checks signatures; we check
each file against the signed SHA256 once more. Knows nothing of kernels: `kernelcache.py` does.

Everything that fails here is infrastructure, `InfrastructureError`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aptsources import Source, stanzas
from infrastructure import InfrastructureError

ARCHITECTURE = "amd64"
_TIMEOUT_S = 30  # of a connection to the mirror; apt tries `_RETRIES` times more
_RETRIES = 2
_SAID_LINES = 4  # of a failed command's output, in our message

Progress = Callable[[float], None]  # told the fraction done, 0…1


@dataclass(frozen=True)
class Package:
    """A package as the signed metadata tell it; `size` in bytes, `depends` are bare names."""

    name: str
    version: str
    size: int
    sha256: str
    depends: tuple[str, ...]


def run(*command: str, cwd: Path | None = None, stdin: str | None = None) -> str:
    """Run a program and return its standard output; raises InfrastructureError with what it said."""
    environment = {**os.environ, "LC_ALL": "C", "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    if shutil.which(command[0], path=environment["PATH"]) is None:
        raise InfrastructureError(f"run {command[0]}: not found; run ci/bootstrap, or install it")
    done = subprocess.run(
        command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        raise failure(command, done.returncode, done.stdout + done.stderr)
    return done.stdout


def failure(command: tuple[str, ...], status: int, said: str) -> InfrastructureError:
    """Make the error of a failed command out of the last lines it said."""
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("dlstatus:")]
    errors = [line for line in lines if line.startswith("E: ")] or lines
    if "No space left" in said:
        advice = "; free some space, or set NETFENCE_KERNELS to a directory on another disk"
    elif command[0] == "apt-get":
        advice = "; check the network and the mirrors in /etc/apt, then try again"
    else:
        advice = ""
    # Options are how we speak to apt, and would be most of the message.
    words = " ".join(Path(word).name for word in command if not word.startswith("-") and "::" not in word)
    words = words.replace(" apt.conf ", " ")
    return InfrastructureError(f"run {words}: exit status {status}: {'; '.join(errors[-_SAID_LINES:])}{advice}")


class PrivateApt:
    """An apt of its own in `directory` that knows one suite; makes the directory and fetches the suite's index."""

    def __init__(self, directory: Path, suite: str, source: Source) -> None:
        self.suite = suite
        self._debs = directory / "debs"
        self._configuration = directory / "apt.conf"
        for each in (
            directory / "state" / "lists" / "partial",
            directory / "cache" / "archives" / "partial",
            self._debs,
        ):
            each.mkdir(parents=True)
        (directory / "state" / "status").touch()
        (directory / "netfence.sources").write_text(source.rendered(suite))
        self._configuration.write_text(_configuration(directory))
        run("apt-get", "-c", str(self._configuration), "-q", "update")

    def newest(self, pattern: str) -> Package:
        """Find the newest package whose whole name matches the expression; raises InfrastructureError if none does."""
        prefix = re.split(r"[\\\[\](){}.*+?|^$]", pattern)[0]
        names = run("apt-cache", "-c", str(self._configuration), "pkgnames", prefix).split()
        found = self.packages([name for name in names if re.fullmatch(pattern, name)])
        if not found:
            raise InfrastructureError(
                f"find a package {pattern} in {self.suite}: none of {len(names)} packages {prefix}* matches; "
                "the suite has moved on: correct its entry in ci/kernels.toml"
            )
        return max(found, key=functools.cmp_to_key(_compare))

    def packages(self, names: list[str]) -> list[Package]:
        """Look packages up by name, each in its newest version; a name that the suite does not have is left out."""
        if not names:
            return []
        shown = run("apt-cache", "-c", str(self._configuration), "show", "--no-all-versions", *names)
        return [_package(stanza) for stanza in stanzas(shown)]

    def download(self, packages: list[Package], progress: Progress) -> list[Path]:
        """Fetch the packages and check their SHA256; return the files in the order asked for."""
        wanted = [f"{package.name}={package.version}" for package in packages]
        command = ("apt-get", "-c", str(self._configuration), "-q", "-o", "APT::Status-Fd=1", "download", *wanted)
        said: list[str] = []
        with subprocess.Popen(
            command, cwd=self._debs, env={**os.environ, "LC_ALL": "C"}, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            for line in process.stdout or ():
                said.append(line)
                if line.startswith("dlstatus:"):
                    progress(float(line.split(":")[2]) / 100)
        if process.returncode != 0:
            raise failure(command, process.returncode, "".join(said))
        return [self._verified(package) for package in packages]

    def _verified(self, package: Package) -> Path:
        files = list(self._debs.glob(f"{package.name}_*.deb"))
        if len(files) != 1:
            raise InfrastructureError(
                f"download {package.name} {package.version}: apt left {len(files)} files; try again"
            )
        check_sha256(files[0], package.sha256)
        return files[0]


def sha256(file: Path) -> str:
    """Hash a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(file: Path, expected: str) -> None:
    """Raise InfrastructureError unless the file has the hash."""
    seen = sha256(file)
    if seen != expected:
        raise InfrastructureError(
            f"check {file.name}: SHA256 is {seen}, the signed index says {expected}; "
            "the mirror or a proxy in front of it is broken: try again, or use another mirror"
        )


def _package(stanza: dict[str, str]) -> Package:
    depends = re.findall(r"(?:^|[,|]\s*)([a-z0-9][a-z0-9+.-]+)", stanza.get("Depends", ""))
    return Package(stanza["Package"], stanza["Version"], int(stanza["Size"]), stanza["SHA256"], tuple(depends))


def _compare(one: Package, other: Package) -> int:
    """Order by version as Debian does; dpkg knows how, and it takes a millisecond."""
    if one.version == other.version:
        return 0
    newer = subprocess.run(["dpkg", "--compare-versions", one.version, "gt", other.version], check=False)
    return 1 if newer.returncode == 0 else -1


def _configuration(directory: Path) -> str:
    """Write the private apt.conf; read after the system's, whose proxies and certificates stay in force."""
    return f"""\
// The system's hooks (caches of package managers, cleaners of images) are not for us.
#clear APT::Update;
APT::Update::Error-Mode "any";
APT::Architecture "{ARCHITECTURE}";
#clear APT::Architectures;
APT::Architectures {{ "{ARCHITECTURE}"; }};
// As root apt would become _apt, who may not enter root's home, where the cache is by default.
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "{_RETRIES}";
Acquire::http::Timeout "{_TIMEOUT_S}";
Acquire::https::Timeout "{_TIMEOUT_S}";
Dir::State "{directory}/state";
Dir::State::status "{directory}/state/status";
Dir::Cache "{directory}/cache";
Dir::Etc::sourcelist "{directory}/netfence.sources";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
"""
