"""Attachments and interfaces that a caller named wrongly: what the caller may have meant.

Ids are UUIDs, which people shorten and mistype, and confuse with the interface or cgroup that they belong to.
"""

from __future__ import annotations

import difflib
import socket
from collections.abc import Iterable
from typing import Final

from netfence.errors import NotFoundError
from netfence.policy.limits import MAX_ERROR_TEXT
from netfence.policy.prefix import shown

CLOSE: Final = 0.8
"""How alike two ids must be, or two interfaces' names: random ids are half alike."""


def unknown(what: str, wanted: str, known: Iterable[tuple[str, str]]) -> NotFoundError:
    """Return the error about an id that no attachment has; `known` are the (id, target) of all.

    `what` is what was tried. A suggestion is made where exactly one attachment can have been meant.
    """
    targets = dict(known)
    near = _near(wanted, targets) if wanted else []
    name = wanted if len(wanted) <= MAX_ERROR_TEXT else shown(wanted)
    if len(near) == 1:
        return NotFoundError(f"{what}: no attachment {name}; did you mean {near[0]} ({targets[near[0]]})?")
    return NotFoundError(f"{what}: no attachment {name}; see `netfenced list`")


def interface_hint(wanted: str) -> str:
    """Return what helps who named an interface that this network namespace does not have."""
    near = difflib.get_close_matches(wanted, [name for _, name in socket.if_nameindex()], n=2, cutoff=CLOSE)
    return f"did you mean {near[0]!r}?" if len(near) == 1 else "see `ip link`"


def _near(wanted: str, targets: dict[str, str]) -> list[str]:
    """Return the ids that may have been meant: of that target, beginning so, or nearly so."""
    of_target = [one for one, target in targets.items() if target == wanted]
    beginning = [one for one in targets if one.startswith(wanted)]
    if of_target or beginning:
        return of_target or beginning
    if len(wanted) > 128:  # difflib takes square time, and no id is so long
        return []
    return difflib.get_close_matches(wanted, targets, n=2, cutoff=CLOSE)
