"""The autograd Functions of masked_weight for a list of weights, closed under differentiation as :mod:`metamask_ext.autograd`.

``MaskedWeightList`` -> ``MaskedWeightListBackward`` -> ``MaskedWeightListDoubleBackward`` -> plain torch. A Function sees tensors
among its arguments, not in lists: it gets columns, one after another, of as many tensors as there are weights. A weight whose
gradient nothing wants has no part in a backward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from . import _ops, reference
from .autograd_tasks import _is_batched
from .reference_tasks import pull_back


class MaskedWeightList(Function):
    """``theta_i = W_i * g(M_i)``; columns: W, M."""

    @staticmethod
    def forward(ctx, gate, parameter, dtype, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.gate, ctx.parameter = gate, parameter
        weight, mask_logits = _columns(tensors, 2)
        return tuple(_ops.masked_weight_list(weight, mask_logits, gate, parameter, dtype))

    @staticmethod
    def backward(ctx, *grads):
        wanted = ctx.needs_input_grad[3:]
        made: Any = [None] * len(wanted)
        used = [index for index, grad in enumerate(grads) if grad is not None]
        if used:
            needs = tuple(any(column[index] for index in used) for column in _columns(wanted, 2))
            tensors = _rows((*grads, *ctx.saved_tensors), 3, used)
            if _is_batched(*tensors):
                found = _backward(reference.masked_weight_list_backward, ctx.gate, ctx.parameter, needs, tensors)
            else:
                found = MaskedWeightListBackward.apply(ctx.gate, ctx.parameter, needs, *tensors)
            made = _placed(found, wanted, 2, used)
        return (
            None,  # gate
            None,  # parameter
            None,  # dtype
            *made,
        )


class MaskedWeightListBackward(Function):
    """The columns dL/dW and dL/dM, or Nones where ``needs`` says so; columns: grads, W, M."""

    @staticmethod
    def forward(ctx, gate, parameter, needs, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.gate, ctx.parameter = gate, parameter
        return _backward(_ops.masked_weight_list_backward, gate, parameter, needs, tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        wanted = ctx.needs_input_grad[3:]
        made: Any = [None] * len(wanted)
        used = [index for index, pair in enumerate(zip(*_columns(cotangents, 2))) if any(one is not None for one in pair)]
        if used:
            needs = tuple(any(column[index] for index in used) for column in _columns(wanted, 3))
            tensors = _rows((*cotangents, *ctx.saved_tensors), 5, used)
            if _is_batched(*tensors):
                found = _double_backward(reference.masked_weight_list_double_backward, ctx.gate, ctx.parameter, needs, tensors)
            else:
                found = MaskedWeightListDoubleBackward.apply(ctx.gate, ctx.parameter, needs, *tensors)
            made = _placed(found, wanted, 3, used)
        return (
            None,  # gate
            None,  # parameter
            None,  # needs
            *made,
        )


class MaskedWeightListDoubleBackward(Function):
    """The gradients of :class:`MaskedWeightListBackward`, in one pass; its own backward is plain torch.

    Columns: cotangents of dL/dW and of dL/dM (None: zero), then those of the backward.
    """

    @staticmethod
    def forward(ctx, gate, parameter, needs, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.gate, ctx.parameter, ctx.needs = gate, parameter, needs
        return _double_backward(_ops.masked_weight_list_double_backward, gate, parameter, needs, tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        def double_backward(*tensors):
            return _double_backward(reference.masked_weight_list_double_backward, ctx.gate, ctx.parameter, ctx.needs, tensors)

        grads = pull_back(double_backward, ctx.saved_tensors, cotangents)
        return (
            None,  # gate
            None,  # parameter
            None,  # needs
            *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[3:])),
        )


def _backward(function, gate, parameter, needs, tensors):
    grad, weight, mask_logits = _columns(tensors, 3)
    return _flat(function(grad, weight, mask_logits, gate, parameter, needs), len(weight))


def _double_backward(function, gate, parameter, needs, tensors):
    cotangent_weight, cotangent_mask, grad, weight, mask_logits = _columns(tensors, 5)
    made = function(cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate, parameter, needs)
    return _flat(made, len(weight))


def _columns(tensors, count):
    length = len(tensors) // count
    return [tensors[start : start + length] for start in range(0, count * length, length)]


def _rows(tensors, count, rows):
    """These rows of the columns, as shorter columns one after another."""
    return [column[index] for column in _columns(tensors, count) for index in rows]


def _flat(columns, length):
    """The columns one after another; an empty one is Nones."""
    return tuple(tensor for column in columns for tensor in (column or [None] * length))


def _placed(tensors, wanted, count, rows) -> list[Tensor | None]:
    """The way back from :func:`_rows`, to columns of full length, with None for what is not ``wanted``."""
    placed: list[Tensor | None] = [None] * len(wanted)
    length = len(wanted) // count
    for start, column in zip(range(0, len(wanted), length), _columns(tensors, count)):
        for index, tensor in zip(rows, column):
            if wanted[start + index]:
                placed[start + index] = tensor
    return placed
