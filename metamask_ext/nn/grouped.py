"""Masked layers that run the samples of each task of a mixed-task batch by themselves, one task after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..torch_private import disable_dynamo, fx_trace, traced_call, tree_leaves
from .context import run_selected
from .each_task import Call, run_each_task
from .masked_layer import MaskedLayer
from .selection import GivenMasks, TaskBatch


class GroupedLayer(MaskedLayer):
    """A masked layer for which no op takes several tasks at once: it runs for one after another."""

    sample_dim: int | None = None
    """The dimensions of the input of one sample. None: one of features at least, none where the input is integers (tokens)."""
    stacks_tasks = False
    """True if a meta-learner may run its tasks as one batch: the layer has nothing below it that would see a part of that."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if fx_trace._is_fx_tracing_flag and (traced := traced_call(self, *inputs, **options)) is not None:
            return traced
        active = self._active()
        if active is None:
            return _forward_in_eager(self, *inputs, **options)
        if isinstance(active, TaskBatch):
            batch, call = self._divided(active, *inputs, **options)
            return run_each_task(self, batch, call, self._run)
        if isinstance(active, GivenMasks) and active.slots is not None and self in active.masks:
            return self._each_of_given(self._only_tensor(*inputs, **options), active)
        return self._run(*inputs, **options)

    def _run(self, *inputs: Any, **options: Any) -> Any:
        """The output for what is active, where that is not several tasks."""
        raise NotImplementedError

    def _divided(self, batch: TaskBatch, *inputs: Any, **options: Any) -> tuple[TaskBatch, Call]:
        """Where the samples of a call lie, and the batch that fits them. RuntimeError where that is not known."""
        input = self._only_tensor(*inputs, **options)
        batch = batch.fitting(self, input, self._sample_dims(input, batch))
        return batch, Call(inputs, options, {0: batch.dim}, batch.dim)

    def _sample_dims(self, input: Tensor, batch: TaskBatch) -> int:
        if self.sample_dim is not None:
            return self.sample_dim
        features = 1 if input.is_floating_point() else 0
        return features if batch.dim else min(features, max(0, input.dim() - 1))

    def _only_tensor(self, *inputs: Any, **options: Any) -> Tensor:
        """The tensor that has the samples. Nobody says which of several do, or along which dimension."""
        others = [value for value in tree_leaves((inputs[1:], options)) if isinstance(value, Tensor)]
        if not inputs or not isinstance(inputs[0], Tensor) or others:
            raise RuntimeError(
                f"{type(self).__name__} must be called with one tensor where several tasks are active, the first argument: nothing "
                "says where others have their samples. Call the model with each task's samples in a block of their own, or "
                "metamask_ext.nn.split_by_task(module) for a module around it whose arguments have the samples first"
            )
        return inputs[0]

    def _each_of_given(self, input: Tensor, given: GivenMasks) -> Tensor:
        """The output where each of the tasks of a meta-learner has its own logits."""
        assert given.slots is not None
        given.check_size(self, input.shape[0] if input.dim() > self._sample_dims(input, _FIRST) else 1)
        masks = given.masks[self]
        groups = [(given.slots == task).nonzero().flatten() for task in range(next(len(one) for one in masks if one is not None))]
        parts = []
        for task, rows in enumerate(groups):
            own: dict[nn.Module, tuple[Tensor | None, ...]] = {self: tuple(None if one is None else one[task] for one in masks)}
            selection = GivenMasks(given.start, own, None, given.normalise)
            parts.append(run_selected([self], selection, self._run, input.index_select(0, rows)))
        return torch.cat(parts).index_select(0, torch.cat(groups).argsort())


_FIRST = TaskBatch([])


@disable_dynamo
def _forward_in_eager(layer: GroupedLayer, *inputs: Any, **options: Any) -> Any:
    """For torch.compile, which cannot read a context variable."""
    return layer.forward(*inputs, **options)
