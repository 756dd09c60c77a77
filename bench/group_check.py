"""Checks samples of results in a process of its own: its float64 arithmetic leaves no trace in the process that is timed."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from types import TracebackType

import torch
from torch import Tensor

from . import samples
from .cases import SUITES
from .measure import FLOOR, worst_error
from .problem import Layer


class Checker:
    """The other end: starts the process, and sends it samples of results."""

    def __init__(self) -> None:
        # Spawned: OpenMP hangs in a process forked from one that has used it.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()
        self._process.join()

    def worst_error(self, id: str, contender: str, results: Sequence[Tensor]) -> float:
        """Returns the largest error of a contender's first results, as a share of the tolerance.

        Raises:
            AssertionError: it is more than 1, or a result has another shape or dtype; or the process died.
        """
        try:
            self._connection.send((id, contender, [(list(result.shape), result.dtype) for result in results]))
            for result in results:
                for sample in samples.taken(result):
                    # Its bytes as they are: a pickle would be a block larger than any that the contender frees.
                    self._connection.send_bytes(sample.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            outcome: float | str = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise AssertionError(f"the check of {id} ended without a result, exit code {self._process.exitcode}") from None
        if isinstance(outcome, str):
            raise AssertionError(outcome)
        return outcome


class _Exact:
    """The float64 samples of one case; they are computed when a contender first needs them."""

    def __init__(self, id: str) -> None:
        case = next(case for its in SUITES.values() for case in its if case.id == id)
        problem = case.problem()
        self.id = id
        self._results = {name: contender.results for name, contender in problem.contenders.items()}
        self._problem = replace(problem, contenders={})  # they hold parameters of their own
        self._samples: dict[bool, list[Tensor]] = {}

    def worst_error(self, contender: str, shapes: Sequence[list[int]], got: Sequence[Tensor]) -> float:
        names, layer = self._results[contender], self._problem.layer
        assert layer is not None
        masked = contender != FLOOR
        if masked not in self._samples:
            self._samples[masked] = samples.exact(layer, names, masked)
        for name, shape in zip(names, shapes):
            wanted = self._shape(layer, name)
            assert shape == wanted, f"{name} of {contender} has shape {shape}, not {wanted}"
        return worst_error(contender, samples.named(names), got, self._samples[masked], self._problem)

    @staticmethod
    def _shape(layer: Layer, name: str) -> list[int]:
        """Returns the shape of a result, named as :func:`metamask_ext.bench.samples.exact` does."""
        if name == "output":
            return [layer.x.shape[0], layer.weight.shape[0]]
        return list(layer.x.shape if name == "gradient of input" else layer.weight.shape)


def _serve(connection: Connection) -> None:
    """Answers each contender's samples by its largest error, or by what is wrong, until the other end is closed."""
    exact: _Exact | None = None
    while True:
        try:
            id, contender, kinds = connection.recv()
        except EOFError:
            return
        got = [sample for shape, dtype in kinds for sample in _received(connection, shape, dtype)]
        try:
            if exact is None or exact.id != id:
                exact = None  # freed before another is made
                exact = _Exact(id)
            connection.send(exact.worst_error(contender, [shape for shape, _ in kinds], got))
        except Exception as error:
            connection.send(str(error) if isinstance(error, AssertionError) else traceback.format_exc())


def _received(connection: Connection, shape: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Receives the samples of one result of ``shape``."""
    rows, columns = shape
    shapes = (len(samples.picked(rows)), columns), (rows, len(samples.picked(columns)))
    return [torch.frombuffer(bytearray(connection.recv_bytes()), dtype=dtype).view(its) for its in shapes]
