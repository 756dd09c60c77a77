"""Models of three tasks, and a mixed-task batch beside its samples alone."""

from __future__ import annotations

import torch
from support.models import assert_same_gradients, gradients, mlp, two_task_model
from torch import nn

from metamask_ext import add_task, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear

MIXED = ["b", "a", "c", "b", "b"]


def three_task_mlp():
    model = mlp()
    add_task(model, "c")
    return model


def cnn(gate="sigmoid"):
    options = {"gate": gate, "threshold": 0.1} if gate == "hard" else {"temperature": 0.7}
    model = two_task_model(
        MaskedConv2d(2, 4, 3, padding=1, padding_mode="reflect", **options),
        nn.Tanh(),
        MaskedConv2d(4, 4, 3, stride=2, groups=2, bias=False, **options),
        nn.Tanh(),
        nn.Flatten(),
        MaskedLinear(16, 3, **options),
    )
    add_task(model, "c")
    return model.double()


MODELS = {
    "mlp": (three_task_mlp, (4,)),
    "mlp-more-dimensions": (three_task_mlp, (2, 3, 4)),
    "cnn": (cnn, (2, 6, 6)),
    "cnn-hard": (lambda: cnn("hard"), (2, 6, 6)),
}


def make(name, samples=5, device="cpu"):
    build, shape = MODELS[name]
    return build().to(device), torch.randn(samples, *shape, dtype=torch.float64).to(device)


def alone(model, x, names):
    """Each sample by itself, under its own task."""
    outputs = []
    for sample, name in zip(x, names, strict=True):
        with using_task(model, name):
            outputs.append(model(sample[None]))
    return torch.cat(outputs)


def compare(model, x, given, names=None, call=None):
    """Compare output and gradients, of the input too, of the mixed-task batch with those of its samples alone."""
    names = given if names is None else names
    results = []
    for run in (lambda x: together(model, x, given, call), lambda x: alone(model, x, names)):
        leaf = x.detach().clone().requires_grad_()
        output = run(leaf)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad, gradients(model)))
    (got, got_dx, got_grads), (wanted, wanted_dx, wanted_grads) = results
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got_dx, wanted_dx)
    assert_same_gradients(got_grads, wanted_grads)
    return wanted_grads


def together(model, x, given, call=None):
    with using_task(model, given):
        return (call or model)(x)
