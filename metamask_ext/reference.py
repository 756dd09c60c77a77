"""Every op in plain PyTorch: the specification, the oracle of the tests, and the path where a Function cannot go.

Mathematics, with ``s = g(M)``, ``d = g'(M)``, ``d2 = g''(M)`` and ``theta = W * s`` (element-wise):

=========  ==================  ===============  =================
gate       s                   d                d2
=========  ==================  ===============  =================
sigmoid    sigmoid(M / t)      s * (1 - s) / t  d * (1 - 2s) / t
hard       1[M > c]            1                0
=========  ==================  ===============  =================

``sigmoid`` is eq. 3 of Blum and Law's proposal (``theta = theta_W * sigma(theta_M)``) with a temperature ``t``. ``hard`` has
the straight-through derivative of Piggyback (arXiv:1801.06519) and Supermasks in Superposition (arXiv:2006.14769): whatever
the order, ``s`` is differentiated as if it were ``M``.

float64 computes in float64; float32, bfloat16 and float16 compute in float32 and round once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMOID, HARD = 0, 1
"""How the ops name a gate: csrc/gate.h has the same numbers."""

GATES = {"sigmoid": SIGMOID, "hard": HARD}
SMALLEST_TEMPERATURE = 2.0**-126
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def resolve_gate(gate: str, temperature: float, threshold: float) -> tuple[int, float]:
    """The gate's number and its one parameter: the temperature of ``sigmoid``, the threshold of ``hard``.

    Raises:
        TypeError: ``temperature`` or ``threshold`` is no number.
        ValueError: ``gate`` is neither name, ``temperature`` is not finite and positive (and a normal float32, so that its inverse
            is finite too), or ``threshold`` is NaN.
    """
    if gate == "sigmoid":
        try:
            valid = SMALLEST_TEMPERATURE <= temperature < math.inf
        except TypeError:
            raise TypeError(f"temperature must be a number, got {temperature!r}") from None
        if not valid:
            raise ValueError(f"temperature must be finite and greater than 0, got {temperature!r} (the least is 2**-126)")
        return SIGMOID, float(temperature)
    if gate == "hard":
        try:
            valid = -math.inf <= threshold <= math.inf
        except TypeError:
            raise TypeError(f"threshold must be a number, got {threshold!r}") from None
        if not valid:
            raise ValueError(f"threshold must be a number, got {threshold!r}")
        return HARD, float(threshold)
    raise ValueError(f"gate must be one of {sorted(GATES)}, got {gate!r}")


def check_pair(weight: Tensor, mask_logits: Tensor, weight_name: str = "weight", mask_name: str = "mask_logits") -> None:
    """Refuse a weight and its logits that do not belong together (csrc/checks.h words it the same way).

    Raises:
        TypeError: not tensors, not floating point of 16 bits or more, or of two dtypes.
        ValueError: of two shapes or on two devices.
    """
    for name, tensor in ((weight_name, weight), (mask_name, mask_logits)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"{weight_name} must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    if mask_logits.dtype != weight.dtype:
        raise TypeError(f"{mask_name} must have the dtype of {weight_name}, {weight.dtype}, got {mask_logits.dtype}")
    if mask_logits.shape != weight.shape:
        raise ValueError(f"{mask_name} must have the shape of {weight_name}, {list(weight.shape)}, got {list(mask_logits.shape)}")
    if mask_logits.device != weight.device:
        raise ValueError(f"{mask_name} must be on the device of {weight_name}, {weight.device}, got {mask_logits.device}")


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None, bias_mask_logits: Tensor | None) -> None:
    """Refuse an input, bias or bias logits that do not fit ``weight`` ``[out, in]``; errors as :func:`check_pair`."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")
    check_input(input, weight)
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input must be [..., in] with in = {weight.shape[1]} as in weight {list(weight.shape)}, got {list(input.shape)}"
        )
    check_bias(weight, bias, bias_mask_logits)


def check_input(input: Tensor, weight: Tensor) -> None:
    """Refuse an input that is no tensor, or on another device than ``weight``."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if input.device != weight.device:
        raise ValueError(f"input must be on the device of weight, {weight.device}, got {input.device}")


def check_bias(weight: Tensor, bias: Tensor | None, bias_mask_logits: Tensor | None) -> None:
    """Refuse a bias that is not ``[out]``, and logits that do not belong to it."""
    if bias is None:
        if bias_mask_logits is not None:
            raise ValueError("bias_mask_logits needs a bias, got bias=None")
        return
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [out] = {list(weight.shape[:1])}, got {list(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"bias must be on the device of weight, {weight.device}, got {bias.device}")
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias must have the dtype of weight, {weight.dtype}, got {bias.dtype}")
    if bias_mask_logits is not None:
        check_pair(bias, bias_mask_logits, "bias", "bias_mask_logits")


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gate_values(logits: Tensor, gate: int, parameter: float) -> tuple[Tensor, Tensor, Tensor]:
    """``s, d, d2`` of the table above, each differentiable as the gate's rule says."""
    if gate == SIGMOID:
        s = torch.sigmoid(logits / parameter)
        rest = torch.sigmoid(-logits / parameter)  # 1 - s, also where s rounds to 1
        d = s * rest / parameter
        return s, d, d * (rest - s) / parameter
    # Straight through: adding M - M.detach(), which is zero, gives s the derivative of M at every order and under every
    # transform. An infinite logit would make that term NaN; nan_to_num keeps its value (and drops only its gradient).
    s = (logits > parameter).to(logits.dtype) + (logits - logits.detach()).nan_to_num()
    return s, torch.ones_like(logits), torch.zeros_like(logits)


def masked_weight(weight: Tensor, mask_logits: Tensor, gate: int, parameter: float, dtype: torch.dtype | None = None) -> Tensor:
    """``theta = W * g(M)``, in ``dtype`` (default: that of ``weight``)."""
    compute = _compute_dtype(weight.dtype)
    logits = mask_logits.to(compute)
    # Only s: under torch.compile and in a forward nobody differentiates, d and d2 would be dead arithmetic.
    s = torch.sigmoid(logits / parameter) if gate == SIGMOID else gate_values(logits, gate, parameter)[0]
    return (weight.to(compute) * s).to(dtype or weight.dtype)


def masked_weight_backward(
    grad: Tensor, weight: Tensor, mask_logits: Tensor, gate: int, parameter: float, needs: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """``dL/dW = G * s`` and ``dL/dM = G * W * d`` for ``G = dL/dtheta``; an output that is not needed is None."""
    compute = _compute_dtype(weight.dtype)
    g, w = grad.to(compute), weight.to(compute)
    s, d, _ = gate_values(mask_logits.to(compute), gate, parameter)
    return (
        (g * s).to(weight.dtype) if needs[0] else None,
        (g * w * d).to(weight.dtype) if needs[1] else None,
    )


def masked_weight_double_backward(
    cotangent_weight: Tensor | None,
    cotangent_mask: Tensor | None,
    grad: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    gate: int,
    parameter: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`masked_weight_backward` for cotangents ``A`` of dL/dW and ``B`` of dL/dM (None: zero).

    ``to G: A*s + B*W*d``; ``to W: B*G*d``; ``to M: A*G*d + B*G*W*d2``; an output that is not needed is None.
    """
    compute = _compute_dtype(weight.dtype)
    g, w = grad.to(compute), weight.to(compute)
    a = torch.zeros_like(w) if cotangent_weight is None else cotangent_weight.to(compute)
    b = torch.zeros_like(w) if cotangent_mask is None else cotangent_mask.to(compute)
    s, d, d2 = gate_values(mask_logits.to(compute), gate, parameter)
    return (
        (a * s + b * w * d).to(grad.dtype) if needs[0] else None,
        (b * g * d).to(weight.dtype) if needs[1] else None,
        (a * g * d + b * g * w * d2).to(weight.dtype) if needs[2] else None,
    )


def check_pairs(weight: Sequence[Tensor], mask_logits: Sequence[Tensor]) -> None:
    """Refuse weights and logits that are not as many, or not of one dtype and device; errors as :func:`check_pair`."""
    if not isinstance(mask_logits, Sequence):
        raise TypeError(f"mask_logits must be a sequence of tensors as weight is, got {type(mask_logits).__name__}")
    if len(weight) == 0:
        raise ValueError("weight must have at least one tensor, got none")
    if len(mask_logits) != len(weight):
        raise ValueError(f"expected {len(weight)} mask_logits tensors, one per weight, got {len(mask_logits)}")
    first = weight[0]
    for index, (one, mask) in enumerate(zip(weight, mask_logits)):
        name = f"weight[{index}]"
        check_pair(one, mask, name, f"mask_logits[{index}]")
        if one.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of weight[0], {first.dtype}, got {one.dtype}")
        if one.device != first.device:
            raise ValueError(f"{name} must be on the device of weight[0], {first.device}, got {one.device}")


def masked_weight_list(
    weight: Sequence[Tensor], mask_logits: Sequence[Tensor], gate: int, parameter: float, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """:func:`masked_weight` of each weight and its logits."""
    return [masked_weight(w, m, gate, parameter, dtype) for w, m in zip(weight, mask_logits)]


def masked_weight_list_backward(
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    gate: int,
    parameter: float,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[list[Tensor], ...]:
    """:func:`masked_weight_backward` of each, as lists of dL/dW and of dL/dM; what is not needed is an empty list."""
    each = [masked_weight_backward(*one, gate, parameter, needs) for one in zip(grad, weight, mask_logits)]
    return _by_output(each, needs)


def masked_weight_list_double_backward(
    cotangent_weight: Sequence[Tensor | None],
    cotangent_mask: Sequence[Tensor | None],
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    gate: int,
    parameter: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[list[Tensor], ...]:
    """:func:`masked_weight_double_backward` of each, as :func:`masked_weight_list_backward`; empty cotangents are zero."""
    none = [None] * len(weight)
    arguments = zip(cotangent_weight or none, cotangent_mask or none, grad, weight, mask_logits)
    return _by_output([masked_weight_double_backward(*one, gate, parameter, needs) for one in arguments], needs)


def _by_output(each: list[Any], needs: Sequence[bool]) -> tuple[list[Tensor], ...]:
    return tuple([outputs[index] for outputs in each] if need else [] for index, need in enumerate(needs))


def masked_linear(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate: int,
    parameter: float,
) -> Tensor:
    """``y = x @ theta.T + b * g(M_b)``; a bias without logits is used as it is."""
    theta = masked_weight(weight, mask_logits, gate, parameter)
    return F.linear(input, theta, masked_bias(bias, bias_mask_logits, gate, parameter))


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
    gate: int,
    parameter: float,
) -> Tensor:
    """``y = conv2d(x, theta) + b * g(M_b)``; a bias without logits is used as it is."""
    theta = masked_weight(weight, mask_logits, gate, parameter)
    bias = masked_bias(bias, bias_mask_logits, gate, parameter)
    return F.conv2d(input, theta, bias, stride, padding, dilation, groups)


def patches(
    input: Tensor, kernel: Sequence[int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """The patches of images ``[N, C, H, W]`` that a convolution multiplies: a row for each place, ``[N, H' * W', C * kH * kW]``."""
    return F.unfold(input, tuple(kernel), dilation, padding, stride).transpose(1, 2)


def conv2d_size(
    size: Sequence[int], kernel: Sequence[int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> list[int]:
    """``[H', W']``, the size of a convolution's output, from the input's ``[N, C, H, W]``."""
    return [
        (length + 2 * pad - step * (width - 1) - 1) // by + 1
        for length, pad, step, width, by in zip(size[2:], padding, dilation, kernel, stride)
    ]


def masked_bias(bias: Tensor | None, bias_mask_logits: Tensor | None, gate: int, parameter: float) -> Tensor | None:
    """``b * g(M_b)``; the bias as it is when it has no logits."""
    if bias is None or bias_mask_logits is None:
        return bias
    return masked_weight(bias, bias_mask_logits, gate, parameter)
