"""The lock that keeps a second writer out. The kernel holds it: it ends with the process, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from .errors import OutputError


@contextmanager
def locked(path: Path, refuse: Callable[[OSError], Exception], *, create: bool = False) -> Iterator[None]:
    """Hold the lock of ``path`` during the block. A lock that another process holds is not waited for.

    Args:
        path: a folder or a file.
        refuse: makes the exception that is raised where the lock cannot be had.
        create: make the file if it is missing. A symbolic link is not followed then.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW if create else os.O_RDONLY, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise refuse(error) from error
        yield
    finally:
        os.close(descriptor)


def locked_run(folder: Path) -> AbstractContextManager[None]:
    """Keep other runs out of ``folder`` during the block.

    Raises:
        OutputError: another run is writing there.
    """
    return locked(folder, lambda error: OutputError(f"another run is writing to {str(folder)!r} ({error.strerror})"))
