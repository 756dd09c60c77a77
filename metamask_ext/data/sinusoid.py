"""Tasks whose target is a sinusoid of a linear function: Blum and Law, EE5239 project proposal (2020), sections 3.2 to 3.4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_at_least_one

Samples = tuple[Tensor, Tensor]

MAGNITUDES = (0.4, 1.2)
"""The default range of ``|w_k|``.

With five variables, ``z`` then has a standard deviation of 1.9 where all are on, of 1.3 where half are: 99 % of the samples lie
within two periods of the sine.
"""


@dataclass(frozen=True)
class SinusoidTasks:
    """Tasks ``y_t = sin(w_t^T x + b1_t + (pi / 2) c_t) + b2_t``; the functions below draw them.

    Attributes:
        weight: ``[T, variables]``: ``w_t``, float32.
        phase, offset: ``[T]``: ``b1_t`` and ``b2_t``.
        cosine: bool ``[T]``: ``c_t``; the sine is a cosine where it is on.
    """

    weight: Tensor
    phase: Tensor
    offset: Tensor
    cosine: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Compute ``y`` ``[T, n, 1]`` for ``x`` ``[T, n, variables]`` (or ``[n, variables]``: the same for all tasks)."""
        z = x @ self.weight[:, :, None] + (self.phase + math.pi / 2 * self.cosine)[:, None, None]
        return torch.sin(z) + self.offset[:, None, None]

    def samples(self, count: int, generator: torch.Generator) -> Samples:
        """Draw ``(x, y)``, ``[T, count, variables]`` and ``[T, count, 1]``, with ``x ~ N(0, I)``; no noise."""
        x = torch.randn(len(self.weight), count, self.weight.shape[1], generator=generator)
        return x, self(x)


def sine_of_linear_tasks(
    tasks: int, generator: torch.Generator, *, variables: int = 5, magnitudes: Sequence[float] = MAGNITUDES
) -> tuple[SinusoidTasks, Tensor]:
    """Draw tasks ``y_t = sin((w * m_t)^T x + b * m_bt)`` of one ``w`` and ``b`` (section 3.2).

    ``|w_k|`` and ``|b|`` are uniform between the two ``magnitudes``, their signs random; each is on in a task with probability 1/2.

    Returns:
        The tasks, and which parameters are on in each: bool ``[T, variables + 1]``, ``b`` last.

    Raises:
        ValueError: fewer than one task or variable, or ``magnitudes`` are in no order.
    """
    _check(tasks, variables, magnitudes)
    support = torch.randint(2, (tasks, variables + 1), generator=generator).bool()
    theta = _signed_uniform((variables + 1,), magnitudes, generator) * support
    zeros = torch.zeros(tasks)
    return SinusoidTasks(theta[:, :-1], theta[:, -1], zeros, zeros.bool()), support


def sinusoid_tasks(
    tasks: int,
    generator: torch.Generator,
    *,
    variables: int = 5,
    magnitudes: Sequence[float] = MAGNITUDES,
    related: bool = False,
    cosine: float = 0.0,
) -> SinusoidTasks:
    """Draw tasks ``y_t = sin(w_t^T x + b1_t) + b2_t`` (section 3.3), some with cos for sin (section 3.4).

    Args:
        related: False: the ``|w_tk|`` are uniform between the two ``magnitudes``, with random signs, ``b1_t`` is uniform in
            [-pi, pi] and ``b2_t`` in [-1, 1], all of them drawn for each task alone. True: all tasks have the same ``w``, and
            ``b1 = b2 = 0``, so that only cos and sin tell them apart.
        cosine: the probability that a task has cos.

    Raises:
        ValueError: fewer than one task or variable, ``cosine`` is no probability, or ``magnitudes`` are in no order.
    """
    _check(tasks, variables, magnitudes)
    if not 0 <= cosine <= 1:
        raise ValueError(f"cosine must be a probability, in 0..1, got {cosine}")
    weight = _signed_uniform((1 if related else tasks, variables), magnitudes, generator).expand(tasks, variables)
    phase, offset = 2 * torch.rand(2, tasks, generator=generator) - 1
    scale = 0.0 if related else 1.0
    return SinusoidTasks(weight, scale * math.pi * phase, scale * offset, torch.rand(tasks, generator=generator) < cosine)


def _signed_uniform(shape: tuple[int, ...], magnitudes: Sequence[float], generator: torch.Generator) -> Tensor:
    low, high = magnitudes
    sign = 1 - 2 * torch.randint(2, shape, generator=generator)
    return sign * (low + (high - low) * torch.rand(shape, generator=generator))


def _check(tasks: int, variables: int, magnitudes: Sequence[float]) -> None:
    low, high = magnitudes
    if not 0 <= low <= high:
        raise ValueError(f"magnitudes must be two numbers from 0 on, the smaller first, got {list(magnitudes)}")
    check_at_least_one(tasks=tasks, variables=variables)
