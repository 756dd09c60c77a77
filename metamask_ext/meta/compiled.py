"""A whole meta-step under torch.compile: inner steps and meta-loss in one graph, so that the second order is inside it.

A backward of a backward that lies outside of a graph is what AOTAutograd refuses. Inside, ``torch.func.grad`` takes the inner
gradients of one task, and ``torch.vmap`` maps it over the tasks; every layer is plain torch there, which the compiler fuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..nn.given import GivenNorm, GivenTasks, run_given
from ..nn.masked_layer import MaskedLayer
from ..nn.names import escape
from ..nn.per_task import PerTask
from ..nn.task_dict import TaskDict
from ..nn.weight_layer import WeightLayer
from ..torch_private import PyTree, uncompiled_call
from .adapted import AdaptedModel, Output, _Stored
from .batch_norm import Normalisation, Statistics
from .samples import Checked, LossFunction, Samples, check_same_tasks, checked, loss_of_one


class MetaLearner(Protocol):
    """The part that a graph needs of a :class:`metamask_ext.meta.MAML`."""

    inner_lr: nn.Parameter | float
    inner_steps: int
    first_order: bool
    checkpoint: bool
    _adapted: AdaptedModel


Given = Any
"""The tensors that a layer is given inside a graph: logits, GivenTasks, tensors by name, or GivenNorm."""

KEPT_CHECKS = 64
"""The most kinds of calls that are remembered as checked."""


class MetaLossGraph:
    """The call of a MAML: checks in eager mode, around a compiled function of tensors.

    Raises:
        ValueError: the MAML is one that has no graph; the text says why.
    """

    def __init__(self, maml: MetaLearner, call: Callable[..., Tensor], options: dict[str, Any]):
        if maml.checkpoint:
            raise ValueError(
                "checkpoint=True is not compiled: torch.compile decides what a compiled meta-step keeps, and inner steps that are "
                "computed again are no part of its graph. Compile a MAML with checkpoint=False, or the model alone"
            )
        self._maml, self._call = maml, call
        self._layers = GivenLayers(maml._adapted)
        self._checked: set[object] = set()
        layers, adapted = self._layers, maml._adapted

        # A function of its own for each MAML: Dynamo counts the graphs of each function's code.
        def run(
            loss_fn: LossFunction,
            first: list[Tensor],
            fixed: list[Given],
            inner_lr: float | Tensor,
            steps: int,
            first_order: bool,
            each: bool,
            support: Checked,
            query: Checked,
        ) -> Tensor:
            rates: Sequence[float | Tensor] = [inner_lr] * len(first)
            if isinstance(inner_lr, Tensor):
                rates = inner_lr.unbind()
            is_kept = adapted.policy == "per task" and bool(adapted.norms)

            def loss(
                state: list[Tensor],
                x: Tensor,
                y: PyTree,
                weights: Tensor | None,
                statistics: Mapping[str, Statistics] | None = None,
            ) -> Tensor:
                prediction, _ = layers.run(state, fixed, x, weights, statistics, False)
                return loss_of_one(loss_fn, prediction, y, weights)

            def one(
                x: Tensor, y: PyTree, weights: Tensor | None, query_x: Tensor, query_y: PyTree, query_weights: Tensor | None
            ) -> Tensor:
                state = list(first)
                for _ in range(steps):
                    grads: list[Tensor] = torch.func.grad(loss)(state, x, y, weights)
                    if first_order:
                        grads = [grad.detach() for grad in grads]
                    state = [tensor - rate * grad for tensor, rate, grad in zip(state, rates, grads)]
                statistics = layers.run(state, fixed, x, weights, None, True)[1] if is_kept else None
                return loss(state, query_x, query_y, query_weights, statistics)

            arguments = (*support, *query)
            if each:
                by_task = [_of_task(arguments, task) for task in range(support[0].shape[0])]
                return torch.stack([one(*given) for given in by_task]).mean()
            dims = tuple(None if given is None else 0 for given in arguments)
            losses: Tensor = torch.vmap(one, dims, randomness="different")(*arguments)
            return losses.mean()

        self._run: Callable[..., Tensor] = torch.compile(run, **options)

    def __call__(self, loss_fn: LossFunction, support: Samples, query: Samples) -> Tensor:
        if torch.is_inference_mode_enabled():
            return self._call(loss_fn, support, query)
        maml, adapted = self._maml, self._maml._adapted
        given, asked = checked("support", support), checked("query", query)
        check_same_tasks(asked[0], len(given[0]))
        self._check(loss_fn, support, query)
        each = adapted.runs_each(given[0]) or adapted.runs_each(asked[0])
        order = maml.first_order, each
        return self._run(loss_fn, adapted.first(), self._layers.fixed(), maml.inner_lr, maml.inner_steps, *order, given, asked)

    def _check(self, loss_fn: LossFunction, support: Samples, query: Samples) -> None:
        """Raise what eager mode raises for calls of this kind: a graph takes a gradient that is not there for zero."""
        kind = loss_fn, support[0].shape, query[0].shape, len(support), len(query), self._maml.inner_steps
        if kind in self._checked:
            return
        devices = [support[0].device] if support[0].device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            self._call(loss_fn, support, query)
        if len(self._checked) >= KEPT_CHECKS:
            self._checked.clear()
        self._checked.add(kind)


def _of_task(arguments: PyTree, task: int) -> PyTree:
    if isinstance(arguments, Tensor):
        return arguments[task]
    if isinstance(arguments, dict):
        return {name: _of_task(argument, task) for name, argument in arguments.items()}
    if isinstance(arguments, (tuple, list)):
        return type(arguments)([_of_task(argument, task) for argument in arguments])
    return arguments


class GivenLayers:
    """Gives the layers of an adapted model their tensors in a graph: the adapted ones, and those of its start that are not."""

    def __init__(self, adapted: AdaptedModel):
        self._adapted, self._model = adapted, adapted.model
        self._call = uncompiled_call(adapted.model)
        self._layers = list(adapted._active)
        places = {
            (source.module, source.key): place for place, source in enumerate(adapted._sources) if isinstance(source, _Stored)
        }
        self._places: list[list[int | None]] = []
        """For each layer the positions among the adapted tensors: of the masks of weight and bias, or of tensors of a task."""
        for layer in self._layers:
            if isinstance(layer, MaskedLayer):
                self._places.append(adapted._masks.get(layer, [None for _ in layer._kinds()]))
            elif isinstance(layer, PerTask):
                key = escape(adapted.start) if isinstance(adapted.start, str) else ""
                self._places.append([places.get((tensors, key)) for tensors in layer._own().values()])
            else:
                self._places.append([])
        for layer, its in zip(self._layers, self._places):
            present = self._present(layer)
            fixed = [kind for kind, place in zip(present, its) if kind is not None and place is None]
            if fixed and not isinstance(adapted.start, str):
                raise ValueError(
                    "a MAML that starts from several tasks is compiled where all masks are adapted, and "
                    f"{type(layer).__name__} would use a mixture: compile the model alone"
                )

    @staticmethod
    def _present(layer: nn.Module) -> list[TaskDict | None]:
        """The dictionaries of a layer's tensors of tasks, in the order of its places; None: it has none there."""
        if isinstance(layer, MaskedLayer):
            dicts = layer._dicts()
            return [dicts.get(kind) for kind in layer._kinds()]
        return list(layer._own().values()) if isinstance(layer, PerTask) else []

    def fixed(self) -> list[Given]:
        """For each layer the tensors of the start that are not adapted."""
        key = escape(self._adapted.start) if isinstance(self._adapted.start, str) else ""
        made: list[Given] = []
        for layer, places in zip(self._layers, self._places):
            own = [
                None if tensors is None or place is not None else tensors._tensor(key)
                for tensors, place in zip(self._present(layer), places)
            ]
            packed = isinstance(layer, MaskedLayer) and any(mask is not None and mask.dtype == torch.uint8 for mask in own)
            if packed and not isinstance(layer, WeightLayer):
                raise ValueError(
                    f"a MAML of a {type(layer).__name__} whose masks are packed is not compiled: compile the model alone"
                )
            weights, biases = ([mask for mask in its if mask is not None] for its in (own[:1], own[1:]))
            made.append(GivenTasks(True, weights, biases or None) if packed else own)
        return made

    def run(
        self,
        parameters: list[Tensor],
        fixed: list[Given],
        x: Tensor,
        weights: Tensor | None,
        statistics: Mapping[str, Statistics] | None,
        keep: bool,
    ) -> tuple[Output, dict[str, Statistics]]:
        """As :meth:`AdaptedModel.run_one`, inside a trace of Dynamo."""
        adapted = self._adapted
        normalise = Normalisation(adapted.policy, None, weights, statistics, adapted.norms, keep)
        given = [self._given(layer, its, own, parameters, normalise) for layer, its, own in zip(self._layers, self._places, fixed)]
        others = {name: parameters[place] for name, place in adapted._others.items()}
        if others:
            y = run_given(self._layers, given, torch.func.functional_call, self._model, others, (x,))
        else:
            y = run_given(self._layers, given, self._call, x)
        return y, normalise.kept or {}

    def _given(
        self, layer: object, places: list[int | None], own: Given, parameters: list[Tensor], normalise: Normalisation
    ) -> Given:
        if isinstance(own, GivenTasks):
            return own
        tensors = [its if place is None else parameters[place] for its, place in zip(own, places)]
        if isinstance(layer, MaskedLayer):
            return tuple(tensors)
        named = dict(zip(layer._own(), tensors)) if isinstance(layer, PerTask) else {}
        return GivenNorm(named, normalise) if layer in self._adapted.norms else named
