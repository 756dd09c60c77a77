"""``y = conv2d(x, W * g(M)) + b * g(M_b)`` in plain PyTorch: see :mod:`metamask_ext.ops.weight.reference`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..weight.reference import masked_bias, masked_weight


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
    gate_id: int,
    gate_param: float,
) -> Tensor:
    """``y = conv2d(x, theta) + b * g(M_b)``; a bias without logits is used as it is."""
    theta = masked_weight(weight, mask_logits, gate_id, gate_param)
    bias = masked_bias(bias, bias_mask_logits, gate_id, gate_param)
    return F.conv2d(input, theta, bias, stride, padding, dilation, groups)
