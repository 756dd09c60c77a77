"""Finds the loss scale of a ``torch.amp.GradScaler`` in a graph.

``scaler.scale(loss)`` multiplies by a scalar tensor that the scaler keeps, or by a copy of it (for a list of losses, or on another
device). Nothing marks the product, and the graph does not lead to the scaler: the garbage collector's list of objects shows the
scalers that live. Looking through it takes a tenth of a second, so a factor is looked up once.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from .torch_private import has_unpack_hook, loss_scale_of, saved_factor

# Functions through which a factor of a loss remains one: sums of losses, means over accumulated steps.
_LINEAR = "Mul Div Add Sub Neg Sum Mean Stack Cat Select Unbind View Squeeze ToCopy Clone"
_PREFIXES = tuple(f"{name}Backward" for name in _LINEAR.split())
_MOST_NODES = 64
"""The nodes to look at: a loss is scaled where it is finished."""
_MOST_SEARCHES = 8
"""The searches, in this process, for factors that a scaler has only with other settings than torch's: new ones in each step would
cost too much."""


class _Searches:
    def __init__(self) -> None:
        self.count = 0
        self.of_no_scaler: dict[int, weakref.ref[Tensor]] = {}
        """By id, factors that are no scale: they never become one, a scaler makes its tensor itself and keeps it."""

    def is_known(self, factor: Tensor) -> bool:
        known = self.of_no_scaler.get(id(factor))
        return known is not None and known() is factor

    def remember(self, factor: Tensor) -> None:
        key = id(factor)
        self.of_no_scaler[key] = weakref.ref(factor, lambda _: self.of_no_scaler.pop(key, None))


_SEARCHES = _Searches()


def is_scaled(root: Any) -> bool:
    """True if the node ``root`` computes a loss that a GradScaler, which still lives, has scaled."""
    first = _first_branch(root)
    for product in () if first is None else _products(first):
        # A hook of the user's may give a tensor back once only.
        hidden = has_unpack_hook(product)
        factor = None if hidden else saved_factor(product)
        if not hidden and (factor is None or not _is_scalar(factor) or _SEARCHES.is_known(factor)):
            continue
        if factor is None or not _is_default_scale(float(factor)):
            if _SEARCHES.count >= _MOST_SEARCHES:
                continue
            _SEARCHES.count += 1
        scales = [scale for scale in map(loss_scale_of, _scalers()) if scale is not None]
        if scales and hidden:
            factor = saved_factor(product)
        if factor is not None and _is_scalar(factor):
            if any(scale is factor or float(scale) == float(factor) for scale in scales):
                return True
            _SEARCHES.remember(factor)
    return False


def _first_branch(root: Any) -> Any:
    """The first node that multiplies, or has several inputs, of those that pass a factor on; None: there is none. For speed."""
    node = root
    while (name := type(node).__name__).startswith(_PREFIXES):
        inputs = node.next_functions
        if len(inputs) > 1 or name == "MulBackward0":
            return node
        node = inputs[0][0]
    return None


def _products(root: Any) -> Iterator[Any]:
    """The nodes that multiply the loss, or a summand of it."""
    seen, stack = {root}, [root]
    while stack and len(seen) <= _MOST_NODES:
        node = stack.pop()
        name = type(node).__name__
        if not name.startswith(_PREFIXES):
            continue
        if name == "MulBackward0":
            yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def _is_scalar(factor: Tensor) -> bool:
    return factor.dtype == torch.float32 and not factor.dim() and not factor.requires_grad


def _is_default_scale(factor: float) -> bool:
    """True if it is a power of two as torch's scalers begin with (2 ** 16) or soon fall to."""
    return factor >= 256 and math.frexp(factor)[0] == 0.5


def _scalers() -> list[GradScaler]:
    """The scalers that live and are enabled."""
    found = [each for each in gc.get_objects() if issubclass(type(each), GradScaler)]
    return [scaler for scaler in found if scaler.is_enabled()]
