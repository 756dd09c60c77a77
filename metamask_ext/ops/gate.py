"""The gates: their names, their checks, and ``s = g(M)`` with its derivatives in plain torch.

=========  ==================  ===============  =================
gate       s                   d = g'(M)        d2 = g''(M)
=========  ==================  ===============  =================
sigmoid    sigmoid(M / t)      s * (1 - s) / t  d * (1 - 2s) / t
hard       1[M > c]            1                0
=========  ==================  ===============  =================

``sigmoid`` is eq. 3 of Blum and Law's proposal (``theta = theta_W * sigma(theta_M)``) with a temperature ``t``. ``hard`` has
the straight-through derivative of Piggyback (arXiv:1801.06519) and Supermasks in Superposition (arXiv:2006.14769): whatever
the order, ``s`` is differentiated as if it were ``M``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIGMOID, HARD = 0, 1
"""The ops' numbers for the gates; csrc/core/gate.h has the same."""
IDENTITY = 3
"""No mask's gate: ``s = M``, of ``task_masked_linear`` on the CPU alone. "Logits" are then weights that differ by task."""

GATES = {"sigmoid": SIGMOID, "hard": HARD}
SMALLEST_TEMPERATURE = 2.0**-126


def resolve_gate(gate: str, temperature: float, threshold: float) -> tuple[int, float]:
    """``gate_id`` and ``gate_param``: the gate's number and its one parameter, a ``sigmoid``'s temperature or a ``hard`` threshold.

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


def check_gate(gate_id: int, gate_param: float) -> None:
    """Refuse what :func:`resolve_gate` does not give; ValueError in the ops' words."""
    if gate_id not in (SIGMOID, HARD):
        raise ValueError(f"gate must be 0 (sigmoid) or 1 (hard), got {gate_id}")
    if gate_id == SIGMOID and not SMALLEST_TEMPERATURE <= gate_param < math.inf:
        raise ValueError(f"temperature must be finite and greater than 0, got {gate_param} (the least is 2**-126)")
    if gate_param != gate_param:
        raise ValueError("threshold must be a number, got nan")


SIXTEEN_BITS = (torch.bfloat16, torch.float16)
"""The dtypes whose arithmetic is float32's."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 computes in float64; float32, bfloat16 and float16 compute in float32 and round once, at the end."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gate_values(logits: Tensor, gate_id: int, gate_param: float) -> tuple[Tensor, Tensor, Tensor]:
    """``s, d, d2`` of the table above, each differentiable as the gate's rule says."""
    if gate_id == SIGMOID:
        s = torch.sigmoid(logits / gate_param)
        rest = torch.sigmoid(-logits / gate_param)  # 1 - s, also where s rounds to 1
        d = s * rest / gate_param
        return s, d, d * (rest - s) / gate_param
    if gate_id == IDENTITY:
        return logits, torch.ones_like(logits), torch.zeros_like(logits)
    # Straight through: adding M - M.detach(), which is zero, gives s the derivative of M at every order and under every
    # transform. An infinite logit would make that term NaN; nan_to_num keeps its value (and drops only its gradient).
    s = (logits > gate_param).to(logits.dtype) + (logits - logits.detach()).nan_to_num()
    return s, torch.ones_like(logits), torch.zeros_like(logits)
