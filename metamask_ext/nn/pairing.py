"""Refuses to pair the parameters of two models by their order where the models have different tasks.

``zip(averaged.parameters(), model.parameters())`` (torch.optim.swa_utils.AveragedModel, target networks) pairs each parameter with
another's from the first task on that one model lacks: a new task's masks come last within their layer, not last in the model,
whose order torch makes of the order of its modules. Tensors of one shape would be mixed without a word.

The walks through the modules of the two models, which ``parameters()`` makes, alternate then and only then: one enters a layer,
the other enters its, and so on for each dictionary of masks. What comes before a difference has been paired rightly.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..torch_private import members_of_caller

NamedModules = Iterator[tuple[str, nn.Module]]
Memo = set[nn.Module]


class _Walk:
    """One walk through the modules of a model. It ends with its ``memo``, the set that torch notes visited modules in."""

    def __init__(self, memo: Memo):
        self.memo = weakref.ref(memo)
        self.layer = self.at = 0
        """When it entered its last layer, and its last dictionary."""
        self.count = 0
        """The dictionaries so far."""
        self.tensors: Callable[[], nn.Module | None] = lambda: None
        """The last one."""


class _Walks(threading.local):
    def __init__(self) -> None:
        self.now = 0
        self.open: list[_Walk] = []

    def of(self, memo: Memo) -> _Walk:
        self.now += 1
        self.open = [walk for walk in self.open if walk.memo() is not None]
        for walk in self.open:
            if walk.memo() is memo:
                return walk
        self.open.append(_Walk(memo))
        return self.open[-1]


_WALKS = _Walks()


def noted_layer(layer: nn.Module, memo: Memo, modules: NamedModules) -> NamedModules:
    """``modules``, the walk through ``layer``, with a note of its beginning."""
    if layer not in memo:
        _WALKS.of(memo).layer = _WALKS.now
    yield from modules


def noted_tensors(tensors: nn.Module, memo: Memo, modules: NamedModules) -> NamedModules:
    """The same for a dictionary of masks. RuntimeError where another model's has other tasks and both are walked in turns."""
    if tensors not in memo:
        walk = _WALKS.of(memo)
        walk.at, walk.count, walk.tensors = _WALKS.now, walk.count + 1, weakref.ref(tensors)
        for other in _WALKS.open:
            if other.count == walk.count and other.layer < walk.layer < other.at < walk.at:
                theirs = other.tensors()
                if theirs is not None:
                    _check_same(theirs, tensors)
    yield from modules


def _check_same(theirs: nn.Module, ours: nn.Module) -> None:
    # modules() may be walked in pairs: they are the same ones for any tasks.
    members = members_of_caller(sys._getframe(), "_check_same", "noted_tensors", "noted_layer", "named_modules")
    if members is None:
        return
    first, second = ([name for name, _ in members(tensors)] for tensors in (theirs, ours))
    if first != second:
        raise RuntimeError(
            "the parameters of two models with different tasks are paired by their order, which would mix up those behind the "
            f"first difference: {first} and {second}. Give both models the same tasks, added in the same order (an AveragedModel "
            "too: add_task(averaged, ...)), or pair them by the names of named_parameters()"
        )


def is_noted() -> bool:
    """True if walks are noted here: not in what torch.compile traces."""
    return not torch.compiler.is_dynamo_compiling()
