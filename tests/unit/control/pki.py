"""A throw-away certificate authority and the files a rotation writes, for tests of transport security."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import trustme

SERVER_NAME = "cp.example"


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its chain, and its key, in PEM."""

    cert: bytes
    key: bytes


class Pki:
    """One CA. Two of them trust each other in nothing."""

    def __init__(self) -> None:
        self._ca = trustme.CA()

    @property
    def ca(self) -> bytes:
        """Return the CA's certificate in PEM."""
        return bytes(self._ca.cert_pem.bytes())

    def server(self, *names: str) -> Pair:
        """Issue a server's certificate: for `SERVER_NAME` alone unless told otherwise."""
        return _pair(self._ca.issue_cert(*(names or (SERVER_NAME,))))

    def client(self, name: str = "daemon.example") -> Pair:
        """Issue a client's certificate."""
        return _pair(self._ca.issue_cert(name))

    def expired(self) -> Pair:
        """Issue a certificate that ended yesterday."""
        return _pair(self._ca.issue_cert("daemon.example", not_after=datetime.now(UTC) - timedelta(days=1)))

    def server_credentials(self, *names: str, mutual: bool = False) -> Any:
        """Return credentials for grpc's `add_secure_port`; `mutual` asks clients for a certificate of this CA."""
        pair = self.server(*names)
        roots = self.ca if mutual else None
        return grpc.ssl_server_credentials([(pair.key, pair.cert)], roots, mutual)


def _pair(leaf: trustme.LeafCert) -> Pair:
    cert = b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
    return Pair(cert, leaf.private_key_pem.bytes())


def write_private(path: Path, content: bytes) -> Path:
    """Write a file that only its owner may read."""
    path.touch(mode=0o600)
    path.write_bytes(content)
    return path


def replace_file(path: Path, content: bytes) -> None:
    """Put a new file in the place of one, as careful tools do."""
    write_private(path.with_name(f".{path.name}.new"), content).rename(path)


def swap_volume(volume: Path, contents: Mapping[str, bytes]) -> None:
    """Fill a directory as Kubernetes does: ``name → ..data/name``, ``..data → ..<version>``, swapped by one rename."""
    versions = [entry for entry in volume.iterdir() if entry.is_dir() and not entry.is_symlink()]
    version = volume / f"..{len(versions)}"
    version.mkdir()
    for name, content in contents.items():
        write_private(version / name, content)
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(f"..data/{name}")
    (volume / "..data_tmp").symlink_to(version.name)
    (volume / "..data_tmp").rename(volume / "..data")
