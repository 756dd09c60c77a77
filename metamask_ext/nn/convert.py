"""From a plain torch model to a masked one."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypedDict, TypeVar

import torch
from torch import nn

from .adapters import adapters_in
from .convertible import has_own_forward, holds_matrix, own_tensors, unmasked, unsupported, unsupported_norm
from .layers import MaskedConv2d, MaskedLinear
from .masked_layer import MaskedLayer
from .names import DEFAULT_TASK
from .own_forward import own_forward_type
from .paths import plain_path
from .per_task import keep_per_task
from .read_through import ReadThroughConv2d, ReadThroughLinear
from .reads import forget, is_read
from .task_layer import TaskLayer
from .task_masks import MaskInit, check_mask_dtype
from .tasks import slots
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
    on_unsupported: str = "report",
    **options: Unpack[GateOptions],
) -> Model:
    """Make the Linear and Conv2d layers of ``model`` masked, in place, and return it.

    The layers keep their identity, parameters (so ties and optimisers hold), hooks, device, dtype and mode. A layer that is masked
    stays as it is. A subclass of Linear or Conv2d with a forward of its own keeps that, which then reads the masked weight. What
    cannot be masked (parametrized, pruned, lazy, quantised layers, a forward that was replaced on the object) is left plain.

    If the code around a layer reads ``layer.weight`` itself instead of calling the layer (``MultiheadAttention``'s ``out_proj``,
    ``TransformerEncoderLayer``'s fast path), that attribute becomes the masked weight. This is seen in the bytecode of ``forward``
    of the modules around it, and of the methods and neighbouring functions that it uses; where the owner of a ``weight`` has no
    name there (``for layer in self.layers: layer.weight``), all layers below that module count as read. Not seen are
    ``getattr(layer, "weight")``, hooks and functions of other packages: make those call ``layer(x)``. Parameters that are not a
    layer's (``MultiheadAttention``'s ``in_proj_weight``) stay plain, and so do the adapters of PEFT: of a model with some, the base
    layers are masked.

    Args:
        model: any module; a Linear or Conv2d itself too.
        include: glob patterns of qualified names of layers (``"layer4.*"``), without the prefixes of wrappers; None: all.
        exclude: patterns of names to leave plain.
        mask_init: see :class:`metamask_ext.nn.MaskedLinear`; +4 unless given, which keeps the output near the original's.
        mask_dtype: see :class:`metamask_ext.nn.MaskedLinear`. None: masks are float32 (float64 for float64 weights), in a model of
            16 bits too.
        batch_norm: ``"shared"`` leaves BatchNorm2d as it is: training a task moves the statistics that all tasks use, and earlier
            tasks lose accuracy down to chance, unless they are frozen by ``eval()``. ``"task"`` makes each chosen BatchNorm2d a
            :class:`metamask_ext.nn.TaskBatchNorm2d`, whose first task begins with what is there; one of a subclass keeps its own
            forward.
        on_unsupported: ``"report"`` leaves what cannot be masked as it is: :func:`metamask_ext.conversion_report` lists it with
            the reasons. ``"error"`` refuses a model in which something is left that ``exclude`` does not name: a layer that cannot
            be converted, and (without ``include``) any other module with a parameter of two dimensions or more, as embeddings.
        options: ``gate``, ``temperature``, ``threshold`` of the new layers.

    Returns:
        ``model``. New layers get the tasks of the model's masked layers, or ``"default"``.

    Raises:
        ValueError: a pattern that matches no Linear or Conv2d (of ``exclude``: no module with parameters), an option out of range;
            with ``on_unsupported="error"``, a module that is left. Nothing is changed then.
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
    if on_unsupported not in ("report", "error"):
        raise ValueError(f"on_unsupported must be 'report' or 'error', got {on_unsupported!r}")
    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm2d) if batch_norm == "task" else (nn.Linear, nn.Conv2d)

    forget()  # a method may have been replaced since
    # A layer may be reached by several names: it is one layer, and read if it is read under any of them.
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds) or unmasked(module):
            names.setdefault(module, []).append(name)
    plain = {module: [plain_path(model, name) for name in given] for module, given in names.items()}
    adapters = adapters_in(model)
    wanted = [module for module in _select(plain, kinds, adapters, include, exclude) if not isinstance(module, TaskLayer)]
    reasons = {module: _reason(module, kinds) for module in wanted}
    if on_unsupported == "error":
        _refuse({plain[module][0]: (module, reason) for module, reason in reasons.items() if reason is not None})
    selected = [module for module in wanted if reasons[module] is None and isinstance(module, kinds)]
    chosen = [module for module in selected if not isinstance(module, nn.BatchNorm2d)]
    for module in chosen:
        if (weight := module._parameters["weight"]) is not None:
            check_mask_dtype(mask_dtype, weight.dtype, plain[module][0])
    normalising = [module for module in selected if isinstance(module, nn.BatchNorm2d)]

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
        keep_per_task(module, own_tensors(module), by_slot)
    return model


def _stand_in(module: nn.Module, read: bool) -> MaskedLayer:
    """A masked layer over the parameters of ``module``, without masks yet. ``read``: other code reads its weight."""
    kind: type[MaskedLayer]
    if has_own_forward(module):
        kind = own_forward_type(type(module))
    elif isinstance(module, nn.Linear):
        kind = ReadThroughLinear if read else MaskedLinear
    else:
        kind = ReadThroughConv2d if read else MaskedConv2d
    masked = kind.__new__(kind)
    masked.__dict__.update(module.__dict__, _modules=dict(module._modules))
    if type(module) is not kind.plain_type:
        masked.plain_type = type(module)
    return masked


def _select(
    names: dict[nn.Module, list[str]],
    kinds: tuple[type[nn.Module], ...],
    adapters: set[nn.Module],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
) -> list[nn.Module]:
    """The modules that are asked for: of ``kinds`` where ``include`` names them, else all that have parameters; no ``adapters``."""

    def matching(argument: str, patterns: str | Iterable[str], among: list[nn.Module]) -> set[nn.Module]:
        found: set[nn.Module] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            layers = {layer for layer in among if any(fnmatchcase(name, pattern) for name in names[layer])}
            if not layers:
                raise ValueError(
                    f"{argument} pattern {pattern!r} matches no Linear or Conv2d of the model (those below a module: 'module.*')"
                )
            found |= layers
        return found

    own = [module for module in names if isinstance(module, kinds) and module not in adapters]
    included = names.keys() - adapters if include is None else matching("include", include, own)
    excluded = set() if exclude is None else matching("exclude", exclude, list(names))
    return [layer for layer in names if layer in included and layer not in excluded]


def _reason(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """The reason why a module with parameters is left; None if it is not, or has but scales and shifts."""
    if not isinstance(module, kinds):
        return f"{', '.join(unmasked(module))}: neither Linear nor Conv2d" if holds_matrix(module) else None
    return unsupported_norm(module) if isinstance(module, nn.BatchNorm2d) else unsupported(module)


def _refuse(found: dict[str, tuple[nn.Module, str]]) -> None:
    """Refuse modules, by name, each for its reason."""
    if found:
        each = [f"{name or 'the model'!r}, a {type(module).__name__}: {reason}" for name, (module, reason) in found.items()]
        exclude = next(iter(found)) if len(found) == 1 else list(found)
        raise ValueError(f"cannot mask {'; '.join(each)}. Leave it plain with exclude={exclude!r}")
