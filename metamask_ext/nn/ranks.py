"""Processes that share a model must agree about its tasks: what torch synchronises, it pairs by position and not by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ..ops.shards import is_distributed
from ..torch_private import tree_flatten, tree_unflatten
from .task_dict import TaskDict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as Group
    from torch.distributed import ReduceOp
    from torch.distributed.tensor import DTensor


def groups_of(tensor: Tensor) -> list[Group]:
    """The process groups of a DTensor's mesh, one for each of its dimensions."""
    groups: list[Group] = tensor.device_mesh.get_all_groups()  # type: ignore[attr-defined]  # a DTensor, whose module is slow to import
    return groups


def reduced(values: Tensor, groups: Iterable[Group], op: ReduceOp.RedOpType) -> Tensor:
    """``values``, in place, over the processes of all groups: those of one dimension of a mesh after another."""
    for group in groups:
        torch.distributed.all_reduce(values, op, group)
    return values


def sharers(modules: Iterable[nn.Module]) -> list[Group]:
    """The groups of processes that share these modules, of which one has a DTensor; none where no module has."""
    shard = next((parameter for module in modules for parameter in module.parameters() if is_distributed(parameter)), None)
    return [] if shard is None else groups_of(shard)


def of_first(tensor: Tensor, groups: Iterable[Group]) -> Tensor:
    """``tensor`` with the values that the first of these processes has; a DTensor has them already."""
    if is_distributed(tensor):
        return tensor
    for group in groups:
        values = tensor.contiguous()
        torch.distributed.broadcast(values, torch.distributed.get_global_rank(group, 0), group)
        tensor.copy_(values)
    return tensor


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, whole and of the same values in every process, as a DTensor where ``like`` is one, and placed as that."""
    if not is_distributed(like) or is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shards = cast("DTensor", like)
    placed: Tensor = distribute_tensor(tensor, shards.device_mesh, shards.placements)
    return placed


def check_same(text: str, groups: Iterable[Group], device: torch.device, what: str) -> None:
    """RuntimeError, in every process, unless all processes of these groups call this with the same text."""
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    largest, least = reduced(torch.tensor([digest, -digest], device=device), groups, torch.distributed.ReduceOp.MAX).tolist()
    if largest != -least:
        raise RuntimeError(
            f"{what}: the processes differ in their tasks, or in their order. This one has {text}. Parameters are paired between "
            "processes by their position: add the same tasks in the same order everywhere"
        )


def check_same_tasks(module: nn.Module, groups: Iterable[Group], what: str) -> None:
    """RuntimeError, in every process, unless ``module`` has the same tasks, in the same order and form, in all of these groups."""
    found = [_described(tensors) for tensors in module.modules() if isinstance(tensors, TaskDict)]
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if found and device.type != "meta":
        check_same(" and ".join(dict.fromkeys(found)), groups, device, what)


def _described(tensors: TaskDict) -> str:
    """The tasks by slot, those that have no parameter marked."""
    parameters = dict(tensors._logits())
    names = [f"{name!r}" + ("" if name in parameters else " (no parameter)") for name in tensors._names if name is not None]
    return f"[{', '.join(names)}]"


def _check_wrapped(wrapper: nn.Module, name: str, child: nn.Module | None) -> None:
    """For the constructor of DistributedDataParallel, which copies the parameters of the first process to the others."""
    # Dynamo cannot look at a module that is half made, as compiled autograd makes one; it makes no wrapper.
    if torch.compiler.is_dynamo_compiling() or not isinstance(wrapper, DistributedDataParallel) or child is None:
        return
    group: Group | None = wrapper.__dict__.get("process_group")
    if name == "module" and group is not None and "module" not in wrapper._modules:
        check_same_tasks(child, [group], "DistributedDataParallel cannot be made")


register_module_module_registration_hook(_check_wrapped)


class _UsedElsewhere(Function):
    """The identity, which gives parameters that other processes use a gradient of zero here."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.zeros = [_zeros_like(parameter) for parameter in parameters]
        # A copy: an activation may write to it.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(zeros() for zeros in ctx.zeros)


def _zeros_like(parameter: Tensor) -> Callable[[], Tensor]:
    """A function that makes zeros like a parameter whose memory may be given away meanwhile."""
    shape, dtype = parameter.shape, parameter.dtype
    if not is_distributed(parameter):
        return partial(torch.zeros, shape, dtype=dtype, device=parameter.device)
    from torch.distributed.tensor import zeros

    like: Any = parameter
    return partial(zeros, shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)


def used_elsewhere(output: object, parameters: list[nn.Parameter]) -> object:
    """``output``, a tensor or a tree of them, with the gradients of ``parameters`` zero where there are none."""
    leaves, spec = tree_flatten(output)
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not parameters or not places:
        return output
    apply: Callable[..., Tensor] = _UsedElsewhere.apply
    leaves[places[0]] = apply(leaves[places[0]], *parameters)
    return tree_unflatten(leaves, spec)
