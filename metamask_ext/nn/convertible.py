"""Which layers :func:`metamask_ext.convert` can mask, and why not the others."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..ops.checks import DTYPES
from ..torch_private import is_made_of_tensors, rebuilding_hook
from .masked_layer import MaskedLayer, masks_name
from .own_forward import OwnForward
from .reads import misses_attribute
from .task_dict import TaskDict
from .task_layer import TaskLayer

AFFINE_NORMS = "a normalisation: its scale and shift are shared by all tasks"


LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Embedding,
)
"""The classes of torch's layers that have a masked one; also their subclasses can be masked."""

_FORWARD = ("forward", "_conv_forward", "_output_padding")
"""The methods by which one of these computes its output."""


def layer_type(module: nn.Module) -> type[nn.Module] | None:
    """The one of :data:`LAYERS` that a module is of; None if it is of none."""
    return next((kind for kind in LAYERS if isinstance(module, kind)), None)


def unsupported(module: nn.Module) -> str | None:
    """The reason why one of :data:`LAYERS` cannot be masked; None if it can."""
    plain = layer_type(module)
    assert plain is not None
    kind = type(module)
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.UninitializedParameter):
        return "it is lazy: run the model once first"
    names = ("weight",) if plain is nn.Embedding else ("weight", "bias")
    if not isinstance(weight, nn.Parameter) or not all(name in module._parameters for name in names):
        return "its weight is not a parameter of its own (parametrized, pruned or normalised)"
    if any(getattr(kind, name, None) is not getattr(plain, name, None) for name in (*names, *_DECIDING)):
        return "its class handles calls or attributes in a way of its own"
    if reason := _unmaskable(module, plain, names):
        return reason
    if plain is nn.Embedding and (reason := unsupported_embedding(module)):
        return reason
    return misses_attribute(kind) if has_own_forward(module) else None


def unsupported_embedding(module: nn.Module) -> str | None:
    """The reason why an embedding with these options cannot be masked."""
    if getattr(module, "max_norm", None) is not None:
        return "it has max_norm: the forward of one task would rescale the weight that all tasks share"
    return "it is sparse: gradients of masks are dense" if getattr(module, "sparse", False) else None


def left_embedding(module: nn.Module, paths: Iterable[str], is_named: bool) -> str | None:
    """The reason why convert leaves an embedding plain that it could mask; None if it does not. ``is_named``: by ``include``."""
    if any(path.rpartition(".")[2] in _DISTANCES for path in paths):
        return "weight: an embedding of distances between positions, which no sample of a batch has for itself"
    return None if is_named else "weight: an embedding, which convert masks where include= names it"


_DISTANCES = frozenset(("relative_attention_bias", "distance_embedding", "rel_attn_embed"))
"""The names that transformers gives to embeddings of the distances between positions: their indices are no samples."""


def _unmaskable(module: nn.Module, plain: type[nn.Module], names: Sequence[str]) -> str | None:
    """The reason why parameters cannot be masked in a module that becomes another by its class."""
    kind = type(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the object, and may hold the weight by itself"
    if not inspect.isfunction(inspect.unwrap(kind.forward)):
        return "its forward is not a Python function"
    if any(getattr(kind, name) is not getattr(nn.Module, name) for name in ("get_extra_state", "set_extra_state")):
        return "it has extra state of its own, where the gate would be saved"
    if taken := [attribute for attribute in (*_ADDED, *map(masks_name, names)) if hasattr(module, attribute)]:
        return f"it has an attribute {taken[0]!r} of its own"
    if kind.__basicsize__ != plain.__basicsize__:
        return "its class has __slots__"
    for name in names:
        parameter = module._parameters[name]
        if parameter is not None and parameter.dtype not in DTYPES:
            return f"its {name} is {parameter.dtype}, not float64, float32, bfloat16 or float16"
    return None


def unsupported_parameter(module: nn.Module, name: str) -> str | None:
    """The reason why a parameter of any module cannot be masked by its name; None if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "its forward is not a Python function"
    kind, parameter = type(module), module._parameters.get(name)
    if isinstance(module, MaskedLayer) and name in module._masked_names:
        return "it is masked already"
    if isinstance(module, TaskLayer) and not isinstance(module, OwnForward):
        return f"it is a {kind.__name__}, whose other parameters all tasks share"
    if isinstance(module, (TaskDict, ParametrizationList)):
        return "it is not a parameter of the module's own"
    if isinstance(parameter, nn.UninitializedParameter):
        return "it is lazy: run the model once first"
    if not isinstance(parameter, nn.Parameter) or parameter.layout != torch.strided:
        return "it is no parameter of the module, or not a dense one"
    if is_made_of_tensors(parameter) and not hasattr(parameter, "device_mesh"):
        return f"it is a {type(parameter).__name__}, whose values are not those of a plain tensor"
    if parameter.dim() == 0:
        return "it is a scalar"
    plain = module.plain_type if isinstance(module, OwnForward) else kind
    if hasattr(plain, name) or plain.__getattr__ is not nn.Module.__getattr__ or plain.__call__ is not nn.Module.__call__:
        return "its class handles calls or attributes in a way of its own"
    if isinstance(module, OwnForward):
        if hasattr(module, masks_name(name)):
            return f"it has an attribute {masks_name(name)!r} of its own"
        if parameter.dtype not in DTYPES:
            return f"its {name} is {parameter.dtype}, not float64, float32, bfloat16 or float16"
    elif reason := _unmaskable(module, nn.Module, [name]):
        return reason
    return misses_attribute(plain, name)


def has_own_forward(module: nn.Module) -> bool:
    """True if the class of a layer computes its output in a way of its own."""
    plain = layer_type(module)
    return any(getattr(type(module), name, None) is not getattr(plain, name, None) for name in _FORWARD)


def maskable_parameters(module: nn.Module) -> list[str]:
    """The parameters of a module that is no layer which convert masks: all of an attention, of experts, of transformers' Conv1D."""
    if isinstance(module, (nn.MultiheadAttention, *LAYERS)) or is_experts(module) or is_of(type(module), _CONV1D):
        found = [name for name, parameter in module._parameters.items() if parameter is not None]
        return found if layer_type(module) is None else []
    return []


def routers_of(module: nn.Module) -> list[nn.Module]:
    """The modules beside experts that choose among them: those with a weight of a row for each expert."""
    experts = [child for child in module.children() if is_experts(child)]
    counts = {len(parameter) for one in experts for parameter in one._parameters.values() if parameter is not None}
    weights = ((child, child._parameters.get("weight")) for child in module.children()) if experts else ()
    return [child for child, weight in weights if _is_known(weight) and weight.dim() == 2 and len(weight) in counts]


def _is_known(parameter: Tensor | None) -> TypeGuard[Tensor]:
    return parameter is not None and not isinstance(parameter, nn.UninitializedParameter)


def is_experts(module: nn.Module) -> bool:
    """True if a module has the weights of several experts, each in one parameter of three dimensions, as in transformers."""
    found = [parameter for name, parameter in module._parameters.items() if name in _OF_EXPERTS and _is_known(parameter)]
    return bool(found) and all(parameter.dim() == 3 for parameter in found)


_OF_EXPERTS = ("gate_up_proj", "down_proj", "up_proj", "gate_proj")

_CONV1D = "transformers.pytorch_utils.Conv1D"


def is_of(kind: type, name: str) -> bool:
    """True if a class, or one that it is made of, has this name: of a package that may not be there."""
    return any(f"{base.__module__}.{base.__qualname__}" == name for base in kind.__mro__)


def unsupported_norm(module: nn.Module) -> str | None:
    """The reason why a BatchNorm2d, or a subclass of it, cannot have statistics for each task; None if it can."""
    names = own_tensors(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the object, and may hold its tensors by itself"
    if any(
        getattr(type(module), name, None) is not getattr(nn.BatchNorm2d, name, None)
        for name in (*_AFFINE, *_DECIDING, *_STATISTICS)
    ):
        return "its class handles calls or attributes in a way of its own"
    if type(module).__basicsize__ != nn.BatchNorm2d.__basicsize__:
        return "its class has __slots__"
    return None if names else "it has no statistics and no affine part"


def own_tensors(module: nn.Module) -> list[str]:
    """The names of the parameters and buffers that ``module`` itself has."""
    return [name for kept in (module._parameters, module._buffers) for name, tensor in kept.items() if tensor is not None]


def unmasked(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that ``module`` itself has and no mask of it covers, by name; also the originals of parametrized ones.

    A mask of a pruned or parametrized weight applies to what is computed, and covers what it is computed of.
    """
    if isinstance(module, (ParametrizationList, TaskDict)):
        return {}
    covered = module._masked_names if isinstance(module, MaskedLayer) else ()
    hooks = [hook for name in covered if (hook := rebuilding_hook(module, name)) is not None]
    of_layer = {*covered, *(source for hook in hooks for source in hook.sources)}
    own: dict[str, Tensor] = {
        name: tensor for name, tensor in module._parameters.items() if tensor is not None and name not in of_layer
    }
    if is_parametrized(module):
        of_parametrizations = module.get_submodule("parametrizations")
        own.update(
            (f"parametrizations.{name}", tensor)
            for name, tensor in of_parametrizations.named_parameters()
            if name.partition(".")[0] not in covered
        )
    return own


def holds_matrix(module: nn.Module) -> bool:
    """True if ``module`` itself has a parameter of two dimensions or more that no mask covers: what a convert should reach."""
    return any(isinstance(tensor, nn.UninitializedParameter) or tensor.dim() > 1 for tensor in unmasked(module).values())


_DECIDING = ("__call__", "_call_impl", "__getattr__")
"""The attributes that decide what a layer reads, besides its forward."""

_AFFINE = ("weight", "bias")

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

_ADDED = (
    *("gate", "temperature", "threshold", "mask_init", "mask_dtype", "plain_type"),
    *("mask_logits", "bias_mask_logits"),
)
