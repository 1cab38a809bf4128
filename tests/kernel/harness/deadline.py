"""Wait for a condition, never for time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SLOWNESS = 10 if os.environ.get("NETFENCE_EMULATED") else 1
"""How many times longer than on hardware a thing may take before it hangs; ci/vm.py tells where we are emulated."""

DEFAULT_TIMEOUT_S = 10.0 * SLOWNESS
POLL_S = 0.005


def wait_for(condition: Callable[[], T], what: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> T:
    """Call `condition` until it gives something true and return that; TimeoutError naming `what` after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > until:
            message = f"waited {timeout_s:g} s for {what}"
            raise TimeoutError(message)
        time.sleep(POLL_S)
