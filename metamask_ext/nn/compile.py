"""``compile``: torch.compile of a model as one graph for all tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..torch_private import is_untraceable, set_compiled_call, uncompiled_call
from .context import AmbiguousTaskError
from .given import GivenTasks, run_given
from .masked_layer import MaskedLayer
from .per_task import PerTask
from .read_through import ReadThrough
from .selection import MarkedBatch, TaskBatch
from .task_layer import TaskLayer, task_layers
from .weight_layer import WeightLayer

M = TypeVar("M", bound=nn.Module)


def compile(model: M, **options: Any) -> M:
    """``model.compile(**options)``, in place, as one graph for all tasks: their masks are arguments of the compiled function.

    Each call looks up every layer's active task in eager mode, with all checks and errors, and passes the tensors to the graph.
    Adding or removing tasks compiles nothing again, and ``fullgraph=True`` may be given. One graph serves every task
    with logits, one every packed task, and one the mixed-task batches of up to 1, 2, 4, 8, … tasks (those of one kind: logits, or
    bits). Heads and norms of a task are arguments too.

    These break the graph, whatever ``fullgraph`` says, and run as with ``torch.compile(model)``: superpositions, what a
    meta-learner adapts, batches of both packed tasks and others, mixed-task batches in models with tensors of tasks beside masks
    (heads, norms) or with layers that have a forward of their own, batches that ``using_task`` lets repeat or whose unknown tasks
    it marks.

    Args:
        model: a module with masked layers. Compile it after they are all there (:func:`metamask_ext.convert`).
        options: those of :func:`torch.compile`.

    Returns:
        ``model``. Copies of it, and what is pickled, are not compiled, as after ``model.compile()``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no masked layer.
    """
    layers = [layer for _, layer in task_layers(model)]
    set_compiled_call(model, _Call(uncompiled_call(model), layers, options))
    return model


class _Call:
    """A model's call: eager code around a compiled function."""

    def __init__(self, call: Callable[..., Any], layers: list[TaskLayer], options: dict[str, Any]):
        self._layers, self._call = layers, call

        # A function of its own for each model: Dynamo counts the graphs of each function's code.
        def run(tensors: list[Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return run_given(layers, tensors, call, *arguments, **named)

        self._one_graph: Callable[..., Any] = torch.compile(run, **options)
        self._several: Callable[..., Any] = torch.compile(call, **{**options, "fullgraph": False})
        self._is_full = bool(options.get("fullgraph", False))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        active = [_active_of(layer) for layer in self._layers]
        if any(isinstance(of, _Elsewhere) for of in active):
            return self._several(*arguments, **named)
        try:
            return self._one_graph(active, arguments, named)
        except Exception as error:
            if self._is_full and is_untraceable(error):
                # It may be that of a layer, which Dynamo cannot put into a graph: eager mode raises it in its own words.
                self._call(*arguments, **named)
            raise


class _Elsewhere:
    """Stands for a selection that is no argument of the graph."""


def _active_of(layer: TaskLayer) -> Any:
    """The argument for a layer. None: no task is active for it, which is an error where it is called."""
    try:
        if isinstance(layer, MaskedLayer):
            active = layer._active()
            return active if isinstance(active, tuple) else _tasks_of(layer, active)
        assert isinstance(layer, PerTask)
        key = layer._selected()
        return {name: layer._theta(name, key) for name in layer._own()} if isinstance(key, str) else _Elsewhere()
    except AmbiguousTaskError:
        return None


def _tasks_of(layer: MaskedLayer, active: object) -> GivenTasks | _Elsewhere:
    if isinstance(active, MarkedBatch):
        return _Elsewhere()
    keys = active.keys if isinstance(active, TaskBatch) else (active,) if isinstance(active, str) else ()
    forms = {layer._task_dict()._is_bits(key) for key in keys}
    repeats = isinstance(active, TaskBatch) and active.repeats
    if len(forms) != 1 or repeats or isinstance(layer, ReadThrough) or not isinstance(layer, WeightLayer):
        return _Elsewhere()
    (packed,) = forms
    masks, bias_masks = layer._masks_of(keys)
    if isinstance(active, str):
        return GivenTasks(packed, masks, bias_masks)
    assert isinstance(active, TaskBatch)
    slots = active.positions(layer._shared()[0].device)
    padded = None if bias_masks is None else _padded(bias_masks)
    return GivenTasks(packed, _padded(masks), padded, slots, active.dim, active.guessed, len(keys) > 1)


def _padded(masks: list[Tensor]) -> list[Tensor]:
    """The masks, filled up to a power of two with the first one: the graph depends on their number.

    All are views. Dynamo notes which of its arguments are one tensor, and which are Parameters, and would compile again for
    another pattern of either.
    """
    missing = (1 << (len(masks) - 1).bit_length()) - len(masks)
    return [mask.view_as(mask) for mask in (*masks, *[masks[0]] * missing)]
