"""Runs every program of this folder whole, and prints what it tried: ``python -m faults``, in tests."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from support.faults import build_library, run_program

PROGRAMS = "bank_save", "loop_run", "power_loss"


def main() -> int:
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        library = build_library(Path(folder))
        for name in PROGRAMS:
            start = time.monotonic()
            report = run_program(name, library)
            failures += len(report["failures"])
            seconds = time.monotonic() - start
            print(f"{name}: {report['tried']} tried, {len(report['failures'])} failed, {seconds:.0f} s", flush=True)
            for failure in report["failures"]:
                print(f"  {failure}")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
