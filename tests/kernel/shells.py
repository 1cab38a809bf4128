"""A shell in another place (a guest, a container) that runs one command after the other for a test.

Owns what goes over the two pipes between them: lines, numbered, answers with exit status and output in base64, so that
nothing else that is written there is taken for an answer. Whoever makes the place starts `LOOP` in it.
"""

from __future__ import annotations

import base64
import os
import select
import subprocess
import time
from typing import NamedTuple

from harness.deadline import SLOWNESS

READY = "ready"
TIMEOUT_S = 60.0 * SLOWNESS  # more than anything here waits for by itself
LOOP = f"""
echo {READY}
while read -r number command; do
    said=$(sh -c "$command" 2>&1 </dev/null)
    echo "$number $? $(printf %s "$said" | base64 -w 0)"
done
"""
"""For any POSIX shell with base64; ends with its input."""


class Said(NamedTuple):
    """How a command ended and what it said, on both outputs."""

    status: int
    text: str


class Shell:
    """The test's end of it. `process` has its input and output as pipes, and is the caller's to end."""

    def __init__(self, process: subprocess.Popen[bytes], ready_s: float) -> None:
        """Wait until it is there; TimeoutError or RuntimeError if it does not come up."""
        self._process = process
        self._rest = b""
        self._number = 0
        assert self._line(ready_s) == READY

    def run(self, command: str, timeout_s: float = TIMEOUT_S) -> Said:
        """Run one line; TimeoutError if it takes longer, RuntimeError if the place is gone."""
        assert "\n" not in command
        assert self._process.stdin is not None
        self._number += 1
        self._process.stdin.write(f"{self._number} {command}\n".encode())
        self._process.stdin.flush()
        number, status, text = self._line(timeout_s).split(" ")
        assert int(number) == self._number
        return Said(int(status), base64.b64decode(text).decode("utf-8", "replace"))

    def _line(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        until = time.monotonic() + timeout_s
        output = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([output], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"waited {timeout_s:g} s for an answer; until then: {self._rest!r}")
            data = os.read(output, 65536)
            if not data:
                raise RuntimeError(f"the shell is gone, exit status {self._process.wait()}: {self._rest!r}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()
