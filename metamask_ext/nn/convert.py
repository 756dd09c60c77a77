"""From a plain torch model to a masked one, and back for one task."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypedDict, TypeVar

import torch
from torch import nn

from ..ops.checks import DTYPES
from .layers import MaskedConv2d, MaskedLinear
from .masked_layer import MaskedLayer, MaskInit
from .names import DEFAULT_TASK
from .paths import plain_path
from .per_task import PerTask, keep_per_task, plain_copy
from .read_through import ReadThroughConv2d, ReadThroughLinear
from .reads import forget, is_read
from .task_layer import TaskLayer, task_keys, task_layers
from .task_masks import check_mask_dtype
from .tasks import refuse_nan, slots
from .wrappers import check_may_grow

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)


class GateOptions(TypedDict, total=False):
    """The options of :func:`convert` that describe the gate of the new layers."""

    gate: str
    temperature: float
    threshold: float


CONVERTED_MASK_INIT = 4.0
"""sigmoid(4) = 0.982: a converted model begins near the original, with a gate that still has a gradient."""


def convert(
    model: Model,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    mask_init: MaskInit = CONVERTED_MASK_INIT,
    mask_dtype: torch.dtype | None = None,
    batch_norm: str = "shared",
    **options: Unpack[GateOptions],
) -> Model:
    """Make the Linear and Conv2d layers of ``model`` masked, in place, and return it.

    The layers keep their identity, parameters (so ties and optimisers hold), hooks, device, dtype and mode. A layer that is masked
    stays as it is.

    If the code around a layer reads ``layer.weight`` itself instead of calling the layer (``MultiheadAttention``'s ``out_proj``,
    ``TransformerEncoderLayer``'s fast path), that attribute becomes the masked weight. This is seen in the bytecode of ``forward``
    of the modules around it, and of the methods and neighbouring functions that it uses; where the owner of a ``weight`` has no
    name there (``for layer in self.layers: layer.weight``), all layers below that module count as read. Not seen are
    ``getattr(layer, "weight")``, hooks and functions of other packages: make those call ``layer(x)``. Parameters that are not a
    layer's (``MultiheadAttention``'s ``in_proj_weight``) stay plain.

    Args:
        model: any module; a Linear or Conv2d itself too.
        include: glob patterns of qualified names of layers (``"layer4.*"``), without the prefixes of wrappers; None: all.
        exclude: patterns of names to leave plain.
        mask_init: see :class:`metamask_ext.nn.MaskedLinear`; +4 unless given, which keeps the output near the original's.
        mask_dtype: see :class:`metamask_ext.nn.MaskedLinear`. None: masks are float32 (float64 for float64 weights), in a model of
            16 bits too.
        batch_norm: ``"shared"`` leaves BatchNorm2d as it is: training a task moves the statistics that all tasks use, and earlier
            tasks lose accuracy down to chance, unless they are frozen by ``eval()``. ``"task"`` makes each chosen BatchNorm2d a
            :class:`metamask_ext.nn.TaskBatchNorm2d`, whose first task begins with what is there.
        options: ``gate``, ``temperature``, ``threshold`` of the new layers.

    Returns:
        ``model``. New layers get the tasks of the model's masked layers, or ``"default"``.

    Raises:
        ValueError: a pattern that matches no Linear or Conv2d, an option out of range, a layer whose forward or weight is not
            torch's own (a subclass with its own forward, a parametrized or lazy layer): exclude it. Nothing is changed then.
        TypeError: an unknown option, a ``mask_dtype`` that a layer's weight cannot have beside it, a model that is no module.
        RuntimeError: a ``DistributedDataParallel`` or ``fully_shard`` holds a chosen layer; it would not synchronise the masks.
    """
    gate: GateOptions = {"gate": "sigmoid", "temperature": 1.0, "threshold": 0.0}
    if unknown := sorted(options.keys() - gate.keys()):
        raise TypeError(f"convert takes the options gate, mask_dtype, mask_init, temperature, threshold, got {', '.join(unknown)}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    gate.update(options)
    if batch_norm not in ("shared", "task"):
        raise ValueError(f"batch_norm must be 'shared' or 'task', got {batch_norm!r}")
    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm2d) if batch_norm == "task" else (nn.Linear, nn.Conv2d)

    forget()  # a method may have been replaced since
    # A layer may be reached by several names: it is one layer, and read if it is read under any of them.
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            names.setdefault(module, []).append(name)
    plain = {module: [plain_path(model, name) for name in given] for module, given in names.items()}
    selected = [module for module in _select(plain, include, exclude) if not isinstance(module, TaskLayer)]
    chosen = [module for module in selected if not isinstance(module, nn.BatchNorm2d)]
    for module in chosen:
        _check_convertible(plain[module][0], module)
        if (weight := module._parameters["weight"]) is not None:
            check_mask_dtype(mask_dtype, weight.dtype, plain[module][0])
    normalising = [module for module in selected if isinstance(module, nn.BatchNorm2d)]
    for module in normalising:
        _check_batch_norm(plain[module][0], module)

    check_may_grow(selected, f"{type(model).__name__} cannot be converted")

    present = any(isinstance(module, TaskLayer) for module in model.modules())
    by_slot: list[str | None] = slots(model) if present else [DEFAULT_TASK]
    task_names = [name for name in by_slot if name is not None]
    made: list[tuple[nn.Module, MaskedLayer]] = []
    for module in chosen:
        # A stand-in with the layer's parameters: what can fail fails on it.
        masked = _stand_in(module, any(is_read(model, name) for name in names[module]))
        masked._init_masked(**gate, mask_init=mask_init, mask_dtype=mask_dtype, tasks=task_names)
        for tensors in masked._dicts().values():
            tensors._renumber(by_slot)
        made.append((module, masked))

    for module, masked in made:
        # The class changes, not the object: whoever holds the layer holds the masked one.
        module._modules.update(masked._modules)
        module.__class__ = type(masked)
        module.__dict__.update({key: value for key, value in masked.__dict__.items() if key != "_modules"})
    for module in normalising:
        keep_per_task(module, _tensor_names(module), by_slot)
    return model


def _stand_in(module: nn.Module, read: bool) -> MaskedLayer:
    """A masked layer over the parameters of ``module``, without masks yet. ``read``: other code reads its weight."""
    if isinstance(module, nn.Linear):
        kind: type[MaskedLayer] = ReadThroughLinear if read else MaskedLinear
    else:
        kind = ReadThroughConv2d if read else MaskedConv2d
    masked = kind.__new__(kind)
    masked.__dict__.update(module.__dict__, _modules=dict(module._modules))
    if type(module) is not kind.plain_type:
        masked.plain_type = type(module)
    return masked


def merge(model: Model, task: str) -> Model:
    """A copy of ``model`` as a plain torch model of one task: ``weight = W * g(M_task)`` baked in, no masks, for export.

    Layers that share a weight and its mask go on sharing; two that share a weight but not a mask have each their own afterwards.

    Args:
        model: a module with masked layers; it is not changed.
        task: the task to keep.

    Raises:
        ValueError: the task is unknown, its logits hold NaN, or ``model`` has no masked layer.
    """
    task_keys(task_layers(model), task)
    layers = [layer for _, layer in task_layers(model)]
    refuse_nan(model, [task], "merged")
    with torch.inference_mode(False):
        return _merged(model, layers, task)


def _merged(model: Model, layers: list[TaskLayer], task: str) -> Model:
    plains = [layer.plain_type.__new__(layer.plain_type) for layer in layers]
    memo: dict[int, object] = {id(layer): plain for layer, plain in zip(layers, plains)}
    baked: dict[tuple[object, ...], nn.Parameter] = {}
    for layer, plain in zip(layers, plains):
        if isinstance(layer, MaskedLayer):
            _fill_plain(plain, layer, task, memo, baked)
        elif isinstance(layer, PerTask):
            plain_copy(layer, task, plain, memo)
    return copy.deepcopy(model, memo)


def _fill_plain(
    plain: nn.Module,
    layer: MaskedLayer,
    task: str,
    memo: dict[int, object],
    baked: dict[tuple[object, ...], nn.Parameter],
) -> None:
    ours = {"gate", "temperature", "threshold", "mask_init", "mask_dtype", "plain_type", "bias_masks", "_parameters", "_modules"}
    state = {key: value for key, value in layer.__dict__.items() if key not in ours}
    others = {key: value for key, value in layer._parameters.items() if key not in ("weight", "bias")}
    children = {key: value for key, value in layer._modules.items() if key not in ("masks", "bias_masks", "parametrizations")}
    plain.__dict__.update(copy.deepcopy(state, memo))
    plain.__dict__["_parameters"] = {"weight": None, "bias": None, **copy.deepcopy(others, memo)}
    plain.__dict__["_modules"] = copy.deepcopy(children, memo)
    for name, (shared, masks) in zip(("weight", "bias"), layer._groups()):
        gate = layer._gate()
        key = (id(shared), id(masks[task]), *gate.values())
        if key not in baked:
            with torch.no_grad():
                theta = layer._theta(name, layer._task_key(task))
            assert theta is not None
            baked[key] = nn.Parameter(theta, requires_grad=shared.requires_grad)
        plain._parameters[name] = baked[key]


def _select(
    names: dict[nn.Module, list[str]], include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> list[nn.Module]:
    def matching(argument: str, patterns: str | Iterable[str]) -> set[nn.Module]:
        found: set[nn.Module] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            layers = {layer for layer, given in names.items() if any(fnmatchcase(name, pattern) for name in given)}
            if not layers:
                raise ValueError(
                    f"{argument} pattern {pattern!r} matches no Linear or Conv2d of the model (those below a module: 'module.*')"
                )
            found |= layers
        return found

    included = set(names) if include is None else matching("include", include)
    excluded = set() if exclude is None else matching("exclude", exclude)
    return [layer for layer in names if layer in included and layer not in excluded]


def _check_convertible(name: str, module: nn.Module) -> None:
    plain = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    kind = type(module)
    weight = module._parameters.get("weight")
    reason = None
    if isinstance(weight, nn.UninitializedParameter):
        reason = "it is lazy: run the model once first"
    elif not isinstance(weight, nn.Parameter) or "bias" not in module._parameters:
        reason = "its weight is not a parameter of its own (parametrized, pruned or normalised)"
    elif "forward" in module.__dict__ or any(getattr(kind, method, None) is not getattr(plain, method, None) for method in _CALLED):
        reason = "its forward is not torch's own"
    elif taken := [attribute for attribute in _ADDED if hasattr(module, attribute)]:
        reason = f"it has an attribute {taken[0]!r} of its own"
    elif kind.__basicsize__ != plain.__basicsize__:
        reason = "its class has __slots__"
    elif weight.dtype not in DTYPES:
        reason = f"its weight is {weight.dtype}, not float64, float32, bfloat16 or float16"
    if reason is not None:
        raise ValueError(f"cannot mask {name or 'the model'!r}, a {kind.__name__}: {reason}. Leave it plain with exclude={name!r}")


def _check_batch_norm(name: str, module: nn.Module) -> None:
    if type(module) is not nn.BatchNorm2d or "forward" in module.__dict__ or not _tensor_names(module):
        reason = "it has no statistics and no affine part" if type(module) is nn.BatchNorm2d else f"it is a {type(module).__name__}"
        raise ValueError(f"batch_norm='task' cannot make a TaskBatchNorm2d of {name or 'the model'!r}: {reason}. exclude={name!r}")


def _tensor_names(module: nn.Module) -> list[str]:
    return [name for kept in (module._parameters, module._buffers) for name, tensor in kept.items() if tensor is not None]


_CALLED = ("forward", "_conv_forward", "weight", "bias", "__call__", "_call_impl", "__getattr__")
"""The attributes that decide the output of a layer."""

_ADDED = (
    *("gate", "temperature", "threshold", "mask_init", "mask_dtype", "plain_type"),
    *("masks", "bias_masks", "mask_logits", "bias_mask_logits"),
)
