"""What only the suite ``cuda`` times: a copy that moves as many bytes as a case must."""

from __future__ import annotations

import torch

from .problems import Contender, Problem, masked_linear, masked_weight


def with_copy(problem: Problem, elements: int, device: str) -> Problem:
    """The same with a contender ``copy``, which reads ``elements`` / 2 and writes as many: the floor of the case, in bytes.

    ``copy/ours`` is the share of the copy bandwidth, measured in the same rounds, that ours reaches.
    """
    source = torch.randn(elements // 2, device=device).to(problem.dtype)
    copied = torch.empty_like(source)
    copy = Contender(lambda: (copied.copy_(source),), lambda: (source.double(),), ("copy",))
    return Problem({**problem.contenders, "copy": copy}, problem.reduction, problem.missing, problem.tolerance, problem.dtype)


def weight_against_copy(width: int, mode: str, device: str) -> Problem:
    """:func:`masked_weight`; forward it reads W and M and writes theta, the backward reads G too and writes dW and dM.

    A ``"backward"`` is both, as plain torch's is.
    """
    arrays = 3 if mode == "forward" else 3 + 5
    return with_copy(masked_weight(width, mode, device), arrays * width * width, device)


def linear_against_copy(batch: int, width: int, device: str) -> Problem:
    """:func:`masked_linear` forward; it reads W and M."""
    return with_copy(masked_linear(batch, width, "forward", device=device), 2 * width * width, device)
