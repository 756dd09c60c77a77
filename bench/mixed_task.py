"""Problems of mixed-task batches: float masks, masks of one bit a weight, and the inference of the task.

Contenders beside ``metamask``, for packed masks: ``loop``, a linear layer for each task of the batch, its ``W * mask`` built;
``gather``, ``torch.bmm`` with the batch's ``W * mask[slots]``; ``compiled``, the same sum under ``torch.compile``, which makes one
loop of it. Their masks are bool, a byte a weight. ``loop-float`` has them as float32, which plain torch multiplies faster: 32
times the memory of bits. For float masks: ``eager`` and ``compiled``, ``torch.bmm`` with ``W * torch.sigmoid(M)`` of all tasks.

``dense`` is the layer without masks; for float masks, ``torch.bmm`` of weights that are made beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext import MaskBank, convert, packed_masked_linear, task_masked_linear, using_task
from metamask_ext.bank.counts import Sums
from metamask_ext.bank.inference import Snapshot, entropy_gradient
from metamask_ext.nn import MaskedLinear
from metamask_ext.ops.gate import SIGMOID
from metamask_ext.ops.packed import reference as packed_reference
from metamask_ext.ops.weight import reference as weight_reference

from .problem import COMPILED, COMPILED_OURS, METAMASK, SEED, Contender, Function, Problem, Work

SLOW = "with 1,000 tasks only the floor is compared: masks of bool would take 1 GiB, of float32 4 GiB"


def packed_forward(batch: int, width: int, tasks: int, device: str = "cpu") -> Problem:
    """One square linear layer, packed masks, every sample its own task, in no order."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(batch, width, generator=generator)
    weight = torch.randn(width, width, generator=generator) / math.sqrt(width)
    bits = torch.randint(0, 256, (tasks, width, width // 8), dtype=torch.uint8, generator=generator)
    slots = torch.randperm(tasks, generator=generator)[:batch]
    x, weight, bits, slots = (tensor.to(device) for tensor in (x, weight, bits, slots))

    def exact() -> tuple[Tensor, ...]:
        inputs = x.double(), slots, weight.double(), [bits]
        return (packed_reference.packed_masked_linear(*inputs, None, None, 1),)

    works: dict[str, Callable[[], Tensor]] = {
        METAMASK: lambda: packed_masked_linear(x, slots, weight, bits),
        "dense": lambda: F.linear(x, weight),
    }
    plain = ("loop", "loop-float", "gather", "compiled")
    if few := tasks <= 64:
        masks = (bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1).view(tasks, width, width).bool()
        floats = masks.float()

        def fused(x: Tensor, slots: Tensor, weight: Tensor, masks: Tensor) -> Tensor:
            # As a product and a sum, not torch.bmm, whose weights Inductor would write to memory.
            return (torch.where(masks[slots], weight, 0.0) * x[:, None]).sum(2)

        compiled = torch.compile(fused, dynamic=False, fullgraph=True)
        works["loop"] = lambda: _loop(x, slots, weight, masks)
        works["loop-float"] = lambda: _loop(x, slots, weight, floats)
        works["gather"] = lambda: torch.bmm(weight * masks[slots], x[:, :, None])[:, :, 0]
        works["compiled"] = lambda: compiled(x, slots, weight, masks)

    def dense() -> tuple[Tensor, ...]:
        return (F.linear(x.double(), weight.double()),)

    contenders = {name: Contender(_alone(work), dense if name == "dense" else exact, ("output",)) for name, work in works.items()}
    return Problem(contenders, width, {} if few else dict.fromkeys(plain, SLOW))


def _loop(x: Tensor, slots: Tensor, weight: Tensor, masks: Tensor) -> Tensor:
    y = x.new_empty(len(x), len(weight))
    for task in slots.unique().tolist():
        rows = (slots == task).nonzero()[:, 0]
        y[rows] = F.linear(x[rows], weight * masks[task])
    return y


def _alone(work: Callable[[], Tensor]) -> Work:
    return lambda: (work(),)


def mixed_task_linear(tasks: int, rows: int, width: int, mode: str, device: str = "cpu") -> Problem:
    """One square linear layer, float masks, ``rows`` samples of each task, those of a task together.

    Args:
        mode: ``"forward"``, with nothing to differentiate; ``"backward"``, forward and the gradients of input, weight and masks.
    """
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(tasks, rows, width, generator=generator)
    weight = torch.randn(width, width, generator=generator) / math.sqrt(width)
    masks = torch.randn(tasks, width, width, generator=generator)
    slots = torch.arange(tasks).repeat_interleave(rows)
    gradient = torch.randn(tasks, rows, width, generator=generator) / rows
    x, weight, masks, slots, gradient = (tensor.to(device) for tensor in (x, weight, masks, slots, gradient))

    def masked(x: Tensor, weight: Tensor, masks: Tensor) -> Tensor:
        return task_masked_linear(x.flatten(0, 1), slots, weight, masks).view(x.shape)

    def plain(x: Tensor, weight: Tensor, masks: Tensor) -> Tensor:
        return torch.bmm(x, (weight * torch.sigmoid(masks)).transpose(1, 2))

    def specification(x: Tensor, weight: Tensor, masks: Tensor) -> Tensor:
        return torch.bmm(x, weight_reference.masked_weight(weight, masks, SIGMOID, 1.0).transpose(1, 2))

    def ready_made(x: Tensor, theta: Tensor) -> Tensor:
        return torch.bmm(x, theta.transpose(1, 2))

    def work(function: Function, tensors: tuple[Tensor, ...], gradient: Tensor) -> Work:
        if mode == "forward":
            return lambda: (function(*tensors),)
        if mode != "backward":
            raise ValueError(f"mode must be 'forward' or 'backward', got {mode!r}")
        wanted = [tensor.detach().requires_grad_() for tensor in tensors]

        def backward() -> tuple[Tensor, ...]:
            output = function(*wanted)
            return (output, *torch.autograd.grad(output, wanted, gradient))

        return backward

    def exactly(function: Function, tensors: tuple[Tensor, ...]) -> Work:
        # Built when called, so that nothing in float64 is alive before or after.
        return lambda: work(function, tuple(tensor.double() for tensor in tensors), gradient.double())()

    given, dense = (x, weight, masks), (x, weight * torch.sigmoid(masks))
    names = ("output", "gradient of input", "gradient of weight", "gradient of masks")
    dense_names = ("output", "gradient of input", "gradient of weights")
    some = 1 if mode == "forward" else None
    exact = exactly(specification, given)
    compiled, ours = (torch.compile(function, dynamic=False, fullgraph=True) for function in (plain, masked))
    contenders = {
        name: Contender(work(function, given, gradient), exact, names[:some])
        for name, function in (
            (METAMASK, masked),
            ("eager", plain),
            (COMPILED, compiled),
            (COMPILED_OURS, ours),
        )
    }
    contenders["dense"] = Contender(work(ready_made, dense, gradient), exactly(ready_made, dense), dense_names[:some])
    # The gradient of the weight sums over tasks and rows.
    return Problem(contenders, max(width, tasks * rows))


def lenet(outputs: int) -> nn.Sequential:
    """Makes a LeNet-300-100 whose linear layers are masked by the hard gate."""
    plain = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, outputs))
    model = convert(plain, gate="hard", mask_init="normal")
    assert isinstance(model, nn.Sequential)
    return model


def inference(batch: int, tasks: int, outputs: int) -> Problem:
    """Infers the task: for each image of a batch and each packed task of LeNet-300-100, evidence that the image is of the task.

    ``metamask`` takes the derivative of the output's entropy, in one shot; ``loop`` runs the network of each task. The float64
    references are autograd's and plain torch's, with the masks as floats.
    """
    torch.manual_seed(SEED)
    model = lenet(outputs)
    bank = MaskBank(model)
    names = [f"task {number}" for number in range(tasks)]
    for name in names:
        bank.add_task(name)
        bank.pack(name)
    bank.remove_task("default")
    x = torch.randn(batch, 784)
    sums = Sums()

    def loop() -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits = []
            for name in names:
                with using_task(model, name):
                    logits.append(model(x))
            return (torch.stack(logits, 1),)

    def layers() -> list[tuple[Tensor, Tensor, list[Tensor], list[Tensor]]]:
        found = []
        for layer in model:
            if isinstance(layer, MaskedLinear):
                assert layer.bias_masks is not None
                weight, bias = layer.weight.detach(), layer.bias.detach()
                masks = [packed_reference.unpack_mask(layer.masks[name], weight.shape) for name in names]
                bias_masks = [packed_reference.unpack_mask(layer.bias_masks[name], bias.shape) for name in names]
                found.append((weight.double(), bias.double(), masks, bias_masks))
        return found

    def each_task() -> tuple[Tensor, ...]:
        logits = [x.double() for _ in names]
        for number, (weight, bias, masks, bias_masks) in enumerate(layers()):
            logits = [
                F.linear(y if number == 0 else y.relu(), weight * masks[task], bias * bias_masks[task])
                for task, y in enumerate(logits)
            ]
        return (torch.stack(logits, 1),)

    def slopes() -> tuple[Tensor, ...]:
        # Of sample b the coefficient alpha[b, t]: its own weights, so that one backward gives the derivatives of every sample.
        alpha = torch.full((batch, tasks), 1.0 / tasks, dtype=torch.float64, requires_grad=True)
        y = x.double()
        for number, (weight, bias, masks, bias_masks) in enumerate(layers()):
            given = y if number == 0 else y.relu()
            outputs = [F.linear(given, weight * masks[task], bias * bias_masks[task]) for task in range(tasks)]
            y = torch.stack([alpha[:, task, None] * output for task, output in enumerate(outputs)]).sum(0)
        log_p = y.log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum()
        return torch.autograd.grad(entropy, [alpha])

    contenders = {
        METAMASK: Contender(
            lambda: (entropy_gradient(model, names, x, True, Snapshot(model, sums)),), slopes, ("derivative of the entropy",)
        ),
        "loop": Contender(loop, each_task, ("logits",)),
    }
    # By the norm: a ReLU whose input is near 0 falls on two sides in float32 and float64.
    return Problem(contenders, 784, tolerance=1e-4)
