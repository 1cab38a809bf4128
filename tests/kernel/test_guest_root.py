"""What ci/guest_root.sh makes of a root: here of this machine's, in a mount namespace of its own."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.userspace

SCRIPT = Path(__file__).parents[2] / "ci" / "guest_root.sh"
LOOK = "ls -A / && echo -- && stat -f -c %T / && stat -L -c %i /usr/bin /proc/self /bin/sh && touch /new"


def look(*before: str) -> tuple[set[str], str]:
    """List the root, and what is behind some paths, in a mount namespace of its own."""
    script = " && ".join((*before, LOOK))
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    names, _, facts = subprocess.run(inside, stdout=subprocess.PIPE, text=True, check=True).stdout.partition("--\n")
    return set(names.split()), facts


def test_the_new_root_is_a_tmpfs_with_what_the_old_one_had() -> None:
    try:
        names, facts = look(f"sh {SCRIPT}")
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path("/run/root").rmdir()
    was = {each.name for each in Path("/").iterdir() if each.is_symlink() or each.is_dir()}
    assert names == was
    kind, _, inodes = facts.partition("\n")
    assert kind == "tmpfs"
    assert inodes.split()[::2] == [str(Path(path).stat().st_ino) for path in ("/usr/bin", "/bin/sh")]
    assert not Path("/new").exists()
