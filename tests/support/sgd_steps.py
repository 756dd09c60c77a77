"""Models, losses and torch's own optimiser, for the tests of FusedMaskedSGD."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from metamask_ext.nn import MaskedConv2d, MaskedLinear
from metamask_ext.nn.task_masks import TaskMasks
from metamask_ext.optim import FusedMaskedSGD

SETTINGS = {"lr": 0.1, "weight_decay": 0.01, "mask_weight_decay": 0.02, "momentum": 0.9}
PLAIN = {"lr": 0.1}
each_setting = pytest.mark.parametrize("settings", [PLAIN, SETTINGS], ids=["plain", "momentum and decay"])
FUSED = ("metamask::masked_linear_backward_sgd_", "metamask::masked_weight_backward_sgd_")


def mlp(dtype=torch.float64, gate="sigmoid", device="cpu"):
    torch.manual_seed(0)
    options = {"dtype": dtype, "gate": gate, "device": device}
    return nn.Sequential(MaskedLinear(5, 9, **options), nn.Tanh(), MaskedLinear(9, 3, **options))


def cnn(dtype=torch.float64, device="cpu"):
    """Masked and plain layers, a bias-free convolution, batch norm."""
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    return nn.Sequential(
        MaskedConv2d(2, 6, 3, stride=2, bias=False, **options),
        nn.BatchNorm2d(6, **options),
        nn.SiLU(),
        MaskedConv2d(6, 4, 1, **options),
        nn.Conv2d(4, 4, 1, **options),
        nn.Flatten(),
        MaskedLinear(36, 3, gate="hard", threshold=-0.1, **options),
    )


def mask_names(model):
    return {
        f"{name}.{key}" for name, module in model.named_modules() if isinstance(module, TaskMasks) for key in module._parameters
    }


def torch_sgd(model, lr, weight_decay=0.0, mask_weight_decay=0.0, momentum=0.0):
    masks = mask_names(model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in masks], "weight_decay": weight_decay},
        {"params": [p for n, p in model.named_parameters() if n in masks], "weight_decay": mask_weight_decay},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def batch(model, seed):
    generator = torch.Generator().manual_seed(seed)
    p = next(model.parameters())
    shape = (4, 2, 8, 8) if p.dim() == 4 else (4, 5)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(p.device, p.dtype) for s in (shape, (4, 3)))


def error(model, x, y):
    return (model(x) - y).square().mean()


def assert_equal_models(ours, theirs, tolerance=1e-12):
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items()):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def ops_of(function):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return [event.name for event in profiler.events() if event.name.startswith("metamask::")]


def compare(make, settings, loss=error, steps=4, prepare=lambda model, optimizer: None, tolerance=1e-12):
    """``steps`` steps of both optimisers on two copies of one model; the ops of ours."""
    ours, theirs = make(), make()
    fused, plain = FusedMaskedSGD(ours, **settings), torch_sgd(theirs, **settings)
    prepare(ours, fused), prepare(theirs, plain)
    names = []
    for seed in range(steps):
        data = batch(ours, seed)
        value = loss(ours, *data)
        names += ops_of(lambda value=value: fused.backward(value))
        assert all(p.grad is None for p in ours.parameters())
        plain.zero_grad()
        loss(theirs, *data).backward()
        plain.step()
    assert_equal_models(ours, theirs, tolerance)
    return names


def twice(model, x, y):
    return (model(x) - y).square().mean() + model(2 * x).square().mean()


def penalty(model, x, y):
    return error(model, x, y) + 0.1 * model[0].weight.square().sum() + 0.1 * model[2].mask_logits.abs().sum()
