"""``y = x @ (W * g(M)).T + b * g(M_b)`` in plain PyTorch: see :mod:`metamask_ext.ops.weight.reference`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..weight.reference import masked_bias, masked_weight


def masked_linear(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
) -> Tensor:
    """``y = x @ theta.T + b * g(M_b)``; a bias without logits is used as it is."""
    theta = masked_weight(weight, mask_logits, gate_id, gate_param)
    return F.linear(input, theta, masked_bias(bias, bias_mask_logits, gate_id, gate_param))
