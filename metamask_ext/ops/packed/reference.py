"""The ops on bit-packed masks in plain PyTorch: their specification, the tests' oracle, and where no Function can go the path.

Bit ``k % 8`` (least significant first) of byte ``k // 8`` of a row is the mask of its weight ``k``; the padding of a row is zero. A
weight whose bit is off is zero, whatever it was: ``theta_t = where(bit_t, W, 0)``. The bits are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gate import compute_dtype
from ..geometry import packed_bytes, packed_shape


def pack_mask(mask_logits: Tensor, threshold: float) -> Tensor:
    """``1[M > threshold]``, eight to a byte."""
    on = mask_logits.to(compute_dtype(mask_logits.dtype)) > threshold
    rows = on if on.dim() == 1 else on.reshape(on.shape[0], prod(on.shape[1:]))
    columns = rows.shape[-1]
    padded = F.pad(rows.to(torch.uint8), (0, 8 * packed_bytes(columns) - columns))
    places = torch.unflatten(padded, -1, (packed_bytes(columns), 8))
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
    output_mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dx_b = dy_b @ theta_t``, ``dW = sum over b of bit_t * (dy_b.T @ x_b)``, ``db = sum over b of bit_t * dy_b``.

    The products are taken in the dtype of ``grad``. None where not needed.
    """
    (out, columns), samples, rows = weight.shape, input.shape[0], prod(input.shape[1:-1])
    dx = input.new_zeros(input.shape) if output_mask[0] else None
    dw = weight.new_zeros(weight.shape) if output_mask[1] else None
    db = bias.new_zeros(bias.shape) if bias is not None and output_mask[2] else None
    if samples == 0:
        return dx, dw, db
    dy = _by_group(grad, samples, rows, groups, out // groups)
    if output_mask[0]:
        theta = _masked(weight, packed, slots).reshape(samples, groups, out // groups, columns).to(grad.dtype)
        dx = (dy @ theta).transpose(1, 2).reshape(input.shape).to(input.dtype)
    if output_mask[1]:
        x = _by_group(input.to(grad.dtype), samples, rows, groups, columns)
        each = (dy.transpose(-1, -2) @ x).reshape(samples, out, columns)
        dw = _sum_masked(each, packed, slots).to(weight.dtype)
    if bias is not None and output_mask[2]:
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
    rows, compute = prod(input.shape[1:-1]), compute_dtype(weight.dtype)
    tasks = _stack(packed, 2) if len(packed) > 0 else weight.new_empty((0, *packed_shape(weight.shape)), dtype=torch.uint8)
    x = _by_group(input.to(compute), samples, rows, groups, columns)
    dy = _by_group(grad.to(compute), samples, rows, groups, out // groups)
    product = (dy.transpose(-1, -2) @ x).reshape(samples, out * columns) * weight.flatten()
    return (product @ _unpack(tasks, columns).to(compute).flatten(1).t()).to(grad.dtype)
