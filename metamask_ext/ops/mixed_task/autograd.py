"""The autograd Functions of mixed-task batches, closed under differentiation as those of :mod:`metamask_ext.ops.weight.autograd`.

``TaskMaskedLinear`` -> ``TaskMaskedLinearBackward`` -> ``TaskMaskedLinearDoubleBackward`` -> plain torch. A Function sees tensors
among its arguments, not in lists: the masks and the bias masks come last, one by one. In a backward that nobody differentiates
(grad mode is off) the ops are called as they are: a Function takes as long as a small layer's arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from metamask_ext.torch_private import is_legacy_batched

from ..vjp import pull_back
from . import raw, reference


class Call(NamedTuple):
    """The arguments of task_masked_linear that are no tensors; ``masks`` counts the weight's masks (the bias's follow them)."""

    gate_id: int
    gate_param: float
    groups: int
    masks: int


class TaskMaskedLinear(Function):
    """``y_b = x_b @ (W * g(M_slots[b])).T + b * g(M_b,slots[b])``, the product in ``dtype``."""

    @staticmethod
    def forward(ctx, call, dtype, input, slots, weight, bias, *masks):
        ctx.save_for_backward(input, slots, weight, bias, *masks)
        ctx.call = call
        of_weight, of_bias = masks[: call.masks], masks[call.masks :]
        return raw.task_masked_linear(
            input, slots, weight, of_weight, bias, of_bias, call.gate_id, call.gate_param, call.groups, dtype
        )

    @staticmethod
    def backward(ctx, grad):
        call, needs = ctx.call, ctx.needs_input_grad
        of_weight, of_bias = needs[6 : 6 + call.masks], needs[6 + call.masks :]
        wanted = needs[2], needs[4], any(of_weight), needs[5], any(of_bias)
        tensors = grad, *ctx.saved_tensors
        if is_legacy_batched(grad):
            dx, dw, db, *dmasks = _backward(reference.task_masked_linear_backward, call, tensors, wanted)
        elif torch.is_grad_enabled():
            dx, dw, db, *dmasks = TaskMaskedLinearBackward.apply(call, wanted, *tensors)
        else:
            dx, dw, db, *dmasks = _backward(raw.task_masked_linear_backward, call, tensors, wanted)
        return (
            None,  # call
            None,  # dtype
            dx,
            None,  # slots
            dw,
            db,
            *(dmask if need else None for dmask, need in zip(dmasks, needs[6:])),
        )


class TaskMaskedLinearBackward(Function):
    """``dx``, ``dW``, ``db`` and those of the masks; ``output_mask`` says which (of input, weight, masks, bias, bias masks)."""

    @staticmethod
    def forward(ctx, call, output_mask, grad, input, slots, weight, bias, *masks):
        ctx.save_for_backward(grad, input, slots, weight, bias, *masks)
        ctx.set_materialize_grads(False)
        ctx.call = call
        tensors = grad, input, slots, weight, bias, *masks
        return _backward(raw.task_masked_linear_backward, call, tensors, output_mask)

    @staticmethod
    def backward(ctx, *cotangents):
        needs = ctx.needs_input_grad
        grads: Sequence[Tensor | None] = [None] * (len(needs) - 2)
        if any(cotangent is not None for cotangent in cotangents):
            of_weight, of_bias = needs[7 : 7 + ctx.call.masks], needs[7 + ctx.call.masks :]
            wanted = needs[2], needs[3], needs[5], any(of_weight), needs[6], any(of_bias)
            tensors = *cotangents, *ctx.saved_tensors
            if is_legacy_batched(*tensors):
                second = _double_backward(reference.task_masked_linear_double_backward, ctx.call, tensors, wanted)
            elif torch.is_grad_enabled():
                second = TaskMaskedLinearDoubleBackward.apply(ctx.call, wanted, *tensors)
            else:
                second = _double_backward(raw.task_masked_linear_double_backward, ctx.call, tensors, wanted)
            ddy, dx, dw, db, *dmasks = second
            grads = ddy, dx, None, dw, db, *(dmask if need else None for dmask, need in zip(dmasks, needs[7:]))
        return (
            None,  # call
            None,  # output_mask
            *grads,
        )


class TaskMaskedLinearDoubleBackward(Function):
    """The gradients of :class:`TaskMaskedLinearBackward`, in one pass; its own backward is plain torch.

    ``tensors`` are the cotangents of dx, dW, db and of the masks' gradients, then the arguments of the backward.
    """

    @staticmethod
    def forward(ctx, call, output_mask, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.call, ctx.output_mask = call, output_mask
        return _double_backward(raw.task_masked_linear_double_backward, call, tensors, output_mask)

    @staticmethod
    def backward(ctx, *cotangents):
        def double_backward(*tensors):
            return _double_backward(reference.task_masked_linear_double_backward, ctx.call, tensors, ctx.output_mask)

        grads = pull_back(double_backward, ctx.saved_tensors, cotangents)
        grads = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[2:])]
        return (
            None,  # call
            None,  # output_mask
            *grads,
        )


# The Functions' tensors, and results, in the order of the ops and their references; None for each mask's that is not needed.


def _backward(function, call, tensors, output_mask):
    """``tensors``: grad, input, slots, weight, bias and all masks; gives dx, dW, db and the masks' gradients."""
    grad, input, slots, weight, bias, *masks = tensors
    n = call.masks
    dx, dw, dmasks, db, dbias_masks = function(
        grad, input, slots, weight, masks[:n], bias, masks[n:], call.gate_id, call.gate_param, call.groups, output_mask
    )
    return dx, dw, db, *(dmasks or [None] * n), *(dbias_masks or [None] * (len(masks) - n))


def _double_backward(function, call, tensors, output_mask):
    """``tensors``: the cotangents of what :func:`_backward` gives, and its tensors; gives ddy, dx, dW, db and the masks'."""
    count = len(tensors) // 2 - 4  # of all masks: 3 cotangents and 5 arguments are not of masks
    c_input, c_weight, c_bias, *c_masks = tensors[: 3 + count]
    grad, input, slots, weight, bias, *masks = tensors[3 + count :]
    n = call.masks
    cotangents = c_input, c_weight, c_masks[:n], c_bias, c_masks[n:]
    ddy, dx, dw, dmasks, db, dbias_masks = function(
        *cotangents, grad, input, slots, weight, masks[:n], bias, masks[n:], call.gate_id, call.gate_param, call.groups, output_mask
    )
    return ddy, dx, dw, db, *(dmasks or [None] * n), *(dbias_masks or [None] * (count - n))
