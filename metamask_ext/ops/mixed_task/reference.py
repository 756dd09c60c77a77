"""The ops on mixed-task batches in plain PyTorch: their specification, the tests' oracle, and where no Function can go the path.

``theta_t = W * g(M_t)``, one mask ``M_t`` for each of ``T`` tasks; sample ``b`` of the batch
uses that of task ``slots[b]``. ``masks`` is a list: of one tensor ``[T, *W.shape]``, or of ``T`` tensors of the shape of ``W``.
With ``G_t = dy_t.T @ x_t`` over the rows of task ``t``, the gradients are

* ``dx = dy_t @ theta_t`` row by row, ``dW = sum_t G_t * s_t``, ``dM_t = G_t * W * d_t``,

and with cotangents ``X`` of dx, ``A`` of dW, ``B_t`` of dM_t, ``H_t = dy_t.T @ X_t`` and ``C_t = A * s_t + B_t * W * d_t``,
theirs are

* to dy: ``X @ theta_t.T + x @ C_t.T``; to x: ``dy @ C_t``; to W: ``sum_t B_t * G_t * d_t + H_t * s_t``;
* to M_t: ``A * G_t * d_t + B_t * G_t * W * d2_t + H_t * W * d_t``.

A bias is one more column of W, whose x is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import is_stacked
from ..vjp import pull_back
from ..weight.reference import masked_weight


def task_masked_linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: Sequence[Tensor],
    bias: Tensor | None,
    bias_masks: Sequence[Tensor],
    gate_id: int,
    gate_param: float,
    groups: int = 1,
) -> Tensor:
    """``y_b = x_b @ theta_slots[b].T + b * g(M_b,slots[b])``; without ``bias_masks`` the bias is used as it is.

    ``input`` ``[B, ..., groups * in]``, ``weight`` ``[out, in]``; the rows ``[g * out / groups, (g + 1) * out / groups)`` of theta
    meet the columns ``[g * in, (g + 1) * in)`` of ``input``.
    """
    theta = _gated(weight, masks, slots, gate_id, gate_param)
    x = input.reshape(input.shape[0], input.shape[1:-1].numel(), groups, weight.shape[1])
    theta = torch.unflatten(theta, 1, (groups, weight.shape[0] // groups))
    y = torch.einsum("blgi,bgoi->blgo", x, theta).reshape(*input.shape[:-1], weight.shape[0])
    if bias is None:
        return y
    if bias_masks:
        bias = _gated(bias, bias_masks, slots, gate_id, gate_param).reshape(len(slots), *(1,) * (input.dim() - 2), len(weight))
    return y + bias


def _gated(weight: Tensor, masks: Sequence[Tensor], slots: Tensor, gate_id: int, gate_param: float) -> Tensor:
    """``theta_slots[b]`` for each sample."""
    stack = weight.new_empty((0, *weight.shape))
    if masks:
        stack = masks[0] if is_stacked(masks, weight) else torch.stack(list(masks))
    theta = masked_weight(weight.expand_as(stack), stack, gate_id, gate_param)
    # A negative index would count from the end: this one is out of range, which is an error also where nobody can look.
    return theta[torch.where(slots < 0, len(stack), slots)]


def task_masked_linear_backward(
    grad: Tensor,
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: Sequence[Tensor],
    bias: Tensor | None,
    bias_masks: Sequence[Tensor],
    gate_id: int,
    gate_param: float,
    groups: int = 1,
    output_mask: Sequence[bool] = (True,) * 5,
) -> tuple[Tensor | None, Tensor | None, list[Tensor], Tensor | None, list[Tensor]]:
    """The gradients of :func:`task_masked_linear` for input, weight, masks, bias and bias_masks; None or [] where not needed."""

    def forward(input, weight, masks, bias, bias_masks):
        return task_masked_linear(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups)

    dx, dw, dm, db, dbm = pull_back(forward, (input, weight, list(masks), bias, list(bias_masks)), grad)
    return (
        dx if output_mask[0] else None,
        dw if output_mask[1] else None,
        dm if output_mask[2] else [],
        db if output_mask[3] else None,
        dbm if output_mask[4] else [],
    )


def task_masked_linear_double_backward(
    cotangent_input: Tensor | None,
    cotangent_weight: Tensor | None,
    cotangent_masks: Sequence[Tensor | None],
    cotangent_bias: Tensor | None,
    cotangent_bias_masks: Sequence[Tensor | None],
    grad: Tensor,
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: Sequence[Tensor],
    bias: Tensor | None,
    bias_masks: Sequence[Tensor],
    gate_id: int,
    gate_param: float,
    groups: int = 1,
    output_mask: Sequence[bool] = (True,) * 6,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor], Tensor | None, list[Tensor]]:
    """The gradients of :func:`task_masked_linear_backward` for grad, input, weight, masks, bias and bias_masks, as there.

    A cotangent that is None, or a list of them that is empty, is zero.
    """

    def backward(grad, input, weight, masks, bias, bias_masks):
        return task_masked_linear_backward(grad, input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups)

    primals = grad, input, weight, list(masks), bias, list(bias_masks)
    cotangents = (
        _or_zeros(cotangent_input, input),
        _or_zeros(cotangent_weight, weight),
        [_or_zeros(one, mask) for one, mask in zip(cotangent_masks or [None] * len(masks), masks)],
        None if bias is None else _or_zeros(cotangent_bias, bias),
        [_or_zeros(one, mask) for one, mask in zip(cotangent_bias_masks or [None] * len(bias_masks), bias_masks)],
    )
    ddy, dx, dw, dm, db, dbm = pull_back(backward, primals, cotangents)
    return (
        ddy if output_mask[0] else None,
        dx if output_mask[1] else None,
        dw if output_mask[2] else None,
        dm if output_mask[3] else [],
        db if output_mask[4] else None,
        dbm if output_mask[5] else [],
    )


def _or_zeros(cotangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if cotangent is None else cotangent.to(like.dtype)
