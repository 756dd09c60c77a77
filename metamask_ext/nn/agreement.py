"""What the layers of several processes must agree about in a forward: the tasks that they use.

``fully_shard`` adds up the gradients that a process has, in the order of its parameters, and asks nobody which those are: where
process 0 used task a and process 1 task b, of one shape, the sum would be of both. ``DistributedDataParallel(static_graph=True)``
waits for the parameters that the first step used, and steps with what is there where others were used later.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ..torch_private import disable_dynamo, wants_static_graph
from .context import AmbiguousTaskError, Key, Owner
from .ranks import check_same_tasks, groups_of, reduced, used_elsewhere
from .task_dict import TaskDict


class Layer(Owner, Protocol):
    """A layer with tensors of tasks."""

    def _dicts(self) -> Mapping[str, TaskDict]: ...
    def _selected(self) -> Key: ...


def active_keys(layer: Layer) -> frozenset[str]:
    """The keys of the tasks that a forward uses; none where it is going to be refused."""
    try:
        selected = layer._selected()
    except AmbiguousTaskError:
        return frozenset()
    return frozenset((selected,)) if isinstance(selected, str) else selected.key_set


def agree_in_forward(layer: nn.Module) -> None:
    """Let a layer whose parameters are shards ask, in each forward that is differentiated, which tasks the other processes run.

    RuntimeError if the processes of its mesh have different tasks now.
    """
    shard = next((parameter for parameter in layer.parameters() if hasattr(parameter, "device_mesh")), None)
    if shard is None or any(isinstance(hook, _UseElsewhere) for hook in layer._forward_hooks.values()):
        return
    groups = groups_of(shard)
    check_same_tasks(layer, groups, f"a {type(layer).__name__} cannot be sharded")
    asking = _Asking(groups)
    layer.register_forward_pre_hook(asking)
    # Before the hook by which fully_shard takes the gathered parameters away.
    layer.register_forward_hook(_UseElsewhere(asking), prepend=True)


class _Asking:
    """A forward pre-hook that finds the parameters of tasks that other processes use in this forward."""

    def __init__(self, groups: list[Any]):
        self.groups = groups
        self.others: list[nn.Parameter] = []

    def __deepcopy__(self, memo: dict[int, object]) -> _Asking:
        return self  # process groups cannot be copied

    @disable_dynamo
    def __call__(self, layer: Any, inputs: tuple[object, ...]) -> None:
        self.others = []
        slots = layer._task_dict()._slots
        if len(slots) == 1 or not torch.is_grad_enabled():
            return
        own = active_keys(layer)
        used = torch.zeros(len(layer._task_dict()._names) + 1, dtype=torch.int32, device=next(layer.parameters()).device)
        used[[slots[key] for key in own] if own else -1] = 1
        *used_by_any, missing = reduced(used, self.groups, torch.distributed.ReduceOp.MAX).tolist()
        if own and missing:
            raise RuntimeError(f"in another process no task is active for this {type(layer).__name__}: see the error there")
        keys = [key for key, slot in slots.items() if used_by_any[slot] and key not in own]
        found = [tensors._parameters.get(key) for tensors in layer._dicts().values() for key in keys]
        self.others = [parameter for parameter in found if parameter is not None and parameter.requires_grad]


class _UseElsewhere:
    """A forward hook that gives those parameters a gradient of zero."""

    def __init__(self, asking: _Asking):
        self._asking = asking

    @disable_dynamo
    def __call__(self, layer: nn.Module, inputs: tuple[object, ...], output: object) -> object:
        others, self._asking.others = self._asking.others, []
        return used_elsewhere(output, others) if others else output


class _SameTasks:
    """A forward pre-hook that refuses other tasks than those of the first step, for a wrapper with a static graph."""

    def __init__(self, wrapper: DistributedDataParallel):
        self._wrapper: ref[DistributedDataParallel] | None = ref(wrapper)
        self._first: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        # What is copied, or unpickled, is in no wrapper, or in another one.
        self._wrapper, self._first = None, WeakKeyDictionary()

    @disable_dynamo
    def __call__(self, layer: Any, inputs: tuple[object, ...]) -> None:
        wrapper = None if self._wrapper is None else self._wrapper()
        if wrapper is None or not torch.is_grad_enabled():
            return
        keys = active_keys(layer)
        first = self._first.setdefault(layer, keys) if keys else keys
        if keys != first:
            raise RuntimeError(
                "a DistributedDataParallel with static_graph=True averages the gradients of what its first step used, the masks of "
                f"{sorted(first)}. This step uses those of {sorted(keys)}: give it find_unused_parameters=True instead"
            )


def _watch(wrapper: nn.Module, name: str, child: nn.Module | None) -> None:
    """For the constructor of DistributedDataParallel."""
    # Dynamo cannot look at a module that is half made, as compiled autograd makes one; it makes no wrapper.
    if torch.compiler.is_dynamo_compiling() or not isinstance(wrapper, DistributedDataParallel):
        return
    if name == "module" and child is not None and wants_static_graph(sys._getframe(1)):
        watching = _SameTasks(wrapper)
        for layer in child.modules():
            if hasattr(type(layer), "_task_dict"):
                layer.register_forward_pre_hook(watching)


register_module_module_registration_hook(_watch)
