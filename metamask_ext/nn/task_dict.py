"""The tensors that belong to tasks: one dictionary by task name for each kind (masks, bias masks, a head's weight)."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .names import check_name, describe, escape, plain
from .pairing import Memo, NamedModules, is_noted, noted_tensors
from .replicas import as_replica
from .structure import structure
from .wrappers import check_entry, check_not_sharded


class Changes:
    """Counts changes anywhere in the process."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.count = 0

    def note(self) -> None:
        # Afterwards: whoever reads the new count sees the change. Two threads never set the same count.
        self.count = next(self._numbers)


CHANGES = Changes()
"""Those of all TaskDicts: while the count stands still, no model has got or lost a task, or a parameter of one."""


class TaskDict(nn.ParameterDict):
    """A ParameterDict from task name to tensor, whose parameter keys are the escaped names; every task has a slot.

    A mask is a parameter (its logits), or a uint8 buffer (its bits, :func:`metamask_ext.pack_mask`). Bits may also lie in a file:
    they are fetched when they are first used.

    Slots count up as tasks are added. That of a removed task stays empty.
    """

    # What has no leading underscore here would be in the way of a task of that name: see escape.

    def __init__(self, buffers: bool = False) -> None:
        super().__init__()
        self._slots: dict[str, int] = {}
        """By parameter key, in the order of the slots."""
        self._names: list[str | None] = []
        """By slot."""
        self._only_buffers = buffers
        self._contested = False
        """True once a task was removed while a block was open somewhere, which may name it."""
        self._fetch: Callable[[str], Tensor] | None = None
        self._waiting: dict[str, None] = {}
        """The names of tasks that are still to be fetched."""
        self._used: Callable[[Collection[str]], None] | None = None
        """Is told the keys of the tasks of each block, once it is used."""

    def _key_to_attr(self, key: str) -> str:
        return escape(key)

    def __setitem__(self, name: str, value: object) -> None:
        name = check_name(name)
        if not isinstance(value, Tensor):
            raise TypeError(f"what belongs to task {name!r} must be a tensor, got {type(value).__name__}")
        value = _lasting(value)
        buffer = self._only_buffers or value.dtype == torch.uint8
        check_entry(self, None if buffer else value, f"task {name!r} cannot be {'changed' if name in self._keys else 'added'}")
        self._put(name, value)

    def _put(self, name: str, value: Tensor) -> None:
        """Have this tensor for a task; the arguments have been checked."""
        key = escape(name)
        if self._only_buffers or value.dtype == torch.uint8:
            self._buffers[key] = value
            self._parameters.pop(key, None)
        else:
            self._parameters[key] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
            self._buffers.pop(key, None)
        self._is_here(name)
        if name not in self._keys:
            self._names.append(name)
            self._slots[key] = len(self._names) - 1
            self._keys[name] = None
            self._count()
        CHANGES.note()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's, which an assignment to an attribute calls, and ``load_state_dict(..., assign=True)``."""
        if name not in self._slots:
            self._refuse_tool(name)
        super().register_parameter(name, param)
        CHANGES.note()

    def __delattr__(self, name: str) -> None:
        # FullyShardedDataParallel puts views of its own in the places of the parameters.
        if name in self._slots and not sys._getframe(1).f_globals.get("__name__", "").startswith("torch.distributed.fsdp."):
            self._refuse_tool(name)
        super().__delattr__(name)

    def _refuse_tool(self, name: str) -> NoReturn:
        raise RuntimeError(
            f"{name} of {type(self).__name__} cannot be set or deleted as an attribute: its parameters are those of tasks, which "
            "prune and parametrize cannot replace. Use metamask_ext.add_task and remove_task"
        )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self._tensor(escape(name))

    def __contains__(self, name: object) -> bool:
        return plain(name) in self._keys

    def __delitem__(self, name: str) -> None:
        name = check_name(name)
        check_not_sharded([self], f"task {name!r} cannot be removed")
        if name not in self._keys:
            raise KeyError(name)
        self._drop(name)

    def _drop(self, name: str, first_new_slot: int | None = None) -> None:
        """Remove what there is of a task, also what an interruption left of one; its slot too, if no task had it before."""
        key = escape(name)
        self._parameters.pop(key, None)
        self._buffers.pop(key, None)
        self._is_here(name)
        slot = self._slots.get(key)
        if slot is not None:
            self._names[slot] = None
            del self._slots[key]
        if first_new_slot is not None:
            del self._names[first_new_slot:]
        self._count()
        self._keys.pop(name, None)  # last: while it is here, the task can be removed again
        CHANGES.note()

    _single = False
    """True if there is one task, whatever block is open. torch.compile guards on it: it flips once while tasks are added."""

    def _count(self) -> None:
        self._single = len(self._slots) == 1 and not self._contested

    def _tensor(self, key: str) -> Tensor:
        """The tensor of the task with this key."""
        tensor = self._held(key)
        return self._fetch_now(key) if tensor is None else tensor

    def _held(self, key: str) -> Tensor | None:
        """The tensor of the task with this key; None where it is still to be fetched, or there is no such task."""
        tensor: Tensor | None = self._parameters.get(key)
        return self._buffers.get(key) if tensor is None else tensor

    def _logits(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The tasks that have a parameter here, with it."""
        found = ((name, self._parameters.get(escape(name))) for name in self._keys)
        return [(name, parameter) for name, parameter in found if parameter is not None]

    def _is_bits(self, key: str) -> bool:
        return key not in self._parameters

    # Tasks in a file

    def _wait_for(self, names: Sequence[str | None], fetch: Callable[[str], Tensor]) -> None:
        """Have these tasks and no other, by slot; ``fetch(name)`` gives the tensor of one, a buffer, when it is used."""
        slots = {escape(name): slot for slot, name in enumerate(names) if name is not None}
        keys = {name: None for name in names if name is not None}
        # What was there goes last: interrupted in between, every task is there or can be fetched.
        self._waiting, self._fetch = dict(keys), fetch
        self._names, self._slots, self._keys = list(names), slots, keys
        self._parameters.clear()
        self._buffers.clear()
        self._count()
        CHANGES.note()

    def _fetch_now(self, key: str) -> Tensor:
        fetch, slot = self._fetch, self._slots.get(key)
        name = None if slot is None else self._names[slot]
        fetched: Tensor | None = None
        if name in self._waiting and fetch is not None:
            with torch.inference_mode(False):  # it stays, and may be saved for a backward one day
                fetched = fetch(name)
        with structure():
            # Another thread may have been here meanwhile: both go on with what the first one left.
            found = self._held(key)
            if found is None:
                if fetched is None or key not in self._slots:
                    raise RuntimeError(f"a task was removed while it was used; there are {describe(self)}")
                found = self._buffers[key] = fetched
            if name is not None:
                self._is_here(name)
        return found

    def _is_here(self, name: str) -> None:
        self._waiting.pop(name, None)
        if not self._waiting:
            self._fetch = None  # a model that waits for no file can be pickled

    def _expect(self, name: str, slot: int | None, fetch: Callable[[str], Tensor]) -> None:
        """Have a task, new in this slot or (None) one that is there, whose tensor ``fetch(name)`` gives. Repeatable."""
        key = escape(name)
        self._fetch = fetch
        self._waiting[name] = None
        self._parameters.pop(key, None)
        self._buffers.pop(key, None)
        if slot is not None:
            self._names += [None] * (slot + 1 - len(self._names))
            self._names[slot] = name
            self._slots[key] = slot
            self._keys[name] = None
        self._count()
        CHANGES.note()

    def _leave(self, name: str, fetch: Callable[[str], Tensor]) -> None:
        """Let go of a task's buffer; ``fetch(name)`` gives it again."""
        # First: interrupted in between, the task is there or can be fetched.
        self._fetch = fetch
        self._waiting[name] = None
        self._buffers.pop(escape(name), None)

    def _fetch_all(self) -> None:
        for name in list(self._waiting):
            self._fetch_now(escape(name))

    def _replicate_for_data_parallel(self) -> nn.Module:
        replicate: Callable[[], TaskDict] = super()._replicate_for_data_parallel
        replica = replicate()
        as_replica(replica)
        replica._waiting = dict(self._waiting)
        return replica

    def named_modules(self, memo: Memo | None = None, prefix: str = "", remove_duplicate: bool = True) -> NamedModules:
        memo = set() if memo is None else memo
        modules: NamedModules = super().named_modules(memo, prefix, remove_duplicate)
        return noted_tensors(self, memo, modules) if is_noted() else modules

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> TaskDict:
        apply: Callable[..., object] = super()._apply
        with structure(), torch.inference_mode(False):  # no task leaves memory meanwhile
            # What is still to be fetched would come on the device and in the dtype of before.
            self._fetch_all()
            apply(function, recurse)
        CHANGES.note()  # torch may be told to replace parameters here
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        inference = {key: value for key, value in state_dict.items() if isinstance(value, Tensor) and value.is_inference()}
        state_dict |= {key: _lasting(value) for key, value in inference.items()}  # with assign=True they stay
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        with structure():  # another thread may add a task meanwhile, or let one leave memory
            self._fetch_all()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _renumber(self, names: Sequence[str | None]) -> None:
        """Take over these slots if they are of the same tasks. Those given out here are not given out again."""
        slots = {name: slot for slot, name in enumerate(names) if name is not None}
        if slots.keys() == self._keys.keys():
            self._names = [*names, *[None] * (len(self._names) - len(names))]
            self._slots = {escape(name): slot for name, slot in slots.items()}
            self._keys = dict.fromkeys(slots)
            CHANGES.note()

    def extra_repr(self) -> str:
        return f"{len(self)} tasks: {describe(self)}"


def _lasting(value: Tensor) -> Tensor:
    """The same values in a tensor that may be trained one day, also where ``value`` was made under ``inference_mode``."""
    if not value.is_inference():
        return value
    with torch.inference_mode(False):
        copied = value.detach().clone()
        return nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
