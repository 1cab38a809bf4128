"""TLS of the server: its files, read again when they change.

Owns the files and what is wrong with them. A new certificate counts from the next handshake on; streams that stand go
on. While the files do not fit each other, as in the middle of their replacement, the last good ones stay.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from netfence.control.filewatch import Signature, signature
from netfence.controlplane.hush import Hush
from netfence.errors import InvalidError

hush = Hush(structlog.get_logger(__name__))


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files of a server: certificate chain and key; with `client_ca` daemons must show a certificate of it."""

    cert: Path | str
    key: Path | str
    client_ca: Path | str | None = None


class TlsFiles:
    """The files in use. Raises InvalidError with every fault when they are no good at the start."""

    def __init__(self, tls: ServerTls) -> None:
        self._cert, self._key = Path(tls.cert), Path(tls.key)
        self._client_ca = None if tls.client_ca is None else Path(tls.client_ca)
        self._seen = self._signatures()
        self._config = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials, which ask for new files on every handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._config, self._changed, require_client_authentication=self._client_ca is not None
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new files, None for the same ones. gRPC calls this in a thread of its own, which may not fail."""
        now = self._signatures()
        if now == self._seen:
            return None
        try:
            self._config = self._read()
        except InvalidError as error:
            hush.warning("tls_files_refused", errors=list(error.errors), effect="the last ones stay")
            return None
        self._seen = now
        hush.info("tls_files_loaded", cert=str(self._cert))
        return self._config

    def _read(self) -> grpc.ServerCertificateConfiguration:
        faults: list[str] = []
        cert = _contents(self._cert, "certificate", faults)
        key = _contents(self._key, "key", faults)
        client_ca = None if self._client_ca is None else _contents(self._client_ca, "client CA", faults)
        if not faults:
            self._check(faults)
        if faults:
            raise InvalidError(faults)
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)

    def _check(self, faults: list[str]) -> None:
        """Note what OpenSSL says against the files: gRPC would only fail handshakes, one by one and without a word."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._cert, self._key, password="")
        except (ssl.SSLError, OSError) as error:
            faults.append(f"TLS certificate {self._cert} and key {self._key}: {_why(error)}; give PEM files that fit")
        if self._client_ca is not None:
            try:
                context.load_verify_locations(self._client_ca)
            except (ssl.SSLError, OSError) as error:
                faults.append(f"TLS client CA {self._client_ca}: {_why(error)}; give a PEM file of certificates")

    def _signatures(self) -> tuple[Signature, ...]:
        return tuple(signature(path) for path in (self._cert, self._key, self._client_ca) if path is not None)


def _contents(path: Path, what: str, faults: list[str]) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        faults.append(f"TLS {what} {path}: {error.strerror}; check the path and that we may read it")
        return b""


def _why(error: OSError) -> str:
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    return str(reason).replace("_", " ").lower()
