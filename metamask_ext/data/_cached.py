"""Data sets in the user's cache: files that are used only if they are the originals, and downloads that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..files.errors import OutputError
from ..files.lock import locked_run
from ..files.read import read_file

_UNFINISHED = "download-"
_WAIT_SECONDS = 10.0


def read_original(path: Path, md5: str, what: str) -> bytes:
    """Return the bytes of a data set's file.

    Raises:
        OutputError: it cannot be read, or its MD5 is another: it is damaged, was not extracted whole, or is of another data set.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise OutputError(f"cannot read {str(path)!r}: {error.strerror}. Delete it, and {what} is downloaded again") from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise OutputError(
            f"{str(path)!r} is damaged, or not {what}: {len(data)} bytes with the MD5 {found} instead of {md5}. Delete it, and "
            f"{what} is downloaded again"
        )
    return data


def download_whole(folder: Path, download: Callable[[Path], None], files: Mapping[str, str], what: str) -> None:
    """Call ``download`` with a new folder beside ``folder``, check the files that it leaves there, and move them.

    A download that is killed leaves nothing in ``folder``; the next one removes what it left.

    Args:
        folder: the place of the files; made if it is not there.
        download: puts the files, and others perhaps, into the folder that it is given.
        files: MD5 sums by the files' names.
        what: the data set, for messages.

    Raises:
        OutputError: a file is not there, or not the original.
        OSError: the files cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _unfinished(folder) as made:
        download(made)
        for file, md5 in files.items():
            read_original(made / file, md5, what)
        for file in files:
            os.replace(made / file, folder / file)


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """Make a locked folder for a download; first remove those of downloads that were killed."""
    with ExitStack() as stack:
        # Between the making of a folder and its lock, another process would take it for one that was left.
        with _waited_for(folder):
            _remove_unfinished(folder)
            made = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder, ignore_cleanup_errors=True))
            )
            stack.enter_context(locked_run(made))
        yield made


@contextmanager
def _waited_for(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which others hold for moments. OutputError if it is not to be had in seconds."""
    end = time.monotonic() + _WAIT_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked_run(folder))
                break
            except OutputError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.01)
        yield


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(f"{_UNFINISHED}*"):
        # Whoever downloads holds the lock of its folder.
        with suppress(OutputError), locked_run(path):
            shutil.rmtree(path, ignore_errors=True)
