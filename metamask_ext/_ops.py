"""Typed callers of the raw ops and their fake (shape-only) kernels, in csrc/library.cpp's order.

A raw op has no derivative: called with grad mode on and an input that requires grad it raises. Differentiate through
:mod:`metamask_ext.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._build import BACKEND
from .reference import check_linear, check_pair, check_pairs, conv2d_size

if BACKEND != "reference":
    import metamask_ext._C  # noqa: F401  importing it registers torch.ops.metamask

    _metamask = torch.ops.metamask

    _masked_weight = _metamask.masked_weight.default
    _masked_weight_backward = _metamask.masked_weight_backward.default
    _masked_weight_backward_sgd_ = _metamask.masked_weight_backward_sgd_.default
    _masked_weight_double_backward = _metamask.masked_weight_double_backward.default
    _masked_weight_list = _metamask.masked_weight_list.default
    _masked_weight_list_backward = _metamask.masked_weight_list_backward.default
    _masked_weight_list_double_backward = _metamask.masked_weight_list_double_backward.default
    _masked_linear = _metamask.masked_linear.default
    _masked_linear_backward = _metamask.masked_linear_backward.default
    _masked_linear_backward_sgd_ = _metamask.masked_linear_backward_sgd_.default
    _patches = _metamask.im2col.default
    _patches_backward = _metamask.col2im.default


def masked_weight(weight: Tensor, mask_logits: Tensor, gate: int, parameter: float, dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`metamask_ext.reference.masked_weight`."""
    return _masked_weight(weight, mask_logits, gate, parameter, dtype)


def masked_weight_backward(
    grad: Tensor, weight: Tensor, mask_logits: Tensor, gate: int, parameter: float, needs: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """See :func:`metamask_ext.reference.masked_weight_backward`."""
    return _masked_weight_backward(grad, weight, mask_logits, gate, parameter, needs)


Settings = tuple[float, float, float]
"""Of a step of SGD: ``lr, weight_decay, momentum``."""


def masked_weight_backward_sgd_(
    grad: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    gate: int,
    parameter: float,
    needs: tuple[bool, bool],
    updates: Sequence[bool],
    velocities: Sequence[Tensor | None],
    settings: Sequence[Settings],
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`masked_weight_backward`, but where ``updates`` says so a parameter takes a step of SGD and gives None.

    ``v = momentum * v + grad + weight_decay * p``, ``p = p - lr * v``, with ``v`` the velocity; without one, momentum must be 0.
    ``updates``, ``velocities`` and ``settings`` are those of weight and mask_logits.
    """
    return _masked_weight_backward_sgd_(
        grad, weight, mask_logits, *velocities, gate, parameter, needs, updates, settings[0], settings[1]
    )


def masked_weight_double_backward(
    cotangent_weight: Tensor | None,
    cotangent_mask: Tensor | None,
    grad: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    gate: int,
    parameter: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See :func:`metamask_ext.reference.masked_weight_double_backward`."""
    return _masked_weight_double_backward(cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate, parameter, needs)


def masked_weight_list(
    weight: Sequence[Tensor], mask_logits: Sequence[Tensor], gate: int, parameter: float, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """See :func:`metamask_ext.reference.masked_weight_list`."""
    return _masked_weight_list(weight, mask_logits, gate, parameter, dtype)


def masked_weight_list_backward(
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    gate: int,
    parameter: float,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[list[Tensor], list[Tensor]]:
    """See :func:`metamask_ext.reference.masked_weight_list_backward`."""
    return _masked_weight_list_backward(grad, weight, mask_logits, gate, parameter, needs)


def masked_weight_list_double_backward(
    cotangent_weight: Sequence[Tensor | None],
    cotangent_mask: Sequence[Tensor | None],
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    gate: int,
    parameter: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """See :func:`metamask_ext.reference.masked_weight_list_double_backward`."""
    return _masked_weight_list_double_backward(cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate, parameter, needs)


def masked_linear(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate: int,
    parameter: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`metamask_ext.reference.masked_linear`; the product is taken, and given, in ``dtype``."""
    return _masked_linear(input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, dtype)


def masked_linear_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate: int,
    parameter: float,
    needs: tuple[bool, bool, bool, bool, bool] = (True, True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of :func:`masked_linear` for input, weight, mask_logits, bias and bias_mask_logits; None where not needed."""
    return _masked_linear_backward(grad, input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, needs)


def masked_linear_backward_sgd_(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate: int,
    parameter: float,
    needs: tuple[bool, bool, bool, bool, bool],
    updates: Sequence[bool],
    velocities: Sequence[Tensor | None],
    settings: Sequence[Settings],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`masked_linear_backward`, with steps of SGD as in :func:`masked_weight_backward_sgd_`.

    ``updates``, ``velocities`` and ``settings`` are those of weight, mask_logits, bias and bias_mask_logits.
    """
    numbers = [number for its in settings for number in its]
    return _masked_linear_backward_sgd_(
        grad, input, weight, mask_logits, bias, bias_mask_logits, *velocities, gate, parameter, needs, updates, numbers
    )


Pair = tuple[int, int]


def patches(input: Tensor, kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """See :func:`metamask_ext.reference.patches`; float32 and float64, on the CPU."""
    return _patches(input, kernel, stride, padding, dilation)


def patches_backward(
    grad: Tensor, size: Sequence[int], kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The gradient of the images, of ``size`` ``[N, C, H, W]``, from that of their :func:`patches`."""
    return _patches_backward(grad, size, kernel, stride, padding, dilation)


def _check_like(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.shape != weight.shape:
        raise ValueError(f"{name} must have the shape of weight, {list(weight.shape)}, got {list(tensor.shape)}")
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {tensor.device}")


def _check_each_like(name: str, tensors: Sequence[Tensor | None], weight: Sequence[Tensor]) -> None:
    if len(tensors) != len(weight):
        raise ValueError(f"expected {len(weight)} {name} tensors, one per weight, got {len(tensors)}")
    for index, (tensor, one) in enumerate(zip(tensors, weight)):
        if tensor is not None:
            _check_like(f"{name}[{index}]", tensor, one)


if BACKEND != "reference":

    @torch.library.register_fake("metamask::masked_weight")
    def _(weight, mask_logits, gate, parameter, dtype=None):
        check_pair(weight, mask_logits)
        return torch.empty_like(weight, dtype=dtype)

    @torch.library.register_fake("metamask::masked_weight_backward")
    def _(grad, weight, mask_logits, gate, parameter, needs):
        check_pair(weight, mask_logits)
        _check_like("grad", grad, weight)
        return tuple(torch.empty_like(weight) if need else None for need in needs)

    @torch.library.register_fake("metamask::masked_weight_backward_sgd_")
    def _(grad, weight, mask_logits, weight_velocity, mask_velocity, gate, parameter, needs, updates, *settings):
        check_pair(weight, mask_logits)
        _check_like("grad", grad, weight)
        return tuple(torch.empty_like(weight) if need and not update else None for need, update in zip(needs, updates))

    @torch.library.register_fake("metamask::masked_weight_double_backward")
    def _(cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate, parameter, needs):
        check_pair(weight, mask_logits)
        _check_like("grad", grad, weight)
        for name, cotangent in (("cotangent_weight", cotangent_weight), ("cotangent_mask", cotangent_mask)):
            if cotangent is not None:
                _check_like(name, cotangent, weight)
        dtypes = (grad.dtype, weight.dtype, weight.dtype)
        return tuple(torch.empty_like(weight, dtype=dtype) if need else None for need, dtype in zip(needs, dtypes))

    @torch.library.register_fake("metamask::masked_weight_list")
    def _(weight, mask_logits, gate, parameter, dtype=None):
        check_pairs(weight, mask_logits)
        return [torch.empty_like(one, dtype=dtype) for one in weight]

    @torch.library.register_fake("metamask::masked_weight_list_backward")
    def _(grad, weight, mask_logits, gate, parameter, needs):
        check_pairs(weight, mask_logits)
        _check_each_like("grad", grad, weight)
        return tuple([torch.empty_like(one) for one in weight] if need else [] for need in needs)

    @torch.library.register_fake("metamask::masked_weight_list_double_backward")
    def _(cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate, parameter, needs):
        check_pairs(weight, mask_logits)
        _check_each_like("grad", grad, weight)
        for name, cotangents in (("cotangent_weight", cotangent_weight), ("cotangent_mask", cotangent_mask)):
            if cotangents:
                _check_each_like(name, cotangents, weight)
        outputs = (grad[0].dtype, weight[0].dtype, weight[0].dtype)
        return tuple([torch.empty_like(one, dtype=dtype) for one in weight] if need else [] for need, dtype in zip(needs, outputs))

    @torch.library.register_fake("metamask::masked_linear")
    def _(input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, dtype=None):
        check_pair(weight, mask_logits)
        check_linear(input, weight, bias, bias_mask_logits)
        return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=dtype or weight.dtype)

    @torch.library.register_fake("metamask::masked_linear_backward")
    def _(grad, input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, needs):
        return _linear_gradients(input, weight, mask_logits, bias, bias_mask_logits, needs)

    @torch.library.register_fake("metamask::masked_linear_backward_sgd_")
    def _(grad, input, weight, mask_logits, bias, bias_mask_logits, v_w, v_m, v_b, v_bm, gate, parameter, needs, updates, settings):
        needs = [needs[0], *(need and not update for need, update in zip(needs[1:], updates))]
        return _linear_gradients(input, weight, mask_logits, bias, bias_mask_logits, needs)

    def _linear_gradients(input, weight, mask_logits, bias, bias_mask_logits, needs):
        check_pair(weight, mask_logits)
        check_linear(input, weight, bias, bias_mask_logits)
        return (
            input.new_empty(input.shape) if needs[0] else None,
            weight.new_empty(weight.shape) if needs[1] else None,
            weight.new_empty(weight.shape) if needs[2] else None,
            bias.new_empty(bias.shape) if bias is not None and needs[3] else None,
            bias.new_empty(bias.shape) if bias_mask_logits is not None and needs[4] else None,
        )

    @torch.library.register_fake("metamask::im2col")
    def _(input, kernel, stride, padding, dilation):
        height, width = conv2d_size(input.shape, kernel, stride, padding, dilation)
        return input.new_empty((input.shape[0], height * width, input.shape[1] * kernel[0] * kernel[1]))

    @torch.library.register_fake("metamask::col2im")
    def _(grad, size, kernel, stride, padding, dilation):
        return grad.new_empty(size)
