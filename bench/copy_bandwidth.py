"""The problems of the suite ``cuda``: each has a contender more, a copy that moves as many bytes as the case must."""

from __future__ import annotations

from dataclasses import replace

import torch

from .layers import masked_linear, masked_weight
from .mixed_task import mixed_task_linear, packed_forward
from .problem import Contender, Problem
from .training import fused_step


def with_copy(problem: Problem, moved: int, device: str) -> Problem:
    """Adds a contender ``copy``, which reads ``moved`` / 2 bytes and writes as many: the floor of the case.

    ``copy/metamask`` is the share of the copy bandwidth, measured in the same rounds, that metamask reaches.
    """
    source = torch.randn(moved // (2 * problem.dtype.itemsize), device=device).to(problem.dtype)
    copied = torch.empty_like(source)
    copy = Contender(lambda: (copied.copy_(source),), lambda: (source.double(),), ("copy",))
    return replace(problem, contenders={**problem.contenders, "copy": copy}, moved=moved)


def weight_against_copy(width: int, mode: str, device: str) -> Problem:
    """Compares :func:`masked_weight` with a copy.

    The forward reads W and M and writes theta; the backward reads G too and writes dW and dM. A ``"backward"`` is both, as plain
    torch's is.
    """
    arrays = 3 if mode == "forward" else 3 + 5
    return with_copy(masked_weight(width, mode, device), 4 * arrays * width * width, device)


def linear_against_copy(batch: int, width: int, device: str) -> Problem:
    """Compares :func:`masked_linear`'s forward, which reads W and M, with a copy."""
    return with_copy(masked_linear(batch, width, "forward", device=device), 4 * 2 * width * width, device)


def step_against_copy(batch: int, width: int, dtype: torch.dtype, device: str) -> Problem:
    """Compares a step of FusedMaskedSGD with a copy: the forward reads W and M, the backward reads both again and writes both."""
    return with_copy(fused_step(batch, width, dtype, device), dtype.itemsize * 6 * width * width, device)


def packed_against_copy(batch: int, width: int, tasks: int, device: str) -> Problem:
    """Compares the packed forward, which reads W and a bit a weight of each task, with a copy."""
    return with_copy(packed_forward(batch, width, tasks, device), 4 * width * width + tasks * width * width // 8, device)


def mixed_task_against_copy(tasks: int, rows: int, width: int, device: str) -> Problem:
    """Compares the forward of a batch that mixes tasks, which reads W and the logits of each task, with a copy."""
    return with_copy(mixed_task_linear(tasks, rows, width, "forward", device), 4 * (1 + tasks) * width * width, device)
