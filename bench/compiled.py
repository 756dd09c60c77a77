"""Problems of compiled models: one graph for all tasks, against a graph that breaks at every masked layer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import metamask_ext
from metamask_ext import add_task, using_task
from metamask_ext.nn import MaskedLinear

from .problem import COMPILED, COMPILED_OURS, METAMASK, SEED, Contender, Function, Problem, Work

TASKS, BATCH = 10, 16


def many_layers(layers: int, width: int, mode: str) -> Problem:
    """Square masked layers with tanh between them, of several tasks, under one of these.

    ``compiled`` is ``torch.compile(model)``, ``compiled-ours`` :func:`metamask_ext.compile`; ``metamask`` is eager mode.

    Args:
        mode: ``"forward"``, or ``"backward"``: forward and the gradients of the weights and of the task's masks.
    """
    torch.manual_seed(SEED)
    model = nn.Sequential(*(part for _ in range(layers) for part in (MaskedLinear(width, width), nn.Tanh())))
    names = [f"task {number}" for number in range(TASKS)]
    for name in names:
        add_task(model, name)
    x = torch.randn(BATCH, width)

    def work(of: nn.Module, call: Function, x: Tensor) -> Work:
        found = [module for module in of.modules() if isinstance(module, MaskedLinear)]
        wanted = [tensor for layer in found for tensor in (layer.weight, layer.masks[names[1]])]

        def forward() -> tuple[Tensor, ...]:
            with using_task(of, names[1]):
                return (call(x),)

        def backward() -> tuple[Tensor, ...]:
            (output,) = forward()
            return (output, *torch.autograd.grad(output.sum(), wanted))

        def without_gradients() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return forward()

        return backward if mode == "backward" else without_gradients

    def exact() -> tuple[Tensor, ...]:
        wide = copy.deepcopy(model).double()
        return work(wide, wide, x.double())()

    plain, ours = copy.deepcopy(model), metamask_ext.compile(copy.deepcopy(model), fullgraph=True)
    # Names of results: a weight and a mask for each layer.
    names_of = ("output", *(f"gradient {number}" for number in range(2 * layers if mode == "backward" else 0)))
    works = {METAMASK: work(model, model, x), COMPILED: work(plain, torch.compile(plain), x), COMPILED_OURS: work(ours, ours, x)}
    contenders = {name: Contender(its, exact, names_of) for name, its in works.items()}
    return Problem(contenders, width, tolerance=1e-4)
