"""Comparisons of the bit-packed ops with a loop over samples in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.closeness import assert_near

import metamask_ext as mm
from metamask_ext.ops.packed import raw as packed_raw
from metamask_ext.ops.packed import reference as packed_reference

# slots, rows of each sample, groups, rows of W in a group, columns, tasks
SHAPES = {
    "1x1": ([0], (), 1, 1, 1, 1),
    "2 columns": ([1, 0, 1], (), 1, 3, 2, 2),
    "3 columns": ([2, 2, 0], (), 1, 17, 3, 3),
    "17 columns": ([1, 4, 0, 4, 1], (), 1, 129, 17, 5),
    "129 columns": (list(range(9)), (), 1, 130, 129, 9),
    "1134 columns": ([3, 1, 0, 2, 6, 5, 4], (), 1, 37, 1134, 7),
    "wider than a tile": ([0, 1, 2, 1], (), 1, 5, 4133, 3),
    "all one task": ([1] * 21, (), 1, 33, 129, 2),
    "few and many": ([3, 0, 3, 1, 3, 0, 3, 2, 3, 3, 3], (), 1, 33, 129, 5),
    "rows": ([1, 0, 1], (2, 5), 1, 17, 65, 2),
    "groups": ([2, 0], (3,), 4, 3, 9, 3),
    "groups, many rows": ([1, 1, 0, 1], (20,), 3, 2, 18, 2),
    "empty batch": ([], (), 1, 17, 5, 2),
    "no rows": ([0, 1], (0,), 1, 17, 5, 2),
    "no columns": ([0, 1], (), 1, 3, 0, 2),
    "no outputs": ([0, 1], (), 1, 0, 5, 2),
}


def inputs(shape, dtype, stacked=True, device="cpu"):
    """input, slots, weight, bias, grad, packed, packed_bias."""
    slots, rows, groups, out, columns, tasks = shape
    generator = torch.Generator().manual_seed(7)
    sizes = ((len(slots), *rows, groups * columns), (groups * out, columns), (groups * out,), (len(slots), *rows, groups * out))
    x, w, b, grad = (torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype) for size in sizes)
    packed = [mm.pack_mask(torch.randn(w.shape, generator=generator).to(device)) for _ in range(tasks)]
    packed_bias = [mm.pack_mask(torch.randn(b.shape, generator=generator).to(device)) for _ in range(tasks)]
    if stacked:
        packed, packed_bias = [torch.stack(packed)], [torch.stack(packed_bias)]
    return x, torch.tensor(slots, dtype=torch.int64, device=device), w, b, grad, packed, packed_bias


def expected(x, slots, w, b, grad, packed, packed_bias, groups):
    """Output and gradients, one sample after the other, by plain torch in float64."""
    x, w, b = (tensor.detach().double().cpu().clone().requires_grad_() for tensor in (x, w, b))
    per_task = [packed[0][slot] if packed[0].dim() == 3 else packed[slot] for slot in slots.tolist()]
    per_bias = [packed_bias[0][slot] if packed_bias[0].dim() == 2 else packed_bias[slot] for slot in slots.tolist()]
    (out, columns), outputs = w.shape, []
    for sample, bits, bias_bits in zip(x, per_task, per_bias):
        theta = w * by_hand(bits, (out, columns))
        each = [
            F.linear(sample[..., g * columns : (g + 1) * columns], theta[g * out // groups : (g + 1) * out // groups])
            for g in range(groups)
        ]
        outputs.append(torch.cat(each, -1) + b * by_hand(bias_bits, (out,)))
    y = torch.stack(outputs) if outputs else x.new_zeros((*x.shape[:-1], out)) + 0 * (x.sum() + w.sum() + b.sum())
    return y.detach(), torch.autograd.grad(y, (x, w, b), grad.double().cpu())


def by_hand(packed, shape):
    """The mask, bit by bit as the format says."""
    columns = shape[-1]
    rows = packed.reshape(shape[0] if len(shape) == 2 else 1, packed.shape[-1]).tolist()
    bits = [[row[k // 8] >> (k % 8) & 1 for k in range(columns)] for row in rows]
    return torch.tensor(bits, dtype=torch.float64).reshape(shape)


def check(shape, dtype, stacked=True, device="cpu"):
    x, slots, w, b, grad, packed, packed_bias = inputs(shape, dtype, stacked, device)
    groups, rows = shape[2], max(grad.numel() // max(grad.shape[-1], 1), 1)
    y, grads = expected(x, slots, w, b, grad, packed, packed_bias, groups)
    got = packed_raw.packed_masked_linear(x, slots, w, packed, b, packed_bias, groups)
    assert got.dtype == dtype
    assert_near(got, y, x.shape[-1], "y")
    got = packed_raw.packed_masked_linear_backward(grad, x, slots, w, packed, b, packed_bias, groups)
    for name, one, other, reduction in zip(("dx", "dW", "db"), got, grads, (w.shape[0], rows, rows)):
        assert one.dtype == dtype
        assert_near(one, other, reduction, name)
    doubles = (tensor.double().cpu() for tensor in (grad, x, w))
    exact = packed_reference.packed_superposition_gradient(*doubles, [one.cpu() for one in packed], groups)
    got = packed_raw.packed_superposition_gradient(grad, x, w, packed, groups)
    assert got.dtype == dtype
    assert_near(got, exact, w.numel() * max(rows // max(len(slots), 1), 1), "superposition")
