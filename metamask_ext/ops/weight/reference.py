"""``theta = W * g(M)`` and its derivatives in plain PyTorch: specification, oracle of the tests, path where no Function can go.

With ``s, d, d2`` of :mod:`metamask_ext.ops.gate` and ``G = dL/dtheta``, element by element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gate import SIGMOID, compute_dtype, gate_values


def masked_weight(weight: Tensor, mask_logits: Tensor, gate_id: int, gate_param: float, dtype: torch.dtype | None = None) -> Tensor:
    """``theta = W * g(M)``, in ``dtype`` (default: that of ``weight``); ``M`` may be float32 beside a weight of 16 bits."""
    compute = compute_dtype(weight.dtype)
    logits = mask_logits.to(compute)
    # Only s: under torch.compile and in a forward nobody differentiates, d and d2 would be dead arithmetic.
    s = torch.sigmoid(logits / gate_param) if gate_id == SIGMOID else gate_values(logits, gate_id, gate_param)[0]
    return (weight.to(compute) * s).to(dtype or weight.dtype)


def masked_weight_backward(
    grad: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    gate_id: int,
    gate_param: float,
    output_mask: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """``dL/dW = G * s`` and ``dL/dM = G * W * d`` for ``G = dL/dtheta``; an output that is not needed is None."""
    compute = compute_dtype(weight.dtype)
    g, w = grad.to(compute), weight.to(compute)
    s, d, _ = gate_values(mask_logits.to(compute), gate_id, gate_param)
    return (
        (g * s).to(weight.dtype) if output_mask[0] else None,
        (g * w * d).to(mask_logits.dtype) if output_mask[1] else None,
    )


def masked_weight_double_backward(
    cotangent_weight: Tensor | None,
    cotangent_mask: Tensor | None,
    grad: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    gate_id: int,
    gate_param: float,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`masked_weight_backward` for cotangents ``A`` of dL/dW and ``B`` of dL/dM (None: zero).

    ``to G: A*s + B*W*d``; ``to W: B*G*d``; ``to M: A*G*d + B*G*W*d2``; an output that is not needed is None.
    """
    compute = compute_dtype(weight.dtype)
    g, w = grad.to(compute), weight.to(compute)
    a = torch.zeros_like(w) if cotangent_weight is None else cotangent_weight.to(compute)
    b = torch.zeros_like(w) if cotangent_mask is None else cotangent_mask.to(compute)
    s, d, d2 = gate_values(mask_logits.to(compute), gate_id, gate_param)
    return (
        (a * s + b * w * d).to(grad.dtype) if output_mask[0] else None,
        (b * g * d).to(weight.dtype) if output_mask[1] else None,
        (a * g * d + b * g * w * d2).to(mask_logits.dtype) if output_mask[2] else None,
    )


def masked_bias(bias: Tensor | None, bias_mask_logits: Tensor | None, gate_id: int, gate_param: float) -> Tensor | None:
    """``b * g(M_b)``; the bias as it is when it has no logits."""
    if bias is None or bias_mask_logits is None:
        return bias
    return masked_weight(bias, bias_mask_logits, gate_id, gate_param)


def masked_weight_list(
    weight: Sequence[Tensor], mask_logits: Sequence[Tensor], gate_id: int, gate_param: float, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """:func:`masked_weight` of each weight and its logits."""
    return [masked_weight(w, m, gate_id, gate_param, dtype) for w, m in zip(weight, mask_logits)]


def masked_weight_list_backward(
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    gate_id: int,
    gate_param: float,
    output_mask: tuple[bool, bool] = (True, True),
) -> tuple[list[Tensor], ...]:
    """:func:`masked_weight_backward` of each, as lists of dL/dW and of dL/dM; what is not needed is an empty list."""
    each = [masked_weight_backward(*one, gate_id, gate_param, output_mask) for one in zip(grad, weight, mask_logits)]
    return _by_output(each, output_mask)


def masked_weight_list_double_backward(
    cotangent_weight: Sequence[Tensor | None],
    cotangent_mask: Sequence[Tensor | None],
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    gate_id: int,
    gate_param: float,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[list[Tensor], ...]:
    """:func:`masked_weight_double_backward` of each, as :func:`masked_weight_list_backward`; empty cotangents are zero."""
    none = [None] * len(weight)
    arguments = zip(cotangent_weight or none, cotangent_mask or none, grad, weight, mask_logits)
    return _by_output([masked_weight_double_backward(*one, gate_id, gate_param, output_mask) for one in arguments], output_mask)


def _by_output(each: Sequence[tuple[Tensor | None, ...]], output_mask: Sequence[bool]) -> tuple[list[Tensor], ...]:
    return tuple(
        [tensor for outputs in each if (tensor := outputs[index]) is not None] if need else []
        for index, need in enumerate(output_mask)
    )
