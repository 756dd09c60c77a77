"""The parts that the engines share: which task comes when, and how far a temperature has fallen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from metamask_ext.nn.names import check_name
from metamask_ext.nn.tasks import add_task, masked_layers
from metamask_ext.nn.tasks import tasks as model_tasks

Tasks = str | Sequence[str] | Mapping[int, str] | Callable[[int], str]
"""The task of each epoch or step: one for all; these in turn; from these numbers on; or a function of the number."""
UNITS = ("epoch", "step")


class TaskSchedule:
    """Says which task is trained in an epoch, or in a step; both count from 0.

    Args:
        tasks: ``"a"``: always; ``["a", "b"]``: in turn, again and again; ``{0: "a", 5: "b"}``: from these epochs or steps on;
            or a function of the number.
        every: ``"epoch"`` or ``"step"``: what is counted.

    Attributes:
        names: the tasks, each once; empty where a function names them.

    Raises:
        TypeError: ``tasks`` is none of these, or has a name that is no string, or a number that is no integer.
        ValueError: ``tasks`` is empty, has an empty name, a negative number or none for 0; ``every`` is unknown.
    """

    def __init__(self, tasks: Tasks, every: str = "epoch"):
        if every not in UNITS:
            raise ValueError(f"every must be one of {', '.join(UNITS)}, got {every!r}")
        self.every = every
        self._function: Callable[[int], str] | None = None
        self._starts: list[tuple[int, str]] | None = None
        self._in_turn: list[str] = []
        if isinstance(tasks, str):
            self._in_turn = [check_name(tasks)]
        elif isinstance(tasks, Mapping):
            self._starts = _starts(tasks)
        elif isinstance(tasks, Sequence) and not isinstance(tasks, (bytes, bytearray)):
            self._in_turn = [check_name(name) for name in tasks]
            if not self._in_turn:
                raise ValueError("tasks must name at least one task, got an empty sequence")
        elif callable(tasks):
            self._function = tasks
        else:
            kind = type(tasks).__name__
            raise TypeError(f"tasks must be a name, a sequence of names, a mapping from number to name or a function, got {kind}")
        self.names = list(dict.fromkeys(self._in_turn or [name for _, name in self._starts or ()]))

    def task(self, number: int) -> str:
        """The task of this epoch or step. TypeError or ValueError if the function names none."""
        if self._function is not None:
            return check_name(self._function(number))
        if self._starts is not None:
            return [name for start, name in self._starts if start <= number][-1]
        return self._in_turn[number % len(self._in_turn)]

    def add_missing(self, model: nn.Module) -> list[str]:
        """Give the model those of ``names`` that it lacks, each with masks by its layers' ``mask_init``; return these."""
        known = model_tasks(model)
        missing = [name for name in self.names if name not in known]
        for name in missing:
            add_task(model, name)
        return missing


def _starts(tasks: Mapping[int, str]) -> list[tuple[int, str]]:
    for start in tasks:
        if isinstance(start, bool) or not isinstance(start, int):
            raise TypeError(f"tasks must be a mapping from integers, got the key {start!r}")
        if start < 0:
            raise ValueError(f"tasks must be a mapping from numbers of at least 0, got {start}")
    if 0 not in tasks:
        raise ValueError(f"tasks must name the task of 0, got a mapping from {sorted(tasks)}")
    return sorted((start, check_name(name)) for start, name in tasks.items())


class Annealing:
    """The temperature of sigmoid gates, falling from ``start`` to ``end`` by the same factor each step.

    ``temperature(p) = start * (end / start) ** p`` for the part ``p`` of the training that is done, 0 to 1. With a low temperature
    gates are near 0 or 1, so that packing to bits changes little.

    Args:
        start, end: of the temperature.

    Raises:
        TypeError: they are no pair of numbers.
        ValueError: one is not positive and finite.
    """

    def __init__(self, ends: tuple[float, float]):
        if not isinstance(ends, (tuple, list)) or len(ends) != 2 or not all(isinstance(end, (int, float)) for end in ends):
            raise TypeError(f"temperature must be a pair of numbers, (1.0, 0.02) say, got {ends!r}")
        for end in ends:
            if not 0 < end < math.inf:
                raise ValueError(f"temperature must be positive and finite, got {end}")
        self.start, self.end = map(float, ends)

    def temperature(self, part: float) -> float:
        """The temperature when this part of the training is done."""
        part = min(max(part, 0.0), 1.0)
        return self.start * (self.end / self.start) ** part

    def check(self, model: nn.Module) -> None:
        """ValueError if no gate of the model has a temperature."""
        if all(layer.gate != "sigmoid" for _, layer in masked_layers(model)):
            raise ValueError("temperature must not be given: no masked layer of the model has a sigmoid gate")

    def apply(self, model: nn.Module, part: float) -> float:
        """Set the temperature of every sigmoid gate of the model, and return it."""
        temperature = self.temperature(part)
        for _, layer in masked_layers(model):
            if layer.gate == "sigmoid":
                layer.temperature = temperature
        return temperature
