"""Masked weights as functions: ``theta = W * g(M)`` and the linear and convolution layers that use it.

Source: C. Blum and A. Law, EE5239 project proposal (2020), eq. 3: ``theta = theta_W * sigma(theta_M)``, one ``theta_W`` for all
tasks and one ``theta_M`` per task. All functions take float64, float32, bfloat16 or float16 (16-bit types are computed in
float32), any strides, and can be differentiated any number of times, by autograd and by torch.func.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import _ops, reference
from ._build import BACKEND
from .autograd import MaskedLinear, MaskedWeight
from .autograd_conv import MaskedConv2d, conv2d_product
from .autograd_list import MaskedWeightList
from .reference import check_bias, check_input, check_linear, check_pair, check_pairs, conv2d_size, resolve_gate

__all__ = ["masked_conv2d", "masked_linear", "masked_weight"]

AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_no_kernels = BACKEND == "reference"
_is_compiling = torch.compiler.is_compiling
# Function.apply without what it does for torch.func, where these are not called: a tenth of a small layer's forward and backward
_apply_linear: Any = super(Function, MaskedLinear).apply
_apply_weight: Any = super(Function, MaskedWeight).apply
_apply_conv2d: Any = super(Function, MaskedConv2d).apply
# One call instead of four where autocast is off
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_functorch_level = torch._C._functorch.maybe_current_level


def _use_reference() -> bool:
    """Whether plain torch must run instead of a Function: the one place that decides it.

    A Function inside a compiled ``func.grad``, or in a compiled step that calls ``autograd.grad``, returns wrong numbers with no
    warning; under torch.func and forward-mode AD a Function of the form ``forward(ctx, ...)`` does not work at all.
    """
    return _no_kernels or _is_compiling() or _functorch_level() is not None or forward_ad._current_level >= 0


def _autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype in which a GEMM or convolution over ``weight`` runs under autocast; None: no autocast (as for float64)."""
    if not _is_any_autocast_enabled():
        return None
    kind = weight.device.type
    if _is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


def _is_autocast_enabled(kind: str) -> bool:
    # torch raises for a device that has no autocast.
    return kind != "meta" and torch.is_autocast_enabled(kind)


@overload
def masked_weight(
    weight: Tensor, mask_logits: Tensor, *, gate: str = "sigmoid", temperature: float = 1.0, threshold: float = 0.0
) -> Tensor: ...


@overload
def masked_weight(
    weight: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    *,
    gate: str = "sigmoid",
    temperature: float = 1.0,
    threshold: float = 0.0,
) -> list[Tensor]: ...


def masked_weight(
    weight: Tensor | Sequence[Tensor],
    mask_logits: Tensor | Sequence[Tensor],
    *,
    gate: str = "sigmoid",
    temperature: float = 1.0,
    threshold: float = 0.0,
) -> Tensor | list[Tensor]:
    """``theta = W * g(M)``, element by element.

    ``g(M) = sigmoid(M / temperature)`` for ``gate="sigmoid"`` (Blum and Law, eq. 3); ``g(M) = 1[M > threshold]`` for
    ``gate="hard"``, differentiated as if it were ``M`` (straight-through: Piggyback, arXiv:1801.06519; Supermasks in Superposition,
    arXiv:2006.14769).

    A sequence of weights, such as those of all layers of a small net, is computed at once, and so are its gradients: by one launch
    on a GPU for up to 111 weights (76 in the backward, 52 in the double backward), by waking the threads once on a CPU.

    Args:
        weight: ``W``, of any shape; floating point. Or a sequence of them, all of one dtype and on one device.
        mask_logits: ``M``, of the shape, dtype and device of ``weight``; for a sequence, a sequence of as many.
        gate: ``"sigmoid"`` or ``"hard"``.
        temperature: ``t > 0``, in units of a logit; used by ``"sigmoid"``.
        threshold: ``c``, in units of a logit; used by ``"hard"``.

    Returns:
        ``theta``, with the shape, dtype, device and memory format of ``weight``; for a sequence, a list of them.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: the shapes or devices differ, the gate is unknown, or the temperature is not positive; a sequence is empty, or
            the two are not as long.
    """
    number, parameter = resolve_gate(gate, temperature, threshold)
    logits: Any = mask_logits
    if isinstance(weight, Sequence):
        check_pairs(weight, logits)
        return thetas(weight, logits, number, parameter, None)
    check_pair(weight, logits)
    if _use_reference():
        return reference.masked_weight(weight, logits, number, parameter)
    return _theta(weight, logits, number, parameter, None)


def masked_linear(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None = None,
    bias_mask_logits: Tensor | None = None,
    *,
    gate: str = "sigmoid",
    temperature: float = 1.0,
    threshold: float = 0.0,
) -> Tensor:
    """``y = x @ (W * g(M)).T + b * g(M_b)``: :func:`torch.nn.functional.linear` with a masked weight.

    Args:
        input: ``x``, ``[..., in]``.
        weight: ``W``, ``[out, in]``.
        mask_logits: ``M``, ``[out, in]``.
        bias: ``b``, ``[out]``, or None.
        bias_mask_logits: ``M_b``, ``[out]``; None leaves the bias unmasked.
        gate, temperature, threshold: see :func:`masked_weight`.

    Returns:
        ``y``, ``[..., out]``; under autocast in the autocast dtype, as ``linear`` does.

    Raises:
        TypeError, ValueError: as :func:`masked_weight`; also when ``input`` does not fit ``weight``.
    """
    number, parameter = resolve_gate(gate, temperature, threshold)
    parameters = (weight, mask_logits, bias, bias_mask_logits)
    if _use_reference():
        _check_linear_arguments(input, *parameters)
        return reference.masked_linear(input, *parameters, number, parameter)
    try:
        if input.dtype != weight.dtype:
            _check_input_dtype(input, weight)
        dtype = _autocast_dtype(weight)
        if torch.is_grad_enabled() and (
            weight.requires_grad
            or mask_logits.requires_grad
            or input.requires_grad
            or (bias is not None and bias.requires_grad)
            or (bias_mask_logits is not None and bias_mask_logits.requires_grad)
        ):
            return _apply_linear(input, *parameters, number, parameter, dtype)
        return _ops.masked_linear(input, *parameters, number, parameter, dtype)
    except Exception as error:
        failed = error
    # The op checks its arguments in the same words. Checking here only what it did not take saves a small layer microseconds.
    _check_linear_arguments(input, *parameters)
    raise failed


def _check_linear_arguments(
    input: Tensor, weight: Tensor, mask_logits: Tensor, bias: Tensor | None, bias_mask_logits: Tensor | None
) -> None:
    check_pair(weight, mask_logits)
    check_linear(input, weight, bias, bias_mask_logits)
    _check_input_dtype(input, weight)


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None = None,
    bias_mask_logits: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    gate: str = "sigmoid",
    temperature: float = 1.0,
    threshold: float = 0.0,
) -> Tensor:
    """``y = conv2d(x, W * g(M)) + b * g(M_b)``: :func:`torch.nn.functional.conv2d` with a masked weight.

    On a CPU, where the output has few places for its channels, the convolution is a product in which ``theta`` is never in memory.

    Args:
        input: ``x``, ``[N, C_in, H, W]`` or ``[C_in, H, W]``.
        weight: ``W``, ``[C_out, C_in / groups, kH, kW]``.
        mask_logits: ``M``, of the shape of ``weight``.
        bias: ``b``, ``[C_out]``, or None.
        bias_mask_logits: ``M_b``, ``[C_out]``; None leaves the bias unmasked.
        stride, padding, dilation, groups: as in ``conv2d``; padding may be ``"valid"`` or ``"same"``.
        gate, temperature, threshold: see :func:`masked_weight`.

    Returns:
        ``y``, ``[N, C_out, H', W']`` or ``[C_out, H', W']``; under autocast in the autocast dtype, as ``conv2d`` does.

    Raises:
        TypeError, ValueError: as :func:`masked_weight`; also when ``input`` does not fit ``weight``.
    """
    number, parameter = resolve_gate(gate, temperature, threshold)
    check_pair(weight, mask_logits)
    if weight.dim() != 4:
        raise ValueError(f"weight must be [C_out, C_in / groups, kH, kW], got shape {list(weight.shape)}")
    check_input(input, weight)
    _check_input_dtype(input, weight)
    if input.dim() not in (3, 4) or input.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"input must be [N, C_in, H, W] or [C_in, H, W] with C_in = {weight.shape[1] * groups} as in weight "
            f"{list(weight.shape)} with groups={groups}, got {list(input.shape)}"
        )
    check_bias(weight, bias, bias_mask_logits)
    if _use_reference():
        return reference.masked_conv2d(
            input, weight, mask_logits, bias, bias_mask_logits, stride, padding, dilation, groups, number, parameter
        )
    parameters = (weight, mask_logits, bias, bias_mask_logits)
    if groups == 1 and (geometry := _product_geometry(input, weight, mask_logits, stride, padding, dilation)) is not None:
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (input, *parameters)):
            return _apply_conv2d(input, *parameters, number, parameter, geometry)
        return conv2d_product(input, *parameters, number, parameter, *geometry)[0]
    theta, bias = _masked_parameters(*parameters, number, parameter)
    return F.conv2d(input, theta, bias, stride, padding, dilation, groups)


CHANNELS_PER_PLACE, CHANNELS_PER_PLACE_1X1 = 4, 8
"""A convolution is a product with patches where its output has at least this many channels for each place (of all samples).

With a kernel of one pixel torch's convolution is a product as well, and loses later."""


def _product_geometry(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: int | tuple[int, int],
) -> Any:
    """Stride, padding and dilation, two integers each, of a convolution that is to be a product; None: torch's must run.

    Where places are few for the channels, theta is what a convolution waits for: written, read, brought into oneDNN's order, and
    its gradient likewise. In the product they exist in cache only. Patches, as long as theta's rows, are written and read instead,
    which pays while they are few (measured: docs/cpu.md).
    """
    if weight.dtype not in (torch.float32, torch.float64) or weight.device.type != "cpu" or input.dim() != 4:
        return None
    geometry: Any = tuple((value, value) if isinstance(value, int) else value for value in (stride, padding, dilation))
    if any(isinstance(pair, str) or len(pair) != 2 for pair in geometry):
        return None
    strides, margins, dilations = geometry
    if min(*strides, *dilations) < 1 or min(margins) < 0:  # torch's convolution words what it refuses
        return None
    out, _, *kernel = weight.shape
    height, width = conv2d_size(input.shape, kernel, *geometry)
    least = CHANNELS_PER_PLACE_1X1 if kernel == [1, 1] else CHANNELS_PER_PLACE
    if height < 1 or width < 1 or weight.numel() == 0 or not 0 < least * len(input) * height * width <= out:
        return None
    in_order = input.is_contiguous() and weight.is_contiguous() and mask_logits.is_contiguous()
    return geometry if in_order and _autocast_dtype(weight) is None else None


def _masked_parameters(
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate: int,
    parameter: float,
) -> tuple[Tensor, Tensor | None]:
    """``theta`` and the masked bias, written at once in the dtype in which autocast will use them."""
    dtype = _autocast_dtype(weight)
    theta = _theta(weight, mask_logits, gate, parameter, dtype)
    if bias is not None and bias_mask_logits is not None:
        bias = _theta(bias, bias_mask_logits, gate, parameter, dtype)
    return theta, bias


def _theta(weight: Tensor, mask_logits: Tensor, gate: int, parameter: float, dtype: torch.dtype | None) -> Tensor:
    # A Function costs about 3 microseconds more than its op, which is half of a small layer's forward.
    if torch.is_grad_enabled() and (weight.requires_grad or mask_logits.requires_grad):
        return _apply_weight(weight, mask_logits, gate, parameter, dtype)
    return _ops.masked_weight(weight, mask_logits, gate, parameter, dtype)


def thetas(
    weight: Sequence[Tensor], mask_logits: Sequence[Tensor], gate: int, parameter: float, dtype: torch.dtype | None
) -> list[Tensor]:
    """``theta`` of each, in ``dtype``; the arguments have been checked."""
    if _use_reference():
        return reference.masked_weight_list(weight, mask_logits, gate, parameter, dtype)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensors in (weight, mask_logits) for tensor in tensors):
        return list(MaskedWeightList.apply(gate, parameter, dtype, *weight, *mask_logits))
    return _ops.masked_weight_list(weight, mask_logits, gate, parameter, dtype)


def _check_input_dtype(input: Tensor, weight: Tensor) -> None:
    if input.dtype == weight.dtype:
        return
    # Autocast converts all types but float64, which stays what it is.
    converts = _is_autocast_enabled(weight.device.type)
    if not (converts and weight.dtype != torch.float64 and input.dtype in AUTOCAST_DTYPES):
        wanted = f"the dtype of weight, {weight.dtype}" if not converts else "a dtype that autocast converts with weight's"
        raise TypeError(f"input must have {wanted}, got {input.dtype}" + (f" and {weight.dtype}" if converts else ""))
