"""A small root file system for guests and containers: busybox, and curl with its libraries, as this machine has them.

curl, because no program of busybox-static resolves a name: Debian's crashes where glibc would load its resolver.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

BUSYBOX = Path("/bin/busybox")  # Debian's busybox-static
CURL = Path("/usr/bin/curl")


def make(root: Path) -> None:
    """Make `root`, which is not there yet, with empty places for mounts; programs are found in /bin."""
    root.mkdir(parents=True)
    for name in ("bin", "dev", "etc", "proc", "sys"):
        (root / name).mkdir()
    shutil.copy(BUSYBOX, root / "bin")
    subprocess.run(["chroot", str(root), "/bin/busybox", "--install", "-s", "/bin"], check=True)
    shutil.copy(CURL, root / "bin")
    told = subprocess.run(["ldd", str(CURL)], stdout=subprocess.PIPE, text=True, check=True).stdout
    for library in re.findall(r"/\S+", told):
        there = root / library.removeprefix("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, there)
