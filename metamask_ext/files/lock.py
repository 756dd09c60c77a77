"""The locks that keep a second writer out: of other processes, and of other threads.

That of processes is the kernel's: it ends with the process, however that ends.

Some file systems have no ``flock`` (Lustre and GPFS as they are often mounted, some FUSE ones; NFS on folders). There a file beside
the lock, made exclusively, takes its place. Nobody removes that file after a kill: it names the process that made it, and the next
writer is refused with the advice to delete it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from weakref import WeakSet

from .atomic import write_new
from .errors import OutputError
from .read import read_file

_NO_FLOCK = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF})
"""The answers of file systems without ``flock``; EBADF is NFS's for a folder, which cannot be opened for writing."""


@contextmanager
def locked(path: Path, refuse: Callable[[OSError], Exception], *, create: bool = False) -> Iterator[None]:
    """Hold the lock of ``path`` during the block. A lock that another process holds is not waited for.

    Args:
        path: a folder or a file.
        refuse: makes the exception that is raised where the lock cannot be had, of an OSError whose ``strerror`` says why.
        create: make the file if it is missing. What a link leads to is locked, but not made, and nothing is written to it.
    """
    owner = os.getpid()
    try:
        stand_in = path / "lock.held" if path.is_dir() else path.with_name(path.name + ".held")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW if create and not path.is_symlink() else os.O_RDONLY | os.O_NONBLOCK
        descriptor = _open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise refuse(error) from error
    try:
        try:
            made = _take(descriptor, stand_in)
        except OSError as error:
            raise refuse(error) from error
        try:
            yield
        finally:
            # A process that was forked within the block, and leaves it too, has no lock to give back.
            if os.getpid() == owner:
                _give_back(descriptor, stand_in if made else None)
    finally:
        with suppress(OSError):  # nothing was written to it, and the descriptor is gone
            os.close(descriptor)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if not flags & os.O_CREAT or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        try:  # another user's: flock needs no right to write
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            raise error from None


def _take(descriptor: int, stand_in: Path) -> bool:
    """Take the lock; return whether ``stand_in`` had to be made for it. OSError if another has it."""
    made = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        made = True
    if made:
        try:
            write_new(stand_in, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except FileExistsError as error:
            raise _held(stand_in) from error
    elif stand_in.exists():  # made where the same folder has no flock
        _give_back(descriptor, None)
        raise _held(stand_in)
    return made


def _held(stand_in: Path) -> OSError:
    try:
        by = read_file(stand_in, 1000).decode(errors="replace") or "another process"
    except OSError:  # given back just now
        by = "another process"
    return OSError(errno.EEXIST, f"{str(stand_in)!r} was made by {by}; delete it if that writes no more")


def _give_back(descriptor: int, stand_in: Path | None) -> None:
    """Unlock before the descriptor is closed: a process that was forked meanwhile has it too, and would keep the lock."""
    if stand_in is not None:
        stand_in.unlink(missing_ok=True)
    else:
        with suppress(OSError):  # closing it unlocks too
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def locked_run(folder: Path) -> AbstractContextManager[None]:
    """Keep other runs out of ``folder`` during the block.

    Raises:
        OutputError: another run is writing there, or the folder cannot be locked.
    """

    def refuse(error: OSError) -> OutputError:
        if isinstance(error, BlockingIOError):
            return OutputError(f"another run is writing to {str(folder)!r} ({error.strerror})")
        return OutputError(f"cannot lock {str(folder)!r}: {error.strerror}")

    return locked(folder, refuse)


class ThreadLock:
    """A lock of threads. A forked process has it free: the thread that held it does not exist there. A copy is another lock."""

    def __init__(self) -> None:
        self._renew()
        _thread_locks.add(self)

    def _renew(self) -> None:
        self._state: tuple[threading.RLock, list[None]] = threading.RLock(), []

    @contextmanager
    def held(self, refuse: Callable[[], Exception] | None = None) -> Iterator[None]:
        """Hold the lock during the block; other threads are waited for.

        Args:
            refuse: makes the exception that is raised where this thread holds the lock already, as in a signal handler. None: the
                block is entered again.
        """
        lock, inside = self._state  # a process that is forked in the block has other ones, and leaves these
        with lock:
            if inside and refuse is not None:
                raise refuse()
            depth = len(inside)
            try:
                inside.append(None)
                yield
            finally:
                del inside[depth:]

    def __reduce__(self) -> tuple[type[ThreadLock], tuple[()]]:
        return ThreadLock, ()


_thread_locks: WeakSet[ThreadLock] = WeakSet()


def _renew_thread_locks() -> None:
    for lock in _thread_locks:
        lock._renew()


os.register_at_fork(after_in_child=_renew_thread_locks)
