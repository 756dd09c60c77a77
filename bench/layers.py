"""Problems of the functions ``masked_weight``, ``masked_linear`` and ``masked_conv2d``: single layers and a small CNN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import metamask_ext
from metamask_ext.ops.conv2d import reference as conv2d_reference
from metamask_ext.ops.gate import SIGMOID
from metamask_ext.ops.linear import reference as linear_reference
from metamask_ext.ops.weight import reference as weight_reference

from .problem import COMPILED, COMPILED_OURS, LEARNING_RATE, METAMASK, SEED, Contender, Function, Layer, Problem, Work, gradient_of


class Layers(NamedTuple):
    """A contender's layers; each takes a weight and its mask logits."""

    weight: Function
    linear: Function
    conv2d: Function


_GATE = (SIGMOID, 1.0)

MASKED = Layers(
    metamask_ext.masked_weight,
    metamask_ext.masked_linear,
    lambda x, w, m, stride: metamask_ext.masked_conv2d(x, w, m, stride=stride, padding=1),
)
EAGER = Layers(
    lambda w, m: w * torch.sigmoid(m),
    lambda x, w, m: F.linear(x, w * torch.sigmoid(m)),
    lambda x, w, m, stride: F.conv2d(x, w * torch.sigmoid(m), stride=stride, padding=1),
)
DENSE = Layers(
    lambda w, m: w,
    lambda x, w, m: F.linear(x, w),
    lambda x, w, m, stride: F.conv2d(x, w, stride=stride, padding=1),
)
SPECIFICATION = Layers(
    lambda w, m: weight_reference.masked_weight(w, m, *_GATE),
    lambda x, w, m: linear_reference.masked_linear(x, w, m, None, None, *_GATE),
    lambda x, w, m, stride: conv2d_reference.masked_conv2d(x, w, m, None, None, stride, 1, 1, 1, *_GATE),
)


@dataclass
class Tensors:
    """A network's input (None: it has none), its weights and their mask logits, and the gradient of its output."""

    input: Tensor | None
    weights: list[Tensor]
    masks: list[Tensor]
    gradient: Tensor | None = None

    def copy(self, dtype: torch.dtype | None = None) -> Tensors:
        def one(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype or tensor.dtype, copy=True)

        weights, masks = [one(w) for w in self.weights], [one(m) for m in self.masks]
        input, gradient = (None if tensor is None else one(tensor) for tensor in (self.input, self.gradient))
        return Tensors(input, weights, masks, gradient)

    def arguments(self) -> list[Tensor]:
        """Lists them as a network takes them: the input, then each weight with its mask."""
        pairs = [tensor for pair in zip(self.weights, self.masks) for tensor in pair]
        return pairs if self.input is None else [self.input, *pairs]


def masked_weight(width: int, mode: str, device: str = "cpu") -> Problem:
    """``theta`` of one square weight."""
    weight = (width, width)
    missing = {
        "dense": "without a mask there is no theta to compute",
        COMPILED_OURS: "of a weight alone plain torch is what a compiled model runs",
    }
    return _problem(lambda layers: layers.weight, None, [weight], mode, reduction=1, missing=missing, device=device)


def masked_linear(
    batch: int,
    width: int,
    mode: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    outputs: int | None = None,
    plain: bool = True,
) -> Problem:
    """One linear layer inside a network: its backward also gives the gradient of its input.

    Args:
        outputs: None: as many as inputs.
        plain: whether plain torch is compared too, or only the floor.
    """
    shape = (batch, width)
    missing = {} if plain else {name: "in bfloat16 only the floor is compared" for name in ("eager", COMPILED, COMPILED_OURS)}
    return _problem(
        lambda layers: layers.linear,
        shape,
        [(outputs or width, width)],
        mode,
        reduction=max(batch, width, outputs or width),
        input_grad=True,
        missing=missing,
        dtype=dtype,
        device=device,
    )


def cnn(batch: int, channels: int, mode: str) -> Problem:
    """A small convolutional classifier of 3 x 32 x 32 images into 10 classes: three convolutions and a linear layer."""
    wide = 2 * channels
    weights = [(channels, 3, 3, 3), (wide, channels, 3, 3), (wide, wide, 3, 3), (10, wide)]

    def network(layers: Layers) -> Function:
        # Smooth: the derivative of a ReLU jumps at 0, where float32 and float64 may fall on two sides.
        def forward(x: Tensor, *weights: Tensor) -> Tensor:
            w1, m1, w2, m2, w3, m3, w4, m4 = weights
            x = F.silu(layers.conv2d(x, w1, m1, 1))
            x = F.silu(layers.conv2d(x, w2, m2, 2))
            x = F.silu(layers.conv2d(x, w3, m3, 2))
            return layers.linear(x.mean((2, 3)), w4, m4)

        return forward

    # A weight of the first layer meets every pixel of every image.
    return _problem(network, (batch, 3, 32, 32), weights, mode, reduction=batch * 32 * 32)


def _problem(
    network: Callable[[Layers], Function],
    input_shape: Sequence[int] | None,
    weight_shapes: Sequence[Sequence[int]],
    mode: str,
    *,
    reduction: int,
    input_grad: bool = False,
    missing: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """Makes the contenders of ``network``, a function from a contender's layers to its forward.

    Args:
        mode: ``"forward"``, with nothing to differentiate; ``"backward"``, forward and the gradients of everything; ``"step"``,
            forward, backward and SGD on the weights, and on the masks where there are any.
        input_grad: whether a backward gives the gradient of the input too.
    """
    missing = missing or {}
    generator = torch.Generator().manual_seed(SEED)

    def normal(shape: Sequence[int], fan_in: int = 1) -> Tensor:
        return (torch.randn(*shape, generator=generator) / math.sqrt(fan_in)).to(device, dtype)

    tensors = Tensors(
        None if input_shape is None else normal(input_shape),
        [normal(shape, math.prod(shape[1:])) for shape in weight_shapes],
        [normal(shape) for shape in weight_shapes],
    )
    if mode != "forward":
        output = network(EAGER)(*(tensor.to("meta") for tensor in tensors.arguments()))  # its shape alone, at no cost
        tensors.gradient = normal(output.shape, output.shape[0])

    # Work that only reads shares its tensors. A step writes, so each contender has parameters of its own.
    def own() -> Tensors:
        return tensors.copy() if mode == "step" else tensors

    def exact(layers: Layers, masked: bool) -> Work:
        # Built when called, so that nothing in float64 is alive before or after.
        return lambda: _work(network(layers), tensors.copy(torch.float64), mode, masked, input_grad)()

    specification = exact(SPECIFICATION, True)
    compiled, compiled_ours = (torch.compile(network(layers), dynamic=False, fullgraph=True) for layers in (EAGER, MASKED))
    contenders = {}
    for name, function, definition in (
        (METAMASK, network(MASKED), specification),
        ("eager", network(EAGER), specification),
        (COMPILED, compiled, specification),
        (COMPILED_OURS, compiled_ours, specification),
        ("dense", network(DENSE), exact(DENSE, False)),
    ):
        if name not in missing:
            masked = name != "dense"
            work = _work(function, own(), mode, masked, input_grad)
            contenders[name] = Contender(work, definition, _result_names(tensors, mode, masked, input_grad))
    layer = None
    if tensors.input is not None and len(tensors.weights) == 1:
        layer = Layer(tensors.input, tensors.weights[0], tensors.masks[0], tensors.gradient)
    return Problem(contenders, reduction, missing, dtype=dtype, layer=layer)


def _work(function: Function, tensors: Tensors, mode: str, masked: bool, input_grad: bool) -> Work:
    arguments, gradient = tensors.arguments(), tensors.gradient
    if mode == "forward":
        return lambda: (function(*arguments),)

    trained = [*tensors.weights, *(tensors.masks if masked else [])]
    wanted = [tensors.input, *trained] if input_grad and tensors.input is not None else trained
    for tensor in wanted:
        tensor.requires_grad_()

    def backward() -> tuple[Tensor, ...]:
        output = function(*arguments)
        return (output, *torch.autograd.grad(output, wanted, gradient))

    if mode == "backward":
        return backward
    if mode != "step":
        raise ValueError(f"mode must be 'forward', 'backward' or 'step', got {mode!r}")

    # torch's default implementation: on a CPU neither foreach nor fused was faster, at any of the sizes here.
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)

    def step() -> tuple[Tensor, ...]:
        for tensor in wanted:
            tensor.grad = None
        output = function(*arguments)
        output.backward(gradient)
        optimizer.step()
        return (output, *map(gradient_of, wanted), *trained)

    return step


def _result_names(tensors: Tensors, mode: str, masked: bool, input_grad: bool) -> tuple[str, ...]:
    kinds = ("weight", "mask") if masked else ("weight",)
    trained = [f"{kind} {number}" for kind in kinds for number in range(1, len(tensors.weights) + 1)]
    grads = [f"gradient of {name}" for name in [*(["input"] if input_grad else []), *trained]]
    return ("output", *(grads if mode != "forward" else []), *(trained if mode == "step" else []))
