"""The autograd Function of the family, closed under differentiation as those of :mod:`metamask_ext.ops.weight.autograd`.

``MaskedLinear`` has one raw backward for gradients that nobody differentiates further, and else builds them from products and the
Functions of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from metamask_ext.torch_private import set_node_default

from ..weight.autograd import bias_gradients, sum_dtype, theta_of, weight_gradients
from . import raw


class MaskedLinear(Function):
    """``y = x @ (W * g(M)).T + b * g(M_b)``, the product in ``dtype``."""

    @staticmethod
    def forward(ctx, input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, dtype):
        ctx.save_for_backward(input, weight, mask_logits, bias, bias_mask_logits)
        ctx.gate_id, ctx.gate_param = gate_id, gate_param
        run = raw.masked_linear if type(input) is Tensor else raw.masked_linear_of_class
        return run(input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, dtype)

    @staticmethod
    def backward(ctx, grad):
        output_mask, steps = ctx.needs_input_grad[:5], ctx.steps
        if steps is not None:
            update = raw.UPDATES[steps.rule]
            input, *saved = ctx.saved_tensors
            parameters, arguments = steps.on(saved)
            grads = update(grad, input, *parameters, ctx.gate_id, ctx.gate_param, output_mask, *arguments)
        else:
            backward: Callable[..., raw.Gradients] = (
                _differentiable_backward if torch.is_grad_enabled() else raw.masked_linear_backward
            )
            grads = backward(grad, *ctx.saved_tensors, ctx.gate_id, ctx.gate_param, output_mask)
        return (
            *grads,
            None,  # gate_id
            None,  # gate_param
            None,  # dtype
        )


set_node_default(MaskedLinear, "steps", None)


def _differentiable_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
    output_mask: Sequence[bool],
) -> raw.Gradients:
    """The gradients of masked_linear_backward, of parts that have derivatives: ``dx = dy @ theta``, ``G = dy.T @ x``."""
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
    dx = dw = dm = None
    if output_mask[0]:
        theta = theta_of(weight, mask_logits, gate_id, gate_param, grad.dtype)
        dx = (grad @ theta).to(input.dtype)
    if output_mask[1] or output_mask[2]:
        inputs = input.flatten(0, -2) if input.dim() > 1 else input[None]
        dtype = sum_dtype(grad, weight, mask_logits)
        product = rows.t().to(dtype) @ inputs.to(dtype)
        dw, dm = weight_gradients(product, weight, mask_logits, gate_id, gate_param, output_mask[1:3])
    total = rows.sum(0, dtype=sum_dtype(grad, bias, bias_mask_logits))
    return dx, dw, dm, *bias_gradients(total, bias, bias_mask_logits, gate_id, gate_param, output_mask[3:5])
