"""Certificates for tests of TLS, made by the openssl command: one authority, what it signs, and files that rotate."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Pair:
    """Files of a certificate and its key, in PEM."""

    cert: Path
    key: Path


class Authority:
    """A certificate authority; `ca` is the file of its certificate. Two of them do not trust each other."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._name = directory, name
        self.ca, self._key = directory / f"{name}.pem", directory / f"{name}.key"
        self._openssl("req", "-x509", *_NEW_KEY, "-keyout", self._key, "-out", self.ca, "-subj", f"/CN={name}")

    def issue(self, name: str, alternative: str) -> Pair:
        """Sign a certificate for `name`; `alternative` is its subjectAltName (``IP:127.0.0.1``, ``DNS:cp.test``)."""
        pair = Pair(self._directory / f"{self._name}-{name}.pem", self._directory / f"{self._name}-{name}.key")
        request, extensions = pair.cert.with_suffix(".csr"), pair.cert.with_suffix(".ext")
        extensions.write_text(f"subjectAltName={alternative}\n")
        self._openssl("req", *_NEW_KEY, "-keyout", pair.key, "-out", request, "-subj", f"/CN={name}")
        self._openssl("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key, "-CAcreateserial",
                      "-days", "2", "-extfile", extensions, "-out", pair.cert)  # fmt: skip
        return pair

    @staticmethod
    def _openssl(*arguments: object) -> None:
        done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def put(path: Path, content: bytes) -> Path:
    """Put a file that only its owner may read in the place of another, as careful tools do."""
    new = path.with_name(f".{path.name}.new")
    new.touch(mode=0o600)
    new.write_bytes(content)
    return new.rename(path)
