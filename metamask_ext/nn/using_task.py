"""``using_task``: names the task of a block, or one for each sample of a mixed-task batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import ContextDecorator
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import TypeVar

import torch
from torch import Tensor, nn

from .context import Key, close_block, open_block
from .names import describe, plain
from .selection import Selection, TaskBatch
from .sequence_first import batch_views
from .task_layer import task_keys, task_layers

F = TypeVar("F", bound=Callable[..., object])


class using_task(ContextDecorator):
    """Make ``task`` the active task of every masked layer of ``model``, for this thread, until the block ends.

    A sequence names a task for each sample of a mixed-task batch: sample ``b``, entry ``b`` of the batch dimension of every layer's
    input (the first one, see ``batch_dim``), uses the masks of ``task[b]``. Tasks may come in any order and repeat. Inside such a
    block, reading a layer's ``mask_logits``, or the masked ``weight`` of a layer that other code reads past forward, raises an
    error: several tasks have one each.

    Blocks nest; the inner one wins for the layers of its model. ``model`` may be any module that holds the layers: the model, a
    wrapper around it (``DistributedDataParallel``, ``torch.compile``) or a part of it. A thread does not inherit the block in which
    it is started: open one in the thread. A model with a single task needs no block. One object may be entered again, also by
    several threads at once, and decorates plain functions (not coroutines and generators: open the block inside those).

    Non-reentrant activation checkpoints (``use_reentrant=False``) recompute under the task of their forward, wherever backward is
    called. Inside other code that runs forwards during a backward (reentrant checkpoints, adjoint methods), open the block there.

    Args:
        model: a module with masked layers.
        task: the name of one of its tasks; or for each sample a name, or a slot (:func:`metamask_ext.slots`): a sequence of
            strings or integers, or an int64 tensor ``[B]``.
        batch_dim: of a mixed-task batch, the dimension of samples in the inputs of the layers. 0: ``[B, ..., in]``. 1:
            ``[L, B, ..., in]``, a sequence first. None: 1 for layers below modules that have ``batch_first=False`` (nearest one
            counts; ``torch.nn``'s transformers, ``MultiheadAttention``, recurrent and custom modules) and 0 for all others. In a
            model with such modules, a layer outside them refuses an input whose first two dimensions both have the batch's size.
            For a part of a model with another dimension, open a block of its own inside:
            ``using_task(model.encoder, task, batch_dim=1)``.
        repeat: of a mixed-task batch, how often a model repeats every sample by itself, copies side by side: ``num_beams``, or
            ``num_return_sequences``, of ``generate``. An input with as many rows as ``task`` takes the names as they are (an
            encoder's), one with ``repeat`` times as many takes each name ``repeat`` times, one after another.

    Raises:
        TypeError: ``task``, or an entry, is neither name nor slot, or a tensor is not int64.
        ValueError: ``model`` has no masked layer, a task is unknown to one of them, a slot is out of range or of a removed task,
            or a tensor is not one-dimensional; ``repeat`` is below 1; ``batch_dim`` is not None, 0 or 1; it is None, and a layer is
            used both below a module with ``batch_first=False`` and elsewhere.
        RuntimeError: from a layer whose input has another number of samples than ``task``, or too few dimensions.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | Sequence[str | int] | Tensor | Selection,
        batch_dim: int | None = None,
        *,
        repeat: int = 1,
    ):
        if batch_dim is not None and (isinstance(batch_dim, bool) or batch_dim not in (0, 1)):
            raise ValueError(f"batch_dim must be None, 0 or 1, got {batch_dim!r}")
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise ValueError(f"repeat must be an integer of at least 1, got {repeat!r}")
        self._model = model
        task = plain(task)
        self._task: str | Selection = task if isinstance(task, (str, Selection)) else batch_of(model, task)
        self._views: dict[nn.Module, TaskBatch] = {}
        """For layers whose samples do not simply lie along the first dimension, the batch as they see it."""
        if isinstance(self._task, TaskBatch):
            self._task = self._task.repeated(repeat)
            if batch_dim is None:
                self._views = batch_views(model, self._task)
            else:
                self._task = self._task.along(batch_dim, stated=True)
        self._keys()

    def _keys(self) -> Mapping[nn.Module, Key]:
        task = self._task
        layers = task_layers(self._model)
        if isinstance(task, str):
            return task_keys(layers, task)
        for _, layer in layers:
            if not layer._task_dict()._slots.keys() >= task.key_set:
                for name in task.names:
                    task_keys(layers, name)
        views = self._views
        return {layer: views.get(layer, task) for _, layer in layers}

    def __call__(self, function: F) -> F:
        # ContextDecorator would close the block before such a function's body runs: under another block, a wrong task.
        if iscoroutinefunction(function) or isgeneratorfunction(function) or isasyncgenfunction(function):
            raise TypeError(
                f"using_task cannot decorate {getattr(function, '__name__', 'a function')}, a coroutine or generator function: "
                "open the block inside it"
            )
        return super().__call__(function)

    def __enter__(self) -> nn.Module:
        open_block(self._keys(), self)
        return self._model

    def __exit__(self, *error: object) -> None:
        close_block(self)


def batch_of(model: nn.Module, given: Sequence[str | int] | Tensor) -> TaskBatch:
    """A task for each sample, as a user named them by name or slot; TypeError or ValueError if that cannot be."""
    if isinstance(given, Tensor):
        if given.dtype != torch.int64:
            raise TypeError(f"task must be int64 where it is a tensor of slots, got {given.dtype}")
        if given.dim() != 1:
            raise ValueError(f"task must be [B], a slot for each sample, got shape {list(given.shape)}")
        given = given.tolist()
    elif not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray)):
        raise TypeError(
            f"task must be a name, or for each sample a name or a slot in a sequence or an int64 tensor, got {type(given).__name__}"
        )
    slots: list[str | None] | None = None
    names = []
    for position, entry in enumerate(given):
        if type(entry) is not str:
            entry = plain(entry)
        if not isinstance(entry, str):
            if slots is None:
                slots = _slots_of(model)
            entry = _name_of(slots, entry, position)
        names.append(entry)
    batch = TaskBatch(names)
    if slots is not None:
        _check_same_slots(model, batch)
    return batch


def _slots_of(model: nn.Module) -> list[str | None]:
    return task_layers(model)[0][1]._task_dict()._names


def _name_of(slots: list[str | None], entry: object, position: int) -> str:
    if isinstance(entry, bool) or not hasattr(entry, "__index__"):
        raise TypeError(f"task[{position}] must be a name or a slot, got {type(entry).__name__}")
    try:
        slot = operator.index(entry)
    except TypeError:  # a tensor or an array of several
        raise TypeError(f"task[{position}] must be a name or a slot, got {type(entry).__name__}") from None
    if not 0 <= slot < len(slots):
        raise ValueError(f"task[{position}] must be a slot in 0 to {len(slots) - 1}, got {slot}")
    name = slots[slot]
    if name is None:
        known = describe(name for name in slots if name is not None)
        raise ValueError(f"task[{position}] must be the slot of a task, got {slot}, whose task was removed; the model has {known}")
    return name


def _check_same_slots(model: nn.Module, batch: TaskBatch) -> None:
    (first_name, first), *others = task_layers(model)
    numbers = first._task_dict()._slots
    for name, layer in others:
        slots = layer._task_dict()._slots
        for task, key in zip(batch.names, batch.keys):
            if slots.get(key) != numbers[key]:
                raise ValueError(
                    f"task must be names, got slots: the layers of the model count their tasks differently: task {task!r} is slot "
                    f"{numbers[key]} of {first_name or 'the model'!r} and {slots.get(key)} of {name or 'the model'!r}"
                )
