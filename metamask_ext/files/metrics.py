"""Metrics files: one JSON object a line, which a resumed run cuts back to its checkpoint and continues."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError, OutputError

METRICS = "metrics.jsonl"


class MetricsFile:
    """A metrics file, open to be appended to.

    Args:
        path: the file; made if it is missing.
        length: the bytes to keep. What follows them was written after the last checkpoint and is cut off.

    Raises:
        CheckpointError: the file is shorter.
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path, length: int):
        self.path = path
        try:
            size = path.stat().st_size if path.exists() else 0
            if size < length:
                raise CheckpointError(f"{str(path)!r} has {size} bytes and its checkpoint was made at {length}: lines are missing")
            self._file = open(path, "ab")  # noqa: SIM115  open for as long as the run
            self._file.truncate(length)
        except OSError as error:
            raise OutputError(f"cannot write {str(path)!r}: {error.strerror}") from error

    def write(self, record: Mapping[str, object]) -> None:
        """Append a line. ValueError if a number in it is not finite: JSON has no such numbers."""
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} must be finite to be written to {str(self.path)!r}, got {value}")
        with self._errors():
            self._file.write(json.dumps(record).encode() + b"\n")

    def sync(self) -> int:
        """Put all lines on the disk; return the length of the file in bytes."""
        with self._errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Write what is left and close the file."""
        with self._errors():
            self._file.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"cannot write {str(self.path)!r}: {error.strerror}") from error


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Read the lines that a loop with ``out=folder`` has written, a dict each. OutputError if there are none to read."""
    path = Path(folder) / METRICS
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise OutputError(f"cannot read {str(path)!r}: {error.strerror}") from error
