"""Compares large results of one linear layer with float64 on samples: some of their rows, and some of their columns.

Each sampled number is computed exactly, from all the numbers it depends on. A result of at most :data:`SAMPLED` rows or columns
is compared whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .problem import LEARNING_RATE, Layer

SAMPLED, EDGE = 32, 4
"""Rows and columns that are compared, and those of them from either end, where a kernel has its remainders."""


@lru_cache(maxsize=64)
def picked(size: int) -> Tensor:
    """Returns the numbers of the rows, or columns, to compare: in ascending order, the same for the same ``size``."""
    if size <= SAMPLED:
        return torch.arange(size)
    inner = torch.randperm(size - 2 * EDGE, generator=torch.Generator().manual_seed(size))[: SAMPLED - 2 * EDGE]
    return torch.cat([torch.arange(EDGE), inner.sort().values + EDGE, torch.arange(size - EDGE, size)])


def taken(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the picked rows of a matrix, and its picked columns."""
    matrix = matrix.detach()
    return matrix[picked(matrix.shape[0])], matrix[:, picked(matrix.shape[1])]


def named(results: Sequence[str]) -> list[str]:
    """Returns the names of the samples of ``results``."""
    return [f"{name}, sampled {part}" for name in results for part in ("rows", "columns")]


def exact(layer: Layer, results: Sequence[str], masked: bool) -> list[Tensor]:
    """Computes the samples of ``results`` in float64, for ``y = x @ (W * sigmoid(M)).T``, or ``x @ W.T`` if not ``masked``.

    Args:
        results: of ``"output"``, ``"gradient of input"``, ``"gradient of weight 1"``, ``"gradient of mask 1"``, and of a step of
            SGD ``"weight"`` and ``"mask"``.
    """
    x, weight, mask = (tensor.detach().double() for tensor in layer[:3])
    gate = mask.sigmoid() if masked else torch.ones_like(mask)
    theta = weight * gate
    found = {"output": _product(x, theta.T)}
    if layer.gradient is not None:
        gradient = layer.gradient.double()
        found["gradient of input"] = _product(gradient, theta)
        of_theta = _product(gradient.T, x)
        factors = gate, theta * (1.0 - gate)
        for name, factor, before in zip(("weight", "mask"), factors, (weight, mask)):
            derived = tuple(part * its for part, its in zip(of_theta, taken(factor)))
            found[f"gradient of {name} 1"] = derived
            found[name] = tuple(start - LEARNING_RATE * part for start, part in zip(taken(before), derived))
    return [sample for name in results for sample in found[name]]


def _product(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    """Returns the samples of ``left @ right``."""
    return left[picked(left.shape[0])] @ right, left @ right[:, picked(right.shape[1])]
