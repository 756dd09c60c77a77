"""Comparisons of the ops whose backward takes a step of SGD or AdamW with that step in float64."""

from __future__ import annotations

import pytest
import torch
from support.closeness import assert_near
from support.gpu import DEVICES
from support.linear_checks import inputs

from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.linear import reference as linear_reference
from metamask_ext.ops.weight.raw import AdamWState

SETTINGS = {
    "sgd": ((0.1, 0.01, 0.9), (0.2, 0.02, 0.8), (0.3, 0.03, 0.7), (0.4, 0.04, 0.6)),
    "adamw": (
        (0.1, 0.9, 0.99, 1e-3, 0.01),
        (0.2, 0.8, 0.95, 1e-2, 0.02),
        (0.3, 0.0, 0.9, 1e-8, 0.03),
        (0.4, 0.7, 0.5, 1e-4, 0.0),
    ),
}
"""Of weight, mask, bias and bias mask; see :mod:`metamask_ext.ops.weight.raw`."""
EVERY = (True,) * 5
each_rule = pytest.mark.parametrize("rule", SETTINGS)


def each_step(*steps):
    """Steps, whose rule is the step or its first entry, on each device: CUDA has none of AdamW."""
    of_sgd = [step for step in steps if "adamw" not in step]
    everywhere = [
        pytest.param(step, *getattr(device, "values", (device,)), marks=getattr(device, "marks", ()))
        for step in of_sgd
        for device in DEVICES
    ]
    return pytest.mark.parametrize(("step", "device"), [*everywhere, *((step, "cpu") for step in steps if step not in of_sgd)])


def has_kernels(step, **_):
    """The emulator runs those of CUDA."""
    return "adamw" not in step


def state_of(rule, parameter):
    """The state of a parameter, in the middle of a training."""
    if rule == "sgd":
        return torch.full_like(parameter, 0.25)
    return AdamWState(torch.full_like(parameter, 0.25), torch.full_like(parameter, 0.5), torch.tensor(3.0))


def tensors_of(state):
    return list(state) if isinstance(state, AdamWState) else [state]


def descend(rule, p, grad, state, settings):
    """One step in float64: the parameter, and what the optimiser keeps of it, afterwards."""
    if rule == "sgd":
        lr, weight_decay, momentum = settings
        v = momentum * (torch.zeros_like(p) if state is None else state.double().cpu()) + grad + weight_decay * p
        return p - lr * v, v
    lr, beta1, beta2, eps, weight_decay = settings
    mean = beta1 * state.exp_avg.double().cpu() + (1 - beta1) * grad
    square = beta2 * state.exp_avg_sq.double().cpu() + (1 - beta2) * grad.square()
    step = state.step.double() + 1
    corrected = mean / (1 - beta1**step), square / (1 - beta2**step)
    return (1 - lr * weight_decay) * p - lr * corrected[0] / (corrected[1].sqrt() + eps), AdamWState(mean, square, step)


def near(got, wanted, dtype, what):
    # Gradients are sums; the largest of them gives the scale.
    bound = 8 * torch.finfo(dtype).eps * (1 + wanted.abs().amax().item())
    difference = (got.double().cpu() - wanted).abs().max().item()
    assert difference <= bound, f"{what}: {difference:.3g} off, allowed {bound:.3g}"


def check(shape, out, gate, dtype, rule="sgd", keeps=True, device="cpu", mask_dtype=None):
    """A step of all four parameters of masked_linear; without ``keeps``, of SGD without momentum."""
    x, w, m, b, bm, grad = inputs(shape, out, dtype, device, mask_dtype)
    parameters = [w, m, b, bm]
    settings = [its if keeps else (*its[:2], 0.0) for its in SETTINGS[rule]]
    states = [state_of(rule, p) if keeps else None for p in parameters]
    before = [p.double().cpu().clone() for p in parameters]
    leaves = [t.double().cpu().clone().requires_grad_() for t in (x, *parameters)]
    grads = torch.autograd.grad(linear_reference.masked_linear(*leaves, *gate), leaves, grad.double().cpu())
    expected = [descend(rule, *of) for of in zip(before, grads[1:], states, settings)]
    got = linear_raw.UPDATES[rule](grad, x, *parameters, *gate, EVERY, (True,) * 4, states, settings)
    assert got[1:] == (None,) * 4
    assert_near(got[0], grads[0], out, "dx")
    for name, p, state, (moved, kept) in zip(["W", "M", "b", "Mb"], parameters, states, expected):
        near(p, moved, p.dtype, name)
        for tensor, wanted in zip(tensors_of(state), tensors_of(kept)):
            if tensor is not None:
                near(tensor, wanted, tensor.dtype, f"what is kept of {name}")


SHAPES = {"ragged": ((3, 129), 257), "3-d": ((2, 5, 17), 33), "panels": ((40, 96), 1134)}
