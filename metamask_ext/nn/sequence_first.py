"""Finds the modules of a model that take a sequence first, ``[L, B, ...]``, and the layers below them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import GraphModule

from .known import modules_of
from .names import describe
from .paths import plain_modules
from .selection import TaskBatch
from .task_layer import TaskLayer

_TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""They hand their ``batch_first`` to their attention and do not keep it."""


def batch_first_layers(model: nn.Module) -> dict[nn.Module, bool | None]:
    """The task layers of ``model``: False below a module with ``batch_first=False`` (the nearest with that attribute counts), True
    elsewhere, None for a layer that is in both places. Empty if the model has no such module.

    A graph of torch.fx may have had some: it keeps the layers, and not the modules around them.
    """
    if not any(_batch_first(module) is False or isinstance(module, GraphModule) for module in modules_of(model)):
        return {}
    found: dict[nn.Module, bool | None] = {}
    for layer, is_first in _below(model, True, set()):
        found[layer] = is_first if found.get(layer, is_first) is is_first else None
    return found


def batch_views(model: nn.Module, batch: TaskBatch) -> dict[nn.Module, TaskBatch]:
    """The batch as the layers of ``model`` see it for which it does not simply lie along the first dimension.

    Layers below a module with ``batch_first=False`` have it as their second dimension. The other layers of such a model have the
    first, unless an input could have either.

    Raises:
        ValueError: a layer is below such a module and elsewhere too.
    """
    layers = batch_first_layers(model)
    if batch.differs and None in layers.values():
        both = [name for name, module in plain_modules(model) if layers.get(module, True) is None]
        raise ValueError(
            f"batch_dim must be 0 or 1, got None: the model uses layers below a module with batch_first=False and elsewhere, "
            f"{describe(both)}"
        )
    second, first = batch.along(1), batch.along(0, guessed=True)
    return {layer: second if is_first is False else first for layer, is_first in layers.items()}


def _below(module: nn.Module, is_first: bool, seen: set[tuple[nn.Module, bool]]) -> Iterator[tuple[TaskLayer, bool]]:
    """The task layers of ``module``, and whether the batch comes first there: once, or twice where both is so in two places."""
    own = _batch_first(module)
    is_first = is_first if own is None else own
    if (module, is_first) in seen:
        return
    seen.add((module, is_first))
    if isinstance(module, TaskLayer):
        yield module, is_first
    for child in module.children():
        yield from _below(child, is_first, seen)


def _batch_first(module: nn.Module) -> bool | None:
    """The attribute ``batch_first`` of a module, if it has one that is True or False."""
    # Not hasattr: where there is none, it takes torch's modules a microsecond.
    if "batch_first" in module.__dict__ or hasattr(type(module), "batch_first"):
        value = module.batch_first
        return value if isinstance(value, bool) else None
    return _batch_first(module.self_attn) if isinstance(module, _TRANSFORMERS) else None
