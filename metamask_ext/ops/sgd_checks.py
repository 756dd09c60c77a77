"""Checks of the ops that take steps of SGD in place, in the words of csrc/ops/checks.h: for their fake kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamask_ext.torch_private import is_one_storage


class Updated(NamedTuple):
    """A parameter that takes a step if ``wanted``, its momentum buffer, and ``lr, weight_decay, momentum``."""

    name: str
    parameter: Tensor | None
    wanted: bool
    buffer: Tensor | None
    settings: Sequence[float]


def check_update(of: Updated) -> None:
    """Refuse a step that cannot be taken; ValueError."""
    name, parameter, buffer, settings = of.name, of.parameter, of.buffer, of.settings
    if not of.wanted or parameter is None:
        return
    if len(settings) != 3:
        raise ValueError(f"the settings of {name} must be lr, weight_decay and momentum, got {len(settings)} numbers")
    if not _is_dense(parameter):
        raise ValueError(f"{name} must be dense to be updated in place")
    if parameter.is_neg():
        raise ValueError(f"{name} must hold its values to be updated in place, got a lazy view: call resolve_neg")
    if buffer is None:
        if settings[2] != 0:
            raise ValueError(f"{name} has momentum {settings[2]} and no buffer")
        return
    if buffer.is_neg():
        raise ValueError(
            f"the momentum buffer of {name} must hold its values to be updated in place, got a lazy view: call resolve_neg"
        )
    if _form(buffer) != _form(parameter):
        raise ValueError(
            f"the momentum buffer of {name} must have its shape, strides, dtype and device, got {list(buffer.shape)}, "
            f"{list(buffer.stride())}, {buffer.dtype} on {buffer.device}"
        )


def check_apart(parameters: Sequence[Updated], others: dict[str, Tensor]) -> None:
    """Refuse to update a tensor that shares memory with another argument; ValueError.

    Seen are tensors of one storage: only those can share memory where there is none.
    """
    parts = [(name, tensor, False) for name, tensor in others.items()]
    for of in parameters:
        parts += [(of.name, of.parameter, of.wanted)] if of.parameter is not None else []
        parts += [("a momentum buffer", of.buffer, True)] if of.wanted and of.buffer is not None else []
    for one in parts:
        for other in parts:
            if one is not other and one[2] and _shares_memory(one[1], other[1]):
                raise ValueError(f"{one[0]} must not share memory with {other[0]} to be updated in place")


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or not is_one_storage(a, b):
        return False
    (a_begin, a_end), (b_begin, b_end) = _extent(a), _extent(b)
    return max(a_begin, b_begin) < min(a_end, b_end)


def _extent(tensor: Tensor) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """The bytes of its storage from the first element to the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    begin = tensor.storage_offset()
    return begin * tensor.element_size(), (begin + last + 1) * tensor.element_size()


def _is_dense(tensor: Tensor) -> bool:
    """True if the elements are one block of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
