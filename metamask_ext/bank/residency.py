"""The bound on tasks of a folder that are in memory: those that no block has used for longest go back to their files."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from ..nn.names import escape
from ..nn.structure import structure
from ..ops.checks import has_values
from .index import BankError
from .kept import Kept
from .store import Store

_OWN_REFERENCES = 3
"""Those to a tensor that is in its place and looked at here: of the dictionary, of a local name, and of the count's argument."""


class Source(Protocol):
    """An opened bank, and the tensors of a model that it fills."""

    @property
    def store(self) -> Store: ...

    @property
    def kept(self) -> Sequence[Kept]: ...

    def fetch(self, each: Kept) -> Callable[[str], Tensor]: ...


class Residency:
    """Lets tasks leave memory, those whose bits are in their files as they are here.

    A task that is used again is read again. What was changed in memory stays there, and so does what anyone else holds; logits and
    other parameters always do, since optimisers hold them.

    Args:
        most: tasks that may stay in memory beside the pinned ones and those of the block that was entered last.
        pinned: the tasks that stay.

    Raises:
        TypeError, ValueError: ``most`` is no integer, or negative.
    """

    def __init__(self, most: int, pinned: Iterable[str] = ()):
        try:
            self.most = operator.index(most)
        except TypeError:
            raise TypeError(f"max_resident must be None or an integer, got {most!r}") from None
        if self.most < 0:
            raise ValueError(f"max_resident must be at least 0, got {most}")
        self._pinned = frozenset(map(escape, pinned))
        self._source: Source | None = None
        self._order: dict[str, None] = {}
        """The keys of the tasks that were read, the one that was used longest ago first."""

    def watch(self, source: Source) -> None:
        """See to the tasks of this source, and to no other. The lock of the tasks is held."""
        self._source = source
        self._order = dict.fromkeys(key for key in self._order if any(each.tensors._held(key) is not None for each in source.kept))
        for each in source.kept:
            each.tensors._used = _Use(self)

    @property
    def pinned(self) -> frozenset[str]:
        """The keys of the tasks that stay."""
        return self._pinned

    def note(self, key: str) -> None:
        """Count a task that was read, or that a save has put into its file."""
        if key not in self._pinned:
            self._order.setdefault(key)

    def use(self, keys: Collection[str]) -> None:
        """Note that a block uses these tasks; those beyond the bound leave, but none of these."""
        with structure():
            for key in keys:
                if key in self._order:
                    del self._order[key]
                    self._order[key] = None
            if self._source is None:
                return
            used = frozenset(keys)
            excess = len(self._order) + self._to_come(keys) - self.most
            for key in [*self._order] if excess > 0 else ():
                if excess > 0 and key not in used:
                    excess -= self._leave(key, self._source)

    def _to_come(self, keys: Collection[str]) -> int:
        """Count those that are still to be read."""
        assert self._source is not None
        tensors = self._source.kept[0].tensors
        return sum(tensors._held(key) is None and key in tensors._slots and key not in self._pinned for key in keys)

    def _leave(self, key: str, source: Source) -> bool:
        """Let the buffers of a task go, and return whether that was possible."""
        name = _name(source.kept[0], key)
        if name is None:
            del self._order[key]
            return False
        here = [each for each in source.kept if key in each.tensors._buffers]
        for each in here:
            tensor = each.tensors._buffers[key]
            if sys.getrefcount(tensor) > _OWN_REFERENCES:
                return False
        del self._order[key]
        if not self._as_in_its_file(name, key, here, source):
            return False
        for each in here:
            tensor = each.tensors._buffers[key]
            # The model may have moved since the bank was opened.
            moved = each if tensor is None else replace(each, device=tensor.device)
            each.tensors._leave(name, source.fetch(moved))
        return True

    def _as_in_its_file(self, name: str, key: str, here: Iterable[Kept], source: Source) -> bool:
        try:
            given = source.store.task(name)
            return all(_same(each.tensors._buffers[key], each.check(source.store, name, given)) for each in here)
        except (BankError, KeyError):  # it cannot be read again, so it stays; whoever reads the file is told
            return False


def _name(each: Kept, key: str) -> str | None:
    slot = each.tensors._slots.get(key)
    return None if slot is None else each.tensors._names[slot]


def _same(held: Tensor | None, given: Tensor) -> bool:
    comparable = held is not None and held.dtype == given.dtype and has_values(held)
    return comparable and held is not None and torch.equal(held, given.to(held.device))


class _Use:
    """The function that a TaskDict calls for the tasks of a block. A copy of the model has none: its tasks stay in memory."""

    def __init__(self, residency: Residency):
        self._residency = residency

    def __call__(self, keys: Collection[str]) -> None:
        self._residency.use(keys)

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def check_pins(pin: str | Iterable[str], tasks: Collection[str | None]) -> tuple[str, ...]:
    """The names to pin. TypeError or ValueError if one is no task's."""
    names = (pin,) if isinstance(pin, str) else tuple(pin)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"pin must name tasks, got {type(name).__name__}")
        if name not in tasks:
            _raise_unknown(name)
    return names


def _raise_unknown(name: str) -> NoReturn:
    raise ValueError(f"pin must name tasks of the bank, got {name!r}")


def usable(device: torch.device | str) -> torch.device:
    """Return a device that tensors can be on here. TypeError or ValueError if there is none such."""
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be None, a string or a torch.device, got {type(device).__name__}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be one that can be used here, got {str(device)!r}: {error}") from error
    return torch.device(device)
