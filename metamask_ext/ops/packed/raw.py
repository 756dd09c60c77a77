"""Typed callers of the raw ops on bit-packed masks and their fake (shape-only) kernels: see :mod:`metamask_ext._ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _ops  # noqa: F401  importing it registers torch.ops.metamask
from ._build import BACKEND
from .reference_packed import (
    check_mask_logits,
    check_packed_grad,
    check_packed_input,
    check_packed_linear,
    check_packed_weight,
    check_shape,
    packed_shape,
)

if BACKEND != "reference":
    from . import _C

    _metamask = torch.ops.metamask

    _pack_mask = _metamask.pack_mask.default
    _unpack_mask = _metamask.unpack_mask.default
    _packed_masked_linear = _C.packed_masked_linear
    _packed_masked_linear_backward = _metamask.packed_masked_linear_backward.default
    _packed_superposition_gradient = _metamask.packed_superposition_gradient.default


def pack_mask(mask_logits: Tensor, threshold: float) -> Tensor:
    """See :func:`metamask_ext.reference_packed.pack_mask`."""
    return _pack_mask(mask_logits, threshold)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """See :func:`metamask_ext.reference_packed.unpack_mask`."""
    return _unpack_mask(packed, shape)


def packed_masked_linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    packed_bias: Sequence[Tensor] | None,
    groups: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`metamask_ext.reference_packed.packed_masked_linear`; the product is taken, and given, in ``dtype``."""
    return _packed_masked_linear(input, slots, weight, packed, bias, packed_bias, groups, dtype)


def packed_masked_linear_backward(
    grad: Tensor,
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    packed_bias: Sequence[Tensor] | None,
    groups: int,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of :func:`packed_masked_linear` for input, weight and bias; None where not needed."""
    return _packed_masked_linear_backward(grad, input, slots, weight, packed, bias, packed_bias, groups, needs)


def packed_superposition_gradient(grad: Tensor, input: Tensor, weight: Tensor, packed: Sequence[Tensor], groups: int) -> Tensor:
    """See :func:`metamask_ext.reference_packed.packed_superposition_gradient`."""
    return _packed_superposition_gradient(grad, input, weight, packed, groups)


if BACKEND != "reference":

    @torch.library.register_fake("metamask::pack_mask")
    def _(mask_logits, threshold):
        check_mask_logits(mask_logits, threshold)
        return mask_logits.new_empty(packed_shape(mask_logits.shape), dtype=torch.uint8)

    @torch.library.register_fake("metamask::unpack_mask")
    def _(packed, shape):
        check_shape(packed, shape)
        return packed.new_empty(shape, dtype=torch.bool)

    @torch.library.register_fake("metamask::packed_masked_linear")
    def _(input, slots, weight, packed, bias, packed_bias, groups, dtype=None):
        check_packed_linear(input, slots, weight, packed, bias, packed_bias, groups)
        return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=dtype or weight.dtype)

    @torch.library.register_fake("metamask::packed_masked_linear_backward")
    def _(grad, input, slots, weight, packed, bias, packed_bias, groups, needs):
        check_packed_linear(input, slots, weight, packed, bias, packed_bias, groups)
        check_packed_grad(grad, input, weight)
        return (
            input.new_empty(input.shape) if needs[0] else None,
            weight.new_empty(weight.shape) if needs[1] else None,
            bias.new_empty(bias.shape) if bias is not None and needs[2] else None,
        )

    @torch.library.register_fake("metamask::packed_superposition_gradient")
    def _(grad, input, weight, packed, groups):
        tasks = check_packed_weight(weight, packed, groups)
        check_packed_input(input, weight, groups)
        check_packed_grad(grad, input, weight)
        return grad.new_empty((input.shape[0], tasks))
