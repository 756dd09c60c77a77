"""Starts processes in which the cases of a group are measured, and receives what they find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .cases import Case

ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    # Freed memory stays with the process instead of going back to the system.
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
}
# These would change the allocator, or bring in options of the user's pytest.
DROPPED_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "PYTEST_")
TIMEOUT_SECONDS = 1800
"""Of one case: at batch 16,384 and 4096 x 4096 a call takes 11 s."""


class CaseError(Exception):
    """The process of a case failed; the message says why."""


def environment(allocator: str) -> dict[str, str]:
    """Returns the variables of a process that measures with this allocator."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(DROPPED_VARIABLES)}
    return {**kept, **ALLOCATORS[allocator]}


def measured(cases: Sequence[Case], allocator: str) -> Iterator[dict[str, Any]]:
    """Measures cases one after another in one process, and yields what it finds of each.

    That is as :func:`metamask_ext.bench.group_process.measure`, or ``failed`` with the reason.

    Raises:
        CaseError: the process ended, or took too long over one case: the first that was not yielded.
    """
    command = [sys.executable, "-m", "metamask_ext.bench.group_process", *(case.id for case in cases)]
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(folder, "stderr").open("w+") as errors,
        subprocess.Popen(
            command, env=environment(allocator), cwd=folder, text=True, stdout=subprocess.PIPE, stderr=errors
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for _ in cases:
                late = threading.Timer(TIMEOUT_SECONDS, child.kill)
                late.start()
                line = child.stdout.readline()
                late.cancel()
                if not line.endswith("\n"):
                    code = child.wait()
                    errors.seek(0)
                    said = errors.read().strip().splitlines()
                    raise CaseError(said[-1] if code > 0 and said else f"its process ended with exit code {code}")
                yield json.loads(line)
        finally:
            child.kill()
