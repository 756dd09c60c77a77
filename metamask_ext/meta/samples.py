"""Sets of samples of several tasks, their checks, and losses by task."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import torch_private
from ..torch_private import PyTree
from .adapted import Output

LossFunction = Callable[..., Tensor]
"""``loss_fn(prediction, target)``."""
Samples = tuple[Tensor, PyTree] | tuple[Tensor, PyTree, Tensor]
Checked = tuple[Tensor, PyTree, "Tensor | None"]
"""``x``, ``y`` and weights."""

_BY_ELEMENT: tuple[Callable[..., Tensor], ...] = (F.mse_loss, F.l1_loss)
"""Losses that are a mean over elements: that of each task needs no vmap."""

torch_private.load_vmap_decompositions()  # of operators without a rule of their own under vmap


def losses(loss_fn: LossFunction, prediction: Output, y: PyTree, weights: Tensor | None) -> Tensor:
    """The loss of each task, ``[T]``."""
    if weights is None:
        return mapped(loss_fn, prediction, y)

    each = torch.vmap(torch.vmap(_alone(loss_fn), randomness="different"), randomness="different")(prediction, y)
    _check_scalar(each[:, 0], len(weights))
    return (each * weights).sum(1) / weights.sum(1)


def loss_of_one(loss_fn: LossFunction, prediction: Output, y: PyTree, weights: Tensor | None) -> Tensor:
    """The loss of one task, of tensors without the first dimension."""
    if weights is None:
        return loss_fn(prediction, y)
    each = torch.vmap(_alone(loss_fn), randomness="different")(prediction, y)
    return (each * weights).sum() / weights.sum()


def _alone(loss_fn: LossFunction) -> LossFunction:
    """The loss of one sample of a task."""

    def alone(prediction: Output, y: PyTree) -> Tensor:
        return loss_fn(*torch_private.tree_map(lambda tensor: tensor[None], (prediction, y)))

    return alone


def mapped(loss_fn: LossFunction, prediction: Output, y: PyTree) -> Tensor:
    """``torch.vmap(loss_fn, randomness="different")``, less the 28 us that its wrapper takes (tests compare the two)."""
    if loss_fn in _BY_ELEMENT and isinstance(prediction, Tensor) and isinstance(y, Tensor) and prediction.shape == y.shape:
        return loss_fn(prediction, y, reduction="none").flatten(1).mean(1)
    leaves, tree = torch_private.tree_flatten((prediction, y))
    losses = torch_private.vmap(lambda *tensors: loss_fn(*torch_private.tree_unflatten(tensors, tree)), leaves)
    _check_scalar(losses, len(leaves[0]))
    return losses


def _check_scalar(losses: object, tasks: int) -> None:
    if not isinstance(losses, Tensor) or losses.shape != (tasks,):
        got = f"shape {list(losses.shape[1:])}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss_fn must give a scalar for one task, got {got}")


def checked(name: str, samples: Samples) -> Checked:
    """``x``, ``y`` and the weights of a set of samples."""
    if not isinstance(samples, (tuple, list)) or len(samples) not in (2, 3):
        raise TypeError(f"{name} must be (x, y) or (x, y, weights), got {type(samples).__name__}")
    x, y, weights = (*samples, None)[:3]
    if not isinstance(x, Tensor):
        raise TypeError(f"x of {name} must be a tensor, got {type(x).__name__}")
    if x.dim() < 2 or x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(f"x of {name} must be [T, K, ...] with at least one task and sample, got shape {list(x.shape)}")
    for leaf in torch_private.tree_leaves(y) if not isinstance(y, Tensor) else (y,):
        if leaf.shape[:2] != x.shape[:2]:
            raise ValueError(f"y of {name} must be [T, K, ...] = {list(x.shape[:2])} as x, got shape {list(leaf.shape)}")
    if weights is not None:
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            raise TypeError(f"weights of {name} must be a floating-point tensor, got {getattr(weights, 'dtype', type(weights))}")
        if weights.shape != x.shape[:2]:
            raise ValueError(f"weights of {name} must be [T, K] = {list(x.shape[:2])}, got shape {list(weights.shape)}")
        if bool((weights < 0).any()) or not bool((weights.sum(1) > 0).all()):
            raise ValueError(f"weights of {name} must not be negative, and not all zero for a task")
    return x, y, weights


def check_same_tasks(x: Tensor, tasks: int) -> None:
    if len(x) != tasks:
        raise ValueError(f"query must have the tasks of support, {tasks}, got {len(x)}")
