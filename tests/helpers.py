"""What the tests of the modules share."""

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
