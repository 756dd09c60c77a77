"""Saves of other processes into a bank's folder, taken over by a model that was loaded from there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from ..files.read import MAX_BYTES, read_file
from ..nn.names import describe, escape
from ..nn.structure import structure
from ..nn.task_layer import TaskLayer, task_layers
from ..nn.tasks import slots
from ..nn.wrappers import check_may_grow, check_not_sharded
from .export import STATE
from .folder import Source, checked_tasks, digests, source_of, take_read, watch
from .index import INDEX, BankError, Index
from .kept import Kept, kept_of
from .residency import Residency
from .store import Store
from .writer import serialise


@dataclass
class _Changes:
    """The slots whose tasks are not what they were."""

    removed: dict[str, int]
    changed: dict[str, int]
    added: dict[str, int]

    @property
    def names(self) -> list[str]:
        """The names, by slot."""
        slots = {**self.removed, **self.changed, **self.added}
        return sorted(slots, key=slots.__getitem__)


def refresh(model: nn.Module, store: Store, residency: Residency | None) -> tuple[Store, list[str]]:
    """Make ``model``, which holds what ``store`` does and perhaps more, hold what the folder does now.

    Returns:
        The bank as it was opened now, and the names of the tasks that were added, changed or removed.

    Raises:
        BankError: as :meth:`metamask_ext.MaskBank.refresh`; nothing has changed.
    """
    index = store.directory / INDEX
    if index.is_file() and read_file(index, MAX_BYTES) == store.data:
        return store, []
    newer = Store.open(store.directory)
    newer.mappings = store.mappings
    old, new = store.opened, newer.opened
    for what, before, after in (("shared weights", old.shared.sha256, new.shared.sha256), ("settings (meta)", old.meta, new.meta)):
        if before != after:
            raise BankError(f"{index}: has other {what} since it was loaded: load it again, into a model")
    checked_tasks(newer)
    with structure():
        kept = kept_of(model)
        changes = _changes(old, new)
        _check_own(model, store, newer, kept, changes)
        present = set(slots(model))
        taken = [*changes.added, *(name for name in changes.changed if name in present)]
        whole = any(each.has_parameters for each in kept)
        pinned = frozenset() if residency is None else residency.pinned
        read = {name: newer.task(name) for name in taken if whole or escape(name) in pinned or not newer.info(name).get("packed")}
        for name, tensors in read.items():
            for each in kept:
                each.check(newer, name, tensors)
        layers = [layer for _, layer in task_layers(model)]
        check_not_sharded(layers, "the tasks of a bank cannot be taken in")
        if any(each.makes_parameter(name, tensors) for name, tensors in read.items() for each in kept):
            check_may_grow(layers, "new tasks of a bank cannot be taken in")
        held = [{name: each.tensors._held(escape(name)) for name in changes.changed} for each in kept]
        source = Source(newer, kept, residency)
        for earlier in [found for each in kept if (found := source_of(each)) is not None][:1]:
            source.states.update(earlier.states)
        source.states.update({name: digests(tensors) for name, tensors in read.items()})
        take_in = partial(_take_in, layers, source, changes, taken, held, read, pinned)
        try:
            take_in()
        except BaseException:  # Ctrl-C amid the layers would leave them with different tasks
            take_in()
            raise
    return newer, changes.names


def _changes(old: Index, new: Index) -> _Changes:
    changes = _Changes({}, {}, {})
    for slot, (before, after) in enumerate(zip_longest(old.tasks, new.tasks)):
        if before is not None and after is not None and before.name == after.name:
            if (before.file, before.info) != (after.file, after.info):
                changes.changed[after.name] = slot
            continue
        if before is not None:
            changes.removed[before.name] = slot
        if after is not None:
            changes.added[after.name] = slot
    return changes


def _check_own(model: nn.Module, store: Store, newer: Store, kept: Sequence[Kept], changes: _Changes) -> None:
    """BankError if the model has tasks of its own that the folder's would replace, or whose slots these have."""
    index, now, before = store.directory / INDEX, slots(model), store.tasks
    own = [name for slot, name in enumerate(now) if name is not None and (slot >= len(before) or before[slot] != name)]
    if taken := [name for name, slot in changes.added.items() if slot < len(now) or name in own]:
        unsaved = f"{describe(own)} of this bank were never saved" if own else "this bank had others there"
        raise BankError(
            f"{index}: others have added {describe(taken)} in slots which this bank has given out, or under names of its own: "
            f"{unsaved}. Load the folder into another model"
        )
    lost = [name for name in changes.changed if name not in now]
    lost += [name for name in (*changes.changed, *changes.removed) if name in now and not _is_saved(store, newer, kept, name)]
    if lost:
        raise BankError(
            f"{index}: others have changed or removed {describe(lost)}, and so has this bank since it was loaded: save it with "
            "overwrite=True, or load the folder into another model"
        )


def _is_saved(store: Store, newer: Store, kept: Sequence[Kept], name: str) -> bool:
    """Return whether the model holds of a task what its file had: that which it was loaded from, or that which is there now."""
    key = escape(name)
    here = {each.key(name): tensor for each in kept if (tensor := each.tensors._held(key)) is not None}
    if not here:
        return True
    for of in (newer, store):
        try:
            given = of.exactly(name)
        except (BankError, KeyError, FileNotFoundError):  # gone: its checksum is known
            continue
        if all(_same(tensor, given.get(found)) for found, tensor in here.items()):
            return True
    sources = [source for each in kept if (source := source_of(each)) is not None]
    if sources:
        read = sources[0].states.get(name, {})
        changed = [found for found, digest in digests(here).items() if read.get(found) != digest]
        if not changed and all(found.startswith(STATE) for found in here):
            return True
    whole = {**(sources[0].rest(name) if sources else {}), **here}
    ordered = {found: whole[found] for each in kept for found in each.names() if found in whole}
    task = store.opened.tasks[store.tasks.index(name)]
    data = serialise(f"task {name!r}", ordered, store.shared_sha256)
    return task is not None and hashlib.sha256(data).hexdigest() == task.file.sha256


def _same(held: Tensor, given: Tensor | None) -> bool:
    return given is not None and held.dtype == given.dtype and torch.equal(held.detach(), given.to(held.device))


def _take_in(
    layers: Sequence[TaskLayer],
    source: Source,
    changes: _Changes,
    taken: Sequence[str],
    held: Sequence[dict[str, Tensor | None]],
    read: dict[str, dict[str, Tensor]],
    pinned: frozenset[str],
) -> None:
    """Take the changes over. Repeatable."""
    for name, slot in changes.removed.items():
        for layer in layers:
            if any(tensors._slots.get(escape(name)) == slot for tensors in layer._dicts().values()):
                layer._remove_task(name)
    with torch.inference_mode(False), torch.no_grad():
        for each, of_each in zip(source.kept, held):
            for name in taken:
                each.tensors._expect(name, changes.added.get(name), source.fetch(each))
                if name in read:
                    take_read(each, name, read[name], of_each.get(name), escape(name) in pinned)
    watch(source)
