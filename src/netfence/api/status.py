"""From our errors to gRPC statuses: the only place that knows both.

Each kind in `netfence.errors` names its code; this module adds the bounds of a status message on the wire. Anything
else that is raised is a defect: the client learns INTERNAL and nothing of its insides, the log learns everything.
"""

from __future__ import annotations

from typing import Final, NoReturn
from urllib.parse import quote

import grpc
import grpc.aio
import structlog

from netfence import __version__
from netfence.api.views import ANSWERED
from netfence.errors import InvalidError, NetfenceError

MAX_MESSAGE_BYTES: Final = 4096
"""Bytes of a status message as it is sent, percent-encoded: it travels in a header, and peers refuse headers of more
than 8 KiB, which would hide the error behind another one."""

log = structlog.get_logger(__name__)


async def abort(context: grpc.aio.ServicerContext[object, object], method: str, error: Exception) -> NoReturn:
    """End a call with the status that `error` stands for."""
    if isinstance(error, NetfenceError):
        code, message = grpc.StatusCode[error.code], status_message(error)
        log.info("api_refused", method=method, code=error.code, error=message)
    else:
        code = grpc.StatusCode.INTERNAL
        message = f"{method}: internal error; the daemon's log has the details, please report it"
        log.error("api_failed", method=method, error=str(error), exc_info=error)
    await context.abort(code, message, ((ANSWERED, __version__),))
    raise RuntimeError("abort returned")  # it raises; this tells so where grpc's types are not installed


def status_message(error: NetfenceError) -> str:
    """Return the error's text, cut to `MAX_MESSAGE_BYTES`; of a list of faults whole ones, then how many more."""
    text = str(error)
    if _sent_bytes(text) <= MAX_MESSAGE_BYTES:
        return text
    if not isinstance(error, InvalidError):
        return _cut(text)
    room = MAX_MESSAGE_BYTES - len("; and 1000000000 more faults")
    kept: list[str] = []
    for fault in error.errors:
        room -= _sent_bytes(fault) + len("; ")
        if room < 0:
            break
        kept.append(fault)
    if not kept:
        return _cut(text)
    return "; ".join([*kept, f"and {len(error.errors) - len(kept)} more faults"])


def _sent_bytes(text: str) -> int:
    """Return how long `text` is percent-encoded (gRPC over HTTP/2, "Responses": all but printable ASCII, and "%")."""
    if text.isascii() and text.isprintable() and "%" not in text:
        return len(text)
    return len(quote(text, safe="".join(map(chr, range(0x20, 0x7F))).replace("%", ""), errors="replace"))


def _cut(text: str) -> str:
    text = text[:MAX_MESSAGE_BYTES]
    while _sent_bytes(text) > MAX_MESSAGE_BYTES - len("%E2%80%A6"):
        text = text[: len(text) * 3 // 4]
    return text + "…"
