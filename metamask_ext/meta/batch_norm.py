"""Batch normalisation while a meta-learner adapts several tasks at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.batch_norm import TaskBatchNorm2d
from ..nn.context import selection_of
from ..nn.paths import plain_modules
from ..nn.selection import GivenMasks
from ..torch_private import BatchNorm, InstanceNorm

POLICIES = ("batch", "frozen", "per task")

Statistics = tuple[Tensor, Tensor]
"""Mean and biased variance of each channel."""


class _MetaBatchNorm(BatchNorm):
    """A batch norm that asks the meta-learner what to do while that runs the model, and is torch's otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        selection = selection_of(self)
        return selection.normalise(self, input) if isinstance(selection, GivenMasks) else super().forward(input)


class MetaBatchNorm1d(_MetaBatchNorm, nn.BatchNorm1d):
    """A :class:`torch.nn.BatchNorm1d` of a model inside :class:`metamask_ext.meta.MAML`."""


class MetaBatchNorm2d(_MetaBatchNorm, nn.BatchNorm2d):
    """A :class:`torch.nn.BatchNorm2d` of a model inside :class:`metamask_ext.meta.MAML`."""


class MetaBatchNorm3d(_MetaBatchNorm, nn.BatchNorm3d):
    """A :class:`torch.nn.BatchNorm3d` of a model inside :class:`metamask_ext.meta.MAML`."""


_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: MetaBatchNorm1d,
    nn.BatchNorm2d: MetaBatchNorm2d,
    nn.BatchNorm3d: MetaBatchNorm3d,
}


def prepare(model: nn.Module, policy: str) -> dict[nn.Module, str]:
    """The batch norms of ``model`` with their names, which from now on ask the meta-learner while that runs them.

    Raises:
        ValueError: an unknown policy; a batch norm that it cannot be applied to; a norm that would update statistics of its own.
    """
    if policy not in POLICIES:
        raise ValueError(f"batch_norm must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
    found: dict[nn.Module, str] = {}
    for name, module in plain_modules(model):
        if isinstance(module, InstanceNorm) and module.track_running_stats:
            raise ValueError(f"track_running_stats of {name!r} must be False, got True: all tasks would update its statistics")
        if not isinstance(module, BatchNorm):
            continue
        if not (type(module) in _TYPES or isinstance(module, (_MetaBatchNorm, TaskBatchNorm2d))):
            kind = type(module).__name__
            raise ValueError(f"batch norm must be torch's BatchNorm1d, 2d or 3d or TaskBatchNorm2d, got a {kind} at {name!r}")
        if policy == "frozen" and not module.track_running_stats:
            raise ValueError(f"batch_norm='frozen' needs running statistics, and {name!r} has none")
        found[module] = name
    for module in found:
        module.__class__ = _TYPES.get(type(module), type(module))
    return found


class Normalisation:
    """Normalises in the place of the batch norms of a model, in one forward.

    Source: Ioffe and Szegedy, arXiv:1502.03167, algorithm 1, for each task.

    Args:
        policy: ``"frozen"`` takes the running statistics; the others those that are given, or of the input.
        tasks: how many the input holds, ``[K * T, C, ...]``, the tasks of a sample beside each other; None: it is of one task,
            ``[K, C, ...]``.
        weights: ``[T, K]``, or ``[K]``: samples of weight 0 do not count in statistics; None: all count.
        given: for each batch norm, by name, the statistics to use, ``[T, C]`` or ``[C]``.
        names: of the batch norms.
        keep: whether ``kept`` is to hold the statistics of this forward.
    """

    def __init__(
        self,
        policy: str,
        tasks: int | None,
        weights: Tensor | None,
        given: Mapping[str, Statistics] | None,
        names: Mapping[nn.Module, str],
        keep: bool = False,
    ):
        self.policy, self.tasks, self.weights, self.given, self.names = policy, tasks, weights, given, names
        self.kept: dict[str, Statistics] | None = {} if keep else None

    def __call__(self, layer: BatchNorm, input: Tensor) -> Tensor:
        check_dimensions: Callable[[Tensor], None] = layer._check_input_dim
        check_dimensions(input)
        if self.policy == "frozen":
            return F.batch_norm(input, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)
        if self.given is None and self.weights is None and self.kept is None:
            return self._native(layer, input)
        lead = 0 if self.tasks is None else 1
        x = input if self.tasks is None else torch.unflatten(input, 0, (-1, self.tasks)).transpose(0, 1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = self._statistics(x, lead) if self.given is None else self.given[self.names[layer]]
        if self.kept is not None:
            self.kept[self.names[layer]] = mean, variance
        scale = torch.rsqrt(variance + layer.eps)
        scale = scale if layer.weight is None else scale * layer.weight
        shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
        over = (..., None, slice(None), *[None] * (x.dim() - lead - 2))
        y = torch.addcmul(shift[over], x, scale[over]).to(input.dtype)
        return y if self.tasks is None else y.transpose(0, 1).reshape(input.shape)

    def _native(self, layer: BatchNorm, input: Tensor) -> Tensor:
        """With the statistics of each task's samples, as more channels of torch's function."""
        if self.tasks is None or self.tasks == 1:
            return F.batch_norm(input, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
        x = torch.unflatten(input, 0, (-1, self.tasks)).flatten(1, 2)
        weight, bias = (None if tensor is None else tensor.repeat(self.tasks) for tensor in (layer.weight, layer.bias))
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, layer.eps).view(input.shape)

    def _statistics(self, x: Tensor, lead: int) -> Statistics:
        dims = (lead, *range(lead + 2, x.dim()))
        if self.weights is None:
            variance, mean = torch.var_mean(x, dims, correction=0)
            return mean, variance
        real = (self.weights != 0).to(x.dtype)[(..., *[None] * (x.dim() - lead - 1))]
        count = real.sum(dims) * x.shape[lead + 2 :].numel()
        mean = (x * real).sum(dims) / count
        centred = (x - mean[(..., None, slice(None), *[None] * (x.dim() - lead - 2))]) * real
        return mean, centred.square().sum(dims) / count
