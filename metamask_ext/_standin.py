"""Plain-torch stand-ins for the mixed-task and packed ops, which are written elsewhere at the same time; deleted at the merge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional


def _by_rows(input, slots, count, one):
    parts, rows = [], []
    for task in range(count):
        mine = (slots == task).nonzero().flatten()
        if len(mine):
            parts.append(one(input[mine], task))
            rows.append(mine)
    order = torch.argsort(torch.cat(rows))
    return torch.cat(parts)[order]


def task_masked_linear(
    input, slots, weight, masks, bias=None, bias_masks=None, *, gate="sigmoid", temperature=1.0, threshold=0.0
) -> Tensor:
    settings = {"gate": gate, "temperature": temperature, "threshold": threshold}

    def one(rows, task):
        return functional.masked_linear(
            rows, weight, masks[task], bias, None if bias_masks is None else bias_masks[task], **settings
        )

    return _by_rows(input, slots, len(masks), one)


def task_masked_conv2d(
    input,
    slots,
    weight,
    masks,
    bias=None,
    bias_masks=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    gate="sigmoid",
    temperature=1.0,
    threshold=0.0,
) -> Tensor:
    settings = {"gate": gate, "temperature": temperature, "threshold": threshold}
    geometry = stride, padding, dilation, groups

    def one(rows, task):
        bias_mask = None if bias_masks is None else bias_masks[task]
        return functional.masked_conv2d(rows, weight, masks[task], bias, bias_mask, *geometry, **settings)

    return _by_rows(input, slots, len(masks), one)


def pack_mask(mask_logits, *, threshold=0.0) -> Tensor:
    bits = (mask_logits > threshold).to(torch.uint8)
    bits = bits.flatten(1) if bits.dim() > 1 else bits[None]
    bits = F.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return packed if mask_logits.dim() > 1 else packed[0]


def unpack_mask(packed, shape) -> Tensor:
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    length = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
    return bits.flatten(-2)[..., :length].reshape(shape).bool()


def packed_masked_linear(input, slots, weight, packed, bias=None, packed_bias=None) -> Tensor:
    def one(rows, task):
        own = None if bias is None else bias if packed_bias is None else bias * unpack_mask(packed_bias[task], bias.shape)
        return F.linear(rows, weight * unpack_mask(packed[task], weight.shape), own)

    return _by_rows(input, slots, len(packed), one)


def packed_masked_conv2d(
    input, slots, weight, packed, bias=None, packed_bias=None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    def one(rows, task):
        own = None if bias is None else bias if packed_bias is None else bias * unpack_mask(packed_bias[task], bias.shape)
        return F.conv2d(rows, weight * unpack_mask(packed[task], weight.shape), own, stride, padding, dilation, groups)

    return _by_rows(input, slots, len(packed), one)


def superposition_gradient(grad, input, weight, packed, groups=1) -> Tensor:
    gradients = []
    for bits in packed:
        theta = weight * unpack_mask(bits, weight.shape)
        parts = zip(input.chunk(groups, -1), theta.chunk(groups, 0))
        y = torch.cat([F.linear(x, part) for x, part in parts], -1)
        gradients.append((y * grad).flatten(1).sum(1))
    return torch.stack(gradients, 1)
