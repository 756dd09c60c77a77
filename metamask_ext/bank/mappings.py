"""The bound on files that are mapped into memory: a process has 65,530 mappings (``vm.max_map_count``), for all that it does."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from weakref import ref

from torch import Tensor

from ..files.lock import ThreadLock

COPIED = 1 << 18
"""Files of up to this many bytes are read into memory: a mapping would save nothing, and takes pages as well."""


class Mappings:
    """Counts mapped files, each until its tensors are gone.

    Args:
        most: files that may be mapped at once; others are read into memory.

    Raises:
        TypeError, ValueError: ``most`` is no integer, or negative.
    """

    def __init__(self, most: int):
        try:
            self._most = operator.index(most)
        except TypeError:
            raise TypeError(f"max_resident must be None or an integer, got {most!r}") from None
        if self._most < 0:
            raise ValueError(f"max_resident must be at least 0, got {most}")
        self._lock = ThreadLock()
        self._files: list[list[ref[Tensor]]] = []
        self._reserved = 0

    def allows(self, size: int) -> bool:
        """Return whether a file of ``size`` bytes is to be mapped; it then has a place until :meth:`note` or :meth:`give_back`."""
        if size <= COPIED:
            return False
        with self._lock.held():
            if len(self._files) + self._reserved >= self._most:
                self._files = [tensors for tensors in self._files if any(tensor() is not None for tensor in tensors)]
            free = len(self._files) + self._reserved < self._most
            self._reserved += free
            return free

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Count a file that was mapped: these are its tensors."""
        with self._lock.held():
            self._files.append([ref(tensor) for tensor in tensors])
            self._reserved -= 1

    def give_back(self) -> None:
        """Free the place of a file that could not be mapped."""
        with self._lock.held():
            self._reserved -= 1

    def __reduce__(self) -> tuple[type[Mappings], tuple[int]]:
        return Mappings, (self._most,)


OF_PROCESS = Mappings(4096)
"""Counts for all banks without a bound of their own."""
