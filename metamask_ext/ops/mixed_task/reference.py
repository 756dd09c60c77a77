"""The ops on batches that mix tasks in plain PyTorch: their specification, oracle, and path where a Function cannot go.

``theta_t = W * g(M_t)`` as in :mod:`metamask_ext.reference`, one mask ``M_t`` for each of ``T`` tasks; sample ``b`` of the batch
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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .reference import check_bias, check_input, check_pair, masked_weight


def is_stacked(masks: Sequence[Tensor], weight: Tensor) -> bool:
    """Whether ``masks`` is one tensor for all tasks."""
    return len(masks) == 1 and isinstance(masks[0], Tensor) and masks[0].dim() == weight.dim() + 1


def count_tasks(masks: Sequence[Tensor], weight: Tensor) -> int:
    return masks[0].shape[0] if is_stacked(masks, weight) else len(masks)


def check_masks(masks: Sequence[Tensor], weight: Tensor, name: str = "masks", weight_name: str = "weight") -> None:
    """Refuse masks that do not belong to ``weight`` (csrc/task_masked_linear.h words it the same way).

    Raises:
        TypeError: not tensors, not floating point of 16 bits or more, or of another dtype than ``weight``.
        ValueError: of another shape or device.
    """
    check_pair(weight, weight, weight_name, weight_name)
    if not is_stacked(masks, weight):
        for index, mask in enumerate(masks):
            check_pair(weight, mask, weight_name, f"{name}[{index}]")
        return
    (mask,) = masks
    if mask.dtype != weight.dtype:
        raise TypeError(f"{name} must have the dtype of {weight_name}, {weight.dtype}, got {mask.dtype}")
    if mask.shape[1:] != weight.shape:
        raise ValueError(f"{name} must be T masks of the shape of {weight_name}, {list(weight.shape)}, got {list(mask.shape)}")
    if mask.device != weight.device:
        raise ValueError(f"{name} must be on the device of {weight_name}, {weight.device}, got {mask.device}")


def check_slots(slots: Tensor, input: Tensor, weight: Tensor) -> None:
    """Refuse slots that are not int64 ``[B]`` on the device of ``weight`` (csrc/checks.h words it the same way).

    Their values: :func:`check_slot_values`.
    """
    if not isinstance(slots, Tensor):
        raise TypeError(f"slots must be a tensor, got {type(slots).__name__}")
    if slots.dtype != torch.int64:
        raise TypeError(f"slots must be int64, got {slots.dtype}")
    if slots.shape != input.shape[:1]:
        raise ValueError(f"slots must be [B] = {list(input.shape[:1])} as in input {list(input.shape)}, got {list(slots.shape)}")
    if slots.device != weight.device:
        raise ValueError(f"slots must be on the device of weight, {weight.device}, got {slots.device}")


def check_slot_values(slots: Tensor, tasks: int) -> None:
    """Refuse a slot outside ``[0, tasks)``: the first one, by its position.

    Where the values cannot be seen (while compiling, under a vmap over them, on a GPU), each is checked where it is used.
    """
    if torch.compiler.is_compiling() or slots.device.type != "cpu":
        return
    while functorch.is_gradtrackingtensor(slots):  # torch.func.grad wraps every argument
        slots = functorch.get_unwrapped(slots)
    if functorch.is_functorch_wrapped_tensor(slots) or functorch.is_legacy_batchedtensor(slots):
        return
    for position, slot in enumerate(slots.tolist()):
        if not 0 <= slot < tasks:
            raise ValueError(f"slots must be in [0, {tasks}), got {slot} at position {position}")


def check_task_bias(weight: Tensor, masks: Sequence[Tensor], bias: Tensor | None, bias_masks: Sequence[Tensor] | None) -> None:
    """Refuse a bias that is not ``[out]``, and masks that do not belong to it, or are of another number of tasks."""
    if bias is None:
        if bias_masks is not None:
            raise ValueError("bias_masks needs a bias, got bias=None")
        return
    check_bias(weight, bias, None)
    if bias_masks is not None:
        check_masks(bias_masks, bias, "bias_masks", "bias")
        tasks, theirs = count_tasks(masks, weight), count_tasks(bias_masks, bias)
        if theirs != tasks:
            raise ValueError(f"bias_masks must have as many tasks as masks, {tasks}, got {theirs}")


def check_task_linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: Sequence[Tensor],
    bias: Tensor | None,
    bias_masks: Sequence[Tensor] | None,
    groups: int = 1,
) -> None:
    """Refuse arguments of :func:`task_masked_linear` that do not fit, all but the values of ``slots``."""
    check_masks(masks, weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the rows of weight, {weight.shape[0]}, got {groups}")
    check_input(input, weight)
    columns = groups * weight.shape[1]
    if input.dim() < 2 or input.shape[-1] != columns:
        raise ValueError(
            f"input must be [B, ..., in] with in = {columns} as in weight {list(weight.shape)} with groups={groups}, "
            f"got {list(input.shape)}"
        )
    check_slots(slots, input, weight)
    check_task_bias(weight, masks, bias, bias_masks)


def task_masked_linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: Sequence[Tensor],
    bias: Tensor | None,
    bias_masks: Sequence[Tensor],
    gate: int,
    parameter: float,
    groups: int = 1,
) -> Tensor:
    """``y_b = x_b @ theta_slots[b].T + b * g(M_b,slots[b])``; without ``bias_masks`` the bias is used as it is.

    ``input`` ``[B, ..., groups * in]``, ``weight`` ``[out, in]``; the rows ``[g * out / groups, (g + 1) * out / groups)`` of theta
    meet the columns ``[g * in, (g + 1) * in)`` of ``input``.
    """
    theta = _gated(weight, masks, slots, gate, parameter)
    x = input.reshape(input.shape[0], input.shape[1:-1].numel(), groups, weight.shape[1])
    theta = theta.unflatten(1, (groups, weight.shape[0] // groups))
    y = torch.einsum("blgi,bgoi->blgo", x, theta).reshape(*input.shape[:-1], weight.shape[0])
    if bias is None:
        return y
    if bias_masks:
        bias = _gated(bias, bias_masks, slots, gate, parameter).reshape(len(slots), *(1,) * (input.dim() - 2), len(weight))
    return y + bias


def _gated(weight: Tensor, masks: Sequence[Tensor], slots: Tensor, gate: int, parameter: float) -> Tensor:
    """``theta_slots[b]`` for each sample."""
    stack = weight.new_empty((0, *weight.shape))
    if masks:
        stack = masks[0] if is_stacked(masks, weight) else torch.stack(list(masks))
    theta = masked_weight(weight.expand_as(stack), stack, gate, parameter)
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
    gate: int,
    parameter: float,
    groups: int = 1,
    needs: Sequence[bool] = (True,) * 5,
) -> tuple[Any, Any, list[Tensor], Any, list[Tensor]]:
    """The gradients of :func:`task_masked_linear` for input, weight, masks, bias and bias_masks; None or [] where not needed."""

    def forward(input, weight, masks, bias, bias_masks):
        return task_masked_linear(input, slots, weight, masks, bias, bias_masks, gate, parameter, groups)

    dx, dw, dm, db, dbm = pull_back(forward, (input, weight, list(masks), bias, list(bias_masks)), grad)
    return (
        dx if needs[0] else None,
        dw if needs[1] else None,
        dm if needs[2] else [],
        db if needs[3] else None,
        dbm if needs[4] else [],
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
    gate: int,
    parameter: float,
    groups: int = 1,
    needs: Sequence[bool] = (True,) * 6,
) -> tuple[Any, Any, Any, list[Tensor], Any, list[Tensor]]:
    """The gradients of :func:`task_masked_linear_backward` for grad, input, weight, masks, bias and bias_masks, as there.

    A cotangent that is None, or a list of them that is empty, is zero.
    """

    def backward(grad, input, weight, masks, bias, bias_masks):
        return task_masked_linear_backward(grad, input, slots, weight, masks, bias, bias_masks, gate, parameter, groups)

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
        ddy if needs[0] else None,
        dx if needs[1] else None,
        dw if needs[2] else None,
        dm if needs[3] else [],
        db if needs[4] else None,
        dbm if needs[5] else [],
    )


def pull_back(function: Callable[..., Any], primals: Any, cotangents: Any) -> Any:
    """:func:`torch.func.vjp` of ``function(*primals)``, for trees that may hold None, and integers, which get None."""
    leaves, tree = tree_flatten(primals)
    present = [index for index, leaf in enumerate(leaves) if leaf is not None and leaf.is_floating_point()]

    def flat(*tensors):
        given = list(leaves)
        for index, tensor in zip(present, tensors):
            given[index] = tensor
        return _tensors(function(*tree_unflatten(given, tree)))

    grads: list[Any] = [None] * len(leaves)
    found = torch.func.vjp(flat, *(leaves[index] for index in present))[1](_tensors(cotangents))
    for index, grad in zip(present, found):
        grads[index] = grad
    return tree_unflatten(grads, tree)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if leaf is not None]


def _or_zeros(cotangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if cotangent is None else cotangent.to(like.dtype)
