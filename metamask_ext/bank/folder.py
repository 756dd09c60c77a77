"""A model and its bank on disk: the tasks that are saved, and the checks before a model takes a bank over."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..nn.masked_layer import MaskedLayer
from ..nn.names import escape
from ..nn.per_task import PerTask, keep_per_task
from ..nn.task_dict import TaskDict
from ..nn.task_layer import TaskLayer, task_layers
from ..nn.tasks import masked_layers, slots
from ..ops.geometry import packed_shape
from .export import BITS, LOGITS, STATE
from .index import INDEX, BankError, JsonObject
from .per_task import full_name, shared_tensors
from .store import Store
from .writer import TaskSource
from .writer import save as write_store

SETTINGS = "temperature", "threshold"
"""The settings of a layer that a bank brings along; the rest of its description must be the model's."""


def save(model: nn.Module, directory: str | os.PathLike[str], before: Store | None) -> Store:
    """Save the model's tasks. Those that ``before`` has as they are now, under the same shared weights, are only referred to."""
    shared = {name: tensor.detach() for name, _, _, tensor in shared_tensors(model)}
    if before is not None and not _same(before.shared(), shared):
        before = None
    kept = _kept(model)
    tasks: list[tuple[str, TaskSource] | None] = []
    for name in slots(model):
        if name is None:
            tasks.append(None)
        elif before is not None and all(_is_stored(each, name) for each in kept):
            tasks.append((name, (before, name)))
        else:
            tensors = {each.key(name): each.tensors[name].detach() for each in kept}
            tasks.append((name, (tensors, {"packed": any(key.startswith(BITS) for key in tensors)})))
    store = write_store(directory, {"layers": _layers(model), "per_task": _per_task(model)}, shared, tasks)
    source = _Source(store)
    for each in kept:
        each.tensors._fetch = _Fetch(source, each)
        for name in each.tensors:
            if each.is_bits(name) and name not in each.tensors._waiting:
                each.tensors._fetched[name] = each.tensors[name]
    return store


def load(store: Store, model: nn.Module) -> None:
    """Make ``model`` hold what the store does; BankError, and nothing has changed, if it cannot."""
    index = store.directory / INDEX
    per_task = _check_model(index, store.meta, model)
    names = store.tasks
    present = [name for name in names if name is not None]
    if not present:
        raise BankError(f"{index}: the bank has no task, and a masked layer needs one")
    shared = store.shared()
    own = {full_name(path, name) for path, of_module in per_task.items() for name in of_module}
    targets = {full: tensor for full, _, _, tensor in shared_tensors(model) if full not in own}
    _check_shared(index, shared, targets)
    trained = {name: store.task(name) for name in present if not store.entry(name).get("packed")}
    kept = _kept(model, per_task)
    for name, tensors in trained.items():
        for each in kept:
            each.check(store, name, LOGITS, tensors)

    # From here on nothing fails.
    for path, of_module in per_task.items():
        module = model.get_submodule(path)
        if not isinstance(module, PerTask):
            keep_per_task(module, of_module, slots(model))
    for path, layer in masked_layers(model):
        for setting in SETTINGS:
            setattr(layer, setting, store.meta["layers"][path][setting])
    with torch.no_grad():
        for full, tensor in targets.items():
            tensor.copy_(shared[full])
    source = _Source(store)
    for each in _kept(model):
        each.tensors._wait_for(names, _Fetch(source, each))
        for name, tensors in trained.items():
            # Not the mapped file's memory: it will be trained.
            each.tensors[name] = tensors[each.key(name, LOGITS)].to(each.device, each.dtypes[0], copy=True)


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

    def is_bits(self, task: str) -> bool:
        """Return whether the task is packed."""
        return self.is_mask and self.tensors._is_bits(escape(task))

    def key(self, task: str, mask: str | None = None) -> str:
        """Return the name of the task's tensor in its file; ``mask``: ``BITS`` or ``LOGITS``, by default what the task has here."""
        if not self.is_mask:
            return STATE + self.name
        return (mask or (BITS if self.is_bits(task) else LOGITS)) + self.name

    def check(self, store: Store, task: str, mask: str, given: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor of ``task`` among those of its file; BankError if it is not there, or does not fit."""
        bits = self.is_mask and mask == BITS
        dtypes = (torch.uint8,) if bits else self.dtypes
        shape = list(packed_shape(self.shape) if bits else self.shape)
        key = self.key(task, mask)
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
            for part, (shared, masks) in zip(("weight", "bias"), layer._groups()):
                add(full_name(path, part), masks, True, shared, *layer._dtypes_of_logits())
        elif isinstance(layer, PerTask):
            for name, tensors in layer._own().items():
                add(full_name(path, name), tensors, False, tensors[next(iter(tensors))])
    for path, names in (per_task or {}).items():
        module = model.get_submodule(path)
        if not isinstance(module, PerTask):
            for name in names:
                add(full_name(path, name), TaskDict(), False, getattr(module, name))
    return found


def _is_stored(each: _Kept, task: str) -> bool:
    """Return whether the tensor is certainly what the store holds. One that can be trained is compared when it is saved."""
    tensors = each.tensors
    return task in tensors._waiting or (each.is_bits(task) and tensors._fetched.get(task) is tensors._buffers.get(escape(task)))


class _Source:
    """An opened bank, from which layers fetch their part of a task: its file is opened once for all of them."""

    def __init__(self, store: Store):
        self.store = store
        self._lock = threading.Lock()
        self._rest: dict[str, dict[str, Tensor]] = {}

    def take(self, task: str, each: _Kept) -> Tensor:
        """Return one tensor of a task; its file is forgotten when every layer has taken its part."""
        mask = BITS if self.store.entry(task).get("packed") else LOGITS
        key = each.key(task, mask)
        with self._lock:
            rest = self._rest.get(task)
            if rest is None or key not in rest:
                rest = self._rest[task] = dict(self.store.task(task))
            tensor = each.check(self.store, task, mask, rest)
            del rest[key]
            if not rest:
                del self._rest[task]
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
            "weight": list(weight.shape),
            "bias": None if bias is None else list(bias.shape),
            "gate": layer.gate,
            "temperature": layer.temperature,
            "threshold": layer.threshold,
            "dtype": str(weight.dtype).removeprefix("torch."),
        }
        for path, layer in masked_layers(model)
        for weight, bias in (layer._shared(),)
    }


def _per_task(model: nn.Module) -> dict[str, list[str]]:
    return {path: list(layer._own()) for path, layer in task_layers(model) if isinstance(layer, PerTask)}


def _check_model(index: Path, meta: JsonObject, model: nn.Module) -> dict[str, list[str]]:
    """Return what the bank keeps per task, by module; BankError if its layers are not the model's."""
    try:
        saved, per_task = dict(meta["layers"]), {path: list(names) for path, names in meta["per_task"].items()}
        described = {
            path: {name: layer[name] for name in ("weight", "bias", "gate", "dtype", *SETTINGS)} for path, layer in saved.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise BankError(f"{index}: meta does not describe the masked layers ({error!r})") from error
    own = _layers(model)
    if described.keys() != own.keys():
        raise BankError(f"{index}: the bank's masked layers are {sorted(described)}, the model's are {sorted(own)}")
    for path, layer in described.items():
        for name in ("gate", "weight", "bias", "dtype"):
            if layer[name] != own[path][name]:
                raise BankError(f"{index}: the bank's {path!r} has {name} {layer[name]!r}, the model's has {own[path][name]!r}")
    modules = dict(model.named_modules())
    for path, names in {**_per_task(model), **per_task}.items():
        module = modules.get(path)
        if isinstance(module, PerTask):
            has = list(module._own())
        elif module is None or isinstance(module, (TaskLayer, TaskDict)):
            has = []
        else:
            has = [name for name in names if module._parameters.get(name) is not None or module._buffers.get(name) is not None]
        if sorted(per_task.get(path, [])) != sorted(has):
            raise BankError(f"{index}: the bank keeps {per_task.get(path, [])} of {path!r} per task, the model can keep {has}")
    return per_task


def _check_shared(index: Path, shared: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    if shared.keys() != targets.keys():
        differing = sorted(shared.keys() ^ targets.keys())
        raise BankError(f"{index}: the bank's shared weights are not the model's: {differing} are in one only")
    for name, target in targets.items():
        if (shared[name].shape, shared[name].dtype) != (target.shape, target.dtype):
            raise BankError(
                f"{index}: the bank's {name} is {shared[name].dtype} {list(shared[name].shape)}, the model's is {target.dtype} "
                f"{list(target.shape)}"
            )


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name].to(a[name].device)) for name in a
    )
