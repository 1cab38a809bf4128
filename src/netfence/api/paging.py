"""Page tokens of List: a place in the order of attachments, not an offset.

A token names the last attachment of its page by what the list is ordered by (time of attach, id). The next page begins
behind that place, whether or not that attachment is still there: attachments that come and go between two pages make no
other one appear twice or not at all.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from typing import Final

from netfence.errors import InvalidError

DEFAULT_SIZE: Final = 100
"""Attachments in a page when the caller does not say."""

MAX_SIZE: Final = 1000
"""Most attachments in a page; asking for more gets this many."""

MAX_BYTES: Final = 2 * 1024 * 1024
"""Bytes of a page: gRPC clients refuse messages over 4 MiB unless told otherwise, and metadata may be large."""

_VERSION = 1
_HEAD = struct.Struct(">Bd")

Place = tuple[float, str]
"""(attached_at, id): what the list is ordered by."""


def page_size(asked: int) -> int:
    """Return the page size for what a caller asked. Raises InvalidError for a negative one."""
    if asked < 0:
        raise InvalidError(f"list: page_size is {asked}; give 1 to {MAX_SIZE}, or 0 for {DEFAULT_SIZE}")
    return min(asked or DEFAULT_SIZE, MAX_SIZE)


def make_token(place: Place) -> str:
    """Return the token of the page that begins behind `place`."""
    return base64.urlsafe_b64encode(_HEAD.pack(_VERSION, place[0]) + place[1].encode()).decode().rstrip("=")


def read_token(token: str) -> Place:
    """Return the place of a token that `make_token` made. Raises InvalidError for anything else."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        version, attached_at = _HEAD.unpack_from(raw)
        place = (attached_at, raw[_HEAD.size :].decode())
    except (binascii.Error, struct.error, ValueError):
        version, place = 0, (math.nan, "")
    if version != _VERSION or not math.isfinite(place[0]) or make_token(place) != token:
        raise InvalidError("list: page_token was not given by this daemon; pass next_page_token unchanged, or nothing")
    return place
