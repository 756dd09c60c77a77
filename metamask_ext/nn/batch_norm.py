"""Batch normalisation with statistics for each task."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.types import Device

from ..ops.checks import check_layer_input
from ..ops.dispatch import worded
from ..torch_private import foreach_add_, foreach_copy_
from .names import DEFAULT_TASK
from .per_task import PerTask
from .selection import Selection, TaskBatch
from .task_dict import TaskDict

AFFINE = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class TaskBatchNorm2d(PerTask, nn.BatchNorm2d):
    """A :class:`torch.nn.BatchNorm2d` with running statistics, and weight and bias, for each task.

    ``y = (x - mean_t) / sqrt(var_t + eps) * weight_t + bias_t``. The active task's are used; the layer begins with one task,
    ``"default"``, and follows :func:`metamask_ext.add_task` and :func:`metamask_ext.remove_task`. A new task begins with mean 0,
    variance 1, weight 1 and bias 0, or as ``init`` of ``add_task`` says. Statistics that several tasks share fit the task trained
    last, and the accuracy of earlier tasks falls to chance.

    In a mixed-task batch every sample is normalised with its task's statistics; in training mode with those of its task's samples
    in the batch, which then go into that task's running ones. Source: Ioffe and Szegedy, arXiv:1502.03167, algorithm 1, for
    each task.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for :class:`torch.nn.BatchNorm2d`.
        per_task_affine: False shares weight and bias between the tasks.

    Shapes: input and output ``[N, C, H, W]``; each of a task's tensors, ``per_task[name][task]``, ``[C]``, where ``name`` is
    torch's (``running_mean``, ``running_var``, ``num_batches_tracked``, ``weight``, ``bias``). ``layer.weight`` is the active
    task's.

    Raises:
        ValueError: nothing is left that could belong to a task; an input that is not 4-D; in training mode a task with only one
            value per channel.
        RuntimeError: called with several tasks and none active.
    """

    plain_type = nn.BatchNorm2d

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        per_task_affine: bool = True,
    ):
        names = [*(AFFINE if affine and per_task_affine else ()), *(STATISTICS if track_running_stats else ())]
        if not names:
            raise ValueError(
                "TaskBatchNorm2d must have statistics or an affine part for each task, got track_running_stats=False and "
                f"affine={affine}, per_task_affine={per_task_affine}"
            )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._keep_per_task(names, [DEFAULT_TASK])

    def _sample_dim(self, input: Tensor) -> int:
        return 3

    def _plain_forward(self, *inputs: object, **options: object) -> Tensor:
        try:
            output: Tensor = super()._plain_forward(*inputs, **options)
        except Exception as error:
            given = inputs[0] if inputs else options.get("input")
            raise worded(error, check_layer_input, given, self._device()) from None
        return output

    def _device(self) -> torch.device:
        tensors = next(iter(self._dicts().values()))
        return tensors[next(iter(tensors))].device

    def _forward_selected(self, input: Tensor, active: Selection) -> Tensor:
        check_layer_input(input, self._device())
        output: Tensor = super()._forward_selected(input, active)
        return output

    def _forward_batch(self, input: Tensor, batch: TaskBatch) -> Tensor:
        if self.training and self.track_running_stats and "running_mean" not in self._own():
            # Statistics that all tasks share take in one task after another.
            output: Tensor = super()._forward_batch(input, batch)
            return output
        self._check_input_dim(input)
        positions = batch.positions(input.device)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        tracked = "running_mean" in self._own() or self._buffers["running_mean"] is not None
        if self.training or not tracked:
            mean, variance = self._statistics(x, positions, batch)
        else:
            mean, variance = (self._gather(name, batch).to(x.dtype) for name in ("running_mean", "running_var"))
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self._gather("weight", batch)
        shift = -mean * scale
        if self.affine:
            shift = shift + self._gather("bias", batch)
        by_sample = (tensor.index_select(0, positions)[..., None, None] for tensor in (shift.to(x.dtype), scale.to(x.dtype)))
        shift, scale = by_sample
        return torch.addcmul(shift, x, scale).to(input.dtype)

    def _gather(self, name: str, batch: TaskBatch) -> Tensor:
        """``[T, C]``, a row for each task of the batch."""
        tensors = self._own().get(name)
        if tensors is None:
            shared: Tensor | None = self._parameters.get(name)
            shared = self._buffers.get(name) if shared is None else shared
            assert shared is not None
            return shared.expand(len(batch.keys), -1)
        if not batch.keys:
            return tensors[next(iter(tensors))].new_empty(0, self.num_features)
        return torch.stack([tensors._tensor(key) for key in batch.keys])

    def _statistics(self, x: Tensor, positions: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Each task's mean and biased variance, ``[T, C]``; in training mode they go into the running ones too."""
        tasks = len(batch.keys)
        count = torch.bincount(positions, minlength=tasks) * (x.shape[2] * x.shape[3])
        if self.training and tasks and int(count.min()) <= 1:
            name = batch.names[int(count.argmin())]
            raise ValueError(f"input must have more than one value per channel for each task when training, got one for {name!r}")
        per_channel = count[:, None]
        zeros = x.new_zeros(tasks, x.shape[1])
        mean = zeros.index_add(0, positions, x.sum((2, 3))) / per_channel
        centred = x - mean.index_select(0, positions)[..., None, None]
        variance = zeros.index_add(0, positions, centred.square().sum((2, 3))) / per_channel
        if self.training and self.track_running_stats and tasks:
            with torch.no_grad():
                self._track(mean, variance * (per_channel / (per_channel - 1)), batch)
        return mean, variance

    def _track(self, mean: Tensor, variance: Tensor, batch: TaskBatch) -> None:
        counts, means, variances = (
            [self._one(name, key) for key in batch.keys] for name in ("num_batches_tracked", "running_mean", "running_var")
        )
        foreach_add_(counts, 1)
        weight: float | Tensor | None = self.momentum
        if weight is None:  # a cumulative average
            weight = 1.0 / torch.stack(counts)[:, None]
        for running, new in ((means, mean), (variances, variance)):
            before = torch.stack(running)
            wide = torch.promote_types(before.dtype, mean.dtype)  # not the 16 bits of the statistics
            weight = weight.to(wide) if isinstance(weight, Tensor) else weight
            foreach_copy_(running, list(before.to(wide).lerp(new.to(wide), weight).to(before.dtype).unbind()))

    def _one(self, name: str, key: str) -> Tensor:
        tensors: TaskDict = self._own()[name]
        return tensors._tensor(key)
