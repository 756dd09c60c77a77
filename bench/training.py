"""Problems of whole training steps: with the optimisers of :mod:`metamask_ext.optim`, and of a ResNet-18."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from metamask_ext import convert
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


class _Mask(nn.Module):
    """A mask as a parametrization: the way to mask an existing model in plain torch."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.mask = nn.Parameter(mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.sigmoid(self.mask)


def resnet18_step(batch: int, size: int, fused: bool) -> Problem:
    """Times a training step of torchvision's ResNet-18 on images of ``size x size`` pixels, with all its layers masked."""
    from metamask_ext.data._torchvision import import_torchvision

    import_torchvision()
    from torchvision.models import resnet18

    torch.manual_seed(SEED)
    plain: nn.Module = resnet18(num_classes=10)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))

    def dense() -> nn.Module:
        return copy.deepcopy(plain)

    def masked() -> nn.Module:
        return convert(copy.deepcopy(plain), mask_init=2.0)

    def eager() -> nn.Module:
        model = copy.deepcopy(plain)
        for module in list(model.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    parametrize.register_parametrization(module, name, _Mask(torch.full_like(parameter, 2.0)))
        return model

    def step(model: nn.Module, images: Tensor, fused: bool) -> Work:
        if fused:
            descent = FusedMaskedSGD(model, LEARNING_RATE)
            update: Callable[[Tensor], None] = descent.backward
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

            def update(loss: Tensor) -> None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        watched = [_shared_weight(model.get_submodule(name)) for name in ("conv1", "fc")]
        before = [weight.detach().clone() for weight in watched]

        def work() -> tuple[Tensor, ...]:
            loss = F.cross_entropy(model(images), labels)
            update(loss)
            return (loss.detach(), *(weight.detach() - start for weight, start in zip(watched, before)))

        return work

    names = ("loss", "step of the first layer's weight", "step of the last layer's weight")
    contenders = {}
    for name, make, reference in ((METAMASK, masked, eager), ("eager", eager, eager), ("dense", dense, dense)):

        def exact(make: Callable[[], nn.Module] = reference) -> tuple[Tensor, ...]:
            return step(make().double(), images.double(), False)()

        contenders[name] = Contender(step(make(), images, fused and name == METAMASK), exact, names)
    missing = {"compiled": "compiling a ResNet-18 takes minutes on this machine"}
    return Problem(contenders, 1, missing, tolerance=1e-2)


def _shared_weight(layer: nn.Module) -> Tensor:
    parameters = dict(layer.named_parameters())
    return parameters["parametrizations.weight.original"] if parametrize.is_parametrized(layer) else parameters["weight"]
