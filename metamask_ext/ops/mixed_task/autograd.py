"""The op with derivatives of every order, and what its nodes leave to plain torch: a third derivative, and batches of gradients.

The nodes are those of ``csrc/autograd/task_masked_linear.cpp``, ``Forward`` -> ``Backward`` -> ``DoubleBackward`` ->
:func:`plain_third_backward`, closed under differentiation. In a backward for a batch of gradients at once (``is_grads_batched``) no
kernel can run: there :func:`plain_backward` and :func:`plain_double_backward` do.

The nodes call these functions by their names. A call is ``(gate_id, gate_param, groups, masks)``, where ``masks`` counts those of
the weight. Arguments stand in a row: input, slots, weight, bias, and all masks, those of the weight first; in front of them the
gradient of the output, and in front of that the cotangents of what :func:`plain_backward` gives. ``wanted`` has a bit for each kind
of gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metamask_ext._build import BACKEND

from ..vjp import pull_back
from . import reference
from .raw import Masks

if TYPE_CHECKING:

    def differentiable_task_masked_linear(
        input: Tensor,
        slots: Tensor,
        weight: Tensor,
        masks: Masks,
        bias: Tensor | None,
        bias_masks: Masks,
        gate_id: int,
        gate_param: float,
        groups: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As :func:`metamask_ext.ops.mixed_task.raw.task_masked_linear`, and autograd records it."""

elif BACKEND != "reference":
    from metamask_ext._C import differentiable_task_masked_linear  # noqa: F401  functional.py calls it

Call = tuple[int, float, int, int]
Row = list[Tensor | None]


def _or_none(gradients: Sequence[Tensor | None] | None, count: int) -> Row:
    return list(gradients) if gradients else [None] * count


def plain_backward(call: Call, wanted: int, row: Row) -> Row:
    """Gradients of input, weight, bias and masks; None where not wanted."""
    gate_id, gate_param, groups, n = call
    tensors: list[Any] = row  # those that may be None are known by their places
    grad, input, slots, weight, bias, *masks = tensors
    dx, dw, dmasks, db, dbias_masks = reference.task_masked_linear_backward(
        *(grad, input, slots, weight, masks[:n], bias, masks[n:], gate_id, gate_param, groups, _flags(wanted, 5))
    )
    return [dx, dw, db, *_or_none(dmasks, n), *_or_none(dbias_masks, len(masks) - n)]


def plain_double_backward(call: Call, wanted: int, row: Row) -> Row:
    """Gradients of the output's gradient, and of input, weight, bias and masks; None where not wanted."""
    gate_id, gate_param, groups, n = call
    count = len(row) // 2 - 4  # of all masks: 3 cotangents and 5 arguments are not of masks
    tensors: list[Any] = row  # those that may be None are known by their places
    c_input, c_weight, c_bias, *c_masks = tensors[: 3 + count]
    grad, input, slots, weight, bias, *masks = tensors[3 + count :]
    ddy, dx, dw, dmasks, db, dbias_masks = reference.task_masked_linear_double_backward(
        c_input,
        c_weight,
        c_masks[:n],
        c_bias,
        c_masks[n:],
        *(grad, input, slots, weight, masks[:n], bias, masks[n:]),
        *(gate_id, gate_param, groups, _flags(wanted, 6)),
    )
    return [ddy, dx, dw, db, *_or_none(dmasks, n), *_or_none(dbias_masks, count - n)]


def plain_third_backward(call: Call, wanted: int, row: Row, cotangents: Row) -> Row:
    """Gradients of ``row``, the arguments of :func:`plain_double_backward`, for cotangents of what that wants."""

    def double_backward(*tensors: Tensor | None) -> Row:
        return plain_double_backward(call, wanted, list(tensors))

    grads: Row = pull_back(double_backward, row, cotangents)
    return grads


def _flags(wanted: int, count: int) -> tuple[bool, ...]:
    return tuple(bool(wanted >> bit & 1) for bit in range(count))
