"""A call of a module in a mixed-task batch as one call for each task, with the samples of that task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_private import tree_flatten, tree_unflatten
from .context import run_selected
from .known import layers_of
from .selection import MarkedBatch, TaskBatch

Place = int | str
"""An argument of a call, by position or by name."""


class Call:
    """The arguments of a call, some of which have samples.

    Args:
        inputs, options: the arguments.
        dims: for each argument with samples the dimension along which they lie; all others are those of every task.
        output_dims: the same for what the call returns: one dimension for all its tensors, or one for each.
        rows: for arguments whose samples have several rows there, one after another, their number.
    """

    def __init__(
        self,
        inputs: Sequence[Any],
        options: Mapping[str, Any],
        dims: Mapping[Place, int],
        output_dims: int | Sequence[int] = 0,
        rows: Mapping[Place, int] | None = None,
    ):
        self.inputs, self.options = tuple(inputs), dict(options)
        self._dims, self._rows, self._output_dims = dims, rows or {}, output_dims

    def of(self, samples: Tensor) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with these samples alone. An argument that is another one (``query is key``) stays so."""
        inputs, options = list(self.inputs), dict(self.options)
        found: dict[tuple[int, int, int], Tensor] = {}
        for place, dim in self._dims.items():
            holder: Any = inputs if isinstance(place, int) else options
            tensor, rows = holder[place], self._rows.get(place, 1)
            same = id(tensor), dim, rows
            if same not in found:
                found[same] = _samples_of(tensor, dim, rows, samples)
            holder[place] = found[same]
        return inputs, options

    @property
    def device(self) -> torch.device:
        """The device of the samples."""
        first = next(iter(self._dims))
        holder: Any = self.inputs if isinstance(first, int) else self.options
        device: torch.device = holder[first].device
        return device

    def part(self, samples: Tensor) -> Call:
        """The same call with these samples alone."""
        inputs, options = self.of(samples)
        return Call(inputs, options, self._dims, self._output_dims, self._rows)

    def marked(self, module: nn.Module, output: Any, batch: MarkedBatch) -> Any:
        """The output of a call for the samples that have a task, with NaN for all others."""
        leaves, form = tree_flatten(output)
        dims = [self._output_dims] * len(leaves) if isinstance(self._output_dims, int) else self._output_dims
        marked = [batch.marked(module, leaf, dim) if isinstance(leaf, Tensor) else leaf for leaf, dim in zip(leaves, dims)]
        return tree_unflatten(marked, form)

    def joined(self, module: nn.Module, outputs: Sequence[Any], groups: Sequence[Tensor], back: Tensor) -> Any:
        """Put together the outputs for ``groups`` of samples, in the batch's order. RuntimeError for outputs without samples."""
        flat = [tree_flatten(output) for output in outputs]
        (first, form), dims = flat[0], self._output_dims
        if any(other != form for _, other in flat):
            raise RuntimeError(f"{type(module).__name__} returns outputs of different forms for the tasks of a mixed-task batch")
        of_each = [dims] * len(first) if isinstance(dims, int) else list(dims)
        leaves = [
            _joined(module, [leaves[index] for leaves, _ in flat], of_each[index], groups, back) for index in range(len(first))
        ]
        return tree_unflatten(leaves, form)


def _samples_of(tensor: Tensor, dim: int, rows: int, samples: Tensor) -> Tensor:
    if rows == 1:
        return tensor.index_select(dim, samples)
    return torch.unflatten(tensor, dim, (-1, rows)).index_select(dim, samples).flatten(dim, dim + 1)


def _joined(module: nn.Module, values: Sequence[Any], dim: int, groups: Sequence[Tensor], back: Tensor) -> Any:
    if all(isinstance(value, Tensor) for value in values):
        for value, samples in zip(values, groups, strict=True):
            if value.dim() <= dim or value.shape[dim] != len(samples):
                raise RuntimeError(
                    f"{type(module).__name__} was run for the {len(samples)} samples of a task, in a mixed-task batch, and "
                    f"returned a tensor of shape {list(value.shape)}: dimension {dim} must be theirs. Call the model with each "
                    "task's samples in a block of their own"
                )
        return torch.cat(list(values), dim).index_select(dim, back)
    if any(isinstance(value, Tensor) for value in values) or any(value != values[0] for value in values):
        raise RuntimeError(
            f"{type(module).__name__} returns what differs between the tasks of a mixed-task batch and has no samples, "
            f"{type(values[0]).__name__}: call the model with each task's samples in a block of their own"
        )
    return values[0]


def run_each_task(module: nn.Module, batch: TaskBatch, call: Call, function: Callable[..., Any]) -> Any:
    """``function`` of the samples of each task by themselves, in the block of that task, put together in the batch's order."""
    layers = layers_of(module)
    if isinstance(batch, MarkedBatch):
        known = call.part(batch.rows(call.device))
        return call.marked(module, run_each_task(module, batch.known, known, function), batch)
    # Of no sample: any task gives the shape.
    keys = batch.keys or [next(iter(layers[0]._task_dict()._slots))]
    if len(keys) == 1:
        return run_selected(layers, keys[0], partial(function, *call.inputs, **call.options))
    groups, back = batch.groups(call.device)
    parts = []
    for key, samples in zip(keys, groups, strict=True):
        inputs, options = call.of(samples)
        parts.append(run_selected(layers, key, partial(function, *inputs, **options)))
    return call.joined(module, parts, groups, back)
