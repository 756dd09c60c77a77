"""The description of a bank's layers in ``bank.json``, checked: whoever wrote it, nothing of it reaches a model unseen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..ops.gate import resolve_gate
from .index import BankError, JsonObject


@dataclass(frozen=True)
class LayerSettings:
    """One masked layer, as ``meta["layers"]`` describes it."""

    weight: list[int]
    bias: list[int] | None
    gate: str
    temperature: float
    threshold: float
    dtype: str


def layer_settings(index: Path, meta: JsonObject) -> dict[str, LayerSettings]:
    """Return the layers that ``meta`` describes, by their paths; ``index`` is for messages.

    Raises:
        BankError: it describes none, or a value cannot be: a shape, a gate, a temperature, a threshold or a dtype.
    """
    layers = meta.get("layers")
    if not isinstance(layers, dict):
        raise BankError(f"{index}: meta does not describe the masked layers (layers must be an object, got {_short(layers)})")
    return {path: _layer(index, path, layer) for path, layer in layers.items()}


def _layer(index: Path, path: str, layer: object) -> LayerSettings:
    if not isinstance(layer, dict):
        raise BankError(f"{index}: layer {path!r} must be an object, got {_short(layer)}")
    if missing := [name for name in LayerSettings.__annotations__ if name not in layer and name != "bias"]:
        raise BankError(f"{index}: layer {path!r} has no {missing[0]!r}")
    bias = layer.get("bias")
    for name, shape in (("weight", layer["weight"]), *([] if bias is None else [("bias", bias)])):
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
            raise BankError(f"{index}: {name} of layer {path!r} must be a list of sizes, got {_short(shape)}")
    for name in ("gate", "dtype"):
        if not isinstance(layer[name], str):
            raise BankError(f"{index}: {name} of layer {path!r} must be a string, got {_short(layer[name])}")
    temperature, threshold = (_number(index, f"{name} of layer {path!r}", layer[name]) for name in ("temperature", "threshold"))
    try:
        resolve_gate(layer["gate"], temperature, threshold)
    except ValueError as error:
        raise BankError(f"{index}: layer {path!r}: {error}") from error
    return LayerSettings(layer["weight"], bias, layer["gate"], temperature, threshold, layer["dtype"])


def _number(index: Path, what: str, value: object) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer that no float is near to
        pass
    raise BankError(f"{index}: {what} must be a finite number, got {_short(value)}")


def names_per_task(index: Path, meta: JsonObject) -> dict[str, list[str]]:
    """Return what the bank keeps per task beside the masks, by the paths of modules. BankError if ``meta`` does not say."""
    per_task = meta.get("per_task")
    if not isinstance(per_task, dict):
        raise BankError(
            f"{index}: meta does not describe what belongs to tasks (per_task must be an object, got {_short(per_task)})"
        )
    for path, names in per_task.items():
        unique = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
        if not unique:
            raise BankError(f"{index}: per_task of {path!r} must be a list of different names, got {_short(names)}")
    return per_task


def _short(value: object) -> str:
    return "none" if value is None else f"{value!r:.60}" if isinstance(value, (str, list, int, float)) else type(value).__name__
