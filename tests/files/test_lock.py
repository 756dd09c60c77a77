"""Locks: of the kernel where it has them, a file elsewhere; given back also where a forked process has a copy."""

from __future__ import annotations

import copy
import errno
import fcntl
import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from metamask_ext.files.errors import OutputError
from metamask_ext.files.lock import ThreadLock, locked, locked_run


def refuse(error: OSError) -> OutputError:
    return OutputError(str(error.strerror))


@pytest.fixture(params=["file", "folder"])
def place(request, tmp_path) -> tuple[Path, bool]:
    """The file or folder to lock, and True if it is made for it."""
    return (tmp_path / "lock", True) if request.param == "file" else (tmp_path, False)


def take(place: tuple[Path, bool]):
    return locked(place[0], refuse, create=place[1])


@pytest.fixture
def no_flock(monkeypatch):
    def set_error(number: int) -> None:
        def flock(*given: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return set_error


def test_a_lock_is_had_once(place):
    with take(place), pytest.raises(OutputError), take(place):
        pass
    with take(place):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.EBADF], ids=errno.errorcode.get)
def test_without_flock_a_file_is_the_lock(place, tmp_path, no_flock, number):
    no_flock(number)
    before = set(tmp_path.iterdir())
    with take(place):
        made = set(tmp_path.iterdir()) - before - {place[0]}
        assert len(made) == 1
        with pytest.raises(OutputError, match=f"lock.held' was made by process {os.getpid()} on .*; delete it"), take(place):
            pass
    assert not made & set(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), take(place):
        raise ZeroDivisionError
    assert not made & set(tmp_path.iterdir())


def test_a_killed_writer_without_flock(place, no_flock, monkeypatch):
    """Its file stays: it is named, also where there is flock, and once it is deleted all is well."""
    no_flock(errno.ENOSYS)
    child = os.fork()
    if child == 0:
        lock = take(place)
        lock.__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    held = place[0] / "lock.held" if place[0].is_dir() else place[0].with_name("lock.held")
    for _ in range(2):
        with (
            pytest.raises(OutputError, match=f"{held}' was made by process {child} on .*; delete it if that writes no more"),
            take(place),
        ):
            pass
        monkeypatch.undo()
    held.unlink()
    with take(place):
        pass


def test_other_errors_are_refused(place, no_flock):
    no_flock(errno.EPERM)
    with pytest.raises(OutputError, match="not permitted"), take(place):
        pass
    with (
        pytest.raises(OutputError, match="No such file|Not a directory"),
        locked(place[0] / "nowhere" / "lock", refuse, create=True),
    ):
        pass


def test_a_process_forked_meanwhile_keeps_no_lock(place):
    """A DataLoader's worker has the descriptor for as long as it lives."""
    reading, writing = os.pipe()
    with take(place):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the process lives"
    with take(place):
        pass
    os.close(writing)
    os.waitpid(child, 0)
    os.close(reading)


@pytest.mark.parametrize("flock", [True, False])
def test_a_forked_process_gives_back_no_lock_of_its_parent(place, no_flock, flock):
    if not flock:
        no_flock(errno.ENOSYS)
    with ExitStack() as stack:
        stack.enter_context(take(place))
        child = os.fork()
        if child == 0:
            stack.close()
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(OutputError), take(place):
            pass


def test_the_error_of_the_block_is_kept(place, monkeypatch):
    def unlock(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_UN:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", unlock)
    with pytest.raises(ZeroDivisionError), take(place):
        raise ZeroDivisionError


def test_what_a_link_leads_to_is_not_written(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with locked(tmp_path / "lock", refuse, create=True):
        assert (tmp_path / "victim").read_text() == "precious"
    (tmp_path / "victim").unlink()
    with pytest.raises(OutputError, match="No such file"), locked(tmp_path / "lock", refuse, create=True):
        pass
    assert not (tmp_path / "victim").exists()


def test_runs_name_their_folder(tmp_path, no_flock):
    with locked_run(tmp_path), pytest.raises(OutputError, match=f"another run is writing to '{tmp_path}'"), locked_run(tmp_path):
        pass
    no_flock(errno.EACCES)
    with pytest.raises(OutputError, match=f"cannot lock '{tmp_path}': Permission denied"), locked_run(tmp_path):
        pass


def entered_in_a_child(lock: ThreadLock) -> bool:
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        with lock.held(ZeroDivisionError):
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("copied", [False, True])
def test_a_forked_process_has_a_lock_of_threads_free(copied):
    lock, inside, leave = ThreadLock(), threading.Event(), threading.Event()
    lock = copy.deepcopy(lock) if copied else lock

    def hold() -> None:
        with lock.held():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    try:
        assert entered_in_a_child(lock)
    finally:
        leave.set()
        thread.join()
    with lock.held(ZeroDivisionError):
        assert entered_in_a_child(lock)


def test_a_thread_that_has_a_lock_is_refused_or_enters_again():
    lock = ThreadLock()
    with lock.held():
        with lock.held():
            pass
        with pytest.raises(ZeroDivisionError), lock.held(ZeroDivisionError):
            pass
    with lock.held(ZeroDivisionError):
        pass


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS], ids=errno.errorcode.get)
def test_a_lock_of_another_user_is_read_only(tmp_path, monkeypatch, number):
    real = os.open

    def opened(path: Path, flags: int, *mode: int, **options: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *mode, **options)

    path = tmp_path / "lock"
    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(OutputError, match=os.strerror(number)), locked(path, refuse, create=True):
        pass
    path.write_bytes(b"")
    with locked(path, refuse, create=True), pytest.raises(OutputError), locked(path, refuse, create=True):
        pass
