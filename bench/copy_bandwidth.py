"""Adds a contender of the suite ``cuda``: a copy that moves as many bytes as the case must."""

from __future__ import annotations

import torch

from .layers import masked_linear, masked_weight
from .problem import Contender, Problem


def with_copy(problem: Problem, elements: int, device: str) -> Problem:
    """Adds a contender ``copy``, which reads ``elements`` / 2 and writes as many: the floor of the case, in bytes.

    ``copy/metamask`` is the share of the copy bandwidth, measured in the same rounds, that metamask reaches.
    """
    source = torch.randn(elements // 2, device=device).to(problem.dtype)
    copied = torch.empty_like(source)
    copy = Contender(lambda: (copied.copy_(source),), lambda: (source.double(),), ("copy",))
    return Problem({**problem.contenders, "copy": copy}, problem.reduction, problem.missing, problem.tolerance, problem.dtype)


def weight_against_copy(width: int, mode: str, device: str) -> Problem:
    """Compares :func:`masked_weight` with a copy.

    The forward reads W and M and writes theta; the backward reads G too and writes dW and dM. A ``"backward"`` is both, as plain
    torch's is.
    """
    arrays = 3 if mode == "forward" else 3 + 5
    return with_copy(masked_weight(width, mode, device), arrays * width * width, device)


def linear_against_copy(batch: int, width: int, device: str) -> Problem:
    """Compares :func:`masked_linear`'s forward, which reads W and M, with a copy."""
    return with_copy(masked_linear(batch, width, "forward", device=device), 2 * width * width, device)
