"""Which layers :func:`metamask_ext.convert` can mask, and why not the others."""

from __future__ import annotations

import inspect

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..ops.checks import DTYPES, stored_as
from ..torch_private import rebuilding_hook
from .per_task import PerTask
from .reads import misses_attribute
from .task_dict import TaskDict
from .task_layer import TaskLayer

AFFINE_NORMS = "a normalisation: its scale and shift are shared by all tasks"


def unsupported(module: nn.Module) -> str | None:
    """The reason why a Linear or Conv2d, or a subclass of one, cannot be masked; None if it can."""
    plain = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    kind = type(module)
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.UninitializedParameter):
        return "it is lazy: run the model once first"
    if not isinstance(weight, nn.Parameter) or "bias" not in module._parameters:
        return "its weight is not a parameter of its own (parametrized, pruned or normalised)"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object, and may hold the weight by itself"
    if any(getattr(kind, name, None) is not getattr(plain, name, None) for name in _DECIDING):
        return "its class handles calls or attributes in a way of its own"
    if kind.forward is not plain.forward and not inspect.isfunction(inspect.unwrap(kind.forward)):
        return "its forward is not a Python function"
    if any(getattr(kind, name) is not getattr(nn.Module, name) for name in ("get_extra_state", "set_extra_state")):
        return "it has extra state of its own, where the gate would be saved"
    if taken := [attribute for attribute in _ADDED if hasattr(module, attribute)]:
        return f"it has an attribute {taken[0]!r} of its own"
    if kind.__basicsize__ != plain.__basicsize__:
        return "its class has __slots__"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, not float64, float32, bfloat16 or float16"
    if (stored := stored_as(weight)) is not None:
        return f"its weight is quantised ({type(weight).__name__}, {stored}): mask the model first, and quantise merge(model, task)"
    return misses_attribute(kind) if has_own_forward(module) else None


def has_own_forward(module: nn.Module) -> bool:
    """True if the class of a Linear or Conv2d computes its output in a way of its own."""
    plain = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    return any(getattr(type(module), name, None) is not getattr(plain, name, None) for name in ("forward", "_conv_forward"))


def unsupported_norm(module: nn.Module) -> str | None:
    """The reason why a BatchNorm2d, or a subclass of it, cannot have statistics for each task; None if it can."""
    names = own_tensors(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the object, and may hold its tensors by itself"
    if any(getattr(type(module), name, None) is not getattr(nn.BatchNorm2d, name, None) for name in (*_DECIDING, *_STATISTICS)):
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
    covered = ("weight", "bias") if isinstance(module, TaskLayer) and not isinstance(module, PerTask) else ()
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


_DECIDING = ("weight", "bias", "__call__", "_call_impl", "__getattr__")
"""The attributes that decide what a layer reads, besides its forward."""

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

_ADDED = (
    *("gate", "temperature", "threshold", "mask_init", "mask_dtype", "plain_type"),
    *("masks", "bias_masks", "mask_logits", "bias_mask_logits"),
)
