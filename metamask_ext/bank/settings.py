"""The description of a bank's layers in ``bank.json``, checked: whoever wrote it, nothing of it reaches a model unseen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..ops.gate import resolve_gate
from .index import BankError, JsonObject


@dataclass(frozen=True)
class LayerSettings:
    """One masked layer, as ``meta["layers"]`` describes it: the shapes of its masked parameters, and its gate."""

    shapes: dict[str, list[int]]
    gate: str
    temperature: float
    threshold: float
    dtype: str

    def differences(self, other: LayerSettings) -> Iterator[tuple[str, object, object]]:
        """Yield what both must have in common and do not: a name, the value here and the one there."""
        yield from ((name, getattr(self, name), getattr(other, name)) for name in ("gate",) if self.gate != other.gate)
        for name in dict.fromkeys((*self.shapes, *other.shapes)):
            if self.shapes.get(name) != other.shapes.get(name):
                yield name, self.shapes.get(name), other.shapes.get(name)
        if self.dtype != other.dtype:
            yield "dtype", self.dtype, other.dtype


def described(shapes: Mapping[str, list[int]]) -> JsonObject:
    """The shapes of a layer's masked parameters in ``meta``: of a weight and a bias, or by names under ``parameters``."""
    if "weight" in shapes and shapes.keys() <= {"weight", "bias"}:
        return {"weight": shapes["weight"], "bias": shapes.get("bias")}
    return {"parameters": dict(shapes)}


def layer_settings(index: Path, meta: JsonObject) -> dict[str, LayerSettings]:
    """Return the layers that ``meta`` describes, by their paths; ``index`` is for messages.

    Raises:
        BankError: it describes none, or a value cannot be: a shape, a gate, a temperature, a threshold or a dtype.
    """
    return {path: settings_of(index, path, layer) for path, layer in _described_layers(index, meta).items()}


def layer_shapes(index: Path, meta: JsonObject) -> dict[str, dict[str, list[int]]]:
    """Return the shapes of the layers' masked parameters. BankError as of :func:`layer_settings`."""
    return {path: _shapes(index, path, layer) for path, layer in _described_layers(index, meta).items()}


def _described_layers(index: Path, meta: JsonObject) -> JsonObject:
    layers = meta.get("layers")
    if not isinstance(layers, dict):
        raise _undescribed(index, f"layers must be an object, got {_short(layers)}")
    for path, layer in layers.items():
        if not isinstance(layer, dict):
            raise _undescribed(index, f"layer {path!r} must be an object, got {_short(layer)}")
    return layers


def _shapes(index: Path, path: str, layer: JsonObject) -> dict[str, list[int]]:
    given = layer.get("parameters")
    if given is None:
        given = {"weight": layer.get("weight")} | ({} if layer.get("bias") is None else {"bias": layer["bias"]})
    if not isinstance(given, dict) or not given:
        raise _undescribed(index, f"parameters of layer {path!r} must be an object with shapes by name, got {_short(given)}")
    return {name: _shape(index, f"{name} of layer {path!r}", shape) for name, shape in given.items()}


def _shape(index: Path, what: str, shape: object) -> list[int]:
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise _undescribed(index, f"{what} must be a list of sizes, got {_short(shape)}")
    return shape


def settings_of(index: Path, path: str, layer: JsonObject) -> LayerSettings:
    """Return the settings of one layer. BankError if a value cannot be."""
    shapes, dtype = _shapes(index, path, layer), layer.get("dtype")
    try:
        gate = gate_settings(layer)
        if not isinstance(dtype, str):
            raise ValueError(f"dtype must be a string, got {_short(dtype)}")
    except ValueError as error:
        raise _undescribed(index, f"layer {path!r}: {error}") from error
    return LayerSettings(shapes, *gate, dtype)


def gate_settings(layer: JsonObject) -> tuple[str, float, float]:
    """Return the gate, the temperature and the threshold of a layer. ValueError if one cannot be."""
    gate = layer.get("gate")
    if not isinstance(gate, str):
        raise ValueError(f"gate must be a string, got {_short(gate)}")
    temperature, threshold = (_number(name, layer.get(name)) for name in ("temperature", "threshold"))
    resolve_gate(gate, temperature, threshold)
    return gate, temperature, threshold


def _undescribed(index: Path, why: str) -> BankError:
    return BankError(f"{index}: meta does not describe the masked layers: {why}")


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer that no float is near to
        pass
    raise ValueError(f"{name} must be a finite number, got {_short(value)}")


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
            raise _undescribed(index, f"per_task of {path!r} must be a list of different names, got {_short(names)}")
    return per_task


def _short(value: object) -> str:
    return "none" if value is None else f"{value!r:.60}" if isinstance(value, (str, list, int, float)) else type(value).__name__
