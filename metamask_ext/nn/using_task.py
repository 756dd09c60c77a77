"""``using_task``: names the task of a block, or one for each sample of a mixed-task batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from functools import partial
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any, Generic, Literal, NoReturn, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from ..torch_private import BatchNorm
from .context import Key, Keys, close_block, open_block
from .known import Known, check_known, check_slots, known_of, layers_of, modules_of, names_by_slot, unknown_among
from .names import describe, escape, plain
from .paths import plain_modules
from .selection import MarkedBatch, Selection, TaskBatch
from .sequence_first import batch_views
from .task_dict import CHANGES
from .task_layer import TaskLayer

F = TypeVar("F", bound=Callable[..., object])
E = TypeVar("E", covariant=True)


class Unknown(list[Any]):
    """The tasks that a model does not know, as ``using_task(..., unknown="mark")`` was given them: each once, in the order of their
    first samples.

    Attributes:
        samples: the positions of the samples that name one, ascending: those whose outputs are NaN. Empty where one name was
            given for the whole batch: if it is unknown, every output is NaN.
    """

    def __init__(self, names: Iterable[object], samples: Sequence[int]):
        super().__init__(names)
        self.samples = [*samples]


class using_task(ContextDecorator, Generic[E]):
    """Make ``task`` the active task of every masked layer of ``model``, for this thread, until the block ends.

    A sequence names a task for each sample of a mixed-task batch: sample ``b``, entry ``b`` of the batch dimension of every layer's
    input (the first one, see ``batch_dim``), uses the masks of ``task[b]``. Tasks may come in any order and repeat. Inside such a
    block, reading a layer's ``mask_logits``, or the masked ``weight`` of a layer that other code reads past forward, raises an
    error: several tasks have one each.

    Blocks nest; the inner one wins for the layers of its model. ``model`` may be any module that holds the layers: the model, a
    wrapper around it (``DistributedDataParallel``, ``torch.compile``) or one block. Its layers are those that it holds when the
    block is first used. Threads do not inherit the block they are started in: enter it in the thread. A model with a single task
    needs no block. One object may be entered again, also by several threads at once, and decorates plain functions (not coroutines
    and generators: open the block inside those).

    Non-reentrant activation checkpoints (``use_reentrant=False``) recompute under the task of their forward, wherever backward is
    called. Inside other code that runs forwards during a backward (reentrant checkpoints, adjoint methods), open the block there.

    ``with using_task(model, names, unknown="mark") as unknown:`` is for servers, whose batches may name tasks that are not there.
    ``unknown`` is then a list of the names (and slots) that the model does not know, ``unknown.samples`` the positions of their
    samples. Every layer of ``model`` gives NaN for these samples, and computes only the others, with the gradients of those alone;
    so does what follows a layer, as far as it keeps samples apart and NaN as NaN.

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
        unknown: ``"raise"``, or ``"mark"``: NaN for the samples of unknown tasks, and slots that are out of range or empty.

    Returns:
        From the ``with`` statement ``model``; with ``unknown="mark"`` the list of what is unknown (:class:`Unknown`).

    Raises:
        TypeError: ``task``, or an entry, is neither name nor slot, or a tensor is not int64.
        ValueError: ``model`` has no masked layer, a task is unknown to one of them (with ``"mark"``: to some of them only), a slot
            is out of range or of a removed task, or a tensor is not one-dimensional; ``batch_dim`` is not None, 0 or 1; it is None,
            and a layer is used both below a module with ``batch_first=False`` and elsewhere; ``unknown`` is neither word.
        RuntimeError: from a layer whose input has another number of samples than ``task``, or too few dimensions. With ``"mark"``
            and unknown tasks: where ``model`` has a batch norm that normalises all samples together (in training mode, or without
            running statistics), which would give NaN to every sample; from a layer of tasks that gives integers, or no tensor.
    """

    @overload
    def __init__(
        self: using_task[nn.Module],
        model: nn.Module,
        task: str | Sequence[str | int] | Tensor | Selection,
        batch_dim: int | None = None,
        *,
        repeat: int = 1,
        unknown: Literal["raise"] = "raise",
    ): ...

    @overload
    def __init__(
        self: using_task[Unknown],
        model: nn.Module,
        task: str | Sequence[str | int] | Tensor,
        batch_dim: int | None = None,
        *,
        repeat: int = 1,
        unknown: Literal["mark"],
    ): ...

    def __init__(
        self,
        model: nn.Module,
        task: str | Sequence[str | int] | Tensor | Selection,
        batch_dim: int | None = None,
        *,
        repeat: int = 1,
        unknown: str = "raise",
    ):
        if batch_dim is not None and (isinstance(batch_dim, bool) or batch_dim not in (0, 1)):
            raise ValueError(f"batch_dim must be None, 0 or 1, got {batch_dim!r}")
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise ValueError(f"repeat must be an integer of at least 1, got {repeat!r}")
        if unknown not in ("raise", "mark"):
            raise ValueError(f"unknown must be 'raise' or 'mark', got {unknown!r}")
        self._model, self._batch_dim, self._repeat, self._marks = model, batch_dim, repeat, unknown == "mark"
        known, task = known_of(model), plain(task)
        if isinstance(task, (str, Selection)):
            self._named: str | Selection | Named = task
        else:
            self._named = named_by(model, known, task, self._marks)
        self._chosen = (known, *self._choose(known))

    def _choose(self, known: Known) -> tuple[Key, Unknown | None]:
        """The key or selection of the block; with ``unknown="mark"`` the unknown names. ValueError if that cannot be."""
        named, unknown = self._named, None
        if isinstance(named, Selection):
            check_known(self._model, known, named.key_set, named.names)
            return named, Unknown([], []) if self._marks else None
        if self._marks:
            chosen, unknown = self._marked(known, named)
        elif isinstance(named, str):
            key = escape(named)
            check_known(self._model, known, {key}, [named])
            return key, None
        else:
            chosen = TaskBatch([name for name in named.names if name is not None])
            check_known(self._model, known, chosen.key_set, chosen.names)
        if isinstance(named, Named) and named.slots:
            check_slots(self._model, known, self._slots(named))
        if not isinstance(chosen, TaskBatch):
            return chosen, unknown
        chosen = chosen.repeated(self._repeat)
        if self._batch_dim is not None:
            return chosen.along(self._batch_dim, stated=True), unknown
        if chosen.differs and not known.one_place:
            batch_views(self._model, chosen)
            known.one_place = True
        return chosen, unknown

    def _marked(self, known: Known, named: str | Named) -> tuple[Key, Unknown]:
        if isinstance(named, str):
            missing = unknown_among(self._model, known, [named])
            return (MarkedBatch(None), Unknown([named], [])) if missing else (escape(named), Unknown([], []))
        missing = unknown_among(self._model, known, {name for name in named.names if name is not None})
        names = [None if name in missing else name for name in named.names]
        samples = [row for row, name in enumerate(names) if name is None]
        batch = MarkedBatch(names) if samples else TaskBatch([name for name in names if name is not None])
        return batch, Unknown(dict.fromkeys(named.given[row] for row in samples), samples)

    def _slots(self, named: Named) -> dict[str, int | None]:
        """The tasks that were given by slots, with these; None where tasks have changed since: the names stay, slots may not."""
        return dict(named.slots) if named.changes == CHANGES.count else dict.fromkeys(named.slots)

    def _keys(self, chosen: Key) -> Keys:
        """The key or selection of each layer that the model has now."""
        layers = layers_of(self._model)
        if (used := layers[0]._task_dict()._used) is not None:
            used((chosen,) if isinstance(chosen, str) else chosen.keys)
        known = known_of(self._model)
        if isinstance(self._named, Named) and self._named.slots:
            check_slots(self._model, known, self._slots(self._named), layers)
        if isinstance(chosen, MarkedBatch):
            self._check_marked(known, chosen, layers)
        if not isinstance(chosen, TaskBatch) or self._batch_dim is not None:
            return dict.fromkeys(layers, chosen)
        views = batch_views(self._model, chosen)
        return {layer: views.get(layer, chosen) for layer in layers}

    def _check_marked(self, known: Known, chosen: MarkedBatch, layers: Sequence[TaskLayer]) -> None:
        """RuntimeError if the layers are others than those that did not know a task, and know it, or statistics would be spoilt."""
        _refuse_batch_statistics(self._model)
        # A task that was added since the block was entered stays unknown in it.
        if known is self._chosen[0] and not known.are_numbered(layers):
            given = [self._named] if isinstance(self._named, str) else self._named.names if isinstance(self._named, Named) else []
            names = {name for name in given if name is not None and name not in chosen.names}
            if found := names - unknown_among(self._model, known, names, layers):
                known.changes = -1  # of other layers
                raise RuntimeError(f"{describe(sorted(found))} became known after the block was entered: enter it again")

    def __call__(self, function: F) -> F:
        # ContextDecorator would close the block before such a function's body runs: under another block, a wrong task.
        if iscoroutinefunction(function) or isgeneratorfunction(function) or isasyncgenfunction(function):
            raise TypeError(
                f"using_task cannot decorate {getattr(function, '__name__', 'a function')}, a coroutine or generator function: "
                "open the block inside it"
            )
        return super().__call__(function)

    def __enter__(self) -> E:
        checked, chosen, unknown = self._chosen
        known = known_of(self._model)
        if known is not checked:
            chosen, unknown = self._again(known, chosen)
            self._chosen = known, chosen, unknown
        if isinstance(chosen, MarkedBatch) and self._model.training:
            _refuse_batch_statistics(self._model)
        open_block(partial(self._keys, chosen), not isinstance(chosen, str), self)
        return cast(E, self._model if unknown is None else Unknown(unknown, unknown.samples))

    def _again(self, known: Known, chosen: Key) -> tuple[Key, Unknown | None]:
        """The same after tasks or modules have changed: names stay, and may be unknown now."""
        if self._marks:
            return self._choose(known)
        if isinstance(chosen, str):
            assert isinstance(self._named, str)
            check_known(self._model, known, {chosen}, [self._named])
        else:
            check_known(self._model, known, chosen.key_set, chosen.names)
        return chosen, None

    def __exit__(self, *error: object) -> None:
        close_block(self)


def _refuse_batch_statistics(model: nn.Module) -> None:
    """RuntimeError if a batch norm of ``model`` would take NaN of some samples into what it gives the others, and keeps."""
    for module in modules_of(model):
        if isinstance(module, BatchNorm) and not isinstance(module, TaskLayer) and (module.training or module.running_mean is None):
            path = next(path for path, each in plain_modules(model) if each is module)
            raise RuntimeError(
                f"unknown='mark' gives NaN for samples of unknown tasks, and {type(module).__name__} {path!r} normalises all "
                "samples together: call model.eval() first, or leave those samples out"
            )


@dataclass
class Named:
    """A task for each sample, as a user named them by name or slot.

    Attributes:
        given: the entries.
        names: their tasks; None for a slot that no task has.
        slots: of the tasks that were given by their slots.
        changes: the count of changes of tasks when slots were looked up.
    """

    given: Sequence[Any]
    names: Sequence[str | None]
    slots: dict[str, int]
    changes: int


def named_by(model: nn.Module, known: Known, given: Sequence[str | int] | Tensor, marks: bool) -> Named:
    """A task for each sample; TypeError or ValueError if that cannot be. ``marks``: a slot of no task is no error."""
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
    entries: list[Any] = [*given]
    changes = CHANGES.count
    if set(map(type, entries)) <= {str}:
        return Named(entries, entries, {}, changes)
    by_slot: list[str | None] | None = None
    names: list[str | None] = []
    slots: dict[str, int] = {}
    for position, entry in enumerate(entries):
        entry = entries[position] = plain(entry)
        if not isinstance(entry, str):
            if by_slot is None:
                by_slot = names_by_slot(model, known)
            slot = entries[position] = _slot_of(entry, position)
            entry = by_slot[slot] if 0 <= slot < len(by_slot) else None
            if entry is not None:
                slots[entry] = slot
            elif not marks:
                _raise_no_slot(by_slot, slot, position)
        names.append(entry)
    return Named(entries, names, slots, changes)


def _slot_of(entry: object, position: int) -> int:
    if isinstance(entry, bool) or not hasattr(entry, "__index__"):
        raise TypeError(f"task[{position}] must be a name or a slot, got {type(entry).__name__}")
    try:
        return operator.index(entry)
    except TypeError:  # a tensor or an array of several
        raise TypeError(f"task[{position}] must be a name or a slot, got {type(entry).__name__}") from None


def _raise_no_slot(by_slot: list[str | None], slot: int, position: int) -> NoReturn:
    if not 0 <= slot < len(by_slot):
        raise ValueError(f"task[{position}] must be a slot in 0 to {len(by_slot) - 1}, got {slot}")
    known = describe(name for name in by_slot if name is not None)
    raise ValueError(f"task[{position}] must be the slot of a task, got {slot}, whose task was removed; the model has {known}")
