"""The tensors of active tasks as arguments of a compiled function (:mod:`metamask_ext.nn.compile`).

Dynamo cannot read a context variable, and a graph that knew the name of a task would be compiled again for each. Eager code reads
what is active, with all checks, and hands over tensors; inside the trace the layers find them here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

R = TypeVar("R")
Logits = tuple[Tensor, Tensor | None]
"""Of a weight and of its bias."""


class GivenTasks:
    """The masks of several tasks, or bits, and for each sample which of them it uses.

    Args:
        packed: whether the masks are bits.
        masks, bias_masks: a tensor a task; padded: ``slots`` may name none of the last ones.
        slots: int64 ``[B]``; None: all samples use the only task.
        dim, guessed: as of :class:`metamask_ext.nn.selection.TaskBatch`.
        several: whether the samples name more than one task.
    """

    def __init__(
        self,
        packed: bool,
        masks: list[Tensor],
        bias_masks: list[Tensor] | None,
        slots: Tensor | None = None,
        dim: int = 0,
        guessed: bool = False,
        several: bool = False,
    ):
        self.packed, self.masks, self.bias_masks, self.slots = packed, masks, bias_masks, slots
        self.dim, self.guessed, self.several = dim, guessed, several


class GivenRows:
    """The tensors of several tasks by name, ``[T, ...]``, and for each sample which of them it uses.

    Args:
        slots, dim, guessed, several: as of :class:`GivenTasks`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], slots: Tensor, dim: int, guessed: bool, several: bool):
        self.tensors, self.slots, self.dim, self.guessed, self.several = tensors, slots, dim, guessed, several


class GivenNorm:
    """The tensors of a batch norm by name, those that tasks have of their own, and what computes in the place of its forward."""

    def __init__(self, tensors: Mapping[str, Tensor], normalise: Callable[[Any, Tensor], Tensor]):
        self.tensors, self.normalise = tensors, normalise


class _Given(threading.local):
    def __init__(self) -> None:  # once a thread
        self.tensors: Mapping[object, Any] | None = None
        """By layer; None: no compiled function of ours is being traced."""


_given = _Given()


def given_to(layer: object) -> Any:
    """The tensors that the function which Dynamo traces was given for ``layer``: logits, GivenTasks, or by name; None: none."""
    given = _given.tensors
    return None if given is None else given.get(layer)


def run_given(layers: Iterable[object], tensors: Iterable[Any], function: Callable[..., R], *arguments: Any, **options: Any) -> R:
    """``function(*arguments, **options)`` in a trace, with these tensors given to the layers."""
    _given.tensors = dict(zip(layers, tensors))
    try:
        return function(*arguments, **options)
    finally:
        _given.tensors = None
