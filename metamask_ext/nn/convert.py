"""From a plain torch model to a masked one."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from .by_task import split_by_task, unsplittable
from .convertible import (
    has_own_forward,
    holds_matrix,
    is_experts,
    layer_type,
    left_embedding,
    maskable_parameters,
    own_tensors,
    routers_of,
    unmasked,
    unsupported,
    unsupported_norm,
    unsupported_parameter,
)
from .convolutions import MaskedConv1d, MaskedConv3d, MaskedConvTranspose1d, MaskedConvTranspose2d, MaskedConvTranspose3d
from .embedding import MaskedEmbedding
from .layers import MaskedConv2d, MaskedLinear
from .masked_layer import MaskedLayer
from .names import DEFAULT_TASK
from .own_forward import own_forward_type
from .parameter import CONVERTED_MASK_INIT, GateOptions, become, checked_gate, own_stand_in
from .paths import plain_path
from .per_task import keep_per_task
from .read_through import read_through_type
from .reads import forget, is_read
from .task_layer import TaskLayer
from .task_masks import MaskInit, check_mask_dtype
from .tasks import slots
from .wrappers import check_may_grow

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)
Patterns = str | Iterable[str]

_MASKED: dict[type[nn.Module], type[MaskedLayer]] = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
    nn.ConvTranspose1d: MaskedConvTranspose1d,
    nn.ConvTranspose2d: MaskedConvTranspose2d,
    nn.ConvTranspose3d: MaskedConvTranspose3d,
    nn.Embedding: MaskedEmbedding,
}
"""By torch's layer the masked one."""


def convert(
    model: Model,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    *,
    mask_init: MaskInit = CONVERTED_MASK_INIT,
    mask_dtype: torch.dtype | None = None,
    batch_norm: str = "shared",
    on_unsupported: str = "report",
    **options: Unpack[GateOptions],
) -> Model:
    """Make the layers of ``model`` masked, in place, and return it.

    These are Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d to 3d, and the parameters of MultiheadAttention, of transformers'
    ``Conv1D``, and of mixtures of experts that have them in parameters of three dimensions, with their routers; embeddings where
    ``include`` names them. The layers keep their identity, parameters (so tied weights and optimisers work), hooks, device, dtype and mode.
    A layer that is masked stays as it is. A subclass of a layer with a forward of its own keeps that, which then reads the masked
    weight. ``convert`` leaves plain what it cannot mask: parametrized, pruned, lazy and quantised layers, a forward that was
    replaced on the object. :func:`metamask_ext.mask_parameter` masks other parameters, as position embeddings, one by one.

    If the code around a layer reads ``layer.weight`` itself instead of calling the layer (``MultiheadAttention``'s ``out_proj``,
    ``TransformerEncoderLayer``'s fast path), that attribute becomes the masked weight. ``convert`` finds such reads in the bytecode of
    ``forward`` of the modules around it, and of the methods and neighbouring functions that it uses; where the owner of a ``weight`` has no
    name there (``for layer in self.layers: layer.weight``), all layers below that module count as read. It does not see
    ``getattr(layer, "weight")``, hooks and functions of other packages: make those call ``layer(x)``.

    Args:
        model: any module; a layer itself too.
        include: glob patterns of qualified names of layers (``"layer4.*"``), without the prefixes of wrappers; None: all.
        exclude: patterns of names to leave plain.
        mask_init: see :class:`metamask_ext.nn.MaskedLinear`; +4 unless given, which keeps the output near the original's.
        mask_dtype: see :class:`metamask_ext.nn.MaskedLinear`. None: masks are float32 (float64 for float64 weights), in a model of
            16 bits too.
        batch_norm: ``"shared"`` leaves BatchNorm2d as it is: training a task changes the statistics that all tasks use, and the
            accuracy of earlier tasks falls to chance, unless ``eval()`` freezes the statistics. ``"task"`` makes each chosen
            BatchNorm2d a :class:`metamask_ext.nn.TaskBatchNorm2d`, whose first task begins with the present values; a subclass
            keeps its own forward.
        on_unsupported: ``"report"`` leaves what cannot be masked as it is: :func:`metamask_ext.conversion_report` lists it with
            the reasons. ``"error"`` refuses a model in which something is left that ``exclude`` does not name: a layer that cannot
            be converted, and (without ``include``) any other module with a parameter of two dimensions or more, as embeddings.
        options: ``gate``, ``temperature``, ``threshold`` of the new layers.

    Returns:
        ``model``. New layers get the tasks of the model's masked layers, or ``"default"``.

    Raises:
        ValueError: a pattern that matches no module that convert masks (of ``exclude``: no module with parameters), an option out
            of range; with ``on_unsupported="error"``, a module that is left. Nothing is changed then.
        TypeError: an unknown option, a ``mask_dtype`` that a layer's weight cannot have beside it, a model that is no module.
        RuntimeError: a ``DistributedDataParallel`` or ``fully_shard`` holds a chosen layer; it would not synchronise the masks.
    """
    gate = checked_gate("convert", options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if batch_norm not in ("shared", "task"):
        raise ValueError(f"batch_norm must be 'shared' or 'task', got {batch_norm!r}")
    if on_unsupported not in ("report", "error"):
        raise ValueError(f"on_unsupported must be 'report' or 'error', got {on_unsupported!r}")

    forget()  # a method may have been replaced since
    found = _Found(model, with_norms=batch_norm == "task")
    wanted = [module for module in found.selected(include, exclude) if not isinstance(module, TaskLayer)]
    reasons = {module: found.reason(module, include is not None) for module in wanted}
    if on_unsupported == "error":
        _refuse({found.paths[module][0]: (module, reason) for module, reason in reasons.items() if reason is not None})
    selected = [module for module in wanted if reasons[module] is None and found.is_one(module)]
    chosen = [module for module in selected if not isinstance(module, nn.BatchNorm2d)]
    for module in chosen:
        for name in found.parameters.get(module, ["weight"]):
            if (parameter := module._parameters[name]) is not None:
                check_mask_dtype(mask_dtype, parameter.dtype, found.paths[module][0])

    check_may_grow(selected, f"{type(model).__name__} cannot be converted")

    present = any(isinstance(module, TaskLayer) for module in model.modules())
    by_slot: list[str | None] = slots(model) if present else [DEFAULT_TASK]
    made: list[tuple[nn.Module, MaskedLayer]] = []
    for module in chosen:
        # A stand-in with the layer's parameters: what can fail fails on it.
        if module in found.parameters:
            masked: MaskedLayer = own_stand_in(module, found.parameters[module], by_slot, gate, mask_init, mask_dtype)
        else:
            masked = _stand_in(module, any(is_read(model, name) for name in found.names[module]))
            masked._init_masked(**gate, mask_init=mask_init, mask_dtype=mask_dtype, tasks=by_slot)
        made.append((module, masked))
    around = [module for module in model.modules() if any(is_experts(child) and child in chosen for child in module.children())]

    for module, masked in made:
        become(module, masked)
    for module in selected:
        if isinstance(module, nn.BatchNorm2d):
            keep_per_task(module, own_tensors(module), by_slot)
    for module in around:
        if unsplittable(module) is None:
            split_by_task(module)
    return model


class _Found:
    """The modules of a model that convert masks, and those beside them that have parameters.

    A module may be reached by several names: it is one, and is asked for, or read by others, if it is under any of them.
    """

    def __init__(self, model: nn.Module, with_norms: bool):
        routers = {router for module in model.modules() for router in routers_of(module)}
        self.norms: tuple[type[nn.Module], ...] = (nn.BatchNorm2d,) if with_norms else ()
        self.names: dict[nn.Module, list[str]] = {}
        self.parameters: dict[nn.Module, list[str]] = {}
        """Of modules that are no layers the parameters which get masks."""
        for name, module in model.named_modules(remove_duplicate=False):
            if layer_type(module) is not None or isinstance(module, self.norms) or unmasked(module):
                self.names.setdefault(module, []).append(name)
                if layer_type(module) is None and (found := maskable_parameters(module) or ["weight"] * (module in routers)):
                    self.parameters[module] = found
        self.paths = {module: [plain_path(model, name) for name in given] for module, given in self.names.items()}

    def is_one(self, module: nn.Module) -> bool:
        return layer_type(module) is not None or isinstance(module, self.norms) or module in self.parameters

    def selected(self, include: Patterns | None, exclude: Patterns | None) -> list[nn.Module]:
        """The modules that are asked for: those that ``include`` names, else all that have parameters."""
        own = [module for module in self.names if self.is_one(module)]
        included = set(self.names) if include is None else self._matching("include", include, own)
        excluded = set() if exclude is None else self._matching("exclude", exclude, list(self.names))
        return [module for module in self.names if module in included and module not in excluded]

    def _matching(self, argument: str, patterns: Patterns, among: list[nn.Module]) -> set[nn.Module]:
        found: set[nn.Module] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            modules = {module for module in among if any(fnmatchcase(path, pattern) for path in self.paths[module])}
            if not modules:
                raise ValueError(
                    f"{argument} pattern {pattern!r} matches no Linear or Conv2d of the model, nor another module that convert "
                    "masks (those below a module: 'module.*')"
                )
            found |= modules
        return found

    def reason(self, module: nn.Module, is_named: bool) -> str | None:
        """The reason why a module with parameters is left; None if it is not, or has but scales and shifts."""
        if isinstance(module, nn.Embedding) and (left := left_embedding(module, self.paths[module], is_named)):
            return left
        if layer_type(module) is not None:
            return unsupported(module)
        if module in self.parameters:
            reasons = (unsupported_parameter(module, name) for name in self.parameters[module])
            return next((reason for reason in reasons if reason is not None), None)
        if isinstance(module, self.norms):
            return unsupported_norm(module)
        return f"{', '.join(unmasked(module))}: neither Linear nor Conv2d" if holds_matrix(module) else None


def _stand_in(module: nn.Module, read: bool) -> MaskedLayer:
    """A masked layer over the parameters of ``module``, without masks yet. ``read``: other code reads its weight."""
    plain = layer_type(module)
    assert plain is not None
    kind = own_forward_type(type(module)) if has_own_forward(module) else _MASKED[plain]
    if read and not has_own_forward(module):
        kind = read_through_type(kind)
    masked = kind.__new__(kind)
    masked.__dict__.update(module.__dict__, _modules=dict(module._modules))
    if plain is nn.Embedding and kind._masked_names != ("weight",):
        masked.__dict__["_masked_names"] = ("weight",)
    if type(module) is not kind.plain_type:
        masked.plain_type = type(module)
    return masked


def _refuse(found: dict[str, tuple[nn.Module, str]]) -> None:
    """Refuse modules, by name, each for its reason."""
    if found:
        each = [f"{name or 'the model'!r}, a {type(module).__name__}: {reason}" for name, (module, reason) in found.items()]
        exclude = next(iter(found)) if len(found) == 1 else list(found)
        raise ValueError(f"cannot mask {'; '.join(each)}. Leave it plain with exclude={exclude!r}")
