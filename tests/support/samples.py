"""Weights with their logits for every kind of test: the same samples feed forward against reference, derivatives, opcheck and CUDA.

A sample is a function of a dtype and a device, so that no test sees what another has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metamask_ext.ops.gate import HARD, SIGMOID

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A weight's, and that of its logits: those that two dtypes may have
PAIRS = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32))
PAIR_IDS = ["bfloat16-float32", "float16-float32"]
GATES = ((SIGMOID, 1.0), (SIGMOID, 0.5), (HARD, 0.0), (HARD, 0.25))
GATE_IDS = ["sigmoid", "sigmoid-t0.5", "hard", "hard-c0.25"]


@dataclass(frozen=True)
class Sample:
    """One pair of a weight and its logits, by shape, memory layout and size of the logits."""

    name: str
    shape: tuple[int, ...]
    layout: Callable[[Tensor], Tensor] = lambda tensor: tensor
    mask_layout: Callable[[Tensor], Tensor] | None = None
    scale: float = 2.0

    def tensors(
        self, count: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0, mask_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """``count`` tensors of this shape: the weight, its logits (the second), and more of the weight's kind.

        The logits are of ``mask_dtype``, if that is given.
        """
        generator = torch.Generator().manual_seed(seed)
        made = []
        for index in range(count):
            tensor = torch.randn(self.shape, generator=generator, dtype=torch.float64)
            tensor = tensor * self.scale if index == 1 else tensor
            layout = self.mask_layout if index == 1 and self.mask_layout is not None else self.layout
            kind = mask_dtype if index == 1 and mask_dtype is not None else dtype
            made.append(layout(tensor.to(device=device, dtype=kind)))
            assert made[-1].shape == self.shape
        return made


def wider(tensor: Tensor) -> Tensor:
    """The same values as every second column of a tensor twice as wide: real strides, and gaps in memory."""
    out = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype, device=tensor.device)
    out[..., ::2] = tensor
    return out[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def offset(tensor: Tensor) -> Tensor:
    """The same values one element into a buffer: not aligned for vectors."""
    buffer = torch.full((tensor.numel() + 1,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    buffer[1:] = tensor.flatten()
    return buffer[1:].view(tensor.shape)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


SMALL = (
    Sample("1x1", (1, 1)),
    Sample("2x3", (2, 3)),
    Sample("17x3", (17, 3)),
    Sample("empty", (0, 5)),
    Sample("no-columns", (3, 0)),
    Sample("vector", (17,)),
    Sample("scalar", ()),
    Sample("transposed", (3, 17), transposed),
    Sample("mask-transposed", (3, 17), mask_layout=transposed),
    Sample("wider", (3, 17), wider),
    Sample("mask-wider", (3, 17), mask_layout=wider),
    Sample("offset", (3, 17), offset),
    Sample("expanded", (3, 17), lambda tensor: tensor[:1].expand(3, 17)),
    Sample("conv", (3, 2, 3, 3)),
    Sample("channels-last", (3, 4, 3, 3), channels_last),
    Sample("mask-channels-last", (3, 4, 3, 3), mask_layout=channels_last),
)
LARGE = (
    Sample("129x1134", (129, 1134)),
    Sample("1134x17", (1134, 17)),
    Sample("logits-to-100", (129, 129), scale=100.0),
    Sample("logits-to-1e4", (129, 129), scale=1e4),
    Sample("large-wider", (129, 129), wider),
)
ALL = SMALL + LARGE


def ids(samples: tuple[Sample, ...]) -> list[str]:
    return [sample.name for sample in samples]


def opcheck(op: torch._ops.OpOverload, arguments: tuple) -> None:
    """torch.library.opcheck. AOT autograd, most of its time, is tried with float32 only: types are told apart in the kernels."""
    tests = ["test_schema", "test_faketensor"]
    if any(isinstance(one, Tensor) and one.dtype == torch.float32 for one in arguments):
        tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, arguments, test_utils=tests)
