"""Comparisons of the ops whose backward takes a step of SGD with that step in float64."""

from __future__ import annotations

import torch
from support.closeness import assert_near
from support.linear_checks import inputs

from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.linear import reference as linear_reference

SETTINGS = ((0.1, 0.01, 0.9), (0.2, 0.02, 0.8), (0.3, 0.03, 0.7), (0.4, 0.04, 0.6))


EVERY = (True,) * 5


def descend(p, grad, momentum_buffer, settings):
    """One step in float64: the parameter and its momentum buffer afterwards."""
    lr, weight_decay, momentum = settings
    v = momentum * momentum_buffer.double().cpu() + grad + weight_decay * p
    return p - lr * v, v


def near(got, wanted, dtype, what):
    # Gradients are sums; the largest of them gives the scale.
    bound = 8 * torch.finfo(dtype).eps * (1 + wanted.abs().amax().item())
    difference = (got.double().cpu() - wanted).abs().max().item()
    assert difference <= bound, f"{what}: {difference:.3g} off, allowed {bound:.3g}"


def check(shape, out, gate, dtype, momentum=True, device="cpu", mask_dtype=None):
    x, w, m, b, bm, grad = inputs(shape, out, dtype, device, mask_dtype)
    parameters = [w, m, b, bm]
    settings = [its if momentum else (*its[:2], 0.0) for its in SETTINGS]
    momentum_buffers = [torch.full_like(p, 0.25) if momentum else None for p in parameters]
    before = [p.double().cpu().clone() for p in parameters]
    leaves = [t.double().cpu().clone().requires_grad_() for t in (x, *parameters)]
    grads = torch.autograd.grad(linear_reference.masked_linear(*leaves, *gate), leaves, grad.double().cpu())
    got = linear_raw.masked_linear_backward_sgd_(grad, x, *parameters, *gate, EVERY, (True,) * 4, momentum_buffers, settings)
    assert got[1:] == (None,) * 4
    assert_near(got[0], grads[0], out, "dx")
    for name, p, start, grad_p, momentum_buffer, its in zip(
        ["W", "M", "b", "Mb"], parameters, before, grads[1:], momentum_buffers, settings
    ):
        expected, v = descend(start, grad_p, torch.zeros_like(p) if momentum_buffer is None else torch.full_like(p, 0.25), its)
        near(p, expected, p.dtype, name)
        if momentum_buffer is not None:
            near(momentum_buffer, v, p.dtype, f"momentum of {name}")


SHAPES = {"ragged": ((3, 129), 257), "3-d": ((2, 5, 17), 33), "panels": ((40, 96), 1134)}
