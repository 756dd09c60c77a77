"""Measurements of a task, recorded in ``bank.json`` beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..nn.names import plain
from .store import Store

_NOW, _BEFORE = "metrics", "metrics_before_packing"


@dataclass(frozen=True)
class Metrics:
    """Numbers by name: of the task as it is, and of its logits before they were packed."""

    now: Mapping[str, float] = field(default_factory=dict)
    before_packing: Mapping[str, float] = field(default_factory=dict)

    def with_more(self, values: Mapping[str, object]) -> Metrics:
        """Return these with more; a name that is there gets its new value. TypeError or ValueError if one is no finite number."""
        return Metrics({**self.now, **{name: _number(name, value) for name, value in values.items()}}, self.before_packing)

    def packed(self) -> Metrics:
        """Return what is known once the task is packed: all that was measured so far is of before."""
        return Metrics({}, {**self.before_packing, **self.now})

    def described(self) -> dict[str, dict[str, float]]:
        """Return them as JSON has them; nothing of what is empty."""
        return {key: dict(values) for key, values in ((_NOW, self.now), (_BEFORE, self.before_packing)) if values}

    @classmethod
    def read(cls, info: Any) -> Metrics:
        """Return what :meth:`described` gave, among other entries. ValueError if it is something else."""
        if not isinstance(info, dict):
            raise ValueError(f"metrics must be an object, got {info!r:.60}")
        found = []
        for key in (_NOW, _BEFORE):
            values = info.get(key, {})
            if not isinstance(values, dict):
                raise ValueError(f"{key} must be an object, got {values!r:.60}")
            try:
                found.append({name: _number(name, value) for name, value in values.items()})
            except TypeError as error:
                raise ValueError(str(error)) from error
        return cls(*found)


def recorded(store: Store) -> dict[int, Metrics]:
    """Return what was recorded of the tasks of a bank, by slot."""
    found = {slot: Metrics.read(store.info(name)) for slot, name in enumerate(store.tasks) if name is not None}
    return {slot: metrics for slot, metrics in found.items() if metrics != Metrics()}


def _number(name: str, value: object) -> float:
    if not isinstance(plain(name), str):
        raise TypeError(f"a metric's name must be a string, got {type(name).__name__}")
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"metric {name!r} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"metric {name!r} must be one number, got {value!r:.60}") from error
    if not math.isfinite(number):
        raise ValueError(f"metric {name!r} must be finite, got {number}")
    return number
