"""The list of kernels, ci/kernels.toml, as values."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).resolve().parent / "kernels.toml"
HOST = "host"


@dataclass(frozen=True)
class Kernel:
    """An entry of the list; `suite` and `package` are empty for the host's own kernel."""

    series: str
    why: str
    supports: frozenset[str]
    lacks: frozenset[str]
    suite: str = ""
    package: str = ""

    @property
    def is_host(self) -> bool:
        """Tell whether this is the kernel that runs here: nothing to fetch, nothing to boot."""
        return self.series == HOST


def load(path: Path = LIST) -> list[Kernel]:
    """Read the list; raises ValueError on an entry that makes no sense."""
    kernels = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["kernel"]:
        supports, lacks = frozenset(entry.pop("supports")), frozenset(entry.pop("lacks"))
        kernel = Kernel(supports=supports, lacks=lacks, **entry)
        if kernel.is_host == bool(kernel.suite and kernel.package):
            raise ValueError(f"{path}: {kernel.series}: all kernels but {HOST} need suite and package")
        if supports & lacks:
            raise ValueError(f"{path}: {kernel.series}: both supports and lacks {', '.join(sorted(supports & lacks))}")
        kernels.append(kernel)
    if len({kernel.series for kernel in kernels}) != len(kernels):
        raise ValueError(f"{path}: a series is there twice")
    return kernels
