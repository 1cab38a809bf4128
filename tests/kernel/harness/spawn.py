"""Start programs inside namespaces and cgroups; they die when we do."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from typing import IO

from harness.cgroup import Cgroup
from harness.netns import NetNs

# The shell moves itself before it becomes the program, so that the program never runs anywhere else.
JOIN = 'echo $$ >"$0" && exec setpriv --pdeathsig KILL -- "$@"'


def spawn(
    argv: Sequence[str],
    *,
    netns: NetNs | None = None,
    cgroup: Cgroup | None = None,
    env: dict[str, str] | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | int | None = None,
) -> subprocess.Popen[bytes]:
    """Start `argv` in the given namespace and cgroup (default: ours); it gets SIGKILL should this process end."""
    if cgroup is None:
        command = ["setpriv", "--pdeathsig", "KILL", "--", *argv]
    else:
        command = ["sh", "-c", JOIN, str(cgroup.procs), *argv]
    with netns.inside() if netns else contextlib.nullcontext():
        return subprocess.Popen(command, env=env, stdin=stdin, stdout=stdout, stderr=stderr)


def stop(process: subprocess.Popen[bytes], timeout_s: float = 10.0) -> int:
    """Ask a process to end, insist after `timeout_s`, and return its exit status (negative: the signal)."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    return process.wait()
