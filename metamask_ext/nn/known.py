"""The layers of a model, found fast, and the tasks that all of them know, remembered while no task and no module comes or goes.

What is remembered is that a name was found right, for the errors of a block that is entered: no layer and no mask. Which layers a
block is for, it asks when one of them is first called (:class:`metamask_ext.nn.context.Context`); and a layer looks for the mask
of its own that has the active task's name, so that none of another task is used whatever has changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .names import escape
from .task_dict import CHANGES, Changes, TaskDict
from .task_layer import TaskLayer, raise_no_layer, same_tasks, task_keys, task_layers

_MODULES = Changes()
"""Those of modules that are registered in others, in any model."""


def _note(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if not torch.compiler.is_dynamo_compiling():
        _MODULES.note()


register_module_module_registration_hook(_note)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """``model`` and the modules in it, each once, in torch's order, without those that hold the tensors of tasks."""
    found = {model: None}
    _collect(model, found)
    return list(found)


def _collect(module: nn.Module, found: dict[nn.Module, None]) -> None:
    for child in module._modules.values():
        if child is not None and child not in found and not isinstance(child, TaskDict):
            found[child] = None
            if child._modules:
                _collect(child, found)


def layers_of(model: nn.Module) -> list[TaskLayer]:
    """The layers of ``model`` with tensors of tasks, each once. ValueError if there is none."""
    return [module for module in modules_of(model) if isinstance(module, TaskLayer)] or raise_no_layer(model)


class Known:
    """The facts that were found of a model at these counts: keys of tasks that every layer knows, and more that depends on it."""

    def __init__(self, changes: int, modules: int):
        self.changes, self.modules = changes, modules
        self.keys: set[str] = set()
        self.one_place = False
        """True if no layer is both below a module with ``batch_first=False`` and elsewhere."""
        self.numbered: tuple[ref[TaskLayer], ...] = ()
        """The layers, where all of them count their tasks alike."""

    def holds(self) -> bool:
        """True if nothing has come or gone since."""
        return self.changes == CHANGES.count and self.modules == _MODULES.count

    def first(self) -> TaskDict | None:
        """The tasks of the first layer, where all layers have the same in the same slots."""
        layer = self.numbered[0]() if self.numbered else None
        return None if layer is None else layer._task_dict()

    def are_numbered(self, layers: Sequence[TaskLayer]) -> bool:
        """True if these are the layers that count their tasks alike."""
        return len(self.numbered) == len(layers) and all(of() is layer for of, layer in zip(self.numbered, layers))


_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def known_of(model: nn.Module) -> Known:
    """The facts known of ``model`` now; ask before a check, and add what it finds. As long as it is valid, it is the same object.

    TypeError if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    known = _KNOWN.get(model)
    if known is None or not known.holds():
        known = _KNOWN[model] = Known(CHANGES.count, _MODULES.count)
    return known


def check_known(model: nn.Module, known: Known, keys: AbstractSet[str], names: Iterable[str]) -> None:
    """ValueError if a layer of ``model`` does not know one of these tasks; ``keys`` are those of ``names``."""
    if keys and known.keys >= keys:
        return
    if all(layer._task_dict()._slots.keys() >= keys for layer in layers_of(model)):
        known.keys.update(keys)
        return
    layers = task_layers(model)
    for name in names:
        task_keys(layers, name)


def unknown_among(model: nn.Module, known: Known, names: Iterable[str], layers: Sequence[TaskLayer] = ()) -> set[str]:
    """Those of ``names`` that no layer of ``model`` knows. ValueError if only some layers know one.

    ``layers``: all of the model's. Without, those are trusted that were found alike while no task and no module has come.
    """
    keys = {_key(name): name for name in names}
    missing = keys.keys() - known.keys
    if not missing:
        return set()
    first = None if layers else known.first()
    if first is not None:
        dicts = [first]
    else:
        layers = layers or layers_of(model)
        number(known, layers)
        dicts = [layer._task_dict() for layer in layers]
    in_all, in_any = set(missing), set[str]()
    for tensors in dicts:
        in_all &= tensors._slots.keys()
        in_any |= missing & tensors._slots.keys()
    if in_any - in_all:
        same_tasks(task_layers(model))
    known.keys.update(in_all)
    return {keys[key] for key in missing - in_all}


def _key(name: str) -> str:
    return escape(name) if name else name  # no task's


def names_by_slot(model: nn.Module, known: Known) -> list[str | None]:
    """The tasks of ``model`` by slot, as its first layer has them: :func:`check_slots` those that are used."""
    first = known.first()
    if first is None:
        number(known, layers := layers_of(model))
        first = layers[0]._task_dict()
    return first._names


def number(known: Known, layers: Sequence[TaskLayer]) -> None:
    """Note that these layers, all of the model's, count their tasks alike, where they do."""
    names = layers[0]._task_dict()._names
    if all(layer._task_dict()._names == names for layer in layers[1:]):
        known.numbered = tuple(map(ref, layers))


def check_slots(model: nn.Module, known: Known, slots: Mapping[str, int | None], layers: Sequence[TaskLayer] = ()) -> None:
    """ValueError if layers count these tasks differently, or give one another slot than this. ``layers``: all of the model's.

    Without ``layers``, which take time to find, those are trusted that were found alike while no task and no module has come.
    """
    if known.numbered if not layers else known.are_numbered(layers):
        return
    (first_name, first), *others = task_layers(model)
    for task, slot in slots.items():
        key = escape(task)
        number = first._task_dict()._slots.get(key) if slot is None else slot
        for name, layer in [(first_name, first), *others]:
            found = layer._task_dict()._slots.get(key)
            if found != number:
                raise ValueError(
                    f"task must be names, got slots: the layers of the model count their tasks differently: task {task!r} is slot "
                    f"{number} of {first_name or 'the model'!r} and {found} of {name or 'the model'!r}"
                )
