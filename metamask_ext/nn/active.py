"""Which task is active: a context variable, so that threads and coroutines do not see each other's.

Activation checkpointing recomputes a forward during the backward, when the context may have closed or another may be open. A
non-reentrant checkpoint is told at the forward what was active, and recomputes under that. Any other forward that runs inside a
backward may only use a context opened in that same backward; elsewhere it is refused, since the alternative is silently wrong
gradients.
"""

from __future__ import annotations

from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .layers import MaskedLayer

_graph_task = torch._C._current_graph_task_id
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class _Context:
    """One open ``using_task``: the key of the active task for each layer, here and in the contexts around it."""

    __slots__ = ("depth", "graph_task", "keys", "outer")

    def __init__(self, keys: dict[nn.Module, str], outer: _Context | None):
        self.outer = outer
        self.depth = 1 if outer is None else outer.depth + 1
        self.keys = keys if outer is None else {**outer.keys, **keys}
        # -1 outside a backward
        self.graph_task = _graph_task()


_current: ContextVar[_Context | None] = ContextVar("metamask_ext.active_task", default=None)


class using_task(ContextDecorator):
    """Make ``task`` the active task of every masked layer of ``model``, for this thread, until the block ends.

    Blocks nest; the inner one wins for the layers of its model. ``model`` may be any module that holds the layers: the model, a
    wrapper around it (``DistributedDataParallel``, ``torch.compile``) or one block. Threads do not inherit the block they are
    started in: enter it in the thread. A model with a single task needs no block.

    Non-reentrant activation checkpoints (``use_reentrant=False``) recompute under the task of their forward, wherever backward is
    called. Inside other code that runs forwards during a backward (reentrant checkpoints, adjoint methods), open the block there.

    Args:
        model: a module with masked layers.
        task: the name of one of its tasks.

    Raises:
        TypeError: ``task`` is no string.
        ValueError: ``model`` has no masked layer, or the task is unknown to one of them.
    """

    def __init__(self, model: nn.Module, task: str):
        self._model, self._task = model, task
        self._tokens: list[Token[_Context | None]] = []
        self._keys()

    def _keys(self) -> dict[nn.Module, str]:
        from .tasks import masked_layers

        return {layer: layer._task_key(self._task) for _, layer in masked_layers(self._model)}

    def __enter__(self) -> nn.Module:
        self._tokens.append(_current.set(_Context(self._keys(), _current.get())))
        return self._model

    def __exit__(self, *error: object) -> None:
        _current.reset(self._tokens.pop())


def active_key(layer: MaskedLayer) -> str:
    """The key of the task that is active for ``layer``, which has several; RuntimeError if there is none to be trusted."""
    context = _current.get()
    key = None if context is None else context.keys.get(layer)
    if key is not None and context is not None and context.graph_task != _graph_task():
        raise RuntimeError(
            f"{type(layer).__name__} was called during a backward, where the task of its first forward is not known. Use "
            "torch.utils.checkpoint with use_reentrant=False, or enter metamask_ext.using_task inside the function that is "
            "recomputed"
        )
    if key is None:
        raise RuntimeError(
            f"{type(layer).__name__} has {len(layer.masks)} tasks, {describe(layer.masks)}, and none is active: call the model inside "
            "'with metamask_ext.using_task(model, task):' (threads and recomputations do not inherit the block)"
        )
    if key not in layer.masks._parameters:
        raise RuntimeError(f"the active task was removed; {type(layer).__name__} has {describe(layer.masks)}")
    _remember_in_checkpoint(context)
    return key


def is_active(layers: list[MaskedLayer], task: str) -> bool:
    """Whether ``task`` is the active task of any of ``layers`` in this thread."""
    context = _current.get()
    return context is not None and any(context.keys.get(layer) == layer.masks._key_to_attr(task) for layer in layers)


def describe(names: Any) -> str:
    """Names for an error message: the first eight of them."""
    names = list(names)
    return ", ".join(repr(name) for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _remember_in_checkpoint(context: _Context | None) -> None:
    """Make the non-reentrant checkpoint that encloses this forward, if any, recompute under ``context``.

    A block opened inside the checkpointed function closes before another is opened there, and the recomputation opens it again by
    itself. So what was open around the checkpoint is the innermost context common to all layers called in it.
    """
    hooks = _saved_tensor_hooks(True)
    frame = _checkpoint_frame(hooks[0]) if hooks else None
    if frame is None:
        return
    if isinstance(frame.recompute_fn, _Recompute):
        frame.recompute_fn.context = _common(frame.recompute_fn.context, context)
    else:
        frame.recompute_fn = _Recompute(frame.recompute_fn, context)


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
    """A checkpoint's function, run under the context of its forward."""

    def __init__(self, function: Any, context: _Context | None):
        self.function, self.context = function, context

    def __call__(self, *arguments: Any) -> Any:
        context = self.context
        token = _current.set(None if context is None else _Context(context.keys, None))
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
