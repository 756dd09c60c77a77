"""Comparisons of the masked-linear ops with plain torch in float64."""

from __future__ import annotations

import torch
from support.closeness import assert_near

from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.linear import reference as linear_reference

# (batch..., in), out: one panel, panels with a ragged last one, rows wider than the cache's share, nothing at all
SHAPES = {
    "1x1x1": ((1, 1), 1),
    "vector": ((17,), 3),
    "3-d": ((2, 3, 17), 129),
    "ragged": ((3, 129), 1134),
    "wide": ((2, 40000), 37),
    "batch 129": ((129, 129), 257),
    "no batch": ((0, 17), 129),
    "no input": ((3, 0), 5),
    "no output": ((3, 17), 0),
}


def inputs(shape, out, dtype, device="cpu", mask_dtype=None):
    """input, weight, mask, bias, bias mask, grad; the masks of ``mask_dtype``, if that is given."""
    generator = torch.Generator().manual_seed(5)
    shapes = (shape, (out, shape[-1]), (out, shape[-1]), (out,), (out,), (*shape[:-1], out))
    mask_dtype = mask_dtype or dtype
    dtypes = (dtype, dtype, mask_dtype, dtype, mask_dtype, dtype)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, kind) for s, kind in zip(shapes, dtypes)]


def expected(tensors, gate, grad_mode=True):
    """Output and gradients by plain torch in float64."""
    x, w, m, b, bm, grad = (tensor.detach().double().cpu() for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in (x, w, m, b, bm)]
    y = linear_reference.masked_linear(*leaves, *gate)
    return y.detach(), torch.autograd.grad(y, leaves, grad)


def check(shape, out, gate, dtype, device="cpu", mask_dtype=None):
    tensors = inputs(shape, out, dtype, device, mask_dtype)
    y, grads = expected(tensors, gate)
    *arguments, grad = tensors
    batch = max(grad.numel() // max(out, 1), 1)
    got = linear_raw.masked_linear(*arguments, *gate)
    assert got.dtype == dtype
    assert_near(got, y, shape[-1], "y")
    got = linear_raw.masked_linear_backward(grad, *arguments, *gate)
    reductions = (out, batch, batch, batch, batch)
    for name, one, other, reduction, argument in zip(("dx", "dW", "dM", "db", "dMb"), got, grads, reductions, arguments):
        assert one.dtype == argument.dtype
        # The gate of a bfloat16 product is right to 3e-6, more than any sum of 16-bit products is rounded to.
        units = 4 if one.dtype == dtype else 32
        assert_near(one, other, reduction, name, units)
