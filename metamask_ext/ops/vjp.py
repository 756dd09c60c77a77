"""Vector-Jacobian products of references whose arguments are trees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metamask_ext.torch_private import PyTree, tree_flatten, tree_leaves, tree_unflatten


def pull_back(function: Callable[..., PyTree], primals: PyTree, cotangents: PyTree) -> PyTree:
    """:func:`torch.func.vjp` of ``function(*primals)``, for trees that may hold None, and integers, which get None."""
    leaves, tree = tree_flatten(primals)
    present = [index for index, leaf in enumerate(leaves) if leaf is not None and leaf.is_floating_point()]

    def flat(*tensors: Tensor) -> list[Tensor]:
        given = list(leaves)
        for index, tensor in zip(present, tensors):
            given[index] = tensor
        return _tensors(function(*tree_unflatten(given, tree)))

    grads: list[Tensor | None] = [None] * len(leaves)
    found = torch.func.vjp(flat, *(leaves[index] for index in present))[1](_tensors(cotangents))
    for index, grad in zip(present, found):
        grads[index] = grad
    return tree_unflatten(grads, tree)


def _tensors(tree: PyTree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if leaf is not None]
