"""Sine waves of random amplitude and phase: Finn, Abbeel and Levine, arXiv:1703.03400, section 5.1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_at_least_one

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, math.pi)
INPUTS = (-5.0, 5.0)


@dataclass(frozen=True)
class SineTasks:
    """Tasks ``y = amplitude * sin(x - phase)``; :func:`sine_tasks` draws them.

    Attributes:
        amplitude, phase: ``[T, 1, 1]``, float32.
    """

    amplitude: Tensor
    phase: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Compute ``y`` ``[T, K, 1]`` for ``x`` ``[T, K, 1]`` (or ``[K, 1]``: the same for all tasks)."""
        return self.amplitude * torch.sin(x - self.phase)

    def samples(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``(x, y)``, each ``[T, count, 1]``, with ``x`` uniform in [-5, 5]; no noise."""
        x = _uniform(INPUTS, (len(self.phase), count, 1), generator)
        return x, self(x)


def sine_tasks(tasks: int, generator: torch.Generator) -> SineTasks:
    """Draw ``tasks`` tasks: amplitude uniform in [0.1, 5], phase uniform in [0, pi].

    Raises:
        ValueError: fewer than one task.
    """
    check_at_least_one(tasks=tasks)
    return SineTasks(_uniform(AMPLITUDES, (tasks, 1, 1), generator), _uniform(PHASES, (tasks, 1, 1), generator))


def _uniform(bounds: tuple[float, float], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator)
