"""``compile``: torch.compile of a model as one graph for all tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..torch_private import is_untraceable, mark_dynamic, set_compiled_call, uncompiled_call
from .context import AmbiguousTaskError
from .given import GivenRows, GivenTasks, run_given
from .masked_layer import MaskedLayer
from .per_task import PerTask
from .read_through import ReadThrough
from .selection import MarkedBatch, TaskBatch
from .task_layer import TaskLayer, task_layers
from .weight_layer import WeightLayer

M = TypeVar("M", bound=nn.Module)


class OwnGraph(nn.Module):
    """A module that says itself how :func:`compile` compiles it: not a net, but what is done with one."""

    def _compiled_call(self, options: dict[str, Any]) -> Callable[..., Any]:
        """The call in the place of the module's own, with the options of torch.compile."""
        raise NotImplementedError


def compile(model: M, **options: Any) -> M:
    """``model.compile(**options)``, in place, as one graph for all tasks: their masks are arguments of the compiled function.

    Each call looks up every layer's active task in eager mode, with all checks and errors, and passes the tensors to the graph.
    Adding or removing tasks compiles nothing again, and ``fullgraph=True`` may be given. One graph serves every task
    with logits, one every packed task, and one the mixed-task batches of any number of tasks (those of one kind: logits, or bits);
    where a weight has more than 2**16 elements, those of up to 2, 4, 8, … tasks. Heads and norms of a task are arguments too.

    These break the graph, whatever ``fullgraph`` says, and run as with ``torch.compile(model)``: superpositions, what a
    meta-learner adapts, batches of both packed tasks and others, mixed-task batches in models with layers that run one
    task after another, or with tensors of tasks in modules other than linear heads, layer norms, and batch norms in eval mode,
    batches that ``using_task`` lets repeat or whose unknown tasks it marks.

    Args:
        model: a module with masked layers. Compile it after they are all there (:func:`metamask_ext.convert`).
        options: those of :func:`torch.compile`.

    Returns:
        ``model``. Copies of it, and what is pickled, are not compiled, as after ``model.compile()``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no masked layer.
    """
    if isinstance(model, OwnGraph):
        set_compiled_call(model, model._compiled_call(options))
        return model
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
        if isinstance(key, TaskBatch) and key.keys and layer._takes_rows():
            return _rows_of(layer, key)
        return {name: layer._theta(name, key) for name in layer._own()} if isinstance(key, str) else _Elsewhere()
    except AmbiguousTaskError:
        return None


def _rows_of(layer: PerTask, batch: TaskBatch) -> GivenRows:
    stacks = {name: _stack([layer._theta(name, key) for key in batch.keys]) for name in layer._own()}
    slots = batch.positions(next(iter(stacks.values())).device)
    return GivenRows(stacks, slots, batch.dim, batch.guessed, len(batch.keys) > 1)


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
    weight, _ = layer._shared()
    gather = _stacked if packed or weight.numel() <= STACKED else _padded
    of_bias = None if bias_masks is None else gather(bias_masks)
    return GivenTasks(packed, gather(masks), of_bias, active.positions(weight.device), active.dim, active.guessed, len(keys) > 1)


STACKED = 2**16
"""Elements of a weight up to which the logits of a mixed-task batch are copied into one tensor.

A graph takes any number of tasks then. Otherwise each is an argument of its own. The copy of larger weights takes as long as the
kernel itself. Bits are copied always."""


def _stacked(masks: list[Tensor]) -> list[Tensor]:
    """The masks as one tensor ``[T, ...]``, of whose ``T`` the graph may know nothing."""
    return [masks[0].view_as(masks[0])] if len(masks) == 1 else [_stack(masks)]


def _stack(tensors: list[Tensor]) -> Tensor:
    stack = torch.stack(tensors)
    mark_dynamic(stack, 0)
    return stack


def _padded(masks: list[Tensor]) -> list[Tensor]:
    """The masks, filled up to a power of two with the first one: the graph depends on their number.

    All are views. Dynamo notes which of its arguments are one tensor, and which are Parameters, and would compile again for
    another pattern of either.
    """
    missing = (1 << (len(masks) - 1).bit_length()) - len(masks)
    return [mask.view_as(mask) for mask in (*masks, *[masks[0]] * missing)]
