"""Scales the gradients of masks that some of the processes used, so that they are means over those."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from metamask_ext.nn.agreement import active_keys
from metamask_ext.nn.ranks import groups_of, reduced
from metamask_ext.nn.task_layer import TaskLayer
from metamask_ext.nn.wrappers import averagers
from metamask_ext.ops.shards import is_distributed
from metamask_ext.torch_private import disable_dynamo, tree_leaves

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MaskUse:
    """Notes the tasks of each layer through whose output a gradient has come in this process.

    ``DistributedDataParallel`` and ``fully_shard`` give the mean of all ``W`` processes, in which those that did not use a task
    count with a gradient of zero. With ``n`` that did, the sum over these divided by ``n`` is the mean times ``W / n``.
    """

    def __init__(self, model: nn.Module):
        self._notes = _Notes()
        for layer in model.modules():
            if isinstance(layer, TaskLayer):
                layer.register_forward_hook(self._notes)

    def forget(self) -> None:
        self._notes.used.clear()

    def scale(self, model: nn.Module) -> None:
        """Scale the gradients, and forget the uses; every process calls this.

        RuntimeError, and nothing has changed, inside ``no_sync``, where gradients are those of one process.
        """
        shared: dict[tuple[ProcessGroup, ...], list[tuple[nn.Parameter, bool]]] = {}
        wrappers = averagers()
        for layer in model.modules():
            if isinstance(layer, TaskLayer):
                used = self._notes.used.get(layer, set())
                for tensors in layer._dicts().values():
                    for key, parameter in tensors._parameters.items():
                        groups = () if parameter is None else _groups(parameter, wrappers)
                        if groups and parameter is not None:
                            shared.setdefault(groups, []).append((parameter, key in used))
        self.forget()
        for groups, found in shared.items():
            size = math.prod(torch.distributed.get_world_size(group) for group in groups)
            counts = torch.tensor([used for _, used in found], dtype=torch.int32, device=found[0][0].device)
            for (parameter, _), count in zip(found, reduced(counts, groups, torch.distributed.ReduceOp.SUM).tolist()):
                if parameter.grad is not None and 0 < count < size:
                    parameter.grad.mul_(size / count)


def _groups(parameter: nn.Parameter, wrappers: Any) -> tuple[ProcessGroup, ...]:
    """The processes over which the gradient of a parameter is a mean."""
    if is_distributed(parameter):
        return tuple(groups_of(parameter))
    for wrapper, averaged in wrappers:
        if parameter in averaged:
            if not wrapper.require_backward_grad_sync:
                raise RuntimeError("scale_masks_by_use=True scales means; inside no_sync gradients are one process's: step outside")
            return (wrapper.process_group,)
    return ()


class _Notes:
    """A forward hook of each layer."""

    def __init__(self) -> None:
        self.used: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.used = WeakKeyDictionary()  # a copy is nobody's

    @disable_dynamo
    def __call__(self, layer: Any, inputs: object, output: object) -> None:
        if torch.is_grad_enabled():
            mark = partial(self._mark, layer, active_keys(layer))
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(mark)

    def _mark(self, layer: nn.Module, keys: frozenset[str], gradient: Tensor) -> None:
        self.used.setdefault(layer, set()).update(keys)
