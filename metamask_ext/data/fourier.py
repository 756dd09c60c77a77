"""Sparse combinations of Fourier features: EECS 182 (Berkeley, fall 2022), homework 9, problem 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import check_at_least_one


def fourier_features(x: Tensor, count: int) -> Tensor:
    """Compute ``phi(x)``, ``[..., n, count]`` for ``x`` ``[..., n]``.

    The features are 1, then ``sqrt(2) sin(pi k x)`` and ``sqrt(2) cos(pi k x)`` for k = 1, 2, ... They are orthonormal for ``x``
    uniform in [-1, 1).

    Raises:
        ValueError: ``count`` is not an odd number of at least 1.
    """
    if count < 1 or count % 2 == 0:
        raise ValueError(f"count must be odd, 1 + 2 times the frequencies, got {count}")
    phases = math.pi * x[..., None] * torch.arange(1, (count + 1) // 2, dtype=x.dtype, device=x.device)
    waves = math.sqrt(2) * torch.stack([phases.sin(), phases.cos()], -1)
    return torch.cat([torch.ones_like(x)[..., None], waves.flatten(-2)], -1)


def fourier_tasks(tasks: int, count: int, true: int, generator: torch.Generator) -> Tensor:
    """Draw coefficients ``alpha`` ``[tasks, count]``, float64, of signals ``y(x) = sum_k alpha_k phi_k(x)``.

    They are uniform in [-1, 1] in the first ``true`` features and scaled to norm 1, and 0 in the others. The mean square of a
    signal is then 1.

    Raises:
        ValueError: ``true`` is not between 1 and ``count``, or there is no task.
    """
    check_at_least_one(tasks=tasks)
    if not 1 <= true <= count:
        raise ValueError(f"true must be between 1 and count ({count}), got {true}")
    drawn = 2 * torch.rand(tasks, true, generator=generator, dtype=torch.float64) - 1
    return torch.nn.functional.pad(drawn / drawn.norm(dim=1, keepdim=True), (0, count - true))


def grid(count: int) -> Tensor:
    """Return ``count`` equally spaced points of [-1, 1), from -1, float64.

    On them a feature of frequency k equals those of frequencies ``count * j - k`` and ``count * j + k``, up to the sign of a sine:
    its aliases.
    """
    return 2 * torch.arange(count, dtype=torch.float64) / count - 1
