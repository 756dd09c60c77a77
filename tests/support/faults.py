"""Faults while files are written: a preloaded library (faults/shim.c) fails, kills or interrupts the nth call below a folder.

A program of tests/faults is a list of attempts, of which each returns what went wrong, if anything did. ``python -m faults.NAME``
makes all of them, ``--sample N`` some; it prints ``{"tried": ..., "failures": [...]}``.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from support.paths import TESTS

KILL, INTERRUPT = -1, -2
"""Actions beside an errno: SIGKILL, half a write done; SIGINT."""

LIBRARY = "METAMASK_FAULT_LIBRARY"

Attempt = Callable[[], str | None]
"""Does something that fails midway; returns what is wrong then, or None."""


@dataclass(frozen=True)
class Fault:
    """The nth call below a folder fails (and, ``for_good``, all after it)."""

    action: int
    nth: int
    for_good: bool = False

    def __str__(self) -> str:
        name = {KILL: "kill", INTERRUPT: "interrupt"}.get(self.action) or errno.errorcode[self.action]
        return f"{name} {'from' if self.for_good else 'at'} call {self.nth}"


def faults(calls: int) -> list[Fault]:
    """Every fault of work that makes ``calls`` calls."""
    once = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, KILL, INTERRUPT)
    for_good = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
    return [Fault(action, nth) for action in once for nth in range(1, calls + 1)] + [
        Fault(action, nth, True) for action in for_good for nth in range(1, calls + 1)
    ]


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ[LIBRARY])
    library.shim_count.restype = ctypes.c_long
    library.shim_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    return library


@contextmanager
def failing(folder: Path, fault: Fault | None) -> Iterator[None]:
    """Makes one call below ``folder`` fail during the block; None only counts."""
    action, nth, for_good = (0, 0, False) if fault is None else (fault.action, fault.nth, fault.for_good)
    _library().shim_arm(os.fsencode(folder), nth, action, for_good)
    try:
        yield
    finally:
        _library().shim_disarm()


def calls_of(folder: Path, work: Callable[[], object]) -> int:
    """Counts the calls that ``work`` makes below ``folder``."""
    with failing(folder, None):
        work()
    return _library().shim_count()


@contextmanager
def logged(folder: Path, log: Path) -> Iterator[None]:
    """Writes each change below ``folder`` to ``log``, which lies elsewhere."""
    _library().shim_log(os.fsencode(log))
    try:
        with failing(folder, None):
            yield
    finally:
        _library().shim_log(None)


@contextmanager
def interrupted(nth: int, package: str) -> Iterator[None]:
    """Raises KeyboardInterrupt at the nth place of ``package`` where Ctrl-C may; 0 only counts the places, in :data:`seen`.

    Python looks for signals where a function begins and after a call of C (and in loops).
    """
    seen[0] = 0

    def profile(frame: Any, event: str, argument: object) -> None:
        if event in ("call", "c_return") and frame.f_globals.get("__name__", "").partition(".")[0] == package:
            seen[0] += 1
            if seen[0] == nth:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


seen = [0]
"""The events of the last :func:`interrupted`."""


def main(attempts: Callable[[Path], Sequence[tuple[str, Attempt]]]) -> None:
    """The command line of a program: makes its attempts, in a temporary folder, and prints the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, help="make that many of them (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        todo = list(attempts(Path(name).resolve()))
        if args.sample is not None:
            todo = random.Random(args.seed).sample(todo, min(args.sample, len(todo)))
        failures = [f"{label}: {wrong}" for label, attempt in todo if (wrong := attempt()) is not None]
    print(json.dumps({"tried": len(todo), "failures": failures}))


def build_library(folder: Path) -> Path:
    """Compiles shim.c; needs gcc."""
    library = folder / "shim.so"
    source = TESTS / "faults" / "shim.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", str(source), "-o", str(library), "-ldl"], check=True)
    return library


def run_program(name: str, library: Path, *arguments: str, timeout: float | None = None) -> dict[str, Any]:
    """Runs a program of tests/faults with the library preloaded; returns its report."""
    environment = {**os.environ, "LD_PRELOAD": str(library), LIBRARY: str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"faults.{name}", *arguments]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
