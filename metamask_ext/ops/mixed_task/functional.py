"""Layers for mixed-task batches: every sample uses the mask of its own task.

``theta_t = W * g(M_t)``. Source: C. Blum and A. Law, EE5239 project proposal (2020), eq. 3, one ``theta_M`` per task; that each
sample of a batch names its task is this library's addition. All functions can be differentiated any number of times, by autograd
and by torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from metamask_ext.torch_private import fx_trace, traced_function

from ..checks import (
    as_list,
    check_conv2d,
    check_dense,
    check_masks,
    check_slot_values,
    check_slots,
    check_task_bias,
    check_task_linear,
    count_tasks,
    is_stacked,
)
from ..composite import composite_op
from ..dispatch import (
    autocast_dtype,
    check_input_dtype,
    in_compiled_graph,
    is_differentiated,
    is_plain,
    of_one_dtype,
    use_reference,
    worded,
)
from ..gate import resolve_gate
from ..geometry import Geometry, im2col, resolve_geometry
from ..weight.functional import theta_list
from . import raw, reference
from .autograd import Call, TaskMaskedLinear

Masks = Tensor | Sequence[Tensor]
_apply: Callable[..., Tensor] = TaskMaskedLinear.apply


def task_masked_linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: Masks,
    bias: Tensor | None = None,
    bias_masks: Masks | None = None,
    *,
    gate: str = "sigmoid",
    temperature: float = 1.0,
    threshold: float = 0.0,
) -> Tensor:
    """``y_b = x_b @ (W * g(M_t)).T + b * g(M_b,t)`` with ``t = slots[b]``: a linear layer for a mixed-task batch.

    Neither forward nor backward allocates ``T x out x in`` or ``B x out x in`` elements, except for the gradients of the masks.

    Args:
        input: ``x``, ``[B, ..., in]``.
        slots: the task of each sample, an index into ``masks``: int64 ``[B]``, in any order; tasks may repeat or be absent.
        weight: ``W``, ``[out, in]``.
        masks: logits ``M``, on the device of ``weight`` and of its dtype, or float32 (see :func:`metamask_ext.masked_weight`): one
            tensor ``[T, out, in]``, or a sequence of ``T`` tensors ``[out, in]``. Of a sequence, only these tensors get gradients
            (zero where the batch does not have the task), in their own dtypes.
        bias: ``b``, ``[out]``, or None.
        bias_masks: logits ``M_b``, ``[T, out]`` or a sequence of ``T`` tensors ``[out]``; None leaves the bias unmasked.
        gate, temperature, threshold: see :func:`metamask_ext.masked_weight`.

    Returns:
        ``y``, ``[B, ..., out]``; under autocast in the autocast dtype, as ``linear`` does.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape or device does not fit, a slot is not in ``[0, T)``, the gate is unknown, or the temperature is not
            positive. Under a vmap over the slots, and in a transform inside torch.compile, one out of range is torch's own error
            of an index.
    """
    if fx_trace._is_fx_tracing_flag and (traced := traced_function(task_masked_linear, locals())) is not None:
        return traced
    gate_id, gate_param = resolve_gate(gate, temperature, threshold)
    given, given_bias = _as_lists(weight, masks, bias_masks)
    return _linear(input, slots, weight, given, bias, given_bias, gate_id, gate_param, 1)


def task_masked_conv2d(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: Masks,
    bias: Tensor | None = None,
    bias_masks: Masks | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    gate: str = "sigmoid",
    temperature: float = 1.0,
    threshold: float = 0.0,
) -> Tensor:
    """``y_b = conv2d(x_b, W * g(M_t)) + b * g(M_b,t)`` with ``t = slots[b]``: a convolution for a mixed-task batch.

    It runs :func:`task_masked_linear` over the input's patches (``im2col``), which take ``kH * kW`` times its memory. On a GPU,
    if the weights of all samples take no more memory than the patches (with ``groups=1``: if the output has at least as many
    positions as channels), it runs one convolution whose groups are the samples instead.

    Args:
        input: ``x``, ``[B, C_in, H, W]``, or ``[C_in, H, W]`` with one slot.
        slots: the task of each sample, int64 ``[B]``, as for :func:`task_masked_linear`.
        weight: ``W``, ``[C_out, C_in / groups, kH, kW]``.
        masks: logits ``M``: one tensor ``[T, *W.shape]``, or a sequence of ``T`` tensors of the shape of ``weight``.
        bias: ``b``, ``[C_out]``, or None.
        bias_masks: logits ``M_b``, ``[T, C_out]`` or a sequence of ``T`` tensors ``[C_out]``; None leaves the bias unmasked.
        stride, padding, dilation, groups: as in ``conv2d``; padding may be ``"valid"`` or ``"same"``.
        gate, temperature, threshold: see :func:`metamask_ext.masked_weight`.

    Returns:
        ``y``, ``[B, C_out, H', W']`` or ``[C_out, H', W']``, contiguous; under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: as :func:`task_masked_linear`.
    """
    if fx_trace._is_fx_tracing_flag and (traced := traced_function(task_masked_conv2d, locals())) is not None:
        return traced
    gate_id, gate_param = resolve_gate(gate, temperature, threshold)
    try:
        return _conv2d(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, stride, padding, dilation, groups)
    except Exception as error:
        all_given = {"input": input, "slots": slots, "weight": weight, "masks": masks, "bias": bias, "bias_masks": bias_masks}
        raise worded(error, partial(check_dense, **all_given)) from None


def _conv2d(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: Masks,
    bias: Tensor | None,
    bias_masks: Masks | None,
    gate_id: int,
    gate_param: float,
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
) -> Tensor:
    given, given_bias = _as_lists(weight, masks, bias_masks)
    check_masks(given, weight)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the rows of weight, {weight.shape[0]}, got {groups}")
    check_conv2d(input, weight, groups)
    check_input_dtype(input, weight)
    batch = input if input.dim() == 4 else input[None]
    check_slots(slots, batch, weight)
    check_task_bias(weight, given, bias, given_bias)
    batch, geometry, size = resolve_geometry(batch, weight.shape[2:], stride, padding, dilation)
    if _takes_one_convolution(batch, weight, given, size):
        y = _one_convolution(batch, slots, weight, given, bias, given_bias, gate_id, gate_param, geometry, groups)
    else:
        # Made contiguous once: the op would do it forward and backward.
        columns = im2col(batch, weight.shape[2:], *geometry).contiguous()
        stacked = is_stacked(given, weight)
        flat = [mask.flatten(2 if stacked else 1) for mask in given]
        y = _linear(columns, slots, weight.flatten(1), flat, bias, given_bias, gate_id, gate_param, groups)
        y = torch.unflatten(y.transpose(1, 2), 2, size)
    # A copy even where y is in order: no output is a view, an activation may write to it.
    return (y if input.dim() == 4 else y[0]).clone(memory_format=torch.contiguous_format)


def _as_lists(weight: Tensor, masks: Masks, bias_masks: Masks | None) -> tuple[list[Tensor], list[Tensor] | None]:
    """The masks as the ops take them: lists, each of one dtype."""
    given, of_bias = as_list("masks", masks), None if bias_masks is None else as_list("bias_masks", bias_masks)
    return of_one_dtype(weight, given), None if of_bias is None else of_one_dtype(weight, of_bias)


ONE_CONVOLUTION_ON = ("cuda",)
"""Types of device whose convolutions with many groups are fast (cuDNN has them)."""


def _takes_one_convolution(batch: Tensor, weight: Tensor, masks: list[Tensor], size: list[int]) -> bool:
    """True if theta of a sample has no more elements than its patches, which are written and read as often (not measured)."""
    places, values = size[0] * size[1], batch.shape[1] * weight.shape[2] * weight.shape[3]
    return (
        weight.device.type in ONE_CONVOLUTION_ON
        and 0 < weight.numel() <= values * places
        and len(batch) > 0
        and count_tasks(masks, weight) > 0
    )


def _one_convolution(
    batch: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: list[Tensor],
    bias: Tensor | None,
    bias_masks: list[Tensor] | None,
    gate_id: int,
    gate_param: float,
    geometry: Geometry,
    groups: int,
) -> Tensor:
    """theta of every task in one pass, that of each sample looked up by its slot, and a convolution whose groups are the samples.

    The samples of a task are not brought together in one group: how many there are of each is known on the device only, and the
    host must not wait for it.
    """
    check_slot_values(slots, count_tasks(masks, weight))
    tasks, samples = count_tasks(masks, weight), len(batch)
    weights, logits = _each_task(weight, masks, tasks)
    if bias is not None and bias_masks is not None:
        biases, bias_logits = _each_task(bias, bias_masks, tasks)
        weights, logits = weights + biases, of_one_dtype(weight, logits + bias_logits)
    thetas = theta_list(weights, logits, gate_id, gate_param, autocast_dtype(weight))
    # A negative index would count from the end: this one is out of range, which is an error also where nobody can look.
    slots = torch.where(slots < 0, tasks, slots)
    theta = torch.stack(thetas[:tasks])[slots].flatten(0, 1)
    if len(thetas) > tasks:
        bias = torch.stack(thetas[tasks:])[slots].flatten()
    elif bias is not None:
        bias = bias.repeat(samples)
    y = F.conv2d(batch.flatten(0, 1)[None], theta, bias, *geometry, samples * groups)
    return torch.unflatten(y[0], 0, (samples, -1))


def _each_task(weight: Tensor, masks: list[Tensor], tasks: int) -> tuple[list[Tensor], list[Tensor]]:
    """``weight`` for each task (the same memory), and the logits."""
    logits = masks[0].unbind() if is_stacked(masks, weight) else masks
    return list(weight.expand(tasks, *weight.shape).unbind()), list(logits)


def _linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: list[Tensor],
    bias: Tensor | None,
    bias_masks: list[Tensor] | None,
    gate_id: int,
    gate_param: float,
    groups: int,
) -> Tensor:
    if use_reference():
        _check(input, slots, weight, masks, bias, bias_masks, groups)
        run = _compiled if in_compiled_graph() else reference.task_masked_linear
        return run(input, slots, weight, masks, bias, bias_masks or [], gate_id, gate_param, groups)
    try:
        if input.dtype != weight.dtype:
            check_input_dtype(input, weight)
        if bias_masks is not None and len(bias_masks) == 0:  # the op would take it for a bias without masks
            check_task_bias(weight, masks, bias, bias_masks)
        return _kernel(input, slots, weight, masks, bias, bias_masks or [], gate_id, gate_param, groups)
    except Exception as error:
        raise worded(error, _check, input, slots, weight, masks, bias, bias_masks, groups) from None


def _kernel(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: list[Tensor],
    bias: Tensor | None,
    bias_masks: list[Tensor],
    gate_id: int,
    gate_param: float,
    groups: int,
) -> Tensor:
    dtype = autocast_dtype(weight)
    if is_differentiated((input, weight, bias, *masks, *bias_masks)):
        call = Call(gate_id, gate_param, groups, len(masks))
        return _apply(call, dtype, input, slots, weight, bias, *masks, *bias_masks)
    return raw.task_masked_linear(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups, dtype)


def _in_graph(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: list[Tensor],
    bias: Tensor | None,
    bias_masks: list[Tensor],
    gate_id: int,
    gate_param: float,
    groups: int,
) -> Tensor:
    plain = is_plain((input, weight, bias, *masks, *bias_masks), gate_param)
    run = reference.task_masked_linear if plain else _kernel
    return run(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups)


_compiled = composite_op(
    "compiled_task_linear(Tensor input, Tensor slots, Tensor weight, Tensor[] masks, Tensor? bias, Tensor[] bias_masks, "
    "int gate_id, Scalar gate_param, int groups) -> Tensor",
    _in_graph,
)


def _check(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: list[Tensor],
    bias: Tensor | None,
    bias_masks: list[Tensor] | None,
    groups: int,
) -> None:
    check_dense(input=input, slots=slots, weight=weight, masks=masks, bias=bias, bias_masks=bias_masks)
    check_task_linear(input, slots, weight, masks, bias, bias_masks, groups)
    check_input_dtype(input, weight)
    check_slot_values(slots, count_tasks(masks, weight))
