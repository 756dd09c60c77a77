"""Problems of a layer's training step with the optimisers of :mod:`metamask_ext.optim`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.nn import MaskedLinear
from metamask_ext.optim import FusedMaskedAdamW, FusedMaskedSGD

from .problem import LEARNING_RATE, METAMASK, SEED, Contender, Layer, Problem, Work, gradient_of

Optimizer = Callable[..., Any]
OPTIMIZERS: dict[str, tuple[Optimizer, Optimizer, dict[str, Any]]] = {
    "SGD": (FusedMaskedSGD, torch.optim.SGD, {"lr": LEARNING_RATE}),
    # A small eps would make a first step of the rounding of a gradient near zero, and the check of the results depend on it.
    "AdamW": (FusedMaskedAdamW, torch.optim.AdamW, {"lr": LEARNING_RATE, "eps": 1e-3, "weight_decay": 0.0}),
}
"""Ours, torch's and the settings of both."""
FUSED = {"SGD": {}, "AdamW": {"fused": True}}
"""The options with which torch's own is fastest."""


class EagerLinear(nn.Module):
    """A masked linear layer in plain torch."""

    def __init__(self, weight: Tensor, mask: Tensor):
        super().__init__()
        self.weight, self.mask = nn.Parameter(weight), nn.Parameter(mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * torch.sigmoid(self.mask))


def fused_step(
    batch: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    outputs: int | None = None,
    optimizer: str = "SGD",
) -> Problem:
    """Times a step on one linear layer inside a network, of as many outputs as inputs if ``outputs`` is None.

    Metamask updates W and M inside the backward; the others store gradients and call torch's optimiser. All compute the gradient of
    the input too.
    """
    generator = torch.Generator().manual_seed(SEED)
    outputs = outputs or width

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).to(device, dtype)

    weight, mask = normal(outputs, width, 1 / math.sqrt(width)), normal(outputs, width)
    # Every weight's gradient is about 1 at every batch, so that the check sees a step.
    x, gradient = normal(batch, width), normal(batch, outputs, 1 / math.sqrt(batch))

    def masked() -> nn.Module:
        layer = MaskedLinear(width, outputs, bias=False, device=device, dtype=dtype, mask_dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.mask_logits.copy_(mask)
        return layer

    def dense() -> nn.Module:
        layer = nn.Linear(width, outputs, bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
        return layer

    def eager() -> nn.Module:
        return EagerLinear(weight.clone(), mask.clone())

    def compiled() -> nn.Module:
        model = eager()
        model.compile(dynamic=False, fullgraph=True)
        return model

    names = ("output", "gradient of input", "weight", "mask")
    contenders = {}
    for name, make, plain in (
        (METAMASK, masked, eager),
        ("eager", eager, eager),
        ("compiled", compiled, eager),
        ("dense", dense, dense),
    ):
        work = _step(make(), x, gradient, optimizer, fused=name == METAMASK)
        contenders[name] = Contender(work, _exactly(plain, x, gradient, optimizer), names[: 3 if name == "dense" else 4])
    return Problem(contenders, max(batch, width, outputs), dtype=dtype, layer=Layer(x, weight, mask, gradient))


def _step(model: nn.Module, x: Tensor, gradient: Tensor, optimizer: str, fused: bool) -> Work:
    x = x.clone().requires_grad_()
    parameters = list(model.parameters())
    ours, theirs, settings = OPTIMIZERS[optimizer]
    if fused:
        descent = ours(model, **settings)

        def step() -> tuple[Tensor, ...]:
            x.grad = None
            output = model(x)
            descent.backward(output, gradient)
            return (output, gradient_of(x), *parameters)

        return step
    plain = theirs(parameters, **settings, **FUSED[optimizer])

    def plain_step() -> tuple[Tensor, ...]:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        output = model(x)
        output.backward(gradient)
        plain.step()
        return (output, gradient_of(x), *parameters)

    return plain_step


def _exactly(make: Callable[[], nn.Module], x: Tensor, gradient: Tensor, optimizer: str) -> Work:
    """Makes the step in float64, by plain torch; built when called, so that nothing in float64 is alive before or after."""
    return lambda: _step(make().double(), x.double(), gradient.double(), optimizer, fused=False)()
