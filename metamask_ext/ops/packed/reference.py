"""The ops on bit-packed masks in plain PyTorch: the specification, the oracle of the tests, the path where a Function cannot go.

Bit ``k % 8`` (least significant first) of byte ``k // 8`` of a row is the mask of its weight ``k``; the padding of a row is zero. A
weight whose bit is off is zero, whatever it was: ``theta_t = where(bit_t, W, 0)``. The bits are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import DTYPES, _compute_dtype, check_input
from .reference_tasks import check_slots

_is_batched = torch._C._functorch.is_batchedtensor
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def is_batched(tensor: Tensor) -> bool:
    """Whether a vmap runs over ``tensor``: torch.func's, or that of autograd's ``is_grads_batched``."""
    return _is_batched(tensor) or _is_legacy_batched(tensor)


def packed_bytes(bits: int) -> int:
    """How many bytes a row of ``bits`` takes."""
    return (bits + 7) // 8


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the packed form of a mask: a vector is one row, of anything else the first dimension are rows."""
    return (packed_bytes(shape[0]),) if len(shape) == 1 else (shape[0], packed_bytes(prod(shape[1:])))


def check_mask_logits(mask_logits: Tensor, threshold: float) -> None:
    """Refuse what :func:`pack_mask` cannot pack."""
    if not isinstance(mask_logits, Tensor):
        raise TypeError(f"mask_logits must be a tensor, got {type(mask_logits).__name__}")
    if mask_logits.dtype not in DTYPES:
        raise TypeError(f"mask_logits must be float64, float32, bfloat16 or float16, got {mask_logits.dtype}")
    if mask_logits.dim() == 0:
        raise ValueError("mask_logits must be [out, ...] or [n], got a scalar")
    if not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a number, got {threshold!r}")
    if threshold != threshold:
        raise ValueError("threshold must be a number, got nan")


def check_shape(packed: Tensor, shape: Sequence[int]) -> None:
    """Refuse a packed mask that is not that of a mask of ``shape``."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"packed must be a tensor, got {type(packed).__name__}")
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, as pack_mask gives it, got {packed.dtype}")
    if len(shape) == 0 or any(n < 0 for n in shape):
        raise ValueError(f"shape must be [out, ...] or [n], got {list(shape)}")
    if tuple(packed.shape) != packed_shape(shape):
        raise ValueError(f"packed must be {list(packed_shape(shape))} for the shape {list(shape)}, got {list(packed.shape)}")


def _check_masks(name: str, packed: Sequence[Tensor], task: tuple[int, ...], words: str, weight: Tensor) -> int:
    """Refuse masks of another dtype, shape or device than wanted; the number of tasks."""
    for tensor in packed:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(tensor).__name__} in it")
    stacked = len(packed) == 1 and packed[0].dim() == len(task) + 1
    for index, tensor in enumerate(packed):
        which = name if stacked else f"{name}[{index}]"
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{which} must be uint8, as pack_mask gives it, got {tensor.dtype}")
        if tuple(tensor.shape[1:] if stacked else tensor.shape) != task:
            start = "[tasks, " if stacked else "["
            raise ValueError(f"{which} must be {start}{words}], a task's being {list(task)}, got {list(tensor.shape)}")
        if tensor.device != weight.device:
            raise ValueError(f"{which} must be on the device of weight, {weight.device}, got {tensor.device}")
    return packed[0].shape[0] if stacked else len(packed)


def check_packed_weight(weight: Tensor, packed: Sequence[Tensor], groups: int) -> int:
    """Refuse a weight that is not ``[out, in]``, or masks that are not its own; the number of tasks."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must be at least 1 and divide out = {weight.shape[0]}, got {groups}")
    return _check_masks("packed", packed, packed_shape(weight.shape), "out, ceil(in / 8)", weight)


def check_packed_input(input: Tensor, weight: Tensor, groups: int) -> None:
    """Refuse an input that does not fit the weight."""
    check_input(input, weight)
    wanted = groups * weight.shape[1]
    if input.dim() < 2 or input.shape[-1] != wanted:
        raise ValueError(
            f"input must be [B, ..., in] with in = {wanted} as in weight {list(weight.shape)} with groups={groups}, "
            f"got {list(input.shape)}"
        )


def check_packed_grad(grad: Tensor, input: Tensor, weight: Tensor) -> None:
    """Refuse a gradient of the output, ``[B, ..., out]``, that does not fit."""
    if not isinstance(grad, Tensor):
        raise TypeError(f"grad must be a tensor, got {type(grad).__name__}")
    if grad.dtype not in DTYPES or (grad.dtype == torch.float64) != (weight.dtype == torch.float64):
        wanted = "float64 as weight is" if weight.dtype == torch.float64 else "float32, bfloat16 or float16"
        raise TypeError(f"grad must be {wanted}, got {grad.dtype}")
    wanted_shape = (*input.shape[:-1], weight.shape[0])
    if grad.shape != wanted_shape:
        raise ValueError(f"grad must be [B, ..., out] = {list(wanted_shape)}, got {list(grad.shape)}")
    if grad.device != weight.device:
        raise ValueError(f"grad must be on the device of weight, {weight.device}, got {grad.device}")


def check_packed_bias(weight: Tensor, bias: Tensor | None, packed_bias: Sequence[Tensor] | None, tasks: int) -> None:
    """Refuse a bias that is not ``[out]``, and masks that do not belong to it."""
    if bias is None:
        if packed_bias is not None:
            raise ValueError("packed_bias needs a bias, got bias=None")
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, got {type(bias).__name__}")
    if packed_bias is not None:
        its = _check_masks("packed_bias", packed_bias, (packed_bytes(weight.shape[0]),), "ceil(out / 8)", weight)
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias must have the dtype of weight, {weight.dtype}, got {bias.dtype}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [out] = {list(weight.shape[:1])}, got {list(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"bias must be on the device of weight, {weight.device}, got {bias.device}")
    if packed_bias is not None and its != tasks:
        raise ValueError(f"packed_bias must have the tasks of packed, {tasks}, got {its}")


def check_packed_linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    packed_bias: Sequence[Tensor] | None,
    groups: int,
) -> int:
    """What :func:`packed_masked_linear` asks of its arguments, all but the values of ``slots`` (csrc/packed_checks.h words it the
    same way); the number of tasks."""
    tasks = check_packed_weight(weight, packed, groups)
    check_packed_input(input, weight, groups)
    check_slots(slots, input, weight)
    if tasks == 0 and len(slots) > 0:
        raise ValueError("packed must hold at least one task, got none")
    check_packed_bias(weight, bias, packed_bias, tasks)
    return tasks


def pack_mask(mask_logits: Tensor, threshold: float) -> Tensor:
    """``1[M > threshold]``, eight to a byte."""
    on = mask_logits.to(_compute_dtype(mask_logits.dtype)) > threshold
    rows = on if on.dim() == 1 else on.reshape(on.shape[0], prod(on.shape[1:]))
    columns = rows.shape[-1]
    places = F.pad(rows.to(torch.uint8), (0, 8 * packed_bytes(columns) - columns)).unflatten(-1, (packed_bytes(columns), 8))
    return (places << torch.arange(8, dtype=torch.uint8, device=on.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of ``shape`` as bool."""
    return _unpack(packed, prod(shape[1:]) if len(shape) > 1 else shape[0]).reshape(tuple(shape))


def _unpack(packed: Tensor, columns: int) -> Tensor:
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :columns].to(torch.bool)


def _stack(packed: Sequence[Tensor], dim: int) -> Tensor:
    """One tensor with the tasks in front; ``dim`` is how many dimensions a task's has."""
    return packed[0] if len(packed) == 1 and packed[0].dim() == dim + 1 else torch.stack(tuple(packed))


def packed_masked_linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    packed_bias: Sequence[Tensor] | None,
    groups: int,
) -> Tensor:
    """``y_b = x_b @ theta_t.T + b_t`` with ``t = slots[b]``."""
    out, columns = weight.shape
    samples, rows = input.shape[0], prod(input.shape[1:-1])
    if samples == 0:
        # No task is looked up, and there may be none; the empty sums keep y in the graph.
        return input.new_empty((*input.shape[:-1], out)) + 0 * (weight.sum() + (0 if bias is None else bias.sum()))
    theta = _masked(weight, packed, slots).reshape(samples, groups, out // groups, columns)
    x = _by_group(input, samples, rows, groups, columns)
    y = (x @ theta.transpose(-1, -2)).transpose(1, 2).reshape(*input.shape[:-1], out)
    return y if bias is None else y + bias_rows(bias, slots, packed_bias, y)


def _by_group(tensor: Tensor, samples: int, rows: int, groups: int, columns: int) -> Tensor:
    """``[B, ..., groups * columns]`` as ``[B, groups, rows, columns]``: products of these are matmul, which every vmap takes."""
    return tensor.reshape(samples, rows, groups, columns).transpose(1, 2)


def bias_rows(bias: Tensor, slots: Tensor, packed_bias: Sequence[Tensor] | None, like: Tensor) -> Tensor:
    """Each sample's bias, as it is added to an output of the shape and dtype of ``like``."""
    if packed_bias is not None and len(slots) > 0:
        bias = _masked(bias, packed_bias, slots).reshape(len(slots), *(1 for _ in like.shape[1:-1]), len(bias))
    return bias.to(like.dtype).expand(like.shape)


def _masked(tensor: Tensor, packed: Sequence[Tensor], slots: Tensor) -> Tensor:
    """A weight or bias for each sample, zero where its task's bit is off."""
    # index_select refuses an index below zero, which indexing would take from the end
    on = _unpack(_stack(packed, tensor.dim()).index_select(0, slots), tensor.shape[-1])
    return torch.where(on, tensor, torch.zeros_like(tensor))


def packed_masked_linear_backward(
    grad: Tensor,
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    packed_bias: Sequence[Tensor] | None,
    groups: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dx_b = dy_b @ theta_t``, ``dW = sum over b of bit_t * (dy_b.T @ x_b)``, ``db = sum over b of bit_t * dy_b``.

    The products are taken in the dtype of ``grad``. None where not needed.
    """
    (out, columns), samples, rows = weight.shape, input.shape[0], prod(input.shape[1:-1])
    dx = input.new_zeros(input.shape) if needs[0] else None
    dw = weight.new_zeros(weight.shape) if needs[1] else None
    db = bias.new_zeros(bias.shape) if bias is not None and needs[2] else None
    if samples == 0:
        return dx, dw, db
    dy = _by_group(grad, samples, rows, groups, out // groups)
    if needs[0]:
        theta = _masked(weight, packed, slots).reshape(samples, groups, out // groups, columns).to(grad.dtype)
        dx = (dy @ theta).transpose(1, 2).reshape(input.shape).to(input.dtype)
    if needs[1]:
        x = _by_group(input.to(grad.dtype), samples, rows, groups, columns)
        each = (dy.transpose(-1, -2) @ x).reshape(samples, out, columns)
        dw = _sum_masked(each, packed, slots).to(weight.dtype)
    if bias is not None and needs[2]:
        sums = grad.reshape(samples, rows, out).sum(1)
        db = (sums.sum(0) if packed_bias is None else _sum_masked(sums, packed_bias, slots)).to(bias.dtype)
    return dx, dw, db


def _sum_masked(each: Tensor, packed: Sequence[Tensor], slots: Tensor) -> Tensor:
    """The sum over the samples of what each gives, zero where its task's bit is off."""
    on = _unpack(_stack(packed, each.dim() - 1).index_select(0, slots), each.shape[-1])
    return torch.where(on, each, torch.zeros_like(each)).sum(0)


def packed_superposition_gradient(grad: Tensor, input: Tensor, weight: Tensor, packed: Sequence[Tensor], groups: int) -> Tensor:
    """``out[b, t] = sum over r, o, k of grad[b, r, o] * W[o, k] * bit_t[o, k] * input[b, r, k]``, ``[B, T]``."""
    samples, (out, columns) = input.shape[0], weight.shape
    rows, compute = prod(input.shape[1:-1]), _compute_dtype(weight.dtype)
    tasks = _stack(packed, 2) if len(packed) > 0 else weight.new_empty((0, *packed_shape(weight.shape)), dtype=torch.uint8)
    x = _by_group(input.to(compute), samples, rows, groups, columns)
    dy = _by_group(grad.to(compute), samples, rows, groups, out // groups)
    product = (dy.transpose(-1, -2) @ x).reshape(samples, out * columns) * weight.flatten()
    return (product @ _unpack(tasks, columns).to(compute).flatten(1).t()).to(grad.dtype)
