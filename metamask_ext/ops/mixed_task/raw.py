"""Typed callers of the raw ops on batches that mix tasks, and their fake kernels, as :mod:`metamask_ext._ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._build import BACKEND
from .reference_tasks import check_task_linear

if BACKEND != "reference":
    from . import _ops  # noqa: F401  importing it registers torch.ops.metamask

    _metamask = torch.ops.metamask

    _task_masked_linear = _metamask.task_masked_linear.default
    _task_masked_linear_backward = _metamask.task_masked_linear_backward.default
    _task_masked_linear_double_backward = _metamask.task_masked_linear_double_backward.default

Masks = Sequence[Tensor]
"""One tensor ``[T, *shape]``, or ``T`` tensors."""


def task_masked_linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: Masks,
    bias: Tensor | None,
    bias_masks: Masks,
    gate: int,
    parameter: float,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`metamask_ext.reference_tasks.task_masked_linear`; the product is taken, and given, in ``dtype``."""
    return _task_masked_linear(input, slots, weight, masks, bias, bias_masks, gate, parameter, groups, dtype)


def task_masked_linear_backward(
    grad: Tensor,
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: Masks,
    bias: Tensor | None,
    bias_masks: Masks,
    gate: int,
    parameter: float,
    groups: int = 1,
    needs: tuple[bool, ...] = (True, True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, list[Tensor], Tensor | None, list[Tensor]]:
    """The gradients of :func:`task_masked_linear` for input, weight, masks, bias and bias_masks.

    Those of masks come in the form of the masks, with zeros for tasks that the batch does not have. What is not needed is None, or
    an empty list.
    """
    return _task_masked_linear_backward(grad, input, slots, weight, masks, bias, bias_masks, gate, parameter, groups, needs)


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
    masks: Masks,
    bias: Tensor | None,
    bias_masks: Masks,
    gate: int,
    parameter: float,
    groups: int = 1,
    needs: tuple[bool, ...] = (True, True, True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor], Tensor | None, list[Tensor]]:
    """The gradients of :func:`task_masked_linear_backward` for grad, input, weight, masks, bias and bias_masks.

    A cotangent that is None, or a list of them that is empty, is zero. What is not needed is None, or an empty list.
    """
    return _task_masked_linear_double_backward(
        cotangent_input,
        cotangent_weight,
        cotangent_masks,
        cotangent_bias,
        cotangent_bias_masks,
        grad,
        input,
        slots,
        weight,
        masks,
        bias,
        bias_masks,
        gate,
        parameter,
        groups,
        needs,
    )


if BACKEND != "reference":

    @torch.library.register_fake("metamask::task_masked_linear")
    def _(input, slots, weight, masks, bias, bias_masks, gate, parameter, groups, dtype=None):
        check_task_linear(input, slots, weight, masks, bias, bias_masks or None, groups)
        return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=dtype or weight.dtype)

    @torch.library.register_fake("metamask::task_masked_linear_backward")
    def _(grad, input, slots, weight, masks, bias, bias_masks, gate, parameter, groups, needs):
        check_task_linear(input, slots, weight, masks, bias, bias_masks or None, groups)
        return _gradients(input, weight, masks, bias, bias_masks, needs)

    @torch.library.register_fake("metamask::task_masked_linear_double_backward")
    def _(
        c_input,
        c_weight,
        c_masks,
        c_bias,
        c_bias_masks,
        grad,
        input,
        slots,
        weight,
        masks,
        bias,
        bias_masks,
        gate,
        parameter,
        groups,
        needs,
    ):
        check_task_linear(input, slots, weight, masks, bias, bias_masks or None, groups)
        return grad.new_empty(grad.shape) if needs[0] else None, *_gradients(input, weight, masks, bias, bias_masks, needs[1:])

    def _gradients(input, weight, masks, bias, bias_masks, needs):
        return (
            input.new_empty(input.shape) if needs[0] else None,
            weight.new_empty(weight.shape) if needs[1] else None,
            [mask.new_empty(mask.shape) for mask in masks] if needs[2] else [],
            bias.new_empty(bias.shape) if bias is not None and needs[3] else None,
            [mask.new_empty(mask.shape) for mask in bias_masks] if needs[4] else [],
        )
