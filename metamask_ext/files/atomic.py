"""Atomic replacement of files: after a kill or a power failure a file is the old one or the new one, never a mixture.

Every file is made new under a random name that nobody can prepare (``O_EXCL``, ``O_NOFOLLOW``) and renamed: a link, a pipe or a
device in the place of the file is replaced, and nothing is ever written through it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

TEMPORARY = r"(\.[0-9a-f]{16})?\.tmp"
"""The end of a temporary name, as a pattern; earlier versions had no random digits there."""

_LONGEST = 255 - len(".0123456789abcdef.tmp")
_NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""The answers of file systems that cannot sync a folder, or any file: there a power failure may undo what was renamed."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block the name of its file, which those of writes and syncs lack."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open ``path`` during the block, which gets the descriptor. Where the block fails, its error is the one that is raised."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    os.close(descriptor)


@contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Remove ``path`` if the block fails. The block's error is the one that is raised, also where the removal fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Put what was written to a file on the disk, or what was renamed in a folder.

    Some file systems cannot sync a folder (or anything): there this does nothing.
    """
    with naming(path), opened(path, os.O_RDONLY) as descriptor:
        sync_descriptor(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Put what was written through a descriptor on the disk, as :func:`sync` does."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


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


def open_new(path: Path) -> int:
    """Make a file that is not there, and return its descriptor. FileExistsError if anything is, also a link to nothing."""
    return os.open(path, os.O_WRONLY | _NEW, 0o666)


def write_new(path: Path, *parts: bytes | memoryview, synced: bool = True) -> None:
    """Write a file that is not there. If that fails, it is not there afterwards.

    Raises:
        OSError: that names the file.
    """
    with naming(path):
        descriptor = open_new(path)
        with removed_on_error(path):
            try:
                written = sum(_write(descriptor, part) for part in parts)
                if (size := os.fstat(descriptor).st_size) != written:
                    raise OSError(errno.EIO, f"{size} bytes are there, and {written} were written")
                if synced:
                    sync_descriptor(descriptor)
            except BaseException:
                with suppress(OSError):
                    os.close(descriptor)
                raise
            os.close(descriptor)


def _write(descriptor: int, part: bytes | memoryview) -> int:
    """Write all of ``part``; return the number of its bytes."""
    left = whole = memoryview(part).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]
    return len(whole)


def write_temporary(path: Path, *parts: bytes | memoryview, synced: bool = True) -> Path:
    """Write a new file beside ``path``, under a random name that is returned. OSError as of :func:`write_new`."""
    name = path.name if len(os.fsencode(path.name)) <= _LONGEST else "long"
    temporary = path.with_name(f"{name}.{secrets.token_hex(8)}.tmp")
    write_new(temporary, *parts, synced=synced)
    return temporary


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Replace ``path`` by ``parts``, one after another. A link there is replaced, not its target.

    Raises:
        OutputError: the file cannot be written; the old one is still there.
    """
    with output_errors(path):
        temporary = write_temporary(path, *parts)
        with removed_on_error(temporary):
            os.replace(temporary, path)
        sync(path.parent)


@contextmanager
def output_errors(path: Path, what: str = "write") -> Iterator[None]:
    """Turn an OSError of the block into an OutputError: "cannot write <path>: <reason>"."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot {what} {str(path)!r}: {error.strerror or error}") from error


def sweep(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove the temporary files of killed writers whose names without the temporary end ``is_ours``.

    For whoever holds the lock of the folder: a writer that is still at work would lose its file.
    """
    for name in os.listdir(folder):
        found = re.fullmatch(rf"(.+?){TEMPORARY}", name)
        if found is not None and is_ours(found[1]):
            os.unlink(folder / name)
