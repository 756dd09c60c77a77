"""Decides which path runs: the kernels, or plain torch where no Function can go; and the dtypes in which a layer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metamask_ext._build import BACKEND
from metamask_ext.torch_private import in_transform, is_any_autocast_enabled, is_made_of_tensors, tree_leaves

from .gate import SIXTEEN_BITS
from .shards import is_distributed

if TYPE_CHECKING:

    def has_tangent(tensor: Tensor) -> bool:
        """True if forward-mode AD has given the tensor a tangent, also where Python does not know of a level."""

elif BACKEND != "reference":
    from metamask_ext._C import has_tangent

AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_no_kernels = BACKEND == "reference"
_is_compiling, _is_exporting = torch.compiler.is_compiling, torch.compiler.is_exporting
KERNELS_ON = {"cpu": ("cpu",), "cuda": ("cpu", "cuda")}.get(BACKEND, ())
"""Types of device for which this build has kernels."""
SMALLEST = 2**16
"""Elements of a weight from which on a compiled masked_linear is the kernel.

For fewer, two kernels of Inductor take no longer than the call of one op (measured: docs/internals/compiled.md)."""


def use_reference() -> bool:
    """True if plain torch must run instead of a Function.

    A Function inside a compiled ``func.grad``, or in a compiled step that calls ``autograd.grad``, returns wrong numbers with no
    warning; under torch.func and forward-mode AD a Function of the form ``forward(ctx, ...)`` does not work at all.
    """
    return _no_kernels or _is_compiling() or in_transform()


def in_compiled_graph() -> bool:
    """True if Dynamo traces this code, and a composite op is to stand for what runs. An exported program holds plain torch only."""
    return _is_compiling() and not _no_kernels and not _is_exporting()


def is_plain(tensors: Iterable[Tensor | None], gate_param: float | torch.SymFloat = 0.0) -> bool:
    """True if plain torch must run where a compiled graph runs, or is traced below Dynamo: asked in a composite op's body.

    So it is under torch.func and forward-mode AD; for tensors made of other tensors (DTensor), whose ops are torch's; on a device
    without kernels; for a temperature that has changed since the first trace: a raw op would be compiled again for each.
    """
    return (
        in_transform()
        or isinstance(gate_param, torch.SymFloat)
        or any(
            tensor is not None and (tensor.device.type not in KERNELS_ON or is_made_of_tensors(tensor) or has_tangent(tensor))
            for tensor in tensors
        )
    )


def is_small(weight: Tensor) -> bool:
    """True if a compiled masked_linear of this weight is no faster as a kernel than in plain torch."""
    return weight.numel() < SMALLEST


def is_differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """True if autograd records an op on these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def of_one_dtype(weight: Tensor, masks: list[Tensor]) -> list[Tensor]:
    """Logits for weights of one dtype, in float32 where some are and others have the weights' 16 bits: an op takes one dtype.

    Nothing is rounded, and the conversion is differentiable.
    """
    dtype = getattr(weight, "dtype", None)
    if dtype not in SIXTEEN_BITS or len({getattr(mask, "dtype", None) for mask in masks}) < 2:
        return masks
    if not any(isinstance(mask, Tensor) and mask.dtype == torch.float32 for mask in masks):
        return masks
    return [mask.float() if isinstance(mask, Tensor) and mask.dtype == dtype else mask for mask in masks]


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
    given = tree_leaves((arguments, getattr(check, "keywords", {})))
    if any(map(is_distributed, given)):
        return TypeError(
            "a DTensor cannot be an argument here: on shards run masked_weight, masked_linear and task_masked_linear, all of whose "
            "tensors but slots are then DTensors. Else give tensors of one process: tensor.full_tensor()"
        )
    return error
