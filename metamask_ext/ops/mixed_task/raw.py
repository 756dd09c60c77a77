"""The raw ops of the family, typed, and their fake kernels: see :mod:`metamask_ext.ops.weight.raw`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metamask_ext._build import BACKEND

from ..checks import check_batch_grad, check_flags, check_like, check_storage, check_task_linear, count_tasks
from ..gate import IDENTITY, check_gate

Masks = Sequence[Tensor]
"""One tensor ``[T, *shape]``, or ``T`` tensors."""

if TYPE_CHECKING:

    def task_masked_linear(
        input: Tensor,
        slots: Tensor,
        weight: Tensor,
        masks: Masks,
        bias: Tensor | None,
        bias_masks: Masks,
        gate_id: int,
        gate_param: float,
        groups: int = 1,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See :func:`metamask_ext.ops.mixed_task.reference.task_masked_linear`; the product is taken, and given, in ``dtype``."""

    def task_masked_linear_backward(
        grad: Tensor,
        input: Tensor,
        slots: Tensor,
        weight: Tensor,
        masks: Masks,
        bias: Tensor | None,
        bias_masks: Masks,
        gate_id: int,
        gate_param: float,
        groups: int = 1,
        output_mask: Sequence[bool] = (True, True, True, True, True),
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor], Tensor | None, list[Tensor]]:
        """The gradients of :func:`task_masked_linear` for input, weight, masks, bias and bias_masks.

        Those of masks come in the form of the masks, with zeros for tasks that the batch does not have. What is not needed is
        None, or an empty list.
        """

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
        gate_id: int,
        gate_param: float,
        groups: int = 1,
        output_mask: Sequence[bool] = (True, True, True, True, True, True),
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor], Tensor | None, list[Tensor]]:
        """The gradients of :func:`task_masked_linear_backward` for grad, input, weight, masks, bias and bias_masks.

        A cotangent that is None, or a list of them that is empty, is zero. What is not needed is None, or an empty list.
        """

elif BACKEND != "reference":
    task_masked_linear = torch.ops.metamask.task_masked_linear.default
    task_masked_linear_backward = torch.ops.metamask.task_masked_linear_backward.default
    task_masked_linear_double_backward = torch.ops.metamask.task_masked_linear_double_backward.default


if BACKEND != "reference":

    @torch.library.register_fake("metamask::task_masked_linear")
    def _(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups=1, dtype=None):
        _check(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups)
        check_storage("dtype", dtype or weight.dtype, weight)
        return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=dtype or weight.dtype)

    @torch.library.register_fake("metamask::task_masked_linear_backward")
    def _(grad, input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups=1, output_mask=(True,) * 5):
        _check(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups)
        check_batch_grad(grad, input, weight)
        check_flags("output_mask", output_mask, 5)
        return _gradients(input, weight, masks, bias, bias_masks, output_mask)

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
        gate_id,
        gate_param,
        groups=1,
        output_mask=(True,) * 6,
    ):
        _check(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups)
        check_batch_grad(grad, input, weight)
        check_flags("output_mask", output_mask, 6)
        if c_input is not None:
            _check_cotangent("cotangent_input", c_input, input, "input")
        if c_weight is not None:
            check_like("cotangent_weight", c_weight, weight)
        _check_cotangents("cotangent_masks", c_masks, masks)
        if c_bias is not None:
            if bias is None:
                raise ValueError("cotangent_bias needs a bias, got bias=None")
            _check_cotangent("cotangent_bias", c_bias, bias, "bias")
        _check_cotangents("cotangent_bias_masks", c_bias_masks, bias_masks)
        to_grad = grad.new_empty(grad.shape) if output_mask[0] else None
        return to_grad, *_gradients(input, weight, masks, bias, bias_masks, output_mask[1:])

    def _check(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups):
        if gate_id != IDENTITY or not weight.is_cpu:
            check_gate(gate_id, gate_param)
        check_task_linear(input, slots, weight, masks, bias, bias_masks or None, groups)
        check_storage("input", input.dtype, weight)
        if count_tasks(masks, weight) == 0 and len(slots) > 0:
            raise ValueError("slots must be in [0, 0): there are no masks")

    def _check_cotangent(name, cotangent, of, its_name):
        check_storage(name, cotangent.dtype, of)
        if cotangent.shape != of.shape:
            raise ValueError(f"{name} must have the shape of {its_name}, {list(of.shape)}, got {list(cotangent.shape)}")
        if cotangent.device != of.device:
            raise ValueError(f"{name} must be on the device of {its_name}, {of.device}, got {cotangent.device}")

    def _check_cotangents(name, cotangents, masks):
        if cotangents and len(cotangents) != len(masks):
            raise ValueError(f"expected {len(masks)} {name} tensors, one per mask, or none, got {len(cotangents)}")
        for index, (cotangent, mask) in enumerate(zip(cotangents, masks)):
            if cotangent is not None:
                _check_cotangent(f"{name}[{index}]", cotangent, mask, "its mask")

    def _gradients(input, weight, masks, bias, bias_masks, output_mask):
        return (
            input.new_empty(input.shape) if output_mask[0] else None,
            weight.new_empty(weight.shape) if output_mask[1] else None,
            [mask.new_empty(mask.shape) for mask in masks] if output_mask[2] else [],
            bias.new_empty(bias.shape) if bias is not None and output_mask[3] else None,
            [mask.new_empty(mask.shape) for mask in bias_masks] if output_mask[4] else [],
        )
