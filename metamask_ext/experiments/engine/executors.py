"""Executors compute the jobs of a run: this process, or several."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from metamask_ext.products import PANELS, using_table

from .jobs import Job, JobError, Key, described, file_name, json_bytes
from .tracking import Tracking, recording

HEARTBEAT_S = 5.0

Result = tuple[Key, bytes]
"""A job and its JSON."""


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, and by panels: these models gain nothing from more threads or from BLAS.

    Their results then depend neither on the number of cores nor on the processor's table of products.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with using_table(PANELS):
            yield
    finally:
        torch.set_num_threads(threads)


def _computed(key: Key, job: Job, tracking: Tracking) -> bytes:
    seed, name = key
    # A job that draws from the global generator gets the same numbers whatever was computed before it.
    with one_thread(), torch.random.fork_rng(devices=[]), recording(tracking, seed, file_name(name)):
        torch.manual_seed(seed)
        return json_bytes(job())


@dataclass
class Processes:
    """Computes jobs in up to ``count`` processes, started when there are jobs for them; with one, in this process.

    Args:
        count: at least 1.
        tracking: of the jobs.
    """

    count: int
    tracking: Tracking

    def __post_init__(self) -> None:
        self._processes: dict[Connection, BaseProcess] = {}

    def close(self) -> None:
        """End the processes, whatever they do."""
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
        for process in self._processes.values():
            process.join()
        self._processes.clear()

    def compute(self, jobs: Mapping[Key, Job]) -> Generator[Result | None, None, None]:
        """Yield each job's JSON as it comes; None now and then between them, where processes compute.

        Raises:
            JobError: a job raised an error, or its process died. The processes are ended, as they are by any other exception, and
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
                data = _computed(key, job, self.tracking)
            except Exception as error:
                raise JobError(f"{described(key)} failed: {type(error).__name__}: {error}") from error
            yield key, data

    def _by_processes(self, jobs: Mapping[Key, Job]) -> Generator[Result | None, None, None]:
        while len(self._processes) < min(self.count, len(jobs)):
            self._start()
        left = iter(jobs.items())
        running = {connection: key for connection in self._processes if (key := _send_next(connection, left)) is not None}
        while running:
            ready = wait([*running], HEARTBEAT_S)
            if not ready:
                yield None
            for connection in [each for each in running if each in ready]:
                key = running.pop(connection)
                data = self._received(connection, key)
                if (following := _send_next(connection, left)) is not None:
                    running[connection] = following
                yield key, data

    def _received(self, connection: Connection, key: Key) -> bytes:
        """The JSON that a process sends. JobError if the job failed, or the process died."""
        try:
            failure, data = connection.recv()
        except (EOFError, OSError):
            raise JobError(f"{described(key)} failed: its process {_ending(self._processes[connection])}") from None
        if failure is not None:
            raise JobError(f"{described(key)} failed: {failure}")
        return data

    def _start(self) -> None:
        # A forked process inherits threads' locks in whatever state they are in; torch's may hang there.
        context = multiprocessing.get_context("spawn")
        connection, end = context.Pipe()
        process = context.Process(target=_serve, args=(end, self.tracking), daemon=True)
        process.start()
        end.close()
        self._processes[connection] = process


def _send_next(connection: Connection, left: Iterator[tuple[Key, Job]]) -> Key | None:
    """Send the next job to a process; its key, None if none is left. JobError if it cannot be pickled."""
    for key, job in left:
        try:
            message = pickle.dumps((key, job))
        except Exception as error:
            raise JobError(f"{described(key)} cannot be sent to another process: {error}") from error
        with suppress(OSError):  # The process is dead, as the next receive finds out.
            connection.send_bytes(message)
        return key
    return None


def _ending(process: BaseProcess) -> str:
    process.join()
    code = process.exitcode
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _serve(connection: Connection, tracking: Tracking) -> None:
    """Compute one job after another until the connection is closed."""
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
        connection.send(_answered(message, tracking))


def _answered(message: bytes, tracking: Tracking) -> tuple[str | None, bytes]:
    """The failure of a job, None if there is none, and its JSON."""
    try:
        key, job = pickle.loads(message)
        return None, _computed(key, job, tracking)
    except Exception as error:
        lines = traceback.format_exc().rstrip()
        return f"{type(error).__name__}: {error}\n{lines}", b""


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
