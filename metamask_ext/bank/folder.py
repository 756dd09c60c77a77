"""A model and its bank on disk: the tasks that are saved, and the checks before a model takes a bank over."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn
from weakref import ref

import torch
from torch import Tensor, nn

from ..files.lock import ThreadLock
from ..nn.masked_layer import MaskedLayer
from ..nn.names import escape
from ..nn.paths import plain_modules
from ..nn.per_task import PerTask, keep_per_task
from ..nn.structure import structure
from ..nn.task_dict import TaskDict
from ..nn.task_layer import TaskLayer, task_layers
from ..nn.tasks import masked_layers, slots
from ..nn.wrappers import check_may_grow, check_whole
from .base import as_bytes
from .export import BITS, LOGITS, STATE
from .index import INDEX, BankError, JsonObject
from .kept import Kept, fill, kept_of
from .metrics import Metrics
from .per_task import full_name, shared_tensors
from .residency import Residency
from .settings import LayerSettings, described, layer_settings, names_per_task, settings_of
from .store import Store
from .writer import TaskSource
from .writer import save as write_store

SETTINGS = "temperature", "threshold"
"""The settings of a layer that a bank brings along; the rest of its description must be the model's."""


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    seen: Collection[str] | None,
    remember: Callable[[Store], object],
    residency: Residency | None,
    metrics: Mapping[int, Metrics],
) -> None:
    """Save the model's tasks, with ``metrics`` by slot; ``seen``: the states of the folder that may be replaced, None: any.

    ``remember`` is called with the bank that was saved, also where an error came too late to undo that. From then on tasks may
    leave memory as ``residency`` says.

    Tasks that nobody has used since they were loaded are referred to. All others are compared with the folder by their contents:
    there are too many ways to write to a tensor for anything else to tell whether it has changed.
    """
    with structure():
        kept = kept_of(model)
        shared = {name: tensor.detach() for name, _, _, tensor in shared_tensors(model)}
        meta = {"layers": described_layers(model), "per_task": described_per_task(model)}
        tasks = [
            None if name is None else (name, _task(kept, name, seen is None, metrics.get(slot, Metrics())))
            for slot, name in enumerate(slots(model))
        ]
    states: list[str] = []

    def adopt(store: Store) -> None:
        with structure():
            watch(Source(store, kept, residency))
            for name in store.tasks:
                if (
                    residency is not None
                    and name is not None
                    and any(each.tensors._buffers.get(escape(name)) is not None for each in kept)
                ):
                    residency.note(escape(name))
        remember(store)

    try:
        store = write_store(directory, meta, shared, tasks, seen=seen, committing=states.append)
    except BaseException:
        with suppress(OSError, BankError):  # the error above is the one to know
            found = Store.open(directory) if states else None
            if found is not None and found.state in states:
                adopt(found)
        raise
    adopt(store)


def watch(source: Source) -> None:
    """Let what waits in a model's TaskDicts be fetched from this source. The lock of the tasks is held."""
    for each in source.kept:
        each.tensors._fetch = source.fetch(each) if each.tensors._waiting else None
    if source.residency is not None:
        source.residency.watch(source)


def _task(kept: Sequence[Kept], name: str, anew: bool, metrics: Metrics) -> TaskSource:
    """Return a reference to the task where it is in a file, as it is there, else its tensors; ``anew``: always its tensors."""
    source = source_of(kept[0])
    waits = all(source_of(each) is source and name in each.tensors._waiting for each in kept)
    if source is not None and waits and {each.name for each in source.kept} == {each.name for each in kept}:
        store = source.store
        info = {**store.info(name), **metrics.described()}
        return (store.task(name), info) if anew and store.is_stale() else (store, name, info)
    tensors = {each.key(name): each.tensors[name].detach() for each in kept}
    masks = [each.key(name) for each in kept if each.is_mask]
    return tensors, {"packed": all(key.startswith(BITS) for key in masks), **metrics.described()}


def load(
    store: Store,
    model: nn.Module,
    pinned: Collection[str] = (),
    device: torch.device | None = None,
    residency: Residency | None = None,
) -> None:
    """Make ``model`` hold what the store does; BankError, and nothing has changed, if it cannot.

    ``pinned``: the tasks that are read now. ``device``: where ``model`` goes before it is filled.
    """
    index = store.directory / INDEX
    per_task = _check_model(index, store.meta, model)
    settings = layer_settings(index, store.meta)
    present = checked_tasks(store)
    shared = store.shared()
    own = {full_name(path, name) for path, of_module in per_task.items() for name in of_module}
    _check_shared(index, shared, _targets(model, own))
    kept = kept_of(model, per_task)
    # A parameter must be there before it is used: optimisers are made of those that are.
    whole = any(each.has_parameters for each in kept)
    read = {name: store.task(name) for name in present if whole or name in pinned or not store.info(name).get("packed")}
    for name, tensors in read.items():
        for each in kept:
            each.check(store, name, tensors)
    check_whole(model.modules(), "the tasks of a bank cannot be taken in")
    modules = dict(plain_modules(model, remove_duplicate=False))
    made = any(not isinstance(modules[path], PerTask) for path in per_task)
    if made or any(each.makes_parameter(name, tensors) for name, tensors in read.items() for each in kept):
        check_may_grow((layer for _, layer in task_layers(model)), "new tasks of a bank cannot be taken in")
    if device is not None:
        model.to(device)

    # From here on nothing fails.
    for path, of_module in per_task.items():
        module = modules[path]
        if not isinstance(module, PerTask):
            keep_per_task(module, of_module, slots(model))
    kept = kept_of(model)
    held = [{name: each.tensors._held(escape(name)) for name in each.tensors} for each in kept]
    layers = [(layer, settings[path]) for path, layer in masked_layers(model)]
    shared_pairs = [(tensor, shared[full]) for full, tensor in _targets(model, own).items()]
    source = Source(store, kept, residency)
    source.states.update({name: digests(tensors) for name, tensors in read.items()})
    take_in = partial(_take_in, layers, shared_pairs, source, held, read, frozenset(pinned))
    try:
        take_in()
    except BaseException:  # Ctrl-C amid the layers would leave a model of two banks
        take_in()
        raise


def _targets(model: nn.Module, own: Collection[str]) -> dict[str, Tensor]:
    """Return what tasks share in ``model``, by name; ``own``: what is to belong to tasks."""
    return {full: tensor for full, _, _, tensor in shared_tensors(model) if full not in own}


def checked_tasks(store: Store) -> list[str]:
    """Return the names of the bank's tasks. BankError if there are none, or ``bank.json`` does not say if one is packed."""
    index, present = store.directory / INDEX, [name for name in store.tasks if name is not None]
    for name in present:
        info = store.info(name)
        if not isinstance(packed := info.get("packed", False), bool):
            raise BankError(f"{index}: packed of task {name!r} must be true or false, got {packed!r:.60}")
        try:
            Metrics.read(info)
        except ValueError as error:
            raise BankError(f"{index}: task {name!r}: {error}") from error
    if not present:
        raise BankError(f"{index}: the bank has no task, and a masked layer needs one")
    return present


def _take_in(
    layers: Iterable[tuple[MaskedLayer, LayerSettings]],
    shared: Iterable[tuple[Tensor, Tensor]],
    source: Source,
    held: Sequence[Mapping[str, Tensor | None]],
    read: Mapping[str, Mapping[str, Tensor]],
    pinned: Collection[str],
) -> None:
    """Fill layers, shared tensors (each with its new value) and TaskDicts, which held these tensors. Repeatable."""
    for layer, of_layer in layers:
        for setting in SETTINGS:
            setattr(layer, setting, getattr(of_layer, setting))
    with torch.inference_mode(False), torch.no_grad():
        for tensor, value in shared:
            fill(tensor, value)
        for each, of_each in zip(source.kept, held):
            each.tensors._wait_for(source.store.tasks, source.fetch(each))
            for name, tensors in read.items():
                take_read(each, name, tensors, of_each.get(name), name in pinned)
    if source.residency is not None:
        with structure():
            source.residency.watch(source)


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the SHA-256 of each tensor of a task that is no mask."""
    return {key: hashlib.sha256(as_bytes(tensor)).hexdigest() for key, tensor in tensors.items() if key.startswith(STATE)}


def take_read(each: Kept, name: str, tensors: Mapping[str, Tensor], held: Tensor | None, pinned: bool) -> None:
    """Give a TaskDict its part of a task that was read; bits only of one that stays in memory, all others wait.

    ``held``: the tensor that it had.
    """
    key = each.key_in(tensors)
    if not key.startswith(BITS):
        each.tensors[name] = each.filled(held, tensors[key])
    elif pinned:
        each.tensors[name] = tensors[key].to(each.device)


class Source:
    """An opened bank, from which layers fetch their part of a task: its file is opened once for all of them.

    Attributes:
        residency: is told of each task that is fetched.
    """

    def __init__(self, store: Store, kept: Sequence[Kept], residency: Residency | None = None):
        self.store, self.residency = store, residency
        # Weakly: a model that is let go of takes its tasks with it at once, also where something of it knows this source.
        self._parts = [(ref(each.tensors), {**vars(each), "tensors": None}) for each in kept]
        self.states: dict[str, dict[str, str]] = {}
        """Of tasks that were read when the bank was opened: the digests of what is no mask, by name."""
        self._lock = ThreadLock()
        self._rest: dict[str, dict[str, Tensor]] = {}

    @property
    def kept(self) -> list[Kept]:
        """The tensors of a task, as its file has them, with the model's TaskDicts."""
        found = ((tensors(), entries) for tensors, entries in self._parts)
        return [Kept(**{**entries, "tensors": tensors}) for tensors, entries in found if tensors is not None]

    def fetch(self, each: Kept) -> Fetch:
        """Return the function that gives a TaskDict its part."""
        return Fetch(self, each)

    def take(self, task: str, each: Kept) -> Tensor:
        """Return one tensor of a task; its file is forgotten when every layer has taken its part."""
        with self._lock.held():
            rest = self._rest.get(task)
            if rest is None or each.key_in(rest) not in rest:
                rest = self._rest[task] = dict(self.store.task(task))
            tensor = each.check(self.store, task, rest)
            key = each.key_in(rest)
            if key.startswith(LOGITS):
                path = self.store.path(task)
                raise BankError(f"{path}: task {task!r} has got logits for {each.name} since the bank was opened. Open it again")
            rest.pop(key, None)
            if not rest:
                self._rest.pop(task, None)
        return tensor.to(each.device) if key.startswith(BITS) else tensor.to(each.device, copy=True)

    def rest(self, task: str) -> dict[str, Tensor]:
        """Return what was read of a task and not yet taken."""
        with self._lock.held():
            return dict(self._rest.get(task, {}))

    def __deepcopy__(self, memo: dict[int, object]) -> Source:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model whose tasks are in a bank's folder cannot be pickled: save its state_dict, or MaskBank.save")


class Fetch:
    """The function that a TaskDict calls to get its tensor of a task."""

    def __init__(self, source: Source, each: Kept):
        self.source, self.each = source, each

    def __call__(self, task: str) -> Tensor:
        tensor = self.source.take(task, self.each)
        if self.source.residency is not None:
            self.source.residency.note(escape(task))
        return tensor


def source_of(each: Kept) -> Source | None:
    """Return the opened bank that has the tasks which wait there."""
    fetch = each.tensors._fetch
    return fetch.source if isinstance(fetch, Fetch) and fetch.each.name == each.name else None


def described_layers(model: nn.Module) -> dict[str, JsonObject]:
    """Describe the masked layers of a model, by path, as ``meta`` of a bank does."""
    return {
        path: {
            **described({name: list(shared.shape) for name, (shared, _) in groups.items()}),
            "gate": layer.gate,
            "temperature": float(layer.temperature),
            "threshold": float(layer.threshold),
            "dtype": str(next(iter(groups.values()))[0].dtype).removeprefix("torch."),
        }
        for path, layer in masked_layers(model)
        for groups in (layer._named_groups(),)
    }


def described_per_task(model: nn.Module) -> dict[str, list[str]]:
    """List what belongs to tasks beside the masks, by the paths of modules."""
    return {path: list(layer._own()) for path, layer in task_layers(model) if isinstance(layer, PerTask)}


def _check_model(index: Path, meta: JsonObject, model: nn.Module) -> dict[str, list[str]]:
    """Return what the bank keeps per task, by module; BankError if its layers are not the model's."""
    given = layer_settings(index, meta)
    per_task = names_per_task(index, meta)
    own = {path: settings_of(index, path, layer) for path, layer in described_layers(model).items()}
    if given.keys() != own.keys():
        raise BankError(f"{index}: the bank's masked layers are {sorted(given)}, the model's are {sorted(own)}")
    for path, layer in given.items():
        for name, value, wanted in layer.differences(own[path]):
            raise BankError(f"{index}: the bank's {path!r} has {name} {value!r}, the model's has {wanted!r}")
    modules = dict(plain_modules(model))
    for path, names in {**described_per_task(model), **per_task}.items():
        module = modules.get(path)
        if not isinstance(module, PerTask) and (module is None or not names or isinstance(module, (TaskLayer, TaskDict))):
            raise BankError(f"{index}: the bank keeps {names} of {path!r} per task, and the model has none of it to keep")
        if isinstance(module, PerTask):
            has = list(module._own())
        else:
            has = [name for name in names if module._parameters.get(name) is not None or module._buffers.get(name) is not None]
        if sorted(per_task.get(path, [])) != sorted(has):
            raise BankError(f"{index}: the bank keeps {per_task.get(path, [])} of {path!r} per task, the model can keep {has}")
    return per_task


def _check_shared(index: Path, shared: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    tied: dict[Tensor, str] = {}
    if shared.keys() != targets.keys():
        differing = sorted(shared.keys() ^ targets.keys())
        raise BankError(f"{index}: the bank's shared weights are not the model's: {differing} are in one only")
    for name, target in targets.items():
        if (shared[name].shape, shared[name].dtype) != (target.shape, target.dtype):
            raise BankError(
                f"{index}: the bank's {name} is {shared[name].dtype} {list(shared[name].shape)}, the model's is {target.dtype} "
                f"{list(target.shape)}"
            )
        other = tied.setdefault(target, name)
        if other != name and not torch.equal(shared[name], shared[other]):
            raise BankError(f"{index}: the bank has different values for {other} and {name}, which are one tensor in the model")
