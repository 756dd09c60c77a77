"""Modules with tensors for each task on a mixed-task batch, by formulas without a loop over tasks: in a compiled graph.

Eager code runs the samples of each task through the module by themselves; how many there are of each would be part of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
"""By name, ``[B, ...]``: for each sample that of its task."""
Formula = Callable[[nn.Module, Tensor, Tensors], Tensor]


def formula_of(module: nn.Module, kind: type[nn.Module]) -> Formula | None:
    """The formula of a module, which is plainly of class ``kind``, in its present mode; None if there is none."""
    if kind is nn.Linear:
        return _linear
    if kind is nn.LayerNorm:
        return _layer_norm
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        # In training mode statistics of tasks change, and how many samples a task has decides what is an error.
        return None if module.training or not module.track_running_stats else _batch_norm
    return None


def _linear(module: nn.Module, input: Tensor, own: Tensors) -> Tensor:
    weight, bias = own.get("weight"), own.get("bias")
    shared = None if bias is not None else module._parameters["bias"]
    if weight is None:
        y = F.linear(input, module._parameters["weight"], shared)  # type: ignore[arg-type]  # a linear layer has a weight
    else:
        rows = input.reshape(input.shape[0], -1, input.shape[-1])
        y = torch.bmm(rows, weight.transpose(1, 2)).reshape(*input.shape[:-1], weight.shape[1])
        y = y if shared is None else y + shared
    return y if bias is None else y + _over(bias, y.dim(), 1)


def _layer_norm(module: nn.Module, input: Tensor, own: Tensors) -> Tensor:
    shape: tuple[int, ...] = module.normalized_shape  # type: ignore[assignment]
    y = F.layer_norm(input, shape, None, None, module.eps)  # type: ignore[arg-type]
    for name, join in (("weight", torch.mul), ("bias", torch.add)):
        shared = module._parameters.get(name)
        if name in own:
            y = join(y, _over(own[name], y.dim(), len(shape)))
        elif shared is not None:
            y = join(y, shared)
    return y


def _batch_norm(module: nn.Module, input: Tensor, own: Tensors) -> Tensor:
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    kept = {**module._buffers, **module._parameters}

    def of(name: str) -> Tensor | None:
        tensor = own[name] if name in own else kept.get(name)
        # The channels are the second dimension, or the only one beside the samples.
        return None if tensor is None else tensor.reshape(-1, tensor.shape[-1], *[1] * (x.dim() - 2))

    mean, variance, weight, bias = map(of, ("running_mean", "running_var", "weight", "bias"))
    assert mean is not None and variance is not None  # formula_of has asked for them
    scale = torch.rsqrt(variance.to(x.dtype) + module.eps)  # type: ignore[operator]
    scale = scale if weight is None else scale * weight
    shift = -mean.to(x.dtype) * scale
    return torch.addcmul(shift if bias is None else shift + bias, x, scale).to(input.dtype)


def _over(tensor: Tensor, dims: int, last: int) -> Tensor:
    """``[B, *shape]`` with ones in front of its ``last`` dimensions, up to ``dims`` in all."""
    return tensor.reshape(tensor.shape[0], *[1] * (dims - 1 - last), *tensor.shape[1:])
