"""Masked layers made of subclasses of Linear and Conv2d with a forward of their own, which runs with the masked weight."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ..torch_private import disable_dynamo, fx_trace, traced_call
from .context import run_selected
from .read_through import ReadThrough
from .selection import GivenMasks, TaskBatch
from .using_task import run_each_task

_TYPES: dict[type[nn.Module], type[OwnForward]] = {}
"""By the class of a plain layer that of the masked one."""


class OwnForward(ReadThrough):
    """A masked layer that runs the forward of its plain class, in which ``weight`` and ``bias`` are the masked ones.

    That may pad as TensorFlow does, standardise or cast the weight. In a mixed-task batch the samples of each task run by
    themselves, one task after another.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        # The class is made at run time.
        return _new, (self.plain_type,), self.__dict__

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if fx_trace._is_fx_tracing_flag and (traced := traced_call(self, *inputs, **options)) is not None:
            return traced
        active = self._active()
        if active is None:
            return _forward_in_eager(self, *inputs, **options)
        given = active if isinstance(active, GivenMasks) and active.slots is not None and self in active.masks else None
        if given is None and not isinstance(active, TaskBatch):
            return self._plain_forward(*inputs, **options)
        if len(inputs) != 1 or options or not isinstance(inputs[0], Tensor):
            raise RuntimeError(f"{type(self).__name__} must be called with one tensor where several tasks are active")
        (input,) = inputs
        if isinstance(active, TaskBatch):
            return active.run(self, input, self.sample_dim, self._each_of_batch)
        assert given is not None
        return self._each_of_given(input, given)

    def _plain_forward(self, *inputs: Any, **options: Any) -> Any:
        forward: Any = super().forward
        return forward(*inputs, **options)

    def _each_of_batch(self, input: Tensor, batch: TaskBatch) -> Any:
        return run_each_task(self, batch, input, self._plain_forward)

    def _each_of_given(self, input: Tensor, given: GivenMasks) -> Tensor:
        """The output where each of the tasks of a meta-learner has its own logits."""
        given.check_size(self, self._samples(input))
        assert given.slots is not None
        masks, bias_masks = given.masks[self]
        groups = [(given.slots == task).nonzero().flatten() for task in range(len(masks))]
        parts = []
        for task, rows in enumerate(groups):
            own: dict[nn.Module, tuple[Tensor, Tensor | None]] = {
                self: (masks[task], None if bias_masks is None else bias_masks[task])
            }
            selection = GivenMasks(given.start, own, None, given.normalise)
            parts.append(run_selected([self], selection, self._plain_forward, input.index_select(0, rows)))
        return torch.cat(parts).index_select(0, torch.cat(groups).argsort())


def own_forward_type(kind: type[nn.Module]) -> type[OwnForward]:
    """The class that a layer of class ``kind``, a subclass of Linear or Conv2d, gets when it is masked."""
    if kind not in _TYPES:
        sample_dim = 1 if issubclass(kind, nn.Linear) else 3
        _TYPES[kind] = type(f"Masked{kind.__name__}", (OwnForward, kind), {"plain_type": kind, "sample_dim": sample_dim})
    return _TYPES[kind]


def _new(kind: type[nn.Module]) -> OwnForward:
    made = own_forward_type(kind)
    return made.__new__(made)


@disable_dynamo
def _forward_in_eager(layer: OwnForward, *inputs: Any, **options: Any) -> Any:
    """For torch.compile, which cannot read a context variable."""
    return layer.forward(*inputs, **options)
