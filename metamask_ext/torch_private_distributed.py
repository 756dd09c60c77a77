"""Private symbols of torch's distributed wrappers that metamask_ext uses; :mod:`metamask_ext.torch_private` has all others.

tests/test_torch_private_distributed.py pins each one.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def is_fsdp_managed(module: torch.nn.Module) -> bool:
    """True if fully_shard, or FullyShardedDataParallel, holds the parameters of this module.

    Both mark every module below them for Dynamo. A module does not know otherwise: its parameters are DTensors or plain tensors by
    turns. ``FSDPModule`` marks only the module that fully_shard was called on.
    """
    return bool(module.__dict__.get("_is_fsdp_managed_module", False)) or is_fsdp_root(module)


def is_fsdp_root(module: torch.nn.Module) -> bool:
    """True if fully_shard was called on this module. torch.distributed.fsdp, slow to import, is not imported for it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def distributes(frame: FrameType) -> bool:
    """True if the frame is that of ``distribute_module``, which hands each module below a layer to the partition of a layer."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and frame.f_code is tensor.distribute_module.__code__


def wants_static_graph(frame: FrameType | None) -> bool:
    """True if the frame is within the constructor of a DistributedDataParallel that was asked for a static graph.

    The wrapper says so itself when all is done; hooks on all of its layers, in any case, would break compiled graphs.
    """
    while frame is not None and frame.f_code is not DistributedDataParallel.__init__.__code__:
        frame = frame.f_back
    return frame is not None and bool(frame.f_locals.get("static_graph"))


class FsdpPlace(NamedTuple):
    """A parameter that fully_shard holds: the group that gathers it, and what the group knows of it."""

    group: Any
    param: Any

    def trained_dtypes(self) -> set[torch.dtype]:
        """The dtypes of the parameters that the group trains; torch allows one."""
        return {param.sharded_param.dtype for param in self.group.fsdp_params if param.sharded_param.requires_grad}

    def add(self, module: torch.nn.Module, name: str, value: Tensor) -> None:
        """Shard ``value``, a whole tensor, as this parameter is, register it in ``module``, and have the group gather it too.

        ``fully_shard`` takes each module once: its list of parameters is the only way to one more.
        """
        like, group = self.param, self.group
        if like._unsharded_dtensor_spec is not None:  # beside tensor parallelism
            spec = like._unsharded_dtensor_spec
            value = sys.modules["torch.distributed.tensor"].distribute_tensor(value, spec.mesh, spec.placements)
        made = type(like)(
            torch.nn.Parameter(value.to(group.device)),
            type(like._module_info)(module, name),
            like.mesh_info,
            group.post_forward_mesh_info,
            group.device,
            (lambda parameter: like.fsdp_placement) if like.fsdp_placement.dim else None,
            group.mp_policy,
            group.offload_policy,
        )
        made.init_dtype_attrs(group.mp_policy)
        group.fsdp_params.append(made)

    def remove(self, module: torch.nn.Module, name: str) -> None:
        """Let the group forget a parameter that :meth:`add` gave it."""
        self.group.fsdp_params[:] = [
            param
            for param in self.group.fsdp_params
            if (param._module_info.module, param._module_info.param_name) != (module, name)
        ]


def fsdp_places(model: torch.nn.Module) -> dict[tuple[torch.nn.Module, str], FsdpPlace]:
    """The parameters that fully_shard holds, by module and name, of the modules below ``model`` that it was called on."""
    found: dict[tuple[torch.nn.Module, str], FsdpPlace] = {}
    for root in model.modules():
        if is_fsdp_root(root):
            state: Any = cast(Any, root)._get_fsdp_state()
            for group in state._fsdp_param_groups:
                for param in group.fsdp_params:
                    info = param._module_info
                    held = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names)]
                    found |= dict.fromkeys(held, FsdpPlace(group, param))
    return found
