"""``mask_parameter``: masks for any parameter of any module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict, TypeVar

import torch
from torch import nn

from .convertible import is_experts, unsupported_parameter
from .masked_layer import MaskedLayer
from .names import DEFAULT_TASK
from .own_forward import OwnForward, own_forward_type
from .paths import plain_modules
from .structure import structure
from .task_layer import TaskLayer
from .task_masks import MaskInit
from .tasks import slots
from .wrappers import check_may_grow

if TYPE_CHECKING:
    from typing_extensions import Unpack

Module = TypeVar("Module", bound=nn.Module)

CONVERTED_MASK_INIT = 4.0
"""sigmoid(4) = 0.982: a converted model begins near the original, with a gate that still has a gradient."""


class GateOptions(TypedDict, total=False):
    """The options that describe the gate of new masks."""

    gate: str
    temperature: float
    threshold: float


GATE: GateOptions = {"gate": "sigmoid", "temperature": 1.0, "threshold": 0.0}


def checked_gate(function: str, options: GateOptions) -> GateOptions:
    """The options of a gate, each given or as it is by default. TypeError for an unknown one."""
    if unknown := sorted(options.keys() - GATE.keys()):
        wanted = ", ".join(sorted([*GATE, "mask_dtype", "mask_init"]))
        raise TypeError(f"{function} takes the options {wanted}, got {', '.join(unknown)}")
    return {**GATE, **options}


def mask_parameter(
    module: Module,
    name: str,
    *,
    mask_init: MaskInit | None = None,
    mask_dtype: torch.dtype | None = None,
    **options: Unpack[GateOptions],
) -> Module:
    """Give any parameter of a module a mask for each task, in place, and return the module: ``theta = W * g(M_task)``.

    In the module's own forward, and for whoever reads it, the attribute is then ``theta`` of the active task. The parameter stays
    what it is in ``state_dict``, ``parameters()`` and optimisers, where the masks are ``<name>_masks.<task>`` (``masks`` for
    ``weight``). All that is said of masked layers holds: :func:`metamask_ext.add_task`, packing, banks, :func:`metamask_ext.merge`,
    superpositions.

    In a mixed-task batch the module's forward runs once for each task, with the samples of that task. It must have one tensor as
    its argument, whose samples lie along the batch dimension, as those of all tensors that it returns;
    :class:`torch.nn.MultiheadAttention` has its own rule. For a module that flattens its samples see
    :func:`metamask_ext.nn.split_by_task`. :func:`metamask_ext.convert` masks whole models; it calls this for what is no layer.

    Args:
        module: any module.
        name: of a floating-point parameter of it, or of a module inside: ``"blocks.0.attention.in_proj_weight"``. A module that
            is in a model with several tasks must be named from the model, whose tasks the new masks get.
        mask_init: see :class:`metamask_ext.nn.MaskedLinear`; +4 unless given, which keeps the output near the original's.
        mask_dtype: see :class:`metamask_ext.nn.MaskedLinear`.
        options: ``gate``, ``temperature``, ``threshold``. All masks of a module have its options.

    Raises:
        TypeError: ``module`` is no module, ``name`` no string, an unknown option, or a ``mask_dtype`` that the parameter cannot
            have beside it.
        ValueError: there is no such parameter, it is masked already, it cannot be masked (it is no plain floating-point tensor, or
            the module's forward does not read it by its name), or the module has masks with other options. Nothing has changed.
        RuntimeError: a ``DistributedDataParallel`` or ``fully_shard`` holds the module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    path, _, own = name.rpartition(".")
    holder = dict(plain_modules(module, remove_duplicate=False)).get(path)
    if holder is None or own not in holder._parameters:
        known = [parameter for parameter, _ in module.named_parameters()]
        raise ValueError(f"name must be a parameter of {type(module).__name__}, of {known[:8]}, got {name!r}")
    if (reason := unsupported_parameter(holder, own)) is not None:
        raise ValueError(f"cannot mask {name!r}, of a {type(holder).__name__}: {reason}")
    gate = checked_gate("mask_parameter", options)
    if isinstance(holder, OwnForward):
        gate, mask_init, mask_dtype = _settings_of(holder, name, options, mask_init, mask_dtype)
    with structure():
        present = any(isinstance(one, TaskLayer) for one in module.modules())
        by_slot: list[str | None] = slots(module) if present else [DEFAULT_TASK]
        check_may_grow([holder], f"{name} of {type(module).__name__} cannot be masked")
        become(holder, own_stand_in(holder, [own], by_slot, gate, mask_init, mask_dtype))
    return module


def _settings_of(
    holder: OwnForward, name: str, options: GateOptions, mask_init: MaskInit | None, mask_dtype: torch.dtype | None
) -> tuple[GateOptions, MaskInit, torch.dtype | None]:
    """Those that a module with masks has. ValueError if others are asked for."""
    own: dict[str, object] = {key: getattr(holder, key) for key in (*GATE, "mask_init", "mask_dtype")}
    wanted: dict[str, object] = dict(options)
    wanted |= {} if mask_init is None else {"mask_init": mask_init}
    wanted |= {} if mask_dtype is None else {"mask_dtype": mask_dtype}
    different = [f"{key}={value!r}, not {own[key]!r}" for key, value in wanted.items() if value != own[key]]
    if different:
        raise ValueError(f"the module of {name!r} has masks, which all have its options: got {', '.join(different)}")
    gate: GateOptions = {"gate": holder.gate, "temperature": holder.temperature, "threshold": holder.threshold}
    return gate, holder.mask_init, holder.mask_dtype


def own_stand_in(
    module: nn.Module,
    names: Sequence[str],
    by_slot: Sequence[str | None],
    gate: GateOptions,
    mask_init: MaskInit | None,
    mask_dtype: torch.dtype | None,
) -> OwnForward:
    """A masked module over the parameters of ``module``, with masks of these tasks for the named ones."""
    kind = type(module) if isinstance(module, OwnForward) else own_forward_type(type(module))
    made = kind.__new__(kind)
    made.__dict__.update(module.__dict__, _modules=dict(module._modules))
    before = module._masked_names if isinstance(module, OwnForward) else ()
    if (*before, *names) != kind._masked_names:
        made.__dict__["_masked_names"] = (*before, *names)
    if is_experts(module):
        made.__dict__["has_tokens"] = True
    mask_init = CONVERTED_MASK_INIT if mask_init is None else mask_init
    made._init_masked(**gate, mask_init=mask_init, mask_dtype=mask_dtype, tasks=by_slot, names=names)
    return made


def become(module: nn.Module, stand_in: MaskedLayer) -> None:
    """Make ``module`` what its stand-in is. The class changes, not the object: whoever holds the module holds the masked one."""
    module._modules.update(stand_in._modules)
    module.__class__ = type(stand_in)
    module.__dict__.update({key: value for key, value in stand_in.__dict__.items() if key != "_modules"})
