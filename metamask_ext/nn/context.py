"""Tracks the active task, batch of tasks or superposition per thread and coroutine, in a context variable.

Activation checkpointing recomputes a forward during the backward, when the context may have closed or another may be open. A
non-reentrant checkpoint is told at the forward which tasks were active, and recomputes under those. A different forward that runs
inside a backward may only use a context opened in that same backward; elsewhere it is refused, since the alternative is silently
wrong gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import Protocol, TypeVar

import torch
from torch import nn

from metamask_ext.torch_private import CheckpointFrame, current_graph_task, disable_dynamo, enclosing_checkpoints

from .names import describe, escape
from .selection import Selection
from .task_dict import TaskDict

R = TypeVar("R")
Key = str | Selection
"""The active task's parameter key, or a selection of several."""
Keys = Mapping[object, Key]
"""By layer."""


class AmbiguousTaskError(RuntimeError):
    """No single task is active for a layer: none, several, or one that is unknown or was removed."""


class Owner(Protocol):
    """A layer with tensors of tasks."""

    def _task_dict(self) -> TaskDict: ...


class Live:
    """Counts the contexts that exist, in all threads and coroutines.

    torch.compile cannot read a context variable, but it guards on these two attributes: while no context holds a selection, a
    compiled layer with one task may use its mask without a look at the context.
    """

    def __init__(self) -> None:
        self.contexts = self.selections = False
        # The garbage collector may end a Context wherever memory is asked for, also where this thread holds the lock.
        self._lock = RLock()
        self._contexts = self._selections = 0

    def count(self, change: int, selects: bool) -> None:
        with self._lock:
            self._contexts += change
            self._selections += change * selects
            self.contexts, self.selections = self._contexts > 0, self._selections > 0


LIVE = Live()


class Context:
    """One open block: the active task's key (or a selection of several) for each of its layers, inside other blocks.

    Args:
        find: gives the layers with their keys. It is called once, when a layer first asks: a block is entered as fast over many
            layers as over one.
        selects: whether one of the keys is a selection.
        graph_task: the backward (-1: none) in which the block was opened: its keys say nothing inside another.
        opener: closes the block.
    """

    __slots__ = ("_counted", "_find", "_selects", "depth", "graph_task", "keys", "opener", "outer")

    def __init__(self, find: Callable[[], Keys], selects: bool, graph_task: int, outer: Context | None, opener: object):
        self._counted = False
        self._find, self._selects, self.graph_task, self.outer, self.opener = find, selects, graph_task, outer, opener
        self.depth: int = 1 if outer is None else outer.depth + 1
        self.keys: Keys | None = None
        LIVE.count(1, selects)
        self._counted = True

    def found(self) -> Keys:
        """The layers with their keys."""
        keys = self.keys
        if keys is None:
            keys = self.keys = self._find()
        return keys

    def of(self, layer: object) -> tuple[Key | None, int]:
        """The key of a layer, here or in the innermost block around that has one, and the backward in which it was set."""
        context: Context | None = self
        while context is not None:
            keys = context.keys
            key = (context.found() if keys is None else keys).get(layer)
            if key is not None:
                return key, context.graph_task
            context = context.outer
        return None, -1

    def all(self) -> dict[object, tuple[Key, int]]:
        """The same of every layer of this block and those around it."""
        outer = {} if self.outer is None else self.outer.all()
        return outer | {layer: (key, self.graph_task) for layer, key in self.found().items()}

    def within(self, outer: Context | None) -> Context:
        """The same block inside another one."""
        moved = Context(self._find, self._selects, self.graph_task, outer, self.opener)
        moved.keys = self.keys
        return moved

    def __del__(self) -> None:
        # Not where a block is closed: a coroutine keeps the context that it began in, a checkpoint that of its forward.
        # An interruption may leave the count too high, which costs compiled layers time; too low, they would miss a selection.
        if getattr(self, "_counted", False):
            LIVE.count(-1, self._selects)


_current: ContextVar[Context | None] = ContextVar("metamask_ext.active_task", default=None)


def open_block(find: Callable[[], Keys], selects: bool, opener: object) -> None:
    """Make the keys that ``find`` gives active for their layers in this thread or coroutine, until ``opener`` closes its block."""
    if torch.compiler.is_dynamo_compiling():
        _open_in_eager(find, selects, opener)
        return
    _current.set(Context(find, selects, current_graph_task(), _current.get(), opener))


def close_block(opener: object) -> None:
    """Close the innermost block that ``opener`` opened.

    No token of the context variable is kept: one object may have blocks open in several threads and coroutines.
    """
    if torch.compiler.is_dynamo_compiling():
        _close_in_eager(opener)
        return
    _current.set(_without(_current.get(), opener))


@contextmanager
def blocks_closed_on_error() -> Iterator[None]:
    """Leave no block open that was opened in here where an error ends it: Ctrl-C may come amid the opening or closing of one."""
    before = _current.get()
    try:
        yield
    except BaseException:
        _current.set(before)
        raise


# Dynamo would build a Context by itself, and count it where it is not.
_open_in_eager, _close_in_eager = disable_dynamo(open_block), disable_dynamo(close_block)


def run_selected(layers: Iterable[nn.Module], key: Key, function: Callable[..., R], *arguments: object) -> R:
    """``function(*arguments)`` with a task or a selection active for ``layers``: a block without the search for the layers."""
    opener = object()
    keys: Keys = dict.fromkeys(layers, key)
    open_block(lambda: keys, not isinstance(key, str), opener)
    try:
        return function(*arguments)
    finally:
        close_block(opener)


def selection_of(module: nn.Module) -> Selection | None:
    """The selection that :func:`run_selected` made active for a module without tasks of its own."""
    context = _current.get()
    if context is None:
        return None
    found, graph_task = context.of(module)
    return None if found is None or isinstance(found, str) or graph_task != current_graph_task() else found


def _without(context: Context | None, opener: object) -> Context | None:
    """``context`` less the innermost block that ``opener`` opened; generators may close blocks out of order."""
    if context is None:
        raise RuntimeError("a using_task block must be closed in the thread or coroutine in which it was opened")
    if context.opener is opener:
        return context.outer
    return context.within(_without(context.outer, opener))


def active_key(layer: Owner) -> Key:
    """The key of the task that is active for ``layer``, which has several, or the selection.

    AmbiguousTaskError if there is none to be trusted.
    """
    context = _current.get()
    key, graph_task = (None, -1) if context is None else context.of(layer)
    if key is not None and graph_task != current_graph_task():
        raise AmbiguousTaskError(
            f"{type(layer).__name__} was called during a backward, where the task of its first forward is not known. Use "
            "torch.utils.checkpoint with use_reentrant=False, or enter metamask_ext.using_task inside the function that is "
            "recomputed"
        )
    known = layer._task_dict()
    if key is None:
        raise AmbiguousTaskError(
            f"{type(layer).__name__} has {len(known)} tasks, {describe(known)}, and none is active: call the model "
            "inside 'with metamask_ext.using_task(model, task):' (threads and recomputations do not inherit the block)"
        )
    if key not in known._slots if isinstance(key, str) else not known._slots.keys() >= key.key_set:
        _raise_removed(layer)
    if frames := enclosing_checkpoints():
        for recompute in _recomputations(frames):
            recompute.remember(context, graph_task)
    return key


def only_key(layer: Owner, only: str) -> Key:
    """The key of the only task of ``layer``, or the selection around.

    AmbiguousTaskError if the block around names another task: one removed by another thread, say.
    """
    context = _current.get()
    key: Key = only
    if context is not None:
        found, graph_task = context.of(layer)
        if found is not None and not isinstance(found, str):
            if not found.key_set <= {only}:
                _raise_removed(layer)
            # In a backward the samples may be other ones.
            if graph_task == current_graph_task():
                key = found
        elif found is not None and found != only:
            _raise_removed(layer)
    # By the recomputation the layer may have other tasks.
    if frames := enclosing_checkpoints():
        for recompute in _recomputations(frames):
            recompute.keys[layer] = key
    return key


def _raise_removed(layer: Owner) -> None:
    raise AmbiguousTaskError(f"the active task was removed; {type(layer).__name__} has {describe(layer._task_dict())}")


def is_active(layers: Iterable[nn.Module], task: str) -> bool:
    """True if ``task`` is the active task, or one of several, of any of ``layers`` in this thread."""
    context = _current.get()
    if context is None:
        return False
    key = escape(task)
    found = [context.of(layer)[0] for layer in layers]
    return any(key == active if isinstance(active, str) else key in active.key_set for active in found if active is not None)


def _recomputations(frames: Iterable[CheckpointFrame]) -> Iterator[_Recomputation]:
    """The functions that these checkpoints will call in the backward, made to run under the context of now."""
    for frame in frames:
        if not isinstance(frame.recompute_fn, _Recomputation):
            frame.recompute_fn = _Recomputation(frame.recompute_fn)
        yield frame.recompute_fn


class _Recomputation:
    """A checkpoint's function, run under the active tasks of its forward.

    A block opened inside the checkpointed function closes before another is opened there, and the recomputation opens it again by
    itself. So what was open around the checkpoint is the innermost context common to all layers called in it.
    """

    def __init__(self, function: Callable[..., object]):
        self.function = function
        self.keys: dict[object, Key] = {}
        """Of layers that had one task."""
        self.contexts: list[Context | None] = []
        """The common context, once there is one."""
        self.graph_task = -1

    def remember(self, context: Context | None, graph_task: int) -> None:
        common = _common(self.contexts[0], context) if self.contexts else context
        if common is not None and (not self.contexts or common is not self.contexts[0]):
            common.all()  # finds the layers now: the model may change until the backward
        self.contexts = [common]
        self.graph_task = graph_task

    def __call__(self, *arguments: object) -> object:
        own: dict[object, Key] = dict(self.keys)
        for context in self.contexts:
            if context is not None:
                # What could be trusted at the forward can be trusted now.
                own |= {layer: key for layer, (key, then) in context.all().items() if then == self.graph_task}
        selects = any(not isinstance(key, str) for key in own.values())
        token = _current.set(Context(lambda: own, selects, current_graph_task(), None, None))
        try:
            return self.function(*arguments)
        finally:
            _current.reset(token)


def _common(a: Context | None, b: Context | None) -> Context | None:
    while a is not b:
        if a is None or b is None:
            return None
        if a.depth >= b.depth:
            a = a.outer
        else:
            b = b.outer
    return a
