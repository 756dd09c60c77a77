"""``split_by_task``: a module without masks of its own that runs for one task after another."""

from __future__ import annotations

from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from ..torch_private import disable_dynamo, fx_trace, traced_call, tree_leaves
from .context import LIVE
from .each_task import Call, Place, run_each_task
from .given import GivenTasks, given_to
from .selection import TaskBatch
from .task_layer import TaskLayer

Module = TypeVar("Module", bound=nn.Module)

_TYPES: dict[type[nn.Module], type[ByTask]] = {}
"""By the class of a plain module that of the one which runs by task."""


class ByTask(nn.Module):
    """A module that runs its samples of a mixed-task batch task by task."""

    unsplit_type: type[nn.Module]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        # The class is made at run time.
        return _new, (self.unsplit_type,), self.__dict__

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if fx_trace._is_fx_tracing_flag and (traced := traced_call(self, *inputs, **options)) is not None:
            return traced
        if torch.compiler.is_dynamo_compiling():
            # Without a selection anywhere there is no batch of several tasks.
            run = _forward_in_eager if LIVE.selections and _takes_several(self) else self.unsplit_type.forward
            return run(self, *inputs, **options)
        first = _first_layer(self)
        batch = None if first is None else first._selected()
        if not isinstance(batch, TaskBatch):
            return self.unsplit_type.forward(self, *inputs, **options)
        if not inputs or not isinstance(inputs[0], Tensor):
            raise RuntimeError(
                f"{type(self).__name__} must be called with the samples as its first argument where several tasks are active"
            )
        batch = batch.fitting(self, inputs[0], 0)
        places: dict[Place, Any] = dict(enumerate(inputs))
        places.update(options)
        dims = {place: batch.dim for place, value in places.items() if isinstance(value, Tensor)}
        for place, dim in dims.items():
            value = places[place]
            if value.dim() <= dim or value.shape[dim] != batch.size:
                raise RuntimeError(
                    f"{type(self).__name__} was called with a tensor of shape {list(value.shape)}, argument {place!r}: dimension "
                    f"{dim} of all its tensors must be that of the {batch.size} samples of a mixed-task batch"
                )
        nested = [value for value in places.values() if not isinstance(value, Tensor)]
        if any(isinstance(value, Tensor) for value in tree_leaves(nested)):
            raise RuntimeError(
                f"{type(self).__name__} was called with tensors inside another argument, where nothing says which samples they are "
                "of: call the model with each task's samples in a block of their own"
            )
        return run_each_task(self, batch, Call(inputs, options, dims, batch.dim), self._run)

    def _run(self, *inputs: Any, **options: Any) -> Any:
        return self.unsplit_type.forward(self, *inputs, **options)


def split_by_task(module: Module) -> Module:
    """Let a module run its samples of a mixed-task batch task by task, in place, and return it.

    For a module whose layers do not see the samples: one that flattens them (``[B, L, E]`` to ``[B * L, E]``, as a mixture of
    experts), cuts them into windows, or mixes their order. Its forward then runs once for each task of the batch, with the samples
    of that task; it must treat samples independently. All tensors that it is called with have the samples along the batch
    dimension of :class:`metamask_ext.using_task`, as those that it returns. With one task active nothing is different, and
    :func:`metamask_ext.merge` gives the plain module. :func:`metamask_ext.convert` does it for the mixtures of experts that it
    knows.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: it is masked itself, its forward was replaced on the object, or its class has ``__slots__``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(module, ByTask):
        if (reason := unsplittable(module)) is not None:
            raise ValueError(f"module cannot be split by task, a {type(module).__name__}: {reason}")
        kind: Any = _by_task_type(type(module))
        module.__class__ = kind
    return module


def unsplittable(module: nn.Module) -> str | None:
    """The reason why a module cannot run by task; None if it can."""
    if isinstance(module, TaskLayer):
        return "it has tasks itself"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    return "its class has __slots__" if type(module).__basicsize__ != nn.Module.__basicsize__ else None


def plain_again(module: nn.Module) -> None:
    """Undo :func:`split_by_task` in ``module`` and below it."""
    for one in module.modules():
        if isinstance(one, ByTask):
            kind: Any = one.unsplit_type
            one.__class__ = kind


def _by_task_type(kind: type[nn.Module]) -> type[ByTask]:
    if kind not in _TYPES:
        _TYPES[kind] = type(f"ByTask{kind.__name__}", (ByTask, kind), {"unsplit_type": kind})
    return _TYPES[kind]


def _new(kind: type[nn.Module]) -> ByTask:
    made = _by_task_type(kind)
    return made.__new__(made)


def _first_layer(module: nn.Module) -> TaskLayer | None:
    return next((one for one in module.modules() if isinstance(one, TaskLayer)), None)


def _takes_several(module: nn.Module) -> bool:
    """True in the trace of a function which is not given one task's tensors."""
    given = given_to(_first_layer(module))
    return given is None or isinstance(given, GivenTasks)


@disable_dynamo
def _forward_in_eager(module: ByTask, *inputs: Any, **options: Any) -> Any:
    """For torch.compile, which cannot read a context variable."""
    return module.forward(*inputs, **options)
