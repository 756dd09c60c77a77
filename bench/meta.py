"""Problems of MAML steps that adapt masks, weights or both of a masked net: metamask, plain PyTorch and other libraries.

``compiled-ours``: metamask, compiled by :func:`metamask_ext.compile`; ``vmap``: plain functions under ``torch.func.grad`` and
``torch.vmap``; ``loop``: one task after another with ``autograd.grad``; ``higher`` and ``torchopt``: as these libraries are meant
to be used, which is one task after another. They are taken from the folder in ``METAMASK_PEERS``, made by :data:`INSTALL`.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import metamask_ext
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv2d, MaskedLinear
from metamask_ext.nn.masked_layer import MaskedLayer

from .problem import COMPILED_OURS, METAMASK, SEED, Contender, Problem, Work, gradient_of

PEERS = "METAMASK_PEERS"
INSTALL = "pip install --no-deps --target DIR higher torchopt optree graphviz"
META_LEARNING_RATE = 1e-3
STEPS = 5
"""The small steps in one unit of work, as they follow each other in training: the first one after another contender's finds its
code and tensors in no cache, and takes half as long again."""
MEMORY_STEPS = (1, 2, 5, 10, 20)

Loss = Callable[[Tensor, Tensor], Tensor]
Network = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]
"""``network(theta, rest, x)``: ``theta`` the masked weights and biases, ``rest`` the parameters without a mask."""


class Learned(NamedTuple):
    """A net's parameters: the shared weights and biases, the masks of each, and the parameters without a mask."""

    shared: list[Tensor]
    masks: list[Tensor]
    rest: list[Tensor]

    def copy(self, dtype: torch.dtype | None = None) -> Learned:
        return Learned(*([t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in some] for some in self))


ADAPTED = {"masks": ("masks",), "weights": ("shared", "rest"), "all": ("shared", "masks", "rest")}
"""By the choice of :class:`metamask_ext.meta.MAML` the fields of :class:`Learned` that are adapted."""


class Data(NamedTuple):
    """Samples of each task, ``[T, K, ...]``, with targets: to adapt to, and to be judged by."""

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor

    def double(self) -> Data:
        return Data(*(t.double() if t.is_floating_point() else t for t in self))


def sine_net() -> nn.Sequential:
    return nn.Sequential(MaskedLinear(1, 40), nn.ReLU(), MaskedLinear(40, 40), nn.ReLU(), MaskedLinear(40, 1))


def sine_data(tasks: int, shots: int) -> Data:
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1), torch.pi * torch.rand(tasks, 1, 1)
    x = 10 * torch.rand(tasks, 2 * shots, 1) - 5
    y = amplitude * torch.sin(x - phase)
    return Data(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])


def sine_step(tasks: int, shots: int, adapt: str = "masks") -> Problem:
    """Times steps of arXiv:1703.03400, section 5.1, on sine waves: 1-40-40-1, one inner step, second order.

    The other libraries adapt masks.
    """
    torch.manual_seed(SEED)
    model, data = sine_net(), sine_data(tasks, shots)
    contenders, learned = _contenders(model, _sine_network, data, F.mse_loss, 0.5, adapt)
    exact, names = contenders[METAMASK].exact, contenders[METAMASK].results
    missing = {}
    for name, step in (("higher", _higher_step), ("torchopt", _torchopt_step)) if adapt == "masks" else ():
        library = _peer(name)
        if isinstance(library, str):
            missing[name] = library
            continue
        contenders[name] = Contender(step(library, learned, data, 0.5), exact, names)
    contenders = {name: replace(contender, work=_repeated(contender.work)) for name, contender in contenders.items()}
    return Problem(contenders, 40, missing, tolerance=1e-3)


def compiled_sine_step(tasks: int, shots: int) -> Problem:
    """Times the same steps of metamask, eager and with the whole meta-step as one graph."""
    torch.manual_seed(SEED)
    model, data = sine_net(), sine_data(tasks, shots)
    found, _ = _contenders(model, _sine_network, data, F.mse_loss, 0.5, "masks")
    exact, names = found[METAMASK].exact, found[METAMASK].results
    own = copy.deepcopy(model)
    maml = metamask_ext.compile(MAML(own, 0.5, adapt="masks"), fullgraph=True)
    support, query = (data.x, data.y), (data.query_x, data.query_y)
    compiled = _step(_learned(own), lambda: maml(F.mse_loss, support, query))
    works = {METAMASK: found[METAMASK].work, COMPILED_OURS: compiled}
    return Problem({name: Contender(_repeated(work), exact, names) for name, work in works.items()}, 40, tolerance=1e-3)


def _sine_network(theta: Sequence[Tensor], rest: Sequence[Tensor], x: Tensor) -> Tensor:
    x = F.linear(x, theta[0], theta[1]).relu()
    x = F.linear(x, theta[2], theta[3]).relu()
    return F.linear(x, theta[4], theta[5])


def _repeated(work: Work) -> Work:
    """Makes ``STEPS`` of it one unit of work, with the results of the first."""

    def repeated() -> tuple[Tensor, ...]:
        results = work()
        for _ in range(STEPS - 1):
            work()
        return results

    return repeated


def fewshot_step(ways: int, tasks: int, filters: int, queries: int, adapt: str = "masks") -> Problem:
    """Times a step of one-shot classification of 28 x 28 images with the four-block net of arXiv:1703.03400, section 5.2."""
    torch.manual_seed(SEED)
    blocks: list[nn.Module] = []
    for channels in (1, filters, filters, filters):
        blocks += [MaskedConv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*blocks, nn.Flatten(), MaskedLinear(filters, ways))
    labels = torch.arange(ways).repeat(tasks, 1)
    images, query = torch.rand(tasks, ways, 1, 28, 28), torch.rand(tasks, ways * queries, 1, 28, 28)
    data = Data(images, labels, query, labels.repeat(1, queries))

    def network(theta: Sequence[Tensor], rest: Sequence[Tensor], x: Tensor) -> Tensor:
        for weight, scale, shift in zip(theta[:4], rest[::2], rest[1::2]):
            x = F.batch_norm(F.conv2d(x, weight, padding=1), None, None, scale, shift, True)
            x = F.max_pool2d(x.relu(), 2)
        return F.linear(x.flatten(1), theta[4], theta[5])

    contenders, _ = _contenders(model, network, data, F.cross_entropy, 0.4, adapt)
    # By the norm, and not tightly: a maximum or a ReLU may fall on two sides in float32 and float64.
    return Problem(contenders, 9 * filters, tolerance=1e-2)


def _contenders(
    model: nn.Module, network: Network, data: Data, loss_fn: Loss, inner_lr: float, adapt: str
) -> tuple[dict[str, Contender], Learned]:
    """Makes metamask, vmap and loop, and the parameters that all start from."""
    learned = _learned(model)
    names = ("meta-loss", *(f"meta-gradient of {kind} {n}" for kind, some in learned._asdict().items() for n in range(len(some))))

    def exact() -> tuple[Tensor, ...]:
        double = learned.copy(torch.float64)
        return _step(double, _looped(network, double, data.double(), loss_fn, inner_lr, ADAPTED[adapt]))()

    own = copy.deepcopy(model)
    maml = MAML(own, inner_lr, adapt=adapt)
    support, query = (data.x, data.y), (data.query_x, data.query_y)
    works = {METAMASK: _step(_learned(own), lambda: maml(loss_fn, support, query))}
    for name, make in (("vmap", _mapped), ("loop", _looped)):
        parameters = learned.copy()
        works[name] = _step(parameters, make(network, parameters, data, loss_fn, inner_lr, ADAPTED[adapt]))
    return {name: Contender(work, exact, names) for name, work in works.items()}, learned


def _learned(model: nn.Module) -> Learned:
    layers = [layer for layer in model.modules() if isinstance(layer, MaskedLayer)]
    pairs = [(shared, masks["default"]) for layer in layers for shared, masks in layer._groups()]
    rest: list[Tensor] = [tensor for norm in model.modules() if isinstance(norm, nn.BatchNorm2d) for tensor in norm.parameters()]
    return Learned([shared for shared, _ in pairs], [mask for _, mask in pairs], rest)


def _step(learned: Learned, meta_loss: Callable[[], Tensor]) -> Work:
    """Makes a step: the meta-loss, its gradient, and Adam."""
    parameters = [tensor for some in learned for tensor in some]
    # Fused, so that what is the same for all takes little of the time
    optimizer = torch.optim.Adam(parameters, META_LEARNING_RATE, fused=True)

    def step() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        loss = meta_loss()
        loss.backward()
        optimizer.step()
        return (loss.detach(), *map(gradient_of, parameters))

    return step


def _theta(shared: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    return [weight * torch.sigmoid(mask) for weight, mask in zip(shared, masks)]


def _output(network: Network, learned: Learned, own: dict[str, list[Tensor]], x: Tensor) -> Tensor:
    """Runs the net with a task's own tensors in the place of some."""
    its = learned._replace(**own)
    return network(_theta(its.shared, its.masks), its.rest, x)


def _mapped(
    network: Network, learned: Learned, data: Data, loss_fn: Loss, inner_lr: float, adapted: tuple[str, ...]
) -> Callable[[], Tensor]:
    start = {kind: getattr(learned, kind) for kind in adapted}

    def loss(own: dict[str, list[Tensor]], x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(_output(network, learned, own, x), y)

    def one(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        grads = torch.func.grad(loss)(start, x, y)
        stepped = {kind: [its - inner_lr * grad for its, grad in zip(start[kind], grads[kind])] for kind in adapted}
        return loss(stepped, query_x, query_y)

    return lambda: torch.vmap(one)(*data).mean()


def _looped(
    network: Network, learned: Learned, data: Data, loss_fn: Loss, inner_lr: float, adapted: tuple[str, ...]
) -> Callable[[], Tensor]:
    start = {kind: getattr(learned, kind) for kind in adapted}

    def meta_loss() -> Tensor:
        losses = []
        for x, y, query_x, query_y in zip(*data):
            inner = loss_fn(_output(network, learned, start, x), y)
            grads = iter(torch.autograd.grad(inner, [its for kind in adapted for its in start[kind]], create_graph=True))
            stepped = {kind: [its - inner_lr * next(grads) for its in start[kind]] for kind in adapted}
            losses.append(loss_fn(_output(network, learned, stepped, query_x), query_y))
        return torch.stack(losses).mean()

    return meta_loss


class _Masks(nn.Module):
    def __init__(self, mask: Tensor, bias_mask: Tensor):
        super().__init__()
        self.mask, self.bias_mask = nn.Parameter(mask), nn.Parameter(bias_mask)


class _Linear(nn.Module):
    """A masked linear layer of plain torch, whose masks are a module of their own: TorchOpt adapts whole modules."""

    def __init__(self, weight: Tensor, mask: Tensor, bias: Tensor, bias_mask: Tensor):
        super().__init__()
        self.weight, self.bias, self.masks = nn.Parameter(weight), nn.Parameter(bias), _Masks(mask, bias_mask)

    def forward(self, x: Tensor) -> Tensor:
        masks = self.masks
        return F.linear(x, self.weight * torch.sigmoid(masks.mask), self.bias * torch.sigmoid(masks.bias_mask))


def _plain_net(learned: Learned) -> tuple[nn.Sequential, Learned]:
    """Makes the net of sine waves for libraries that adapt modules."""
    shared, masks, _ = learned.copy()
    layers = [_Linear(shared[n], masks[n], shared[n + 1], masks[n + 1]) for n in range(0, len(shared), 2)]
    model = nn.Sequential(layers[0], *(module for layer in layers[1:] for module in (nn.ReLU(), layer)))
    own = [(layer.weight, layer.bias, layer.masks.mask, layer.masks.bias_mask) for layer in layers]
    return model, Learned([t for layer in own for t in layer[:2]], [t for layer in own for t in layer[2:]], [])


def _higher_step(higher: ModuleType, learned: Learned, data: Data, inner_lr: float) -> Work:
    model, own = _plain_net(learned)
    inner = torch.optim.SGD(own.masks, inner_lr)

    def meta_loss() -> Tensor:
        losses = []
        for x, y, query_x, query_y in zip(*data):
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (net, descent):
                descent.step(F.mse_loss(net(x), y))
                losses.append(F.mse_loss(net(query_x), query_y))
        return torch.stack(losses).mean()

    return _step(own, meta_loss)


def _torchopt_step(torchopt: ModuleType, learned: Learned, data: Data, inner_lr: float) -> Work:
    model, own = _plain_net(learned)
    adapted = nn.ModuleList(layer.masks for layer in model if isinstance(layer, _Linear))
    inner = torchopt.MetaSGD(adapted, inner_lr)

    def meta_loss() -> Tensor:
        losses = []
        start, inner_start = torchopt.extract_state_dict(adapted), torchopt.extract_state_dict(inner)
        for x, y, query_x, query_y in zip(*data):
            inner.step(F.mse_loss(model(x), y))
            losses.append(F.mse_loss(model(query_x), query_y))
            torchopt.recover_state_dict(adapted, start)
            torchopt.recover_state_dict(inner, inner_start)
        return torch.stack(losses).mean()

    return _step(own, meta_loss)


def _peer(name: str) -> ModuleType | str:
    """Imports the library, or says why it cannot."""
    folder = os.environ.get(PEERS)
    if folder is None:
        return f"{name} is looked for in the folder {PEERS}: {INSTALL}, {PEERS}=DIR"
    if folder not in sys.path:
        sys.path.append(folder)  # last: what the peers bring along hides nothing
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"{error} (of {PEERS}: {INSTALL})"


def checkpoint_memory(tasks: int) -> dict[str, float]:
    """Measures how much more memory up to 20 inner steps of a sine step take than one of them, with ``checkpoint=True``."""
    torch.manual_seed(SEED)
    model, data = sine_net(), sine_data(tasks, 10)
    used = {}
    for steps in MEMORY_STEPS:
        maml = MAML(model, 0.01, steps, checkpoint=True)

        def step(maml: MAML = maml) -> None:
            maml(F.mse_loss, (data.x, data.y), (data.query_x, data.query_y)).backward()

        step()  # what is allocated once
        model.zero_grad()
        used[steps] = _peak(step)
    return {
        "memory of 20 inner steps / of 1": max(used.values()) / used[1],
        "memory of 1 inner step, MB": used[1] / 1e6,
    }


def _peak(function: Callable[[], None]) -> int:
    """Returns the most bytes of tensors that were in use at once, beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
