"""Masked layers that other tools put below modules of their own, or exchange for others: seen when a module is registered."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .adapters import BASE_LAYERS, holds_base
from .masked_layer import MaskedLayer
from .per_task import PerTask
from .read_through import ReadThrough, read_through_type


def _registered(module: nn.Module, name: str, child: nn.Module | None) -> None:
    # Dynamo cannot look at a module that is half made.
    if child is None or torch.compiler.is_dynamo_compiling():
        return
    if name in BASE_LAYERS and isinstance(child, (MaskedLayer, PerTask)) and holds_base(module):
        _below_adapter(child)
    before = module._modules.get(name)
    if isinstance(before, MaskedLayer) and not isinstance(child, MaskedLayer):
        _refuse_unmasked(before, child)


def _below_adapter(layer: MaskedLayer | PerTask) -> None:
    """Make ``weight`` of a layer that PEFT has taken the masked one: what is merged into it would be masked, and is refused."""
    if isinstance(layer, PerTask):
        raise RuntimeError(
            f"{type(layer).__name__} cannot be the base of an adapter: it has tensors of each task, and the adapter would be "
            "merged into those of one. Leave it out of target_modules"
        )
    if not isinstance(layer, ReadThrough):
        layer.__class__ = read_through_type(type(layer))


def _refuse_unmasked(layer: MaskedLayer, other: nn.Module) -> None:
    """Refuse a plain layer over the parameters of the masked one whose place it takes, as tools for quantised training make it."""
    held = {id(parameter) for parameter in other._parameters.values() if parameter is not None}
    if any(id(parameter) in held for parameter in layer._parameters.values()):
        raise RuntimeError(
            f"a {type(other).__name__} cannot take the place of a {type(layer).__name__} and its parameters: the masks would be "
            "lost. Use metamask_ext.merge(model, task) first"
        )


def watch() -> None:
    """Look at every module that is registered in another, from now on."""
    register_module_module_registration_hook(_registered)
