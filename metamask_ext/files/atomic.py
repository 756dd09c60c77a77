"""Atomic replacement of files: after a kill or a power failure a file is the old one or the new one, never a mixture."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import OutputError


def sync(path: Path) -> None:
    """Put what was written to a file on the disk, or what was renamed in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prepare_folder(folder: Path) -> None:
    """Make ``folder`` and its parents, and prove that files can be written there.

    Raises:
        OutputError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"out must be a folder that can be written, got {str(folder)!r}: {error.strerror}") from error


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Replace ``path`` by ``parts``, one after another.

    Raises:
        OutputError: the file cannot be written; the old one is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror}") from error
