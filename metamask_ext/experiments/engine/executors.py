"""Computes the jobs of a run: in this process, in several of this machine, or on any ``concurrent.futures`` executor."""

from __future__ import annotations

import os
import pickle
import platform
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from metamask_ext._info import build_info
from metamask_ext.products import PANELS, using_table

from .data import described
from .jobs import Job, JobError, Json, Key, flat, json_bytes, named
from .processes import OneProcess
from .settings import OptionError
from .tracking import Rows, recording

HEARTBEAT_S = 5.0

Result = tuple[Key, bytes, Rows]
"""A job, its JSON, and the numbers that it tracked."""
Opened = tuple[Executor, int | None]
"""An executor, and how many jobs it computes at a time, if that is known."""


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed() -> Json:
    """The versions and the build of this process, as the identity of a run has them."""
    info = build_info()
    versions = {"metamask_ext": info["version"], "torch": torch.__version__, "python": platform.python_version()}
    return {"versions": versions, "build_info": info}


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


@dataclass(frozen=True)
class Origin:
    """The versions and the data that the results of a run come from, wherever they are computed.

    Attributes:
        data: the data, in words; None: they are not checked.
        installed: versions and build, as :func:`installed` gives them.
        tracked: whether jobs record numbers of their training.
    """

    data: str | None
    installed: Json
    tracked: bool


def _computed(key: Key, job: Job, origin: Origin) -> tuple[bytes, Rows]:
    # A job that draws from the global generator gets the same numbers whatever was computed before it.
    with one_thread(), torch.random.fork_rng(devices=[]), described(origin.data), recording(origin.tracked) as rows:
        torch.manual_seed(key[0])
        return json_bytes(job()), rows


_TURN = threading.RLock()
"""Threads of a process take turns: a job seeds the generator and sets the number of threads, which all of them share."""


def answered(message: bytes) -> tuple[str | None, bytes, Rows]:
    """Compute the job in a message, in whatever process this is.

    Returns:
        The failure, None if there is none; the job's JSON; the numbers that it tracked. Failures are words: an exception of a
        module that the receiver lacks could not be read there.
    """
    try:
        key, job, origin = pickle.loads(message)
        _check_installed(origin)
        with _TURN:
            return None, *_computed(key, job, origin)
    except Exception as error:
        lines = traceback.format_exc().rstrip()
        return f"{type(error).__name__}: {error}\n{lines}", b"", []


def _check_installed(origin: Origin) -> None:
    """RuntimeError if this process has other versions than the run, or another build: its numbers could be other ones."""
    wanted, here = flat(origin.installed), flat(installed())
    for name, value in wanted.items():
        if here.get(name) != value:
            where = f"the process that computes it on {platform.node()!r}"
            raise RuntimeError(f"{where} has {name} {here.get(name)!r}, the run {value!r}")


class Workers:
    """Computes jobs on an executor, or in up to ``count`` processes of its own, one job each at a time.

    With a ``count`` of 1, or one job, it computes in this process. Processes are started, and an executor is made, when there are
    jobs for them.

    Args:
        count: at least 1; None: the cores.
        opened: makes the executor in the place of processes.
        name: of the executor.
        keep: leave the executor open at the end: it is another's.

    A context, which closes them.

    Attributes:
        count: how many jobs are computed at a time; None if only the executor knows.

    Raises:
        OptionError: ``count`` cannot be.
    """

    def __init__(
        self, count: int | None = None, opened: Callable[[], Opened] | None = None, name: str = "local", keep: bool = False
    ) -> None:
        if count is not None and count < 1:
            raise OptionError(f"workers must be at least 1, got {count}")
        self.name = name
        self.count = count if opened is not None else cores() if count is None else count
        self._open, self._keep = opened, keep
        self._executor: Executor | None = None
        self._processes: list[OneProcess] = []
        self._running: dict[Future[tuple[str | None, bytes, Rows]], tuple[Key, Executor]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self) -> None:
        """Make the executor now, if there is to be one. OptionError if that cannot be."""
        if self._open is not None and self._executor is None:
            self._executor, self.count = self._open()

    def close(self) -> None:
        """End the processes, whatever they do, or shut the executor down: what it has begun, it may finish before."""
        for future in self._running:
            future.cancel()
        self._running.clear()
        processes, self._processes = self._processes, []
        for process in processes:
            process.end()
        executor, self._executor = self._executor, None
        if executor is not None and not self._keep:
            executor.shutdown()

    def compute(self, jobs: Mapping[Key, Job], origin: Origin) -> Generator[Result | None, None, None]:
        """Yield each job's JSON as it comes, with the numbers that it tracked; None now and then between them.

        Raises:
            JobError: a job raised an error, its process died, or the executor failed. All is closed then, as it is by any other
                exception, and by whoever closes the iterator.
        """
        if self._open is not None or min(self.count or 1, len(jobs)) > 1:
            try:
                yield from self._sent(jobs, origin)
            except BaseException:
                self.close()
                raise
            return
        for key, job in jobs.items():
            try:
                data, rows = _computed(key, job, origin)
            except Exception as error:
                raise JobError(f"{named(key)} failed: {type(error).__name__}: {error}") from error
            yield key, data, rows

    def _sent(self, jobs: Mapping[Key, Job], origin: Origin) -> Generator[Result | None, None, None]:
        left, free = iter(jobs.items()), self._places(len(jobs))
        self._send(left, free, origin)
        while self._running:
            done, _ = wait(self._running, HEARTBEAT_S, FIRST_COMPLETED)
            if not done:
                yield None
            for future in [each for each in self._running if each in done]:
                data, rows = self._received(future)
                key, executor = self._running.pop(future)
                free.append(executor)
                self._send(left, free, origin)
                yield key, data, rows

    def _places(self, jobs: int) -> list[Executor]:
        """The executors, each as often as it takes a job at a time. Those that are not ours take all, and keep them in a queue."""
        self.open()
        if self._executor is not None:
            return [self._executor] * jobs
        assert self.count is not None
        while len(self._processes) < min(self.count, jobs):
            self._processes.append(OneProcess())
        return [*self._processes]

    def _send(self, left: Iterator[tuple[Key, Job]], free: list[Executor], origin: Origin) -> None:
        """Send jobs to the executors that are free. JobError if one cannot be pickled, or sent."""
        while free and (following := next(left, None)) is not None:
            key, job = following
            try:
                message = pickle.dumps((key, job, origin))
            except Exception as error:
                raise JobError(f"{named(key)} cannot be sent to another process: {error}") from error
            executor = free.pop()
            try:
                self._running[executor.submit(answered, message)] = key, executor
            except Exception as error:
                raise self._failed(key, executor, error) from error

    def _received(self, future: Future[tuple[str | None, bytes, Rows]]) -> tuple[bytes, Rows]:
        """The JSON of a job and its numbers. JobError if the job failed, or its process or the executor did."""
        key, executor = self._running[future]
        error = CancelledError() if future.cancelled() else future.exception()
        if error is not None:
            raise self._failed(key, executor, error) from error
        failure, data, rows = future.result()
        if failure is not None:
            raise JobError(f"{named(key)} failed: {failure}")
        return data, rows

    def _failed(self, key: Key, executor: Executor, error: BaseException) -> JobError:
        if isinstance(executor, OneProcess) and isinstance(error, BrokenExecutor):
            return JobError(f"{named(key)} failed: its process {executor.ending()}")
        if isinstance(error, BrokenExecutor) and len(self._running) > 1:  # It does not say whose process died.
            others = [each for each, _ in self._running.values() if each != key]
            return JobError(
                f"the executor {self.name!r} broke while it had {named(key)} and {len(others)} more, {named(others[0])} first: "
                f"{type(error).__name__}: {error}"
            )
        return JobError(f"{named(key)} failed on the executor {self.name!r}: {type(error).__name__}: {error}")
