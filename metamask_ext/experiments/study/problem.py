"""A problem of the common study: stacked tasks, a network, a loss and a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

Layer = Callable[..., nn.Module]
"""Makes a layer from the arguments of :class:`torch.nn.Linear`, or of :class:`torch.nn.Conv2d`."""


class TaskData(NamedTuple):
    """Samples of several tasks: ``x`` ``[T, n, ...]``, ``y`` ``[T, n, ...]``."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Score:
    """The number that a problem is judged by.

    Attributes:
        name: with the unit if it is short.
        unit: for an axis.
        higher_is_better: which way is up.
        margin: scores that differ by no more count as equal where samples are counted (question 2).
    """

    name: str
    unit: str
    higher_is_better: bool
    margin: float = 0.0

    def best(self, values: list[float | None]) -> int:
        """The place of the best of ``values``, of which None is the worst. FloatingPointError if all are None."""
        known = [(value if self.higher_is_better else -value, -place) for place, value in enumerate(values) if value is not None]
        if not known:
            raise FloatingPointError(f"no configuration gave a finite {self.name}")
        return -max(known)[1]


@dataclass(frozen=True)
class Problem:
    """The tasks of one seed, and what is learned of them.

    Attributes:
        train, test: the trained tasks.
        new_train, new_test: tasks not seen in training; ``new_train`` has as many samples as are asked about at most.
        network: ``network(linear, conv)`` makes the net of layers that these two make: plain ones, or masked ones with the gate of
            the method. It takes ``[n, ...]``. Its parameters are those of its layers, under the same names either way.
        loss: ``loss(prediction, y)`` of one task, a scalar; it must run under ``torch.vmap``.
        score: the same, on test data; what :class:`Score` names.
        examine: ``examine(method, model)`` measures more of the trained model of a method (JSON values). Called for each method
            but ``independent``, whose nets are several; masks are named by ``names``.
        likelihood: of the labels given the net's output, as :func:`metamask_ext.continual.fisher_diagonal` names it; methods with
            EWC need it.
    """

    train: TaskData
    test: TaskData
    new_train: TaskData
    new_test: TaskData
    network: Callable[[Layer, Layer], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    examine: Callable[[str, nn.Module], Mapping[str, object]] | None = None
    likelihood: str | None = None

    @property
    def names(self) -> list[str]:
        """``"task-0"``, ...: the trained tasks."""
        return [f"task-{task}" for task in range(len(self.train.x))]

    def plain(self) -> nn.Module:
        """The net without masks."""
        return self.network(nn.Linear, nn.Conv2d)

    def scores(self, data: TaskData, predict: Callable[[int, Tensor], Tensor], tasks: Sequence[int]) -> list[float]:
        """The score on ``data`` of the predictions ``predict(k, x)`` for the task ``tasks[k]``, for each ``k``.

        Raises:
            FloatingPointError: one is not finite.
        """
        with torch.no_grad():
            found = [float(self.score(predict(k, data.x[task]), data.y[task])) for k, task in enumerate(tasks)]
        for task, value in zip(tasks, found):
            if not math.isfinite(value):
                raise FloatingPointError(f"the score of task {task} is {value}: the rates are too large")
        return found


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor, dim: int = 0, size: int = 1000) -> Tensor:
    """``function(x)`` computed for ``size`` samples at a time: memory does not grow with their number."""
    return torch.cat([function(part) for part in x.split(size, dim)], dim)
