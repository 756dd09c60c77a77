"""Closeness to a float64 result, within the rounding that the computation may leave."""

from __future__ import annotations

import torch
from torch import Tensor


def resolution(dtype: torch.dtype) -> float:
    """The relative error that rounding a result once to ``dtype`` may leave, with room for the arithmetic before it.

    float64: exp and a few operations, each half a unit. float32: the same. The 16-bit types compute in float32 and round once.
    """
    return {torch.float64: 2e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]


def assert_close(got: Tensor, expected: Tensor, what: str, scale: Tensor | float = 0.0) -> None:
    """``got`` is the float64 ``expected`` to the resolution of its dtype, element by element.

    ``scale`` bounds the terms that were added up to each element; where they cancel, the error is relative to them. Below
    ``tiny`` an absolute error is allowed: float16's subnormals are 6e-8 apart, and the kernels take exp(x) as 0 below 1.6e-38
    (float64: 3e-308), which a gradient multiplies by a few tens.
    """
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    tiny = {torch.float16: 6e-8, torch.bfloat16: 1e-36, torch.float32: 1e-36, torch.float64: 1e-300}[got.dtype]
    error = (got.double() - expected).abs()
    bound = resolution(got.dtype) * torch.maximum(expected.abs(), torch.as_tensor(scale, dtype=torch.float64)) + tiny
    # NaN fails: it is not <= anything
    assert bool((error <= bound).all()), f"{what}: error up to {(error / bound).max().item():.3g} times what {got.dtype} allows"


def assert_near(got, wanted, terms, what, units=4):
    """Sums of ``terms`` products round at each addition; the 16-bit types keep theta, G and the result in 16 bits."""
    unit = torch.finfo(got.dtype).eps
    bound = units * unit * max(terms, 1) ** 0.5 * wanted.abs().amax().item() if wanted.numel() else 0.0
    assert got.shape == wanted.shape, what
    error = (got.double().cpu() - wanted.cpu()).abs()
    assert bool((error <= bound + 1e-30).all()), f"{what}: error {error.max().item():.3g}, allowed {bound:.3g}"
