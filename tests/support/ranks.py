"""Two processes joined by gloo over loopback, which run a function each and give back what it returned or raised."""

from __future__ import annotations

import datetime
import os
import queue
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
SECONDS = 60


@dataclass(frozen=True)
class Raised:
    """An exception of a rank: the name of its type, its message, its traceback."""

    kind: str
    message: str
    trace: str


class Ranks:
    """The processes. They start once and take one function after another, whose models and wrappers die with it."""

    def __init__(self, folder):
        context = mp.get_context("spawn")
        self._calls = [context.Queue() for _ in range(RANKS)]
        self._results = [context.Queue() for _ in range(RANKS)]
        path = folder / "rendezvous"
        self._processes = [
            context.Process(target=_serve, args=(rank, str(path), self._calls[rank], self._results[rank]), daemon=True)
            for rank in range(RANKS)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function, *arguments):
        """The results of ``function(rank, *arguments)``, those of rank 0 first; the error of a rank that none was expected of."""
        results = self.try_(function, *arguments)
        for result in results:
            if isinstance(result, Raised):
                raise AssertionError(f"a rank raised {result.kind}: {result.message}\n{result.trace}")
        return results

    def try_(self, function, *arguments):
        """The same, with a :class:`Raised` in place of the result of a rank that raised."""
        for calls in self._calls:
            calls.put((function, arguments))
        try:
            return [results.get(timeout=SECONDS) for results in self._results]
        except queue.Empty:
            self.close()
            raise AssertionError(f"{function.__name__} did not end within {SECONDS} seconds") from None

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank, path, calls, results):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=SECONDS / 2)
    )
    while True:
        function, arguments = calls.get()
        try:
            result = function(rank, *arguments)
        except Exception as error:
            result = Raised(type(error).__name__, str(error), traceback.format_exc())
        results.put(result)
