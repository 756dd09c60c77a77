"""Finds the modules of a model that take a sequence first, ``[L, B, ...]``, and the layers below them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .names import describe
from .selection import TaskBatch
from .task_layer import TaskLayer

_TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""They hand their ``batch_first`` to their attention and do not keep it."""


def batch_views(model: nn.Module, batch: TaskBatch) -> dict[nn.Module, TaskBatch]:
    """The batch as the layers of ``model`` see it for which it does not simply lie along the first dimension.

    Layers below a module with ``batch_first=False`` (the nearest with that attribute counts) have it as their second dimension. The
    other layers of such a model have the first, unless an input could have either.

    Raises:
        ValueError: a layer is below such a module and elsewhere too.
    """
    if not any(_batch_first(module) is False for module in model.modules()):
        return {}
    found: dict[nn.Module, set[bool]] = {}
    names: dict[nn.Module, str] = {}
    for name, layer, is_first in _below(model, "", True, set()):
        found.setdefault(layer, set()).add(is_first)
        names[layer] = name
    both = [names[layer] for layer, seen in found.items() if len(seen) > 1]
    if both and len(batch.keys) > 1:
        raise ValueError(
            f"layers of the model are used below a module with batch_first=False and elsewhere: {describe(both)}. Give batch_dim"
        )
    second, first = batch.along(1), batch.along(0, guessed=True)
    return {layer: first if True in seen else second for layer, seen in found.items()}


def _below(
    module: nn.Module, name: str, is_first: bool, seen: set[tuple[nn.Module, bool]]
) -> Iterator[tuple[str, TaskLayer, bool]]:
    """The task layers of ``module``, and whether the batch comes first there: once, or twice where both is so in two places."""
    own = _batch_first(module)
    is_first = is_first if own is None else own
    if (module, is_first) in seen:
        return
    seen.add((module, is_first))
    if isinstance(module, TaskLayer):
        yield name, module, is_first
    for key, child in module._modules.items():
        if child is not None:
            yield from _below(child, f"{name}.{key}" if name else key, is_first, seen)


def _batch_first(module: nn.Module) -> bool | None:
    """The attribute ``batch_first`` of a module, if it has one that is True or False."""
    # Not hasattr: where there is none, it takes torch's modules a microsecond.
    if "batch_first" in module.__dict__ or hasattr(type(module), "batch_first"):
        value = module.batch_first
        return value if isinstance(value, bool) else None
    return _batch_first(module.self_attn) if isinstance(module, _TRANSFORMERS) else None
