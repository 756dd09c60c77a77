"""Pieces of a run, computed by several processes, or by this one."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from .tracking import recording

Key = tuple[int, str]
Job = Callable[[], Mapping[str, Any]]
HEARTBEAT_S = 5.0


class PieceError(RuntimeError):
    """A piece of a run raised an error, or its process died; the message has its name and the error."""


@dataclass(frozen=True)
class Place:
    """Where the pieces of a run leave their traces: its folder, and how they are tracked."""

    folder: Path
    tracking: str | None


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_name(piece: str) -> str:
    """The name of a piece's files, without a suffix."""
    if not piece or "/" in piece or piece.startswith("."):
        raise ValueError(f"the name of a piece must be a file name, got {piece!r}")
    return piece.replace(", ", "-").replace(" ", "-")


def json_bytes(value: Any) -> bytes:
    """``value`` as a JSON file. ValueError if a number in it is not finite."""
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: these models gain nothing from more, and their results then do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measured(key: Key, job: Job, place: Place) -> bytes:
    seed, piece = key
    # A job that draws from the global generator gets the same numbers whatever was computed before it.
    with one_thread(), torch.random.fork_rng(devices=[]), recording(place.tracking, place.folder, seed, file_name(piece)):
        torch.manual_seed(seed)
        return json_bytes(job())


def _called(key: Key) -> str:
    return f"piece {key[1]!r} of seed {key[0]}"


class Workers:
    """Up to ``count`` processes that compute pieces, started when there are pieces for them; with one, this process does it all."""

    def __init__(self, count: int, place: Place):
        self.count, self.place = count, place
        self._processes: dict[Connection, Any] = {}

    def close(self) -> None:
        """End the processes, whatever they do."""
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
        for process in self._processes.values():
            process.join()
        self._processes.clear()

    def compute(self, jobs: Mapping[Key, Job]) -> Generator[tuple[Key, bytes] | None, None, None]:
        """The result of each of ``jobs`` as JSON, as they come; None now and then between them, where processes compute.

        Raises:
            PieceError: a job raised an error, or its process died. The processes are ended, as they are by any other exception, and
                by whoever closes the iterator.
        """
        if min(self.count, len(jobs)) > 1:
            try:
                yield from self._by_processes(jobs)
            except BaseException:
                self.close()
                raise
            return
        for key, job in jobs.items():
            try:
                data = _measured(key, job, self.place)
            except Exception as error:
                raise PieceError(f"{_called(key)} failed: {type(error).__name__}: {error}") from error
            yield key, data

    def _by_processes(self, jobs: Mapping[Key, Job]) -> Generator[tuple[Key, bytes] | None, None, None]:
        left = iter(jobs.items())
        running: dict[Connection, Key] = {}

        def start_next(worker: Connection) -> None:
            for key, job in left:
                try:
                    message = pickle.dumps((key, job))
                except Exception as error:
                    raise PieceError(f"{_called(key)} cannot be sent to another process: {error}") from error
                running[worker] = key
                with suppress(OSError):  # the process is dead: the loop below finds that out
                    worker.send_bytes(message)
                return

        while len(self._processes) < min(self.count, len(jobs)):
            self._start()
        for worker in self._processes:
            start_next(worker)
        while running:
            ready = wait([*running], HEARTBEAT_S)
            if not ready:
                yield None
            for worker in [each for each in running if each in ready]:
                key = running.pop(worker)
                try:
                    failure, data = worker.recv()
                except (EOFError, OSError):
                    process = self._processes[worker]
                    process.join()
                    code = process.exitcode
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                    raise PieceError(f"{_called(key)} failed: its process {how}") from None
                if failure is not None:
                    raise PieceError(f"{_called(key)} failed: {failure}")
                start_next(worker)
                yield key, data

    def _start(self) -> None:
        # A forked process inherits threads' locks in whatever state they are in; torch's may hang there.
        context = multiprocessing.get_context("spawn")
        connection, end = context.Pipe()
        process = context.Process(target=_work, args=(end, self.place), daemon=True)
        process.start()
        end.close()
        self._processes[connection] = process


def _work(connection: Connection, place: Place) -> None:
    """What a process does: a piece after the other, until its connection is closed."""
    # Ctrl-C reaches every process of the terminal; the one that started the others ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Progress bars of several processes would overwrite each other.
    os.environ["TERM"] = "dumb"
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            key, job = pickle.loads(message)
            result: tuple[str | None, bytes] = (None, _measured(key, job, place))
        except Exception as error:
            lines = traceback.format_exc().rstrip()
            result = f"{type(error).__name__}: {error}\n{lines}", b""
        connection.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
