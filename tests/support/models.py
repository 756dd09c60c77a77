"""Models of masked layers, and comparisons of their outputs and gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import metamask_ext

LOGIT_ON = 100.0
"""sigmoid(100) is 1 in every dtype."""


def two_task_model(*layers: nn.Module, tasks: tuple[str, str] = ("a", "b")) -> nn.Sequential:
    """Masked layers with two tasks of random masks and no ``default``."""
    model = nn.Sequential(*layers)
    for task in tasks:
        metamask_ext.add_task(model, task)
    metamask_ext.remove_task(model, "default")
    return model


def mlp() -> nn.Sequential:
    """Three masked layers, two tasks, in double precision: gradients can be compared closely."""
    linear = metamask_ext.nn.MaskedLinear
    return two_task_model(linear(4, 6), nn.Tanh(), linear(6, 6), nn.Tanh(), linear(6, 3)).double()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients of the model's parameters, taken away from them."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(got: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    """The same parameters have a gradient, and the same one to rounding."""
    assert got.keys() == wanted.keys()
    present = {name for name, grad in wanted.items() if grad is not None}
    assert {name for name, grad in got.items() if grad is not None} == present
    assert present, "nothing has a gradient: the comparison would be empty"
    for name in present:
        torch.testing.assert_close(got[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def randomize_masks(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Random logits in every mask, so that a mask left out shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "masks." in name:
                parameter.normal_(std=scale)
    return model


def masks_on(model: nn.Module) -> nn.Module:
    """Every logit at +100: the gate is 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "masks." in name:
                parameter.fill_(LOGIT_ON)
    return model


def expected(model, task, x):
    """The output computed with torch alone."""
    for layer in model:
        if isinstance(layer, metamask_ext.nn.MaskedLinear):
            theta = layer.weight * layer.masks[task].sigmoid()
            x = nn.functional.linear(x, theta, layer.bias * layer.bias_masks[task].sigmoid())
        else:
            x = layer(x)
    return x


def assert_uses(model, task, x, call=None):
    """The call's output is ``task``'s, and differs from the other's."""
    got = (call or model)(x)
    torch.testing.assert_close(got, expected(model, task, x))
    assert not torch.allclose(got, expected(model, "b" if task == "a" else "a", x))


def reference_gradients(model, x, *tasks):
    """Without any checkpoint, from torch alone."""
    sum(expected(model, task, x).square().sum() for task in tasks).backward()
    return gradients(model)


def kinds(model):
    """Name, type and parameters of every module: what must not change when convert fails."""
    return {
        name: (type(module), dict(module._parameters), list(module._modules), dict(module.__dict__).keys())
        for name, module in model.named_modules()
    }


def small_cnn():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


def small_input():
    return torch.randn(2, 2, 5, 5)


def masked_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, metamask_ext.nn.MaskedLayer)]
