"""Bearer tokens: who may connect, where certificates are not used or not enough.

Owns the forms in which tokens are given and their comparison. Refuses to know gRPC.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

import structlog

from netfence.control.filewatch import signature
from netfence.controlplane.hush import Hush
from netfence.errors import InvalidError

Tokens = str | Collection[str] | Callable[[], str | Collection[str]]
"""One token, several (while they are being replaced), or a function that is asked on every connect."""

SCHEME: Final = "bearer "
MAX_FILE_BYTES: Final = 1 << 20

hush = Hush(structlog.get_logger(__name__))


class TokenCheck:
    """Tells whether a call's ``authorization`` is one of the tokens. Raises InvalidError for no or empty ones."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        if not callable(tokens):
            _digests(tokens)

    def accepted(self, authorization: str) -> str | None:
        """Return the accepted token, or None.

        Digests are compared, all of them and in constant time, so that the time taken tells nothing about a token. A
        function that fails accepts nobody.
        """
        scheme, token = authorization[: len(SCHEME)], authorization[len(SCHEME) :]
        if scheme.lower() != SCHEME:
            return None
        try:
            known = _digests(self._tokens() if callable(self._tokens) else self._tokens)
        except Exception as error:  # noqa: BLE001 - the user's code, or a file that is just not there
            hush.warning("tokens_unreadable", error=str(error), effect="nobody can connect")
            return None
        given = _digest(token)
        matches = [hmac.compare_digest(given, digest) for digest in known]
        return token if any(matches) else None


def token_file(path: Path) -> Callable[[], Collection[str]]:
    """Return a function that reads tokens from a file: one a line, empty lines and those with ``#`` do not count.

    The file is read again when it changes; while it cannot be read, or has no token, the last ones count. Raises
    InvalidError when it cannot be read at first.
    """
    tokens = _read(path)
    seen = signature(path)

    def read() -> Collection[str]:
        nonlocal tokens, seen
        now = signature(path)
        if now != seen:
            try:
                tokens, seen = _read(path), now
            except InvalidError as error:
                hush.warning("token_file_refused", error=str(error), effect="the last tokens stay")
        return tokens

    return read


def _read(path: Path) -> Collection[str]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES).decode("ascii")
    except OSError as error:
        raise InvalidError(f"read token file {path}: {error.strerror}; check --token-file") from None
    except UnicodeDecodeError:
        raise InvalidError(f"read token file {path}: it is not ASCII text; one token a line") from None
    lines = (line.strip() for line in text.splitlines())
    tokens = {line for line in lines if line and not line.startswith("#")}
    if not tokens:
        raise InvalidError(f"read token file {path}: no token in it; one token a line")
    return tokens


def _digests(tokens: str | Collection[str]) -> list[bytes]:
    every = [tokens] if isinstance(tokens, str) else list(tokens)
    if not every:
        raise InvalidError("tokens: none given, so nobody could connect; leave `tokens` out to do without")
    if not all(every):
        raise InvalidError("tokens: one is empty")
    return [_digest(token) for token in every]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
