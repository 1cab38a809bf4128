"""Text that came from outside, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` with what is not printable escaped, so that it cannot steer a terminal or forge a line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
