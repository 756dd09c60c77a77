"""Decides which path runs: the kernels, or plain torch where no Function can go; and the dtypes in which a layer runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metamask_ext._build import BACKEND
from metamask_ext.torch_private import in_transform, is_any_autocast_enabled

from .gate import HARD, SIXTEEN_BITS

AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_no_kernels = BACKEND == "reference"
_is_compiling = torch.compiler.is_compiling


def use_reference() -> bool:
    """True if plain torch must run instead of a Function.

    A Function inside a compiled ``func.grad``, or in a compiled step that calls ``autograd.grad``, returns wrong numbers with no
    warning; under torch.func and forward-mode AD a Function of the form ``forward(ctx, ...)`` does not work at all.
    """
    return _no_kernels or _is_compiling() or in_transform()


FLOAT32 = torch.float32
"""Masks fit a weight of this dtype as they are: a small layer asks no further."""

Parameters = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Weight, logits, bias and logits of the bias."""


def fit_logits(weight: Tensor, mask_logits: Tensor, gate_id: int, gate_param: float) -> Tensor:
    """float32 logits of a 16-bit weight, in its dtype; all others as they are, fitting or not.

    The kernels take one dtype for both. The conversion is differentiable: the logits' gradient is computed in 16 bits and comes to
    them in float32. A hard gate keeps its side of the threshold, which rounding could cross.
    """
    dtype = getattr(weight, "dtype", None)
    if dtype not in SIXTEEN_BITS or not isinstance(mask_logits, Tensor) or mask_logits.dtype != torch.float32:
        return mask_logits
    return _beside(mask_logits, gate_param, dtype) if gate_id == HARD else mask_logits.to(dtype)


def _beside(mask_logits: Tensor, threshold: float, dtype: torch.dtype) -> Tensor:
    """Values of ``dtype`` on the logits' sides of ``threshold``, and well away from it, with the derivative of the logits."""
    limit = torch.finfo(dtype).max
    near = max(min(threshold, limit), -limit)
    above = min(near + 1 + abs(near), limit) if threshold < limit else math.inf
    below = max(near - 1 - abs(near), -limit) if threshold >= -limit else -math.inf
    sides = torch.where(mask_logits > threshold, above, below).to(dtype)
    # Zeros with the derivative 1, as gate_values makes them.
    return sides + (mask_logits - mask_logits.detach()).nan_to_num().to(dtype)


def fit_each(weight: Tensor, masks: Sequence[Tensor], gate_id: int, gate_param: float) -> list[Tensor]:
    """:func:`fit_logits` of each task's logits of one weight."""
    return [fit_logits(weight, mask, gate_id, gate_param) for mask in masks]


def fit_parameters(
    weight: Tensor, mask_logits: Tensor, bias: Tensor | None, bias_mask_logits: Tensor | None, gate_id: int, gate_param: float
) -> Parameters:
    """The parameters of a layer, with :func:`fit_logits` of both logits."""
    if bias_mask_logits is not None:
        bias_mask_logits = fit_logits(weight, bias_mask_logits, gate_id, gate_param)
    return weight, fit_logits(weight, mask_logits, gate_id, gate_param), bias, bias_mask_logits


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype in which a GEMM or convolution over ``weight`` runs under autocast; None: no autocast (as for float64)."""
    if not is_any_autocast_enabled():
        return None
    kind = weight.device.type
    if is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


def is_autocast_enabled(kind: str) -> bool:
    """True if autocast is on for a type of device; torch raises for one that has no autocast."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def check_input_dtype(input: Tensor, weight: Tensor) -> None:
    """Refuse an input of another dtype than ``weight``, unless autocast converts both."""
    if input.dtype == weight.dtype:
        return
    # Autocast converts all types but float64, which stays what it is.
    converts = is_autocast_enabled(weight.device.type)
    if not (converts and weight.dtype != torch.float64 and input.dtype in AUTOCAST_DTYPES):
        wanted = f"the dtype of weight, {weight.dtype}" if not converts else "a dtype that autocast converts with weight's"
        raise TypeError(f"input must have {wanted}, got {input.dtype}" + (f" and {weight.dtype}" if converts else ""))


def worded(error: Exception, check: Callable[..., object], *arguments: object) -> Exception:
    """The error to raise where a kernel refused its arguments: that of ``check(*arguments)``, else ``error`` itself.

    The kernels check what they take in the same words. What cannot be passed to them at all (no tensor, say) fails in torch's words
    first; checking only after a failure saves a small layer microseconds.
    """
    try:
        check(*arguments)
    except Exception as refusal:
        return refusal
    return error
