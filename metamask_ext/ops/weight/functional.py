"""``masked_weight``: ``theta = W * g(M)`` as a function that can be differentiated any number of times.

Source: C. Blum and A. Law, EE5239 project proposal (2020), eq. 3: ``theta = theta_W * sigma(theta_M)``, one ``theta_W`` for all
tasks and one ``theta_M`` per task. The functions of all families take float64, float32, bfloat16 or float16 (16-bit types are
computed in float32) and any strides, and can be differentiated by autograd and by torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from metamask_ext.torch_private import bare_apply, fx_trace, traced_function

from ..checks import check_dense, check_pair, check_pairs
from ..dispatch import of_one_dtype, use_reference, worded
from ..gate import resolve_gate
from . import raw, reference
from .autograd import MaskedWeight, MaskedWeightList

_apply_weight: Callable[..., Tensor] = bare_apply(MaskedWeight)
_apply_list: Callable[..., tuple[Tensor, ...]] = MaskedWeightList.apply


@overload
def masked_weight(
    weight: Tensor, mask_logits: Tensor, *, gate: str = "sigmoid", temperature: float = 1.0, threshold: float = 0.0
) -> Tensor: ...


@overload
def masked_weight(
    weight: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    *,
    gate: str = "sigmoid",
    temperature: float = 1.0,
    threshold: float = 0.0,
) -> list[Tensor]: ...


def masked_weight(
    weight: Tensor | Sequence[Tensor],
    mask_logits: Tensor | Sequence[Tensor],
    *,
    gate: str = "sigmoid",
    temperature: float = 1.0,
    threshold: float = 0.0,
) -> Tensor | list[Tensor]:
    """``theta = W * g(M)``, element by element.

    ``g(M) = sigmoid(M / temperature)`` for ``gate="sigmoid"`` (Blum and Law, eq. 3); ``g(M) = 1[M > threshold]`` for
    ``gate="hard"``, differentiated as if it were ``M`` (straight-through: Piggyback, arXiv:1801.06519; Supermasks in Superposition,
    arXiv:2006.14769).

    A sequence of weights, such as those of all layers of a small net, is computed at once, and so are its gradients: by one launch
    on a GPU for up to 111 weights (76 in the backward, 52 in the double backward), by waking the threads once on a CPU.

    Args:
        weight: ``W``, of any shape; floating point. Or a sequence of them, all of one dtype and on one device.
        mask_logits: ``M``, of the shape and device of ``weight`` and of its dtype, or float32 beside a weight of 16 bits; for a
            sequence, a sequence of as many. Float32 logits keep updates that 16 bits would round away: they are not rounded
            before the gate, and their gradient is float32.
        gate: ``"sigmoid"`` or ``"hard"``.
        temperature: ``t > 0``, in units of a logit; used by ``"sigmoid"``.
        threshold: ``c``, in units of a logit; used by ``"hard"``.

    Returns:
        ``theta``, with the shape, dtype, device and memory format of ``weight``; for a sequence, a list of them.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: the shapes or devices differ, the gate is unknown, or the temperature is not positive; a sequence is empty, or
            the two are not as long.
    """
    if fx_trace._is_fx_tracing_flag and (traced := traced_function(masked_weight, locals())) is not None:
        return traced
    gate_id, gate_param = resolve_gate(gate, temperature, threshold)
    try:
        return _masked(weight, mask_logits, gate_id, gate_param)
    except Exception as error:
        raise worded(error, partial(check_dense, weight=weight, mask_logits=mask_logits)) from None


def _masked(
    weight: Tensor | Sequence[Tensor], mask_logits: Tensor | Sequence[Tensor], gate_id: int, gate_param: float
) -> Tensor | list[Tensor]:
    logits: Any = mask_logits
    if isinstance(weight, Sequence):
        if weight and isinstance(logits, Sequence):
            logits = of_one_dtype(weight[0], list(logits))
        check_pairs(weight, logits)
        return theta_list(weight, logits, gate_id, gate_param, None)
    check_pair(weight, logits)
    if use_reference():
        return reference.masked_weight(weight, logits, gate_id, gate_param)
    return theta(weight, logits, gate_id, gate_param, None)


def theta(weight: Tensor, mask_logits: Tensor, gate_id: int, gate_param: float, dtype: torch.dtype | None) -> Tensor:
    """``theta`` in ``dtype``; the arguments have been checked, and the kernels may run."""
    # A Function costs about 3 microseconds more than its op, which is half of a small layer's forward.
    if torch.is_grad_enabled() and (weight.requires_grad or mask_logits.requires_grad):
        return _apply_weight(weight, mask_logits, gate_id, gate_param, dtype)
    return raw.masked_weight(weight, mask_logits, gate_id, gate_param, dtype)


def theta_list(
    weight: Sequence[Tensor], mask_logits: Sequence[Tensor], gate_id: int, gate_param: float, dtype: torch.dtype | None
) -> list[Tensor]:
    """``theta`` of each, in ``dtype``; the arguments have been checked."""
    if use_reference():
        return reference.masked_weight_list(weight, mask_logits, gate_id, gate_param, dtype)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensors in (weight, mask_logits) for tensor in tensors):
        return list(_apply_list(gate_id, gate_param, dtype, *weight, *mask_logits))
    return raw.masked_weight_list(weight, mask_logits, gate_id, gate_param, dtype)
