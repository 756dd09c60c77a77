"""Models, losses and torch's own optimisers, for the tests of FusedMaskedSGD and FusedMaskedAdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from metamask_ext.nn import MaskedConv2d, MaskedLinear
from metamask_ext.nn.task_masks import TaskMasks
from metamask_ext.optim import FusedMaskedAdamW, FusedMaskedSGD


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


def _groups(model, weight_decay, mask_weight_decay):
    masks = mask_names(model)
    return [
        {"params": [p for n, p in model.named_parameters() if n not in masks], "weight_decay": weight_decay},
        {"params": [p for n, p in model.named_parameters() if n in masks], "weight_decay": mask_weight_decay},
    ]


def torch_sgd(model, lr, weight_decay=0.0, mask_weight_decay=0.0, momentum=0.0):
    return torch.optim.SGD(_groups(model, weight_decay, mask_weight_decay), lr=lr, momentum=momentum)


def torch_adamw(model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, mask_weight_decay=0.0):
    return torch.optim.AdamW(_groups(model, weight_decay, mask_weight_decay), lr=lr, betas=betas, eps=eps)


@dataclass(frozen=True, eq=False)
class Kind:
    """An optimiser of ours and torch's with the same numbers."""

    name: str
    ours: type[FusedMaskedSGD | FusedMaskedAdamW]
    torchs: Callable[..., torch.optim.Optimizer]
    plain: dict[str, object]
    settings: dict[str, object]
    tolerance: float
    state: tuple[str, ...]
    """The tensors of a parameter's size that it keeps with ``settings``."""

    @property
    def ops(self):
        """Those of linear layers, and of other weights, that take its steps."""
        return tuple(f"metamask::masked_{layer}_backward_{self.name.lower()}_" for layer in ("linear", "weight"))


SGD = Kind(
    "SGD",
    FusedMaskedSGD,
    torch_sgd,
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01, "mask_weight_decay": 0.02, "momentum": 0.9},
    1e-12,
    ("momentum_buffer",),
)
ADAMW = Kind(
    "AdamW",
    FusedMaskedAdamW,
    torch_adamw,
    {"lr": 0.01},
    {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "mask_weight_decay": 0.02},
    1e-10,
    ("exp_avg", "exp_avg_sq"),
)
KINDS = (SGD, ADAMW)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
each_setting = pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, settings) for kind in KINDS for settings in (kind.plain, kind.settings)],
    ids=[f"{kind.name}-{settings}" for kind in KINDS for settings in ("plain", "every option")],
)


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


def assert_equal_states(kind, fused, ours, plain, theirs, tolerance):
    """The states of the parameters; ours may have begun with zeros where no step was taken."""
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        mine, others = fused.state.get(p, {}), plain.state.get(q, {})
        for key in (*kind.state, "step"):
            if others.get(key) is not None:
                message = f"{key} of {name}: "
                torch.testing.assert_close(
                    mine[key], others[key], rtol=tolerance, atol=tolerance, check_dtype=False, msg=message.__add__
                )
            else:
                assert key not in mine or not mine[key].any(), f"{key} of {name}"


def ops_of(function):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return [event.name for event in profiler.events() if event.name.startswith("metamask::")]


def compare(make, kind, settings, loss=error, steps=4, prepare=lambda model, optimizer: None, tolerance=None):
    """``steps`` steps of both optimisers on two copies of one model; the ops of ours."""
    ours, theirs = make(), make()
    fused, plain = kind.ours(ours, **settings), kind.torchs(theirs, **settings)
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
    assert_equal_models(ours, theirs, tolerance or kind.tolerance)
    assert_equal_states(kind, fused, ours, plain, theirs, tolerance or kind.tolerance)
    return names


def twice(model, x, y):
    return (model(x) - y).square().mean() + model(2 * x).square().mean()


def penalty(model, x, y):
    return error(model, x, y) + 0.1 * model[0].weight.square().sum() + 0.1 * model[2].mask_logits.abs().sum()
