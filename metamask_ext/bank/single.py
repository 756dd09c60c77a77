"""One task of a model, to and from a file of its own (:mod:`metamask_ext.bank.artefact`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import escape as escape_pattern
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn.names import check_name, describe
from ..nn.structure import structure
from ..nn.task_dict import TaskDict
from ..nn.task_layer import task_layers
from ..nn.tasks import put_in, tasks
from ..nn.wrappers import check_may_grow, check_not_sharded
from ..ops.geometry import packed_shape
from .artefact import Artefact, converted
from .base import Fingerprint, differences
from .export import BITS, LOGITS, STATE
from .folder import described_layers, described_per_task
from .index import BankError
from .kept import Kept, kept_of
from .metrics import Metrics
from .per_task import full_name, shared_tensors
from .settings import settings_of

_SHOWN = 3


def fingerprints(model: nn.Module) -> dict[str, Fingerprint]:
    """Return those of all that the tasks of ``model`` share."""
    return {name: Fingerprint.of(tensor) for name, _, _, tensor in shared_tensors(model)}


def artefact_of(
    model: nn.Module, task: str, metrics: Metrics, base_name: str | None, card: str | None, base: Mapping[str, Fingerprint]
) -> Artefact:
    """Return a task of ``model`` without its base, whose fingerprints are ``base``. ValueError if the task is unknown."""
    name = check_name(task)
    with structure():
        known = tasks(model)
        if name not in known:
            raise ValueError(f"task must be one of {describe(known)}, got {task!r}")
        kept = kept_of(model)
        tensors = {each.key(name): each.tensors[name].detach() for each in kept}
    meta = {"layers": described_layers(model), "per_task": described_per_task(model)}
    base_name = type(model).__name__ if base_name is None else base_name
    text = _card(name, base_name, tensors, kept, metrics) if card is None else card
    return Artefact(name, base_name, base, meta, metrics, text, tensors)


def _card(name: str, base_name: str, tensors: Mapping[str, Tensor], kept: list[Kept], metrics: Metrics) -> str:
    masks = [each for each in kept if each.is_mask]
    kind = "bits" if all(BITS + each.name in tensors for each in masks) else "logits"
    lines = [
        f"# Task {name!r}",
        "",
        f"Masks ({kind}) of {sum(each.shape.numel() for each in masks):,} weights, in {len(masks)} tensors of {base_name!r}.",
        "The base is not in this file: its fingerprints are, and only a model that has them takes the task.",
    ]
    values = [(f"{key}, before packing", value) for key, value in metrics.before_packing.items()] + [*metrics.now.items()]
    if values:
        lines += ["", "| metric | |", "|---|---|", *(f"| {key} | {value:.6g} |" for key, value in values)]
    lines += ["", "```python", "bank = metamask_ext.MaskBank(model)", "name = bank.load_task(file)", "```", ""]
    return "\n".join(lines)


def check_base(path: Path, artefact: Artefact, model: nn.Module) -> None:
    """BankError that names what differs, unless ``model`` has the base of a task and the layers for it."""
    of_tasks = frozenset(full_name(where, name) for where, names in artefact.per_task(path).items() for name in names)
    found = differences(artefact.base, {name: tensor for name, _, _, tensor in shared_tensors(model)}, of_tasks)
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise BankError(
            f"{path}: task {artefact.name!r} belongs to another base, {artefact.base_name!r}: {', '.join(found[:_SHOWN])}{more}"
        )
    own = {where: settings_of(path, where, layer) for where, layer in described_layers(model).items()}
    layers = artefact.layers(path)
    if layers.keys() != own.keys():
        raise BankError(f"{path}: the task masks the layers {sorted(layers)}, the model's masked layers are {sorted(own)}")
    for where, layer in layers.items():
        # Bits are bits whatever the gate; logits mean what their gate makes of them. The base has said of what dtype it may be.
        unlike = [
            each for each in layer.differences(own[where]) if each[0] != "dtype" and (each[0] != "gate" or not artefact.packed)
        ]
        if not artefact.packed and not unlike:
            key = "temperature" if layer.gate == "sigmoid" else "threshold"
            values = getattr(layer, key), getattr(own[where], key)
            unlike = [(key, *values)] if values[0] != values[1] else []
        for key, value, wanted in unlike:
            raise BankError(f"{path}: the task's {where!r} has {key} {value!r}, the model's has {wanted!r}")


def check_all(artefacts: Mapping[Path, Artefact], model: nn.Module) -> list[str]:
    """Check tasks of one base against a model; return the patterns of what it must keep per task besides what it does.

    BankError if one does not fit, or they have different tensors per task, or one name, or one of the model's.
    """
    known, own = set(tasks(model)), described_per_task(model)
    wanted: dict[str, list[str]] | None = None
    for path, artefact in artefacts.items():
        check_base(path, artefact, model)
        if artefact.name in known:
            raise BankError(f"{path}: there is another task {artefact.name!r}")
        known.add(artefact.name)
        of_task = {where: sorted(names) for where, names in artefact.per_task(path).items()}
        if wanted is not None and of_task != wanted:
            raise BankError(f"{path}: the task has {of_task} of its own, by module, and others {wanted}")
        wanted = of_task
    missing = {where: names for where, names in (wanted or {}).items() if where not in own}
    kept = kept_of(model, missing)
    for path, artefact in artefacts.items():
        _check_per_task(path, {**own, **missing}, artefact)
        _tensors_of(path, kept, artefact)
    return [escape_pattern(full_name(where, name)) for where, names in missing.items() for name in names]


def take_in(model: nn.Module, path: Path, artefact: Artefact, name: str | None) -> str:
    """Give ``model`` a task that was read; return its name there. BankError, and nothing has changed, if it does not fit."""
    task = check_name(artefact.name if name is None else name)
    with structure():
        if task in tasks(model):
            raise BankError(f"{path}: the model has a task {task!r} already: give another name, or remove that one")
        check_base(path, artefact, model)
        _check_per_task(path, described_per_task(model), artefact)
        new = _tensors_of(path, kept_of(model), artefact)
        layers = [layer for _, layer in task_layers(model)]
        check_not_sharded(layers, f"task {task!r} cannot be taken in")
        if any(_is_parameter(tensors, tensor) for tensors, tensor in new):
            check_may_grow(layers, f"task {task!r} cannot be taken in")
        put_in(task, new)
    return task


def _check_per_task(path: Path, own: Mapping[str, list[str]], artefact: Artefact) -> None:
    wanted = artefact.per_task(path)
    if {where: sorted(names) for where, names in own.items()} != {where: sorted(names) for where, names in wanted.items()}:
        raise BankError(
            f"{path}: the task has {wanted} of its own, by module, and the model keeps {dict(own)} per task: "
            "MaskBank(model, per_task=...) makes it keep more"
        )


def _tensors_of(path: Path, kept: Sequence[Kept], artefact: Artefact) -> list[tuple[TaskDict, Tensor]]:
    """Return a task's tensors with their TaskDicts. BankError if one does not fit."""
    try:
        new = [(each.tensors, _tensor_of(each, artefact.tensors)) for each in kept]
        if extra := artefact.tensors.keys() - {key for each in kept for key in each.names()}:
            raise ValueError(f"{min(extra)!r} belongs to no layer of the model")
    except ValueError as error:
        raise BankError(f"{path}: {error}") from error
    return new


def _is_parameter(tensors: TaskDict, tensor: Tensor) -> bool:
    return not (tensors._only_buffers or tensor.dtype == torch.uint8)


def _tensor_of(each: Kept, given: Mapping[str, Tensor]) -> Tensor:
    """Return a task's tensor for a TaskDict. ValueError if there is none that fits."""
    keys = [key for key in each.names() if key in given]
    if len(keys) != 1 or (keys[0].startswith(LOGITS) and any(key.startswith(BITS) for key in given)):
        wanted = f"{STATE}{each.name}" if not each.is_mask else f"bits for all weights or logits for all, for {each.name!r} too"
        raise ValueError(f"the task must have {wanted}, got {keys or 'neither'}")
    (key,), tensor = keys, given[keys[0]]
    shape = list(packed_shape(each.shape) if key.startswith(BITS) else each.shape)
    if list(tensor.shape) != shape:
        raise ValueError(f"{key!r} must have the shape {shape}, got {list(tensor.shape)}")
    return converted(tensor, torch.uint8 if key.startswith(BITS) else each.dtypes[0], key).to(each.device)
