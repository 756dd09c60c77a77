"""A model and its bank on disk: the tasks that are saved, and the checks before a model takes a bank over."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

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
from ..ops.geometry import packed_shape
from .export import BITS, LOGITS, STATE
from .index import INDEX, BankError, JsonObject
from .per_task import full_name, shared_tensors
from .settings import LayerSettings, described, layer_settings, names_per_task, settings_of
from .store import Store
from .writer import TaskSource
from .writer import save as write_store

SETTINGS = "temperature", "threshold"
"""The settings of a layer that a bank brings along; the rest of its description must be the model's."""


def save(
    model: nn.Module, directory: str | os.PathLike[str], seen: Collection[str] | None, remember: Callable[[Store], object]
) -> None:
    """Save the model's tasks; ``seen``: the states of the folder that may be replaced, None: any.

    ``remember`` is called with the bank that was saved, also where an error came too late to undo that.

    Tasks that nobody has used since they were loaded are referred to. All others are compared with the folder by their contents:
    there are too many ways to write to a tensor for anything else to tell whether it has changed.
    """
    with structure():
        kept = _kept(model)
        shared = {name: tensor.detach() for name, _, _, tensor in shared_tensors(model)}
        meta = {"layers": _layers(model), "per_task": _per_task(model)}
        tasks = [None if name is None else (name, _task(kept, name, seen is None)) for name in slots(model)]
    states: list[str] = []

    def adopt(store: Store) -> None:
        source = _Source(store, kept)
        with structure():
            for each in kept:
                each.tensors._fetch = _Fetch(source, each) if each.tensors._waiting else None
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


def _task(kept: Sequence[_Kept], name: str, anew: bool) -> TaskSource:
    """Return a reference to the task where it is in a file, as it is there, else its tensors; ``anew``: always its tensors."""
    source = kept[0].source
    waits = all(each.source is source and name in each.tensors._waiting for each in kept)
    if source is not None and waits and source.names == {each.name for each in kept}:
        store = source.store
        return (store.task(name), store.info(name)) if anew and store.is_stale() else (store, name)
    tensors = {each.key(name): each.tensors[name].detach() for each in kept}
    masks = [each.key(name) for each in kept if each.is_mask]
    return tensors, {"packed": all(key.startswith(BITS) for key in masks)}


def load(store: Store, model: nn.Module) -> None:
    """Make ``model`` hold what the store does; BankError, and nothing has changed, if it cannot."""
    index = store.directory / INDEX
    per_task = _check_model(index, store.meta, model)
    settings = layer_settings(index, store.meta)
    present = _checked_tasks(store)
    shared = store.shared()
    own = {full_name(path, name) for path, of_module in per_task.items() for name in of_module}
    targets = {full: tensor for full, _, _, tensor in shared_tensors(model) if full not in own}
    _check_shared(index, shared, targets)
    kept = _kept(model, per_task)
    # A parameter must be there before it is used: optimisers are made of those that are.
    whole = any(each.has_parameters for each in kept)
    read = {name: store.task(name) for name in present if whole or not store.info(name).get("packed")}
    for name, tensors in read.items():
        for each in kept:
            each.check(store, name, tensors)
    check_whole(model.modules(), "the tasks of a bank cannot be taken in")
    modules = dict(plain_modules(model, remove_duplicate=False))
    made = any(not isinstance(modules[path], PerTask) for path in per_task)
    if made or any(each.makes_parameter(name, tensors) for name, tensors in read.items() for each in kept):
        check_may_grow((layer for _, layer in task_layers(model)), "new tasks of a bank cannot be taken in")

    # From here on nothing fails.
    for path, of_module in per_task.items():
        module = modules[path]
        if not isinstance(module, PerTask):
            keep_per_task(module, of_module, slots(model))
    kept = _kept(model)
    held = [{name: each.tensors._held(escape(name)) for name in each.tensors} for each in kept]
    layers = [(layer, settings[path]) for path, layer in masked_layers(model)]
    shared_pairs = [(tensor, shared[full]) for full, tensor in targets.items()]
    take_in = partial(_take_in, layers, shared_pairs, store, list(zip(kept, held)), read)
    try:
        take_in()
    except BaseException:  # Ctrl-C amid the layers would leave a model of two banks
        take_in()
        raise


def _checked_tasks(store: Store) -> list[str]:
    """Return the names of the bank's tasks. BankError if there are none, or ``bank.json`` does not say if one is packed."""
    index, present = store.directory / INDEX, [name for name in store.tasks if name is not None]
    for name in present:
        if not isinstance(packed := store.info(name).get("packed", False), bool):
            raise BankError(f"{index}: packed of task {name!r} must be true or false, got {packed!r:.60}")
    if not present:
        raise BankError(f"{index}: the bank has no task, and a masked layer needs one")
    return present


def _take_in(
    layers: Iterable[tuple[MaskedLayer, LayerSettings]],
    shared: Iterable[tuple[Tensor, Tensor]],
    store: Store,
    kept: Sequence[tuple[_Kept, Mapping[str, Tensor | None]]],
    read: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Fill layers, shared tensors (each with its new value) and TaskDicts (each with the tensors it held). Repeatable."""
    for layer, of_layer in layers:
        for setting in SETTINGS:
            setattr(layer, setting, getattr(of_layer, setting))
    source = _Source(store, [each for each, _ in kept])
    with torch.inference_mode(False), torch.no_grad():
        for tensor, value in shared:
            _fill(tensor, value)
        for each, held in kept:
            each.tensors._wait_for(store.tasks, _Fetch(source, each))
            for name, tensors in read.items():
                key = each.key_in(tensors)
                if not key.startswith(BITS):
                    each.tensors[name] = each.filled(held.get(name), tensors[key])


def _fill(tensor: Tensor, given: Tensor) -> None:
    # What was made under inference_mode can be written to only there.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(given)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A TaskDict of the model, with the names of its tensors in a task's file, and their shape."""

    name: str
    """The name of the shared tensor in a plain state_dict."""
    tensors: TaskDict
    is_mask: bool
    shape: torch.Size
    dtypes: tuple[torch.dtype, ...]
    """Those that it may have in a file, but for bits; logits become the first one here."""
    device: torch.device

    @property
    def has_parameters(self) -> bool:
        """True if a packed task has a parameter here: a head's, say."""
        return not (self.is_mask or self.tensors._only_buffers)

    def fits(self, held: Tensor | None) -> bool:
        """Return whether a tensor that the model has can take the values of one that is no bits."""
        return held is not None and held.shape == self.shape and held.dtype in self.dtypes

    def filled(self, held: Tensor | None, given: Tensor) -> Tensor:
        """Return the tensor that the model has, with other values, where it fits: optimisers hold it. Else a copy of ``given``."""
        if held is None or not self.fits(held):
            return given.to(self.device, self.dtypes[0], copy=True)  # not the mapped file's memory: it will be trained
        _fill(held, given)
        return held

    @property
    def source(self) -> _Source | None:
        """The opened bank that has the tasks which wait here."""
        fetch = self.tensors._fetch
        return fetch.source if isinstance(fetch, _Fetch) and fetch.each.name == self.name else None

    def key(self, task: str) -> str:
        """Return the name that the task's tensor gets in a file."""
        if not self.is_mask:
            return STATE + self.name
        return (BITS if self.tensors[task].dtype == torch.uint8 else LOGITS) + self.name

    def key_in(self, given: Mapping[str, Tensor]) -> str:
        """Return the name that the tensor has among those of a file."""
        if not self.is_mask:
            return STATE + self.name
        return (BITS if BITS + self.name in given else LOGITS) + self.name

    def makes_parameter(self, task: str, given: Mapping[str, Tensor]) -> bool:
        """Return whether the task gets a parameter that the model does not have."""
        if self.key_in(given).startswith(BITS) or self.tensors._only_buffers:
            return False
        return not self.fits(self.tensors._held(escape(task)))

    def check(self, store: Store, task: str, given: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor of ``task`` among those of its file; BankError if it is not there, or does not fit."""
        key = self.key_in(given)
        bits = key.startswith(BITS)
        dtypes = (torch.uint8,) if bits else self.dtypes
        shape = list(packed_shape(self.shape) if bits else self.shape)
        tensor = given.get(key)
        if tensor is None or tensor.dtype not in dtypes or list(tensor.shape) != shape:
            got = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            wanted = " or ".join(map(str, dtypes))
            raise BankError(f"{store.path(task)}: {key} of task {task!r} must be {wanted} {shape}, got {got}")
        return tensor


def _kept(model: nn.Module, per_task: dict[str, list[str]] | None = None) -> list[_Kept]:
    """List what belongs to tasks in ``model``; ``per_task``: also what is to do so, without a TaskDict as yet."""
    found = []

    def add(name: str, tensors: TaskDict, is_mask: bool, like: Tensor, *dtypes: torch.dtype) -> None:
        found.append(_Kept(name, tensors, is_mask, like.shape, dtypes or (like.dtype,), like.device))

    for path, layer in task_layers(model):
        if isinstance(layer, MaskedLayer):
            for part, (shared, masks) in layer._named_groups().items():
                add(full_name(path, part), masks, True, shared, *layer._dtypes_of_logits(shared))
        elif isinstance(layer, PerTask):
            for name, tensors in layer._own().items():
                add(full_name(path, name), tensors, False, tensors[next(iter(tensors))])
    modules = dict(plain_modules(model, remove_duplicate=False)) if per_task else {}
    for path, names in (per_task or {}).items():
        module = modules[path]
        if not isinstance(module, PerTask):
            for name in names:
                add(full_name(path, name), TaskDict(buffers=name in module._buffers), False, getattr(module, name))
    return found


class _Source:
    """An opened bank, from which layers fetch their part of a task: its file is opened once for all of them."""

    def __init__(self, store: Store, kept: Sequence[_Kept]):
        self.store = store
        self.names = {each.name for each in kept}
        """The tensors of a task, as its file has them."""
        self._lock = ThreadLock()
        self._rest: dict[str, dict[str, Tensor]] = {}

    def take(self, task: str, each: _Kept) -> Tensor:
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

    def __deepcopy__(self, memo: dict[int, object]) -> _Source:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model whose tasks are in a bank's folder cannot be pickled: save its state_dict, or MaskBank.save")


class _Fetch:
    """The function that a TaskDict calls to get its tensor of a task."""

    def __init__(self, source: _Source, each: _Kept):
        self.source, self.each = source, each

    def __call__(self, task: str) -> Tensor:
        return self.source.take(task, self.each)


def _layers(model: nn.Module) -> dict[str, JsonObject]:
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


def _per_task(model: nn.Module) -> dict[str, list[str]]:
    return {path: list(layer._own()) for path, layer in task_layers(model) if isinstance(layer, PerTask)}


def _check_model(index: Path, meta: JsonObject, model: nn.Module) -> dict[str, list[str]]:
    """Return what the bank keeps per task, by module; BankError if its layers are not the model's."""
    given = layer_settings(index, meta)
    per_task = names_per_task(index, meta)
    own = {path: settings_of(index, path, layer) for path, layer in _layers(model).items()}
    if given.keys() != own.keys():
        raise BankError(f"{index}: the bank's masked layers are {sorted(given)}, the model's are {sorted(own)}")
    for path, layer in given.items():
        for name, value, wanted in layer.differences(own[path]):
            raise BankError(f"{index}: the bank's {path!r} has {name} {value!r}, the model's has {wanted!r}")
    modules = dict(plain_modules(model))
    for path, names in {**_per_task(model), **per_task}.items():
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
