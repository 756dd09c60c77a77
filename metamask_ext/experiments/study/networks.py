"""Many plain nets of one form, run at once."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metamask_ext.nn.task_dict import TaskDict
from metamask_ext.nn.tasks import masked_layers
from metamask_ext.ops.weight.functional import masked_weight

from .problem import Problem, in_parts

Parameters = dict[str, Tensor]


class GateOptions(TypedDict):
    """Options of :func:`metamask_ext.masked_weight`."""

    gate: str
    temperature: float
    threshold: float


class Nets:
    """The plain net of a problem with the parameters of many: each a stack ``[R, ...]`` by name."""

    def __init__(self, problem: Problem):
        self.plain = problem.plain().requires_grad_(False)
        # Under vmap convolutions become one of many groups, on a CPU slower than one after the other: 136 ms against 78 for 21
        # nets of ``mnist`` and 32 images each, forward and backward.
        self._one_by_one = any(isinstance(module, nn.Conv2d) for module in self.plain.modules())

    def __call__(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Outputs ``[R, n, ...]`` for ``x`` ``[R, n, ...]``, each net with its own."""
        if self._one_by_one:
            return torch.stack([self.one(parameters, row, part) for row, part in enumerate(x)])
        return torch.vmap(lambda own, part: functional_call(self.plain, own, (part,)))(parameters, x)

    def one(self, parameters: Parameters, row: int, x: Tensor) -> Tensor:
        """Outputs ``[n, ...]`` of net ``row`` for ``x`` ``[n, ...]``."""
        own = {name: stack[row] for name, stack in parameters.items()}
        return in_parts(lambda part: functional_call(self.plain, own, (part,)), x)


def stacked_masks(model: nn.Module, names: list[str]) -> Parameters:
    """The masks of these tasks ``[T, ...]``, by the name of the weight or bias that they belong to."""
    found: Parameters = {}
    for prefix, layer in masked_layers(model):
        for kind, masks in (("weight", layer.masks), ("bias", layer.bias_masks)):
            if masks is not None:
                found[f"{prefix}.{kind}" if prefix else kind] = torch.stack([masks[name].detach() for name in names])
    return found


def gate_options(model: nn.Module) -> GateOptions:
    """The gate of the model's layers, which is the same for all."""
    kinds = {(layer.gate, layer.temperature, layer.threshold) for _, layer in masked_layers(model)}
    ((gate, temperature, threshold),) = kinds
    return {"gate": gate, "temperature": temperature, "threshold": threshold}


@torch.no_grad()
def gates(model: nn.Module, names: list[str]) -> Parameters:
    """``g(M)`` of these tasks ``[T, ...]``, by the name of the weight or bias that they belong to."""
    options = gate_options(model)
    return {key: masked_weight(torch.ones_like(masks), masks, **options) for key, masks in stacked_masks(model, names).items()}


def shared_parameters(model: nn.Module) -> Parameters:
    """The parameters that belong to no task, by name, of a masked model or a plain one."""
    of_tasks = {id(parameter) for module in model.modules() if isinstance(module, TaskDict) for parameter in module.parameters()}
    return {name: parameter.detach() for name, parameter in model.named_parameters() if id(parameter) not in of_tasks}
