"""Masks of one bit a weight: packing, and layers in which every sample of a batch uses its own task's bits.

``theta_t = W * bit_t``: the supermasks of Supermasks in Superposition (Wortsman et al., arXiv:2006.14769), one bit for each weight
where that paper's code stacks float masks. The bits are constants; gradients go to the input, to W and to the bias, of any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from metamask_ext.torch_private import fx_trace, traced_function

from ..checks import (
    as_list,
    check_conv2d,
    check_dense,
    check_mask_logits,
    check_packed_linear,
    check_shape,
    check_slot_values,
    check_superposition,
    has_values,
    nan_flag,
)
from ..composite import composite_op
from ..dispatch import (
    autocast_dtype,
    check_input_dtype,
    in_compiled_graph,
    is_differentiated,
    is_plain,
    use_reference,
    worded,
)
from ..geometry import im2col, resolve_geometry
from . import raw, reference
from .autograd import PackedMaskedLinear

_apply: Callable[..., Tensor] = PackedMaskedLinear.apply


def pack_mask(mask_logits: Tensor, *, threshold: float = 0.0) -> Tensor:
    """``1[M > threshold]``, eight weights to a byte.

    Weight ``k`` of a row is bit ``k % 8`` (least significant first) of byte ``k // 8``; the padding of a row is zero.

    Args:
        mask_logits: ``M``, ``[out, ...]``, or ``[n]`` of a bias; floating point. A row is all that follows the first dimension.
        threshold: ``c``, in units of a logit.

    Returns:
        uint8 ``[out, ceil(in / 8)]`` with ``in`` the product of the dimensions after the first; ``[ceil(n / 8)]`` of a vector.

    Raises:
        TypeError: ``mask_logits`` is no tensor or not floating point, or ``threshold`` is no number.
        ValueError: ``mask_logits`` is a scalar or holds NaN, for which there is no bit, or ``threshold`` is NaN. Where values
            cannot be looked at (under torch.compile, in transforms of torch.func) NaN becomes 0.
    """
    if fx_trace._is_fx_tracing_flag and (traced := traced_function(pack_mask, locals())) is not None:
        return traced
    check_dense(mask_logits=mask_logits)
    check_mask_logits(mask_logits, threshold)
    if has_values(mask_logits) and bool(nan_flag(mask_logits)):
        raise ValueError(f"mask_logits must not hold NaN, got {int(mask_logits.isnan().sum())} of {mask_logits.numel()}")
    if use_reference():
        return reference.pack_mask(mask_logits, threshold)
    return raw.pack_mask(mask_logits.detach(), threshold)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of ``shape`` that :func:`pack_mask` packed, as bool.

    Raises:
        TypeError: ``packed`` is no tensor or not uint8.
        ValueError: ``packed`` is not the shape of a packed mask of ``shape``.
    """
    if fx_trace._is_fx_tracing_flag and (traced := traced_function(unpack_mask, locals())) is not None:
        return traced
    check_dense(packed=packed)
    check_shape(packed, shape)
    if use_reference():
        return reference.unpack_mask(packed, shape)
    return raw.unpack_mask(packed, shape)


def packed_masked_linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    packed_bias: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """``y_b = x_b @ (W * bit_t).T + b * bit_t`` with ``t = slots[b]``: a linear layer in which each sample has its own mask.

    A weight whose bit is off is zero, also where ``W`` is not finite.

    Args:
        input: ``x``, ``[B, ..., in]``.
        slots: int64 ``[B]``, the task of each sample: an index into ``packed``.
        weight: ``W``, ``[out, in]``.
        packed: the masks, uint8: one tensor ``[T, out, ceil(in / 8)]`` or a sequence of ``T`` tensors from :func:`pack_mask`.
        bias: ``b``, ``[out]``, or None.
        packed_bias: its masks, ``[T, ceil(out / 8)]`` or a sequence; None leaves the bias unmasked.

    Returns:
        ``y``, ``[B, ..., out]``; under autocast in the autocast dtype, as ``linear`` does.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: shapes or devices do not fit, or a slot is no task's.
    """
    if fx_trace._is_fx_tracing_flag and (traced := traced_function(packed_masked_linear, locals())) is not None:
        return traced
    return _linear(input, slots, weight, packed, bias, packed_bias, 1)


def packed_masked_conv2d(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    packed_bias: Tensor | Sequence[Tensor] | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """``y_b = conv2d(x_b, W * bit_t) + b * bit_t`` with ``t = slots[b]``, by ``im2col`` and :func:`packed_masked_linear`.

    Args:
        input: ``x``, ``[B, C_in, H, W]``, or ``[C_in, H, W]`` with one slot.
        slots: int64 ``[B]``, the task of each sample.
        weight: ``W``, ``[C_out, C_in / groups, kH, kW]``.
        packed: the masks, uint8 ``[T, C_out, ceil(C_in / groups * kH * kW / 8)]`` or a sequence: a row is an output channel.
        bias, packed_bias: as in :func:`packed_masked_linear`.
        stride, padding, dilation, groups: as in ``conv2d``; padding may be ``"valid"`` or ``"same"``.

    Returns:
        ``y``, ``[B, C_out, H', W']`` or ``[C_out, H', W']``; under autocast in the autocast dtype, as ``conv2d`` does.

    Raises:
        TypeError, ValueError: as :func:`packed_masked_linear`; also when ``input`` does not fit ``weight`` or ``padding`` is no
            padding.
    """
    if fx_trace._is_fx_tracing_flag and (traced := traced_function(packed_masked_conv2d, locals())) is not None:
        return traced
    try:
        return _conv2d(input, slots, weight, packed, bias, packed_bias, stride, padding, dilation, groups)
    except Exception as error:
        given = {"input": input, "slots": slots, "weight": weight, "packed": packed, "bias": bias, "packed_bias": packed_bias}
        raise worded(error, partial(check_dense, **given)) from None


def _conv2d(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    packed_bias: Tensor | Sequence[Tensor] | None,
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
) -> Tensor:
    check_conv2d(input, weight, groups)
    check_input_dtype(input, weight)
    images = input if input.dim() == 4 else input[None]
    images, geometry, size = resolve_geometry(images, weight.shape[2:], stride, padding, dilation)
    columns = im2col(images, weight.shape[2:], *geometry)
    y = _linear(columns, slots, weight.flatten(1), packed, bias, packed_bias, groups)
    y = torch.unflatten(y.transpose(1, 2), 2, size)
    # A copy even where y is in order: no output is a view, an activation may write to it.
    return (y if input.dim() == 4 else y[0]).clone(memory_format=torch.contiguous_format)


def superposition_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, packed: Tensor | Sequence[Tensor], groups: int = 1
) -> Tensor:
    """The gradient for the coefficients of a superposition of masks, for every sample and every task.

    Of a layer ``y_b = x_b @ (W * sum over t of alpha[b, t] * bit_t).T`` with ``grad = dL/dy``:
    ``dL/dalpha[b, t] = sum over r, o, k of grad[b, r, o] * W[o, k] * bit_t[o, k] * x[b, r, k]`` (Supermasks in Superposition,
    arXiv:2006.14769, section 3.3). Masks are expanded to floats one tile at a time.

    Args:
        grad: ``dL/dy``, ``[B, ..., out]``.
        input: ``x``, ``[B, ..., groups * in]``.
        weight: ``W``, ``[out, in]``; rows of group ``g`` read columns ``g * in`` to ``(g + 1) * in`` of the input.
        packed: the masks of all tasks, as in :func:`packed_masked_linear`.
        groups: of a convolution, else 1.

    Returns:
        ``[B, T]``, in the dtype of ``grad``. It has no derivative of its own: where one is asked for, it raises.

    Raises:
        TypeError, ValueError: as :func:`packed_masked_linear`.
    """
    masks = as_list("packed", packed)
    if use_reference():
        check_superposition(grad, input, weight, masks, groups)
        return reference.packed_superposition_gradient(grad, input, weight, masks, groups)
    try:
        return raw.packed_superposition_gradient(grad, input, weight, masks, groups)
    except Exception as error:
        raise worded(error, check_superposition, grad, input, weight, masks, groups) from None


def _linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    packed_bias: Tensor | Sequence[Tensor] | None,
    groups: int,
) -> Tensor:
    masks, bias_masks = as_list("packed", packed), None if packed_bias is None else as_list("packed_bias", packed_bias)
    arguments = (input, slots, weight, masks, bias, bias_masks, groups)
    if use_reference():
        _check(*arguments)
        return (_compiled if in_compiled_graph() else reference.packed_masked_linear)(*arguments)
    try:
        if input.dtype != weight.dtype:
            check_input_dtype(input, weight)
        return _kernel(*arguments)
    except Exception as error:
        raise worded(error, _check, *arguments) from None


def _kernel(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    packed_bias: list[Tensor] | None,
    groups: int,
) -> Tensor:
    dtype = autocast_dtype(weight)
    if is_differentiated((input, weight, bias)):
        return _apply(input, slots, weight, bias, packed, packed_bias, groups, dtype)
    return raw.packed_masked_linear(input, slots, weight, packed, bias, packed_bias, groups, dtype)


def _in_graph(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    packed_bias: list[Tensor] | None,
    groups: int,
) -> Tensor:
    run = reference.packed_masked_linear if is_plain((input, weight, bias, *packed)) else _kernel
    return run(input, slots, weight, packed, bias, packed_bias, groups)


_compiled = composite_op(
    "compiled_packed_linear(Tensor input, Tensor slots, Tensor weight, Tensor[] packed, Tensor? bias, Tensor[]? packed_bias, "
    "int groups) -> Tensor",
    _in_graph,
)


def _check(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    packed_bias: list[Tensor] | None,
    groups: int,
) -> None:
    check_dense(input=input, slots=slots, weight=weight, packed=packed, bias=bias, packed_bias=packed_bias)
    tasks = check_packed_linear(input, slots, weight, packed, bias, packed_bias, groups)
    check_input_dtype(input, weight)
    check_slot_values(slots, tasks)
