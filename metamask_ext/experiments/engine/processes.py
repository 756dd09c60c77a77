"""A process of this machine that computes: the standard library's, and what that does not say when the process dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any


class _Spawn(SpawnContext):
    """Starts processes by spawn, and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[BaseProcess] = []

    def Process(self, *arguments: Any, **options: Any) -> BaseProcess:  # type: ignore[override]  # a class there
        process = SpawnContext.Process(*arguments, **options)
        self.started.append(process)
        return process


class OneProcess(ProcessPoolExecutor):
    """One process, started when it gets work; it ends with the process that made it.

    A :class:`concurrent.futures.ProcessPoolExecutor` of several processes fails all its futures when one of them dies. Several
    executors of one process each say whose work it was that died, and how.
    """

    def __init__(self) -> None:
        # A forked process inherits threads' locks in whatever state they are in; torch's may hang there.
        self._spawn = _Spawn()
        super().__init__(1, mp_context=self._spawn, initializer=_begin)

    def ending(self) -> str:
        """The way in which the process ended, in words; for whoever got a BrokenExecutor."""
        self.shutdown()  # Two threads that wait for one process may both miss its exit code.
        for process in self._spawn.started:
            process.join()
            code = process.exitcode
            if code is not None and code < 0:
                return f"was killed by {signal.Signals(-code).name}"
            return f"ended with exit code {code}"
        return "did not start"

    def end(self) -> None:
        """End the process, whatever it does."""
        for process in self._spawn.started:
            process.kill()
        self.shutdown(cancel_futures=True)


def _begin() -> None:
    # Ctrl-C reaches every process of the terminal; the one that started the others ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Progress bars of several processes would overwrite each other.
    os.environ["TERM"] = "dumb"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
