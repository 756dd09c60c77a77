"""Metrics files: one JSON object a line, which a resumed run cuts back to its checkpoint and continues."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .atomic import output_errors, sync_descriptor
from .errors import CheckpointError, OutputError
from .read import parse_json, regular_size

METRICS = "metrics.jsonl"


_CHUNK = 1 << 20
_LONGEST_LINE = 1 << 24


class MetricsFile:
    """A metrics file, open to be appended to; a context, at whose end what is left is written.

    Args:
        path: the file; made if it is missing. A link is not followed.
        length: the bytes to keep. What follows them was written after the last checkpoint and goes with :meth:`cut`.
        sha256: of the bytes to keep; None where an earlier version has not written it down.

    Raises:
        CheckpointError: the file is shorter, or its bytes are others. Nothing has changed.
        OutputError: it cannot be written, or is no regular file.
    """

    def __init__(self, path: Path, length: int, sha256: str | None = None):
        self.path = path
        self._digest = hashlib.sha256()
        if length and path.is_symlink():
            raise CheckpointError(f"{str(path)!r} is a symbolic link; its checkpoint was made with a file of {length} bytes")
        with output_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            with output_errors(path):
                self._read(descriptor, length, sha256)
            self._file = os.fdopen(descriptor, "ab")
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        self._length = length

    def _read(self, descriptor: int, length: int, sha256: str | None) -> None:
        size = regular_size(self.path, os.fstat(descriptor))
        if size < length:
            raise CheckpointError(f"{str(self.path)!r} has {size} bytes and its checkpoint was made at {length}: lines are missing")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            left = length
            while left and (chunk := file.read(min(left, _CHUNK))):
                self._digest.update(chunk)
                left -= len(chunk)
        if sha256 is not None and self._digest.hexdigest() != sha256:
            raise CheckpointError(f"{str(self.path)!r} was changed since its checkpoint was made: its SHA-256 is not {sha256}")

    @property
    def sha256(self) -> str:
        """The SHA-256 of all lines so far."""
        return self._digest.hexdigest()

    def cut(self) -> None:
        """Cut off what was written after the checkpoint."""
        with output_errors(self.path):
            self._file.truncate(self._length)

    def write(self, record: Mapping[str, object]) -> None:
        """Append a line. ValueError if a number in it is not finite: JSON has no such numbers."""
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} must be finite to be written to {str(self.path)!r}, got {value}")
        line = json.dumps(record).encode() + b"\n"
        with output_errors(self.path):
            self._file.write(line)
        self._digest.update(line)
        self._length += len(line)

    def sync(self) -> int:
        """Put all lines on the disk; return the length of the file in bytes."""
        with output_errors(self.path):
            self._file.flush()
            sync_descriptor(self._file.fileno())
            if (size := os.fstat(self._file.fileno()).st_size) != self._length:
                raise OSError(errno.EIO, f"{size} bytes are there, and {self._length} were written")
        return self._length

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            with output_errors(self.path):
                self._file.close()
        else:
            with suppress(OSError):  # the block's own error is the one that is raised
                self._file.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Read the lines that a loop with ``out=folder`` has written, a dict each.

    Raises:
        OutputError: there are none to read, or a line is no JSON object.
    """
    path = Path(folder) / METRICS
    lines: list[dict[str, Any]] = []
    with output_errors(path, "read"), open(path, "rb", opener=_without_waiting) as file:
        regular_size(path, os.fstat(file.fileno()))
        while data := file.readline(_LONGEST_LINE):
            try:
                line = parse_json(data)
                if not isinstance(line, dict):
                    raise ValueError(f"it must be a JSON object, got {type(line).__name__}")
            except ValueError as error:
                raise OutputError(f"cannot read {str(path)!r}: line {len(lines) + 1}: {error}") from error
            lines.append(line)
    return lines


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
