"""From a plain torch model to a masked one, and back for one task."""

from __future__ import annotations

import copy
import dis
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from .. import functional
from .layers import DEFAULT_TASK, MaskedConv2d, MaskedLayer, MaskedLinear, ReadThroughConv2d, ReadThroughLinear
from .tasks import masked_layers, tasks

Model = TypeVar("Model", bound=nn.Module)

CONVERTED_MASK_INIT = 4.0
"""sigmoid(4) = 0.982: a converted model begins near the original, with a gate that still has a gradient."""


def convert(
    model: Model,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    mask_init: Any = CONVERTED_MASK_INIT,
    **options: Any,
) -> Model:
    """Make the Linear and Conv2d layers of ``model`` masked, in place, and return it.

    The layers keep their identity, parameters (so ties and optimisers hold), hooks, device, dtype and mode. A layer that is masked
    stays as it is. Where the code around a layer reads ``layer.weight`` itself instead of calling the layer
    (``MultiheadAttention``'s ``out_proj``, ``TransformerEncoderLayer``'s fast path), that attribute becomes the masked weight; this is
    seen in the bytecode of the ``forward`` of the modules around it, as an expression that ends in ``.<layer>.weight``.

    Args:
        model: any module; a Linear or Conv2d itself too.
        include: glob patterns of qualified module names (``"layer4.*"``); None: all.
        exclude: patterns of names to leave plain.
        mask_init: see :class:`metamask_ext.nn.MaskedLinear`; +4 unless given, which keeps the output near the original's.
        options: ``gate``, ``temperature``, ``threshold`` of the new layers.

    Returns:
        ``model``. New layers get the tasks of the model's masked layers, or ``"default"``.

    Raises:
        ValueError: a pattern that matches no module, a layer whose forward or weight is not torch's own (a subclass, a parametrized
            or lazy layer): exclude it. Nothing is changed then.
        TypeError: an unknown option.
    """
    settings = {"gate": "sigmoid", "temperature": 1.0, "threshold": 0.0, "mask_init": mask_init}
    if unknown := sorted(options.keys() - settings.keys()):
        raise TypeError(f"convert takes the options {', '.join(sorted(settings))}, got {', '.join(unknown)}")
    settings.update(options)

    modules = dict(model.named_modules())
    chosen = _select(modules, include, exclude)
    plan: list[tuple[nn.Module, type[MaskedLayer]]] = []
    for name in chosen:
        module = modules[name]
        if isinstance(module, MaskedLayer) or not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        _check_convertible(name, module)
        if isinstance(module, nn.Linear):
            kind = ReadThroughLinear if _is_read(model, name) else MaskedLinear
        else:
            kind = ReadThroughConv2d if _is_read(model, name) else MaskedConv2d
        plan.append((module, kind))

    present = any(isinstance(module, MaskedLayer) for module in modules.values())
    names = tasks(model) if present else [DEFAULT_TASK]
    for module, kind in plan:
        # The class changes, not the object: whoever holds the layer holds the masked one.
        converted: Any = module
        converted.__class__ = kind
        converted._init_masked(**settings, tasks=names)
    return model


def merge(model: Model, task: str) -> Model:
    """A copy of ``model`` as a plain torch model of one task: ``weight = W * g(M_task)`` baked in, no masks, for export.

    Two layers that share a weight but not a mask have each their own weight afterwards.

    Args:
        model: a module with masked layers; it is not changed.
        task: the task to keep.

    Raises:
        ValueError: the task is unknown, or ``model`` has no masked layer.
    """
    memo: dict[int, Any] = {}
    layers = [layer for _, layer in masked_layers(model)]
    for layer in layers:
        layer._task_key(task)
    for layer in layers:
        memo[id(layer)] = layer.plain_type.__new__(layer.plain_type)
    for layer in layers:
        _fill_plain(memo[id(layer)], layer, task, memo)
    return copy.deepcopy(model, memo)


def _fill_plain(plain: nn.Module, layer: MaskedLayer, task: str, memo: dict[int, Any]) -> None:
    ours = {"gate", "temperature", "threshold", "mask_init", "bias_masks", "_parameters", "_modules"}
    state = {key: value for key, value in layer.__dict__.items() if key not in ours}
    plain.__dict__.update(copy.deepcopy(state, memo))
    plain.__dict__["_parameters"] = {"weight": None, "bias": None}
    plain.__dict__["_modules"] = {}
    with torch.no_grad():
        for name, (shared, masks) in zip(("weight", "bias"), layer._groups()):
            theta = functional.masked_weight(shared, masks[task], **layer._gate())
            setattr(plain, name, nn.Parameter(theta, requires_grad=shared.requires_grad))


def _select(
    modules: dict[str, nn.Module], include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> list[str]:
    def matching(argument: str, patterns: str | Iterable[str]) -> set[str]:
        found: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            names = {name for name in modules if fnmatchcase(name, pattern)}
            if not names:
                raise ValueError(f"{argument} pattern {pattern!r} matches no module of the model")
            found |= names
        return found

    included = set(modules) if include is None else matching("include", include)
    excluded = set() if exclude is None else matching("exclude", exclude)
    return [name for name in modules if name in included and name not in excluded]


def _check_convertible(name: str, module: nn.Module) -> None:
    plain = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    reason = None
    if type(module).forward is not plain.forward:
        reason = "its forward is not torch's own"
    elif not isinstance(module._parameters.get("weight"), nn.Parameter) or "bias" not in module._parameters:
        reason = "its weight is not a parameter of its own (parametrized, pruned or normalised)"
    elif isinstance(module.weight, nn.parameter.UninitializedTensorMixin):
        reason = "it is lazy: run the model once first"
    if reason is not None:
        raise ValueError(
            f"cannot mask {name or 'the model'!r}, a {type(module).__name__}: {reason}. Leave it plain with exclude={name!r}"
        )


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether a module around the layer ``name`` reads its weight or bias in ``forward``, as in ``F.linear(x, self.fc.weight)``."""
    *outer, own = name.split(".")
    around = [model]
    for part in outer:
        around.append(around[-1].get_submodule(part))
    return any(own in _layers_read(type(module)) for module in around if name)


def _layers_read(kind: type[nn.Module]) -> set[str]:
    """The names ``f`` in every ``….f.weight`` and ``….f.bias`` that the class's ``forward`` evaluates."""
    instructions: list[dis.Instruction] = list(_instructions(kind.forward))
    return {
        str(owner.argval)
        for owner, attribute in zip(instructions, instructions[1:])
        if owner.opname == attribute.opname == "LOAD_ATTR" and attribute.argval in ("weight", "bias")
    }


def _instructions(function: Any) -> Iterator[dis.Instruction]:
    code = getattr(function, "__code__", None)
    if code is not None:
        yield from (instruction for instruction in dis.get_instructions(code) if instruction.opname != "CACHE")
