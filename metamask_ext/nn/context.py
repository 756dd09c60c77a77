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
    """One open block: the active task's key (or a selection of several) for each layer, here and in the blocks around it.

    Beside each key stands the backward (-1: none) in which it was set: a key from outside a backward says nothing inside it.
    """

    __slots__ = ("_counted", "_selects", "depth", "keys", "opener", "outer", "own")

    def __init__(self, own: Mapping[object, tuple[Key, int]], outer: Context | None, opener: object):
        self._counted = False
        self.own, self.outer, self.opener = own, outer, opener
        self.depth: int = 1 if outer is None else outer.depth + 1
        self.keys: Mapping[object, tuple[Key, int]] = own if outer is None else {**outer.keys, **own}
        self._selects = any(not isinstance(key, str) for key, _ in own.values())
        LIVE.count(1, self._selects)
        self._counted = True

    def __del__(self) -> None:
        # Not where a block is closed: a coroutine keeps the context that it began in, a checkpoint that of its forward.
        # An interruption may leave the count too high, which costs compiled layers time; too low, they would miss a selection.
        if getattr(self, "_counted", False):
            LIVE.count(-1, self._selects)


_current: ContextVar[Context | None] = ContextVar("metamask_ext.active_task", default=None)


def open_block(keys: Mapping[nn.Module, Key], opener: object) -> None:
    """Make ``keys`` active for their layers in this thread or coroutine, until ``opener`` closes its block."""
    if torch.compiler.is_dynamo_compiling():
        _open_in_eager(keys, opener)
        return
    now = current_graph_task()
    _current.set(Context({layer: (key, now) for layer, key in keys.items()}, _current.get(), opener))


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


def run_selected(layers: Iterable[nn.Module], selection: Selection, function: Callable[..., R], *arguments: object) -> R:
    """``function(*arguments)`` with ``selection`` active for ``layers``: a block without the search for the layers."""
    opener = object()
    open_block(dict.fromkeys(layers, selection), opener)
    try:
        return function(*arguments)
    finally:
        close_block(opener)


def selection_of(module: nn.Module) -> Selection | None:
    """The selection that :func:`run_selected` made active for a module without tasks of its own."""
    context = _current.get()
    if context is None:
        return None
    found, graph_task = context.keys.get(module, ("", -1))
    return None if isinstance(found, str) or graph_task != current_graph_task() else found


def _without(context: Context | None, opener: object) -> Context | None:
    """``context`` less the innermost block that ``opener`` opened; generators may close blocks out of order."""
    if context is None:
        raise RuntimeError("a using_task block must be closed in the thread or coroutine in which it was opened")
    if context.opener is opener:
        return context.outer
    return Context(context.own, _without(context.outer, opener), context.opener)


def active_key(layer: Owner) -> Key:
    """The key of the task that is active for ``layer``, which has several, or the selection.

    AmbiguousTaskError if there is none to be trusted.
    """
    context = _current.get()
    key, graph_task = (None, -1) if context is None else context.keys.get(layer, (None, -1))
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
        found, graph_task = context.keys.get(layer, (only, -1))
        if not isinstance(found, str):
            if not found.key_set <= {only}:
                _raise_removed(layer)
            # In a backward the samples may be other ones.
            if graph_task == current_graph_task():
                key = found
        elif found != only:
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
    found = [context.keys[layer][0] for layer in layers if layer in context.keys]
    return any(key == active if isinstance(active, str) else key in active.key_set for active in found)


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
        self.contexts = [_common(self.contexts[0], context) if self.contexts else context]
        self.graph_task = graph_task

    def __call__(self, *arguments: object) -> object:
        now = current_graph_task()
        own = {layer: (key, now) for layer, key in self.keys.items()}
        for context in self.contexts:
            # What could be trusted at the forward can be trusted now.
            if context is not None:
                own |= {layer: (key, now) for layer, (key, then) in context.keys.items() if then == self.graph_task}
        token = _current.set(Context(own, None, None))
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
