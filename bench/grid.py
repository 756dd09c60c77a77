"""The suite ``grid``: one linear layer at batches from 1 to 16,384 and weights from 64 x 64 to 4096 x 4096.

All batches of a weight are measured in one process, in ascending order: what an earlier batch has allocated or freed, a later one
does itself, and more. (glibc raises the size from which memory goes back to the system to that of the largest block freed.)
"""

from __future__ import annotations

import statistics
import time

import torch

from .layers import masked_linear
from .problem import COMPILED_OURS, Problem
from .training import fused_step

Weight = tuple[int, int]
"""Inputs and outputs."""

BATCHES = (1, 8, 32, 256, 1024, 2048, 4096, 16384)
FEW_BATCHES = (8, 256, 4096)
"""Those of bfloat16, and of the default allocator, unless all are asked for."""

WEIGHTS: tuple[Weight, ...] = ((64, 64), (256, 256), (768, 768), (1024, 1024), (768, 3072), (4096, 4096))
MODES = ("forward", "backward", "fused-step")
DTYPES = (torch.float32, torch.bfloat16)
QUICK_WEIGHT, QUICK_BATCHES = (64, 64), (8, 256)

SECONDS = 2.0
"""The rounds of a case should take so long, where one round takes less."""
FEWEST, FEWEST_SLOW = 5, 3
"""Rounds of a case, and of one in which a round takes longer than :data:`SECONDS`; that is not warmed up again after its check."""

COPY = "copy, GB/s"
COPIES, COPY_ROUNDS, COPY_BYTES = 8, 21, 1 << 22


def measure_name(mode: str, dtype: torch.dtype) -> str:
    return mode if dtype == torch.float32 else f"{name_of(dtype)}-{mode}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_name(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def sizes_of(shape: str) -> tuple[int, int, int]:
    """Returns batch, inputs and outputs of a point's shape."""
    batch, inputs, outputs = map(int, shape.split("x"))
    return batch, inputs, outputs


def problem(batch: int, inputs: int, outputs: int, mode: str, dtype: torch.dtype) -> Problem:
    """Makes one point of the grid.

    Args:
        mode: ``"forward"``, with nothing to differentiate; ``"backward"``, forward and the gradients of x, W and M;
            ``"fused-step"``, a step of FusedMaskedSGD, against ``torch.optim.SGD``.
    """
    if mode == "fused-step":
        return fused_step(batch, inputs, dtype, outputs=outputs)
    problem = masked_linear(batch, inputs, mode, dtype, outputs=outputs)
    problem.contenders.pop(COMPILED_OURS)  # another compilation for each of hundreds of sizes
    return problem


def copy_rate(inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, float]:
    """Measures the bytes that a copy of the weight reads and writes a second: the median of rounds of some copies each."""
    source = torch.randn(outputs, inputs).to(dtype)
    copied = torch.empty_like(source)
    size = source.numel() * source.element_size()
    repeats = max(COPIES, COPY_BYTES // size)
    seconds = []
    for _ in range(COPY_ROUNDS):
        start = time.perf_counter()
        for _ in range(repeats):
            copied.copy_(source)
        seconds.append(time.perf_counter() - start)
    return {COPY: 2 * size * repeats / statistics.median(seconds) / 1e9}
