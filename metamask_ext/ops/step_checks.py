"""Checks of the ops that take steps of SGD and AdamW in place, in the words of csrc/ops/checks.h: for their fake kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamask_ext.torch_private import is_one_storage

_NAMES = ("weight", "mask_logits", "bias", "bias_mask_logits")


class Updated(NamedTuple):
    """A parameter that takes a step if ``wanted``, and what the optimiser keeps of it, by what messages call that."""

    name: str
    parameter: Tensor | None
    wanted: bool
    state: dict[str, Tensor]


def sgd_updates(
    parameters: Sequence[Tensor | None],
    updates: Sequence[bool],
    buffers: Sequence[Tensor | None],
    settings: Sequence[Sequence[float]],
) -> list[Updated]:
    """The parameters of an op with their momentum buffers; ValueError for a step that cannot be taken."""
    made = []
    for name, parameter, update, buffer, its in zip(_NAMES, parameters, updates, buffers, settings):
        if update and parameter is not None:
            if len(its) != 3:
                raise ValueError(f"the settings of {name} must be lr, weight_decay and momentum, got {len(its)} numbers")
            _check_updated(name, parameter)
            if buffer is not None:
                _check_state("the momentum buffer of", name, buffer, parameter)
            elif its[2] != 0:
                raise ValueError(f"{name} has momentum {its[2]} and no buffer")
        made.append(Updated(name, parameter, update, {} if buffer is None else {"a momentum buffer": buffer}))
    return made


def adamw_updates(
    parameters: Sequence[Tensor | None], updates: Sequence[bool], state: Sequence[Tensor], settings: Sequence[float]
) -> list[Updated]:
    """The same for steps of AdamW: ``state`` is exp_avg, exp_avg_sq and step of each parameter that is updated."""
    if len(settings) != 5 * len(updates):
        raise ValueError(
            f"settings must be lr, beta1, beta2, eps and weight_decay of {len(updates)} parameters, got {len(settings)} numbers"
        )
    if len(state) != 3 * sum(updates):
        raise ValueError(
            f"state must be exp_avg, exp_avg_sq and step of {sum(updates)} updated parameters, got {len(state)} tensors"
        )
    made, left = [], list(state)
    for index, (name, parameter, update) in enumerate(zip(_NAMES, parameters, updates)):
        kept = dict(zip(("exp_avg", "exp_avg_sq", "step"), left[:3])) if update else {}
        if update and parameter is not None:
            del left[:3]
            beta1, beta2 = settings[5 * index + 1 : 5 * index + 3]
            if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
                raise ValueError(f"the betas of {name} must be in [0, 1), got {beta1} and {beta2}")
            _check_updated(name, parameter)
            _check_state("exp_avg of", name, kept["exp_avg"], parameter)
            _check_state("exp_avg_sq of", name, kept["exp_avg_sq"], parameter)
            _check_count(name, kept["step"], parameter)
        made.append(Updated(name, parameter, update, kept))
    return made


def _check_updated(name: str, parameter: Tensor) -> None:
    if not _is_dense(parameter):
        raise ValueError(f"{name} must be dense to be updated in place")
    if parameter.is_neg():
        raise ValueError(f"{name} must hold its values to be updated in place, got a lazy view: call resolve_neg")


def _check_state(kind: str, name: str, state: Tensor, parameter: Tensor) -> None:
    if state.is_neg():
        raise ValueError(f"{kind} {name} must hold its values to be updated in place, got a lazy view: call resolve_neg")
    if _form(state) != _form(parameter):
        raise ValueError(
            f"{kind} {name} must have its shape, strides, dtype and device, got {list(state.shape)}, "
            f"{list(state.stride())}, {state.dtype} on {state.device}"
        )


def _check_count(name: str, count: Tensor, parameter: Tensor) -> None:
    numbers = (torch.float32, torch.float64)
    if count.numel() != 1 or count.is_neg() or count.device != parameter.device or count.dtype not in numbers:
        raise ValueError(
            f"step of {name} must be one float32 or float64 number on its device, got {list(count.shape)}, {count.dtype} on "
            f"{count.device}"
        )


def check_apart(parameters: Sequence[Updated], others: dict[str, Tensor]) -> None:
    """Refuse to update a tensor that shares memory with another argument; ValueError.

    Seen are tensors of one storage: only those can share memory where there is none.
    """
    parts = [(name, tensor, False) for name, tensor in others.items()]
    for of in parameters:
        parts += [(of.name, of.parameter, of.wanted)] if of.parameter is not None else []
        parts += [(kind, tensor, True) for kind, tensor in of.state.items()] if of.wanted else []
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
