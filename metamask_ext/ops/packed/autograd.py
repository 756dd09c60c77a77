"""The autograd Functions of bit-packed masks, closed under differentiation.

``packed_masked_linear`` is linear in the input and in W, so that its gradients are linear in the output's gradient and one of the
two: forward, input gradient and weight gradient are each other's derivatives, and two Functions give every order. See
:mod:`metamask_ext.ops.weight.autograd` for the form that they have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from metamask_ext.torch_private import is_batched

from . import raw, reference

if TYPE_CHECKING:

    class _Context(FunctionCtx):
        """A node of one of these Functions."""

        saved_tensors: tuple[Tensor, ...]
        tensors: int
        tasks: int
        masks_bias: bool


def _saved(ctx: _Context) -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor] | None]:
    """The tensors, then the masks as lists. Masks are saved like tensors: autograd then sees a change in place."""
    tensors, first = ctx.saved_tensors, ctx.tensors
    packed = list(tensors[first : first + ctx.tasks])
    packed_bias = list(tensors[first + ctx.tasks :]) if ctx.masks_bias else None
    return tensors[:first], packed, packed_bias


def _save(ctx: _Context, tensors: tuple[Tensor | None, ...], packed: list[Tensor], packed_bias: list[Tensor] | None) -> None:
    ctx.tensors, ctx.tasks, ctx.masks_bias = len(tensors), len(packed), packed_bias is not None
    save: Callable[..., None] = ctx.save_for_backward  # torch's takes None too, its type does not
    save(*tensors, *packed, *(packed_bias or []))


class PackedMaskedLinear(Function):
    """``y_b = x_b @ where(bit_t, W, 0).T + where(bit_t, b, 0)`` with ``t = slots[b]``, the product in ``dtype``."""

    @staticmethod
    def forward(ctx, input, slots, weight, bias, packed, packed_bias, groups, dtype):
        _save(ctx, (input, slots, weight, bias), packed, packed_bias)
        ctx.groups = groups
        return raw.packed_masked_linear(input, slots, weight, packed, bias, packed_bias, groups, dtype)

    @staticmethod
    def backward(ctx, grad):
        (input, slots, weight, bias), packed, packed_bias = _saved(ctx)
        output_mask = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        grad_input, grad_weight, grad_bias = _backward(
            grad, input, slots, weight, packed, bias, packed_bias, ctx.groups, output_mask
        )
        return (
            grad_input,
            None,  # slots
            grad_weight,
            grad_bias,
            None,  # packed
            None,  # packed_bias
            None,  # groups
            None,  # dtype
        )


class PackedMaskedLinearBackward(Function):
    """``dx = dy @ theta``, ``dW = sum_b bit_t * (dy_b.T @ x_b)``, ``db = sum_b bit_t * dy_b``: those in ``output_mask``."""

    @staticmethod
    def forward(ctx, grad, input, slots, weight, bias, packed, packed_bias, groups, output_mask):
        _save(ctx, (grad, input, slots, weight), packed, packed_bias)
        ctx.set_materialize_grads(False)
        ctx.groups = groups
        return raw.packed_masked_linear_backward(grad, input, slots, weight, packed, bias, packed_bias, groups, output_mask)

    @staticmethod
    def backward(ctx, for_input, for_weight, for_bias):
        (grad, input, slots, weight), packed, packed_bias = _saved(ctx)
        to_grad: Tensor | None = None
        to_input: Tensor | None = None
        to_weight: Tensor | None = None
        if ctx.needs_input_grad[0]:
            parts = []
            if for_input is not None:
                parts.append(_forward(for_input, slots, weight, packed, None, None, ctx.groups, grad.dtype))
            if for_weight is not None:
                masks = packed_bias if for_bias is not None else None
                parts.append(_forward(input, slots, for_weight, packed, for_bias, masks, ctx.groups, grad.dtype))
            elif for_bias is not None:
                parts.append(reference.bias_rows(for_bias, slots, packed_bias, grad))
            if parts:
                to_grad = sum(parts[1:], start=parts[0])
        if ctx.needs_input_grad[1] and for_weight is not None:
            to_input = _backward(grad, input, slots, for_weight, packed, None, None, ctx.groups, (True, False, False))[0]
        if ctx.needs_input_grad[3] and for_input is not None:
            to_weight = _backward(grad, for_input, slots, weight, packed, None, None, ctx.groups, (False, True, False))[1]
        return (
            to_grad,
            to_input,
            None,  # slots
            to_weight,
            None,  # bias, on which no gradient depends
            None,  # packed
            None,  # packed_bias
            None,  # groups
            None,  # output_mask
        )


def _forward(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    packed_bias: list[Tensor] | None,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    if is_batched(input, weight, bias):
        # vmap over a backward (is_grads_batched): it has no way to call a raw op that takes a list
        return reference.packed_masked_linear(input, slots, weight, packed, bias, packed_bias, groups).to(dtype)
    apply: Callable[..., Tensor] = PackedMaskedLinear.apply
    return apply(input, slots, weight, bias, packed, packed_bias, groups, dtype)


def _backward(
    grad: Tensor,
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    packed_bias: list[Tensor] | None,
    groups: int,
    output_mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    if is_batched(grad, input, weight):
        return reference.packed_masked_linear_backward(grad, input, slots, weight, packed, bias, packed_bias, groups, output_mask)
    apply: Callable[..., tuple[Tensor | None, ...]] = PackedMaskedLinearBackward.apply
    return apply(grad, input, slots, weight, bias, packed, packed_bias, groups, output_mask)
