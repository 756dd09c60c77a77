"""Defines what a case times: contenders that do the same unit of work, each with its float64 reference.

The contenders of most cases: ``metamask``, this library; ``eager``, plain PyTorch, ``W * torch.sigmoid(M)``; ``compiled``, the same
eager function under ``torch.compile``; ``compiled-ours``, this library under ``torch.compile``; ``dense``, the same network with no
mask at all, the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

METAMASK = "metamask"
"""The contender that a case is about: this library."""

COMPILED, COMPILED_OURS = "compiled", "compiled-ours"
"""Contenders that need a compiler; the second is compared with the first."""

LEARNING_RATE = 1e-3
SEED = 0

Function = Callable[..., Tensor]
Work = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case.

    Attributes:
        work: one unit of work, as it is timed; it returns all that it computes.
        exact: the same, in float64, by the specification. It starts where ``work`` started before its first call.
        results: the names of what both return.
    """

    work: Work
    exact: Work
    results: tuple[str, ...]


class Layer(NamedTuple):
    """The start of a case of one linear layer: ``x``, W, M, and the gradient of the output; None where nothing is derived."""

    x: Tensor
    weight: Tensor
    mask: Tensor
    gradient: Tensor | None


@dataclass(frozen=True)
class Problem:
    """A case made ready to run.

    Attributes:
        contenders: by name; ``metamask`` is one of them.
        reduction: the largest number of products summed into one result: the check's tolerance grows with it.
        missing: contenders that the case cannot have, each with the reason.
        tolerance: of the check, on the norm of each result's error, relative to the result's: for networks in which the rounding of
            one element decides others (a maximum, a ReLU). None: each element is checked.
        dtype: of all results.
        layer: of a case of one linear layer, what its contenders start from.
        moved: the bytes that ``metamask`` must move at least; those of the contender ``copy``. 0: there is none.
    """

    contenders: dict[str, Contender]
    reduction: int
    missing: dict[str, str] = field(default_factory=dict)
    tolerance: float | None = None
    dtype: torch.dtype = torch.float32
    layer: Layer | None = None
    moved: int = 0


def gradient_of(tensor: Tensor) -> Tensor:
    """Returns ``tensor.grad``, which a backward has written."""
    assert tensor.grad is not None
    return tensor.grad
