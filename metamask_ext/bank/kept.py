"""The tensors of a model that belong to its tasks, each with its name in a task's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.masked_layer import MaskedLayer
from ..nn.names import escape
from ..nn.paths import plain_modules
from ..nn.per_task import PerTask
from ..nn.task_dict import TaskDict
from ..nn.task_layer import task_layers
from ..ops.geometry import packed_shape
from .export import BITS, LOGITS, STATE
from .index import BankError
from .per_task import full_name
from .store import Store


@dataclass(frozen=True, eq=False)
class Kept:
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
        fill(held, given)
        return held

    def key(self, task: str) -> str:
        """Return the name that the task's tensor gets in a file."""
        if not self.is_mask:
            return STATE + self.name
        return (BITS if self.tensors[task].dtype == torch.uint8 else LOGITS) + self.name

    def names(self) -> tuple[str, ...]:
        """Return the names that a task's tensor may have in a file."""
        return (BITS + self.name, LOGITS + self.name) if self.is_mask else (STATE + self.name,)

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


def kept_of(model: nn.Module, per_task: dict[str, list[str]] | None = None) -> list[Kept]:
    """List what belongs to tasks in ``model``; ``per_task``: also what is to do so, without a TaskDict as yet."""
    found = []

    def add(name: str, tensors: TaskDict, is_mask: bool, like: Tensor, *dtypes: torch.dtype) -> None:
        found.append(Kept(name, tensors, is_mask, like.shape, dtypes or (like.dtype,), like.device))

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


def fill(tensor: Tensor, given: Tensor) -> None:
    """Give a tensor the values of another."""
    # What was made under inference_mode can be written to only there.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(given)
