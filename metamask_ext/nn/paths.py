"""Names of modules and tensors without the prefixes of wrappers: those that the plain model gives them.

A wrapper of torch (``torch.compile``, DistributedDataParallel, DataParallel, FullyShardedDataParallel, activation checkpoints,
AveragedModel), around the model or inside it, is told by its type: a module of a user may be called ``module`` too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..torch_private import wrapped_attribute

StateDict = dict[str, Any]


def plain_path(model: nn.Module, path: str) -> str:
    """The path of a module or tensor of ``model``, as torch gives it, less the attributes in which wrappers hold what they wrap."""
    if "mod" not in path:  # none of the attributes is in it
        return path
    parts: list[str] = []
    module: nn.Module | None = model
    for part in path.split("."):
        if module is None or wrapped_attribute(module) != part:
            parts.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(parts)


def plain_modules(model: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """``model.named_modules()`` by plain paths, without the wrappers themselves."""
    named = model.named_modules(remove_duplicate=remove_duplicate)
    return [(plain_path(model, path), module) for path, module in named if wrapped_attribute(module) is None]


def plain_state(model: nn.Module) -> StateDict:
    """The state dict of ``model`` by plain paths: it loads into the plain model, by :func:`own_state` into a wrapped one."""
    state = model.state_dict()
    plain: StateDict = OrderedDict(_renamed(_plain_paths(model, state), state))
    metadata = getattr(state, "_metadata", {})
    plain._metadata = OrderedDict(_renamed(_plain_paths(model, metadata), metadata))  # type: ignore[attr-defined]  # torch's own
    return plain


def own_state(model: nn.Module, given: Mapping[str, Any]) -> StateDict:
    """A state dict by plain paths, or by those of ``model``, as one that loads into ``model``, whatever its tasks are."""
    own = model.state_dict()
    prefixes = _inverse(_plain_paths(model, [path.rpartition(".")[0] for path in own]))
    state: StateDict = OrderedDict()
    for path, value in given.items():
        prefix, _, name = path.rpartition(".")
        prefix = prefixes.get(prefix, prefix)
        state[f"{prefix}.{name}" if prefix else name] = value
    metadata = getattr(given, "_metadata", None)
    if metadata is not None:
        back = _inverse(_plain_paths(model, getattr(own, "_metadata", {})))
        state._metadata = OrderedDict(_renamed(back, metadata))  # type: ignore[attr-defined]  # torch's own
    return state


def _plain_paths(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    return {path: plain_path(model, path) for path in paths}


def _inverse(paths: Mapping[str, str]) -> dict[str, str]:
    return {plain: path for path, plain in paths.items()}


def _renamed(names: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}
