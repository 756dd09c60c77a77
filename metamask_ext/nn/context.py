"""What is active, a task, one for each sample, or a mixture: a context variable, so that threads and coroutines do not see each
other's.

Activation checkpointing recomputes a forward during the backward, when the context may have closed or another may be open. A
non-reentrant checkpoint is told at the forward what was active, and recomputes under that. Any other forward that runs inside a
backward may only use a context opened in that same backward; elsewhere it is refused, since the alternative is silently wrong
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ContextDecorator
from contextvars import ContextVar
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .selection import Selection
    from .task_layer import TaskLayer

_graph_task = torch._C._current_graph_task_id
_autograd = torch._C._autograd
_saved_tensor_hooks = _autograd._top_saved_tensors_default_hooks


class _Context:
    """One open ``using_task``: the active task's key (or a selection of several) for each layer, here and in the blocks around it.

    Beside each key stands the backward (-1: none) in which it was set: a key from outside a backward says nothing inside it.
    """

    __slots__ = ("depth", "keys", "opener", "outer", "own")

    def __init__(self, own: dict[nn.Module, tuple[str | Selection, int]], outer: _Context | None, opener: using_task | None):
        self.own, self.outer, self.opener = own, outer, opener
        self.depth: int = 1 if outer is None else outer.depth + 1
        self.keys: dict[nn.Module, tuple[str | Selection, int]] = own if outer is None else {**outer.keys, **own}


_current: ContextVar[_Context | None] = ContextVar("metamask_ext.active_task", default=None)


class using_task(ContextDecorator):
    """Make ``task`` the active task of every masked layer of ``model``, for this thread, until the block ends.

    A sequence names a task for each sample of a mixed batch: sample ``b``, entry ``b`` of the first dimension of every layer's
    input, uses the masks of ``task[b]``. Tasks may come in any order and repeat. Inside such a block a layer's ``mask_logits``, and
    the masked ``weight`` of layers that other code reads past forward, cannot be read: there is more than one.

    Blocks nest; the inner one wins for the layers of its model. ``model`` may be any module that holds the layers: the model, a
    wrapper around it (``DistributedDataParallel``, ``torch.compile``) or one block. Threads do not inherit the block they are
    started in: enter it in the thread. A model with a single task needs no block. One object may be entered again, also by several
    threads at once, and decorates plain functions (not coroutines and generators: open the block inside those).

    Non-reentrant activation checkpoints (``use_reentrant=False``) recompute under the task of their forward, wherever backward is
    called. Inside other code that runs forwards during a backward (reentrant checkpoints, adjoint methods), open the block there.

    Args:
        model: a module with masked layers.
        task: the name of one of its tasks; or for each sample a name, or a slot (:func:`metamask_ext.slots`): a sequence of
            strings or integers, or an int64 tensor ``[B]``.

    Raises:
        TypeError: ``task``, or an entry, is neither name nor slot, or a tensor is not int64.
        ValueError: ``model`` has no masked layer, a task is unknown to one of them, a slot is out of range or of a removed task,
            or a tensor is not one-dimensional.
        RuntimeError: from a layer whose input has another number of samples than ``task``.
    """

    def __init__(self, model: nn.Module, task: str | Sequence[str | int] | Tensor | Selection):
        from .selection import Selection, batch_of

        self._model = model
        self._task: str | Selection = task if isinstance(task, (str, Selection)) else batch_of(model, task)
        self._keys()

    def _keys(self) -> dict[nn.Module, str | Selection]:
        from .tasks import task_layers

        task = self._task
        layers = task_layers(self._model)
        if isinstance(task, str):
            return {layer: layer._task_key(task) for _, layer in layers}
        for _, layer in layers:
            if not layer._task_dict()._slots.keys() >= task.key_set:
                for name in task.names:
                    layer._task_key(name)
        return {layer: task for _, layer in layers}

    def __call__(self, function: Callable[..., Any]) -> Any:
        # ContextDecorator would close the block before such a function's body runs: under another block, a wrong task.
        if iscoroutinefunction(function) or isgeneratorfunction(function) or isasyncgenfunction(function):
            raise TypeError(
                f"using_task cannot decorate {getattr(function, '__name__', 'a function')}, a coroutine or generator function: "
                "open the block inside it"
            )
        return super().__call__(function)

    def __enter__(self) -> nn.Module:
        graph_task = _graph_task()
        own = {layer: (key, graph_task) for layer, key in self._keys().items()}
        _current.set(_Context(own, _current.get(), self))
        return self._model

    def __exit__(self, *error: object) -> None:
        # No token of the context variable is kept: one object may be open in several threads and coroutines.
        _current.set(_without(_current.get(), self))


def run_selected(layers: Iterable[nn.Module], selection: Selection, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` with ``selection`` active for ``layers``: a block without the search for the layers."""
    now = _graph_task()
    token = _current.set(_Context({layer: (selection, now) for layer in layers}, _current.get(), None))
    try:
        return function(*arguments)
    finally:
        _current.reset(token)


def selection_of(module: nn.Module) -> Selection | None:
    """The selection that is active for a module without tasks of its own, as :func:`run_selected` was told."""
    context = _current.get()
    found, graph_task = (None, -1) if context is None else context.keys.get(module, (None, -1))
    return None if found is None or isinstance(found, str) or graph_task != _graph_task() else found


def _without(context: _Context | None, opener: using_task) -> _Context | None:
    """``context`` less the innermost block that ``opener`` opened; generators may close blocks out of order."""
    if context is None:
        raise RuntimeError("a using_task block must be closed in the thread or coroutine in which it was opened")
    if context.opener is opener:
        return context.outer
    return _Context(context.own, _without(context.outer, opener), context.opener)


def active_key(layer: TaskLayer) -> str | Selection:
    """The key of the task that is active for ``layer``, which has several, or the selection.

    RuntimeError if there is none to be trusted.
    """
    context = _current.get()
    key, graph_task = (None, -1) if context is None else context.keys.get(layer, (None, -1))
    if key is not None and graph_task != _graph_task():
        raise RuntimeError(
            f"{type(layer).__name__} was called during a backward, where the task of its first forward is not known. Use "
            "torch.utils.checkpoint with use_reentrant=False, or enter metamask_ext.using_task inside the function that is "
            "recomputed"
        )
    known = layer._task_dict()
    if key is None:
        raise RuntimeError(
            f"{type(layer).__name__} has {len(known)} tasks, {describe(known)}, and none is active: call the model "
            "inside 'with metamask_ext.using_task(model, task):' (threads and recomputations do not inherit the block)"
        )
    if key not in known._slots if isinstance(key, str) else not known._slots.keys() >= key.key_set:
        _raise_removed(layer)
    for recompute in _enclosing_checkpoints():
        recompute.remember(context, graph_task)
    return key


def only_key(layer: TaskLayer, only: str) -> str | Selection:
    """The key of the only task of ``layer``, or the selection around.

    RuntimeError if the block around names another task: one removed by another thread, say.
    """
    context = _current.get()
    key: str | Selection = only
    if context is not None:
        found, graph_task = context.keys.get(layer, (only, -1))
        if not isinstance(found, str):
            if not found.key_set <= {only}:
                _raise_removed(layer)
            # In a backward the samples may be other ones.
            if graph_task == _graph_task():
                key = found
        elif found != only:
            _raise_removed(layer)
    # By the recomputation the layer may have other tasks.
    for recompute in _enclosing_checkpoints():
        recompute.keys[layer] = key
    return key


def _raise_removed(layer: TaskLayer) -> None:
    raise RuntimeError(f"the active task was removed; {type(layer).__name__} has {describe(layer._task_dict())}")


def is_active(layers: list[TaskLayer], task: str) -> bool:
    """Whether ``task`` is the active task, or one of several, of any of ``layers`` in this thread."""
    context = _current.get()
    if context is None:
        return False
    found = [(layer._task_dict()._key_to_attr(task), context.keys[layer][0]) for layer in layers if layer in context.keys]
    return any(key == active if isinstance(active, str) else key in active.key_set for key, active in found)


def describe(names: Any) -> str:
    """Names for an error message: the first eight of them."""
    names = list(names)
    return ", ".join(repr(name) for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _enclosing_checkpoints() -> list[_Recompute]:
    """What the non-reentrant checkpoints that enclose this forward will recompute, innermost first.

    torch shows only the top of its stack of hooks: they are taken off one by one and put back.
    """
    if not _saved_tensor_hooks(True) or not _autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return []
    taken = []
    try:
        while hooks := _saved_tensor_hooks(True):
            _autograd._pop_saved_tensors_default_hooks()
            taken.append(hooks)
    finally:
        for hooks in reversed(taken):
            _autograd._push_saved_tensors_default_hooks(*hooks)
    found = []
    for pack_hook, _ in taken:
        frame = _checkpoint_frame(pack_hook)
        if frame is not None:
            if not isinstance(frame.recompute_fn, _Recompute):
                frame.recompute_fn = _Recompute(frame.recompute_fn)
            found.append(frame.recompute_fn)
    return found


def _checkpoint_frame(pack_hook: object) -> Any:
    """torch.utils.checkpoint's record of the region being run, found through its pack hook; None for any other hook.

    Private to torch, and pinned by tests. Where it is not found, the recomputation has no context and is refused.
    """
    if isinstance(pack_hook, FunctionType) and pack_hook.__closure__:
        for name, cell in zip(pack_hook.__code__.co_freevars, pack_hook.__closure__):
            if name == "frame" and hasattr(cell.cell_contents, "recompute_fn"):
                return cell.cell_contents
    return None


class _Recompute:
    """A checkpoint's function, run under the active tasks of its forward.

    A block opened inside the checkpointed function closes before another is opened there, and the recomputation opens it again by
    itself. So what was open around the checkpoint is the innermost context common to all layers called in it.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.keys: dict[nn.Module, str | Selection] = {}
        """Of layers that had one task."""
        self.contexts: list[_Context | None] = []
        """The common context, once there is one."""
        self.graph_task = -1

    def remember(self, context: _Context | None, graph_task: int) -> None:
        self.contexts = [_common(self.contexts[0], context) if self.contexts else context]
        self.graph_task = graph_task

    def __call__(self, *arguments: Any) -> Any:
        now = _graph_task()
        own = {layer: (key, now) for layer, key in self.keys.items()}
        for context in self.contexts:
            # What could be trusted at the forward can be trusted now.
            if context is not None:
                own |= {layer: (key, now) for layer, (key, then) in context.keys.items() if then == self.graph_task}
        token = _current.set(_Context(own, None, None))
        try:
            return self.function(*arguments)
        finally:
            _current.reset(token)


def _common(a: _Context | None, b: _Context | None) -> _Context | None:
    while a is not b:
        if a is None or b is None:
            return None
        if a.depth >= b.depth:
            a = a.outer
        else:
            b = b.outer
    return a
