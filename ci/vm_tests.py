#!/usr/bin/env python3
"""tests/kernel on other kernels: each in a virtual machine, two machines at a time.

    .venv/bin/python ci/vm_tests.py [--quick] [5.10 …] [-- pytest arguments]

`--quick` is for machines that have to emulate, where Python takes ten times as long. It leaves out what a kernel cannot
change (marker `userspace`: the daemon against control planes, stores, command lines), and deals the cases of tests that
have many out to the kernels of the list (harness/parts.py): together they run all, each runs its share.

Results go to build/junit/<series>.xml and .json, guests' consoles and output to build/vm/<series>/. Exit status 0: all
passed; 1: tests failed; 3: a guest was lost or a kernel could not be had, which is no word on the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import vm
from infrastructure import EXIT_STATUS, InfrastructureError
from kernelcache import ensure
from kernellist import Kernel, load
from vm import ROOT, Machine, Outcome

JUNIT = ROOT / "build" / "junit"
SHARES = ROOT / "build" / "vm"
IMAGES = ROOT / "build" / "images"
SYSTEM = ("usr/lib/python3", "usr/lib64", "usr/bin", "usr/sbin", "etc")
AT_ONCE = 2
IDLE_S = 900.0  # one emulated test may take long without a word
TOTAL_S = 3 * 3600.0
QUICK_S = 18 * 60.0
"""What issue 4 allows all kernels of the list with `--quick`, on two cores without KVM (docs/decisions/0014)."""
WHOLE = "not nightly and not registry"
QUICK = f"{WHOLE} and not userspace"

_speak = threading.Lock()


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one kernel's tests, for ci/matrix.py. `outcome`: one of `Outcome`, or "infrastructure"."""

    kernel: str
    release: str
    outcome: str
    detail: str

    @property
    def status(self) -> int:
        """The exit status that this result is worth."""
        return {str(Outcome.PASSED): 0, str(Outcome.FAILED): 1}.get(self.outcome, EXIT_STATUS)


def run(kernel: Kernel, tests: list[str], env: dict[str, str], images: Mapping[Path, Path]) -> Result:
    """Run the tests on one kernel and leave what the matrix reads."""
    result = _run(kernel, tests, env, images, teller(kernel.series))
    made = SHARES / kernel.series / "junit.xml"
    if made.exists():
        shutil.copy(made, JUNIT / f"{kernel.series}.xml")
    return leave(result)


def leave(result: Result) -> Result:
    """Write what the matrix reads of a run as a whole, and say it."""
    (JUNIT / f"{result.kernel}.json").write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    teller(result.kernel)(f"{result.outcome}: {result.detail}")
    return result


def forget(series: str) -> None:
    """Remove what an earlier run left of a kernel, so that nothing of it is taken for this one's."""
    JUNIT.mkdir(parents=True, exist_ok=True)
    for kind in ("xml", "json"):
        (JUNIT / f"{series}.{kind}").unlink(missing_ok=True)


def _run(
    kernel: Kernel,
    tests: list[str],
    env: dict[str, str],
    images: Mapping[Path, Path],
    tell: Callable[[str], None],
) -> Result:
    share = SHARES / kernel.series
    shutil.rmtree(share, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "--durations=10"),
        *(f"--junitxml={share}/junit.xml", *tests),
    ]
    # Hypothesis keeps what failed there, and warns (an error here) where it can write nowhere.
    writable = {"HYPOTHESIS_STORAGE_DIRECTORY": str(share / "hypothesis")}
    try:
        installed = ensure(kernel)
        machine = Machine(installed, idle_s=IDLE_S, total_s=TOTAL_S)
        ended = vm.run(machine, command, share, env={**writable, **env}, images=images, tell=tell)
    except InfrastructureError as error:
        return Result(kernel.series, "?", "infrastructure", str(error))
    detail = f"{ended.detail}, after {ended.seconds:.0f} s"
    return Result(kernel.series, installed.release, ended.outcome, detail)


def teller(series: str) -> Callable[[str], None]:
    """Make what prints a guest's lines, whole, with its name before each."""

    def tell(text: str) -> None:
        with _speak:
            for line in text.splitlines():
                print(f"{series:>5} | {line}", flush=True)

    return tell


def compiled_tests(marked: str) -> list[str]:
    """Have Python and pytest leave their modules compiled; return the files that have tests to run.

    Guests see this tree read-only: what they would compile anew, they compile in each process that they start.
    """
    compiling = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    python = [sys.executable, "-m"]
    subprocess.run([*python, "compileall", "-q", "src", "tests/kernel"], cwd=ROOT, env=compiling, check=True)
    listing = [*python, "pytest", "-p", "no:cacheprovider", "tests/kernel", "-m", marked, "--collect-only", "-q"]
    told = subprocess.run(listing, cwd=ROOT, env=compiling, stdout=subprocess.PIPE, text=True, check=True).stdout
    return sorted({line.partition("::")[0] for line in told.splitlines() if "::" in line})


def images_of_programs() -> dict[Path, Path]:
    """Make images of all that guests start programs from, and of what Python imports: directory → image."""
    python = [Path(sys.prefix), ROOT / "src", ROOT / "tests", Path(sysconfig.get_path("stdlib"))]
    libraries = Path("/usr/lib", sysconfig.get_config_var("MULTIARCH"))
    directories = [*python, libraries, *(Path("/", each) for each in SYSTEM)]
    return {each: vm.image(each, IMAGES / f"{number}.ext4") for number, each in enumerate(directories)}


def run_all(kernels: list[Kernel], marked: str, extra: list[str], parts: Mapping[str, dict[str, str]]) -> list[Result]:
    """Run the tests so marked on the kernels, `AT_ONCE` at a time, each with its part of the environment."""
    for kernel in kernels:
        forget(kernel.series)
    tests = [*compiled_tests(marked), "-m", marked, *extra]
    try:
        images = images_of_programs()
    except InfrastructureError as error:
        return [leave(Result(kernel.series, "?", "infrastructure", str(error))) for kernel in kernels]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda kernel: run(kernel, tests, parts[kernel.series], images), kernels))


def took(seconds: float, *, bounded: bool) -> str:
    """Say how long all took, and that it was too long where `QUICK_S` bounds it: a slow machine is no failed test."""
    said = f"all machines together: {seconds / 60:.1f} minutes"
    if bounded and seconds > QUICK_S:
        said += f": SLOWER than the {QUICK_S / 60:.0f} minutes that issue 4 allows on two cores (no failure)"
    return said


def _slow_ones_first(series: list[str]) -> list[str]:
    """Order the kernels so that no machine runs alone at the end: the oldest and the newest take longest."""
    return [each for pair in zip(series, reversed(series), strict=True) for each in pair][: len(series)]


def main() -> int:
    """Run as the docstring of the module says."""
    listed = {kernel.series: kernel for kernel in load() if not kernel.is_host}
    parser = argparse.ArgumentParser(description="tests/kernel on other kernels.", allow_abbrev=False)
    parser.add_argument("series", nargs="*", metavar="SERIES", help=f"of {', '.join(listed)}; default: all")
    parser.add_argument("--quick", action="store_true", help="without what a kernel cannot change")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, extra = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    if unknown := set(arguments.series) - set(listed):
        parser.error(f"not in ci/kernels.toml: {', '.join(sorted(unknown))}")
    chosen = [listed[series] for series in arguments.series or _slow_ones_first(list(listed))]
    parts = {
        series: {"NETFENCE_PART": f"{part}/{len(listed)}"} if arguments.quick else {}
        for part, series in enumerate(listed)
    }
    begun = time.monotonic()
    try:
        results = run_all(chosen, QUICK if arguments.quick else WHOLE, extra, parts)
    except OSError as error:  # a full disk
        print(f"infrastructure: {error}", file=sys.stderr)
        return EXIT_STATUS
    print(took(time.monotonic() - begun, bounded=arguments.quick and not arguments.series))
    return max(result.status for result in results)


if __name__ == "__main__":
    sys.exit(main())
