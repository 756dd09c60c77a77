"""The autograd Function of a masked convolution that is a product, closed under differentiation.

Its form is that of :mod:`metamask_ext.ops.weight.autograd`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.grad import conv2d_input, conv2d_weight

from metamask_ext.torch_private import set_node_default

from ..geometry import output_size
from ..linear import raw as linear_raw
from ..weight.autograd import MaskedWeight, MaskedWeightBackward, bias_gradients
from . import raw


def conv2d_product(
    input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, stride, padding, dilation
) -> tuple[Tensor, Tensor]:
    """The convolution as masked_linear of the input's patches, and the patches. Not differentiable."""
    kernel = weight.shape[2:]
    patches = raw.im2col(input, kernel, stride, padding, dilation)
    y = linear_raw.masked_linear(patches, _rows(weight), _rows(mask_logits), bias, bias_mask_logits, gate_id, gate_param)
    size = output_size(input.shape, kernel, stride, padding, dilation)
    return y.transpose(1, 2).unflatten(2, size).contiguous(), patches


class MaskedConv2d(Function):
    """``y = conv2d(x, W * g(M)) + b * g(M_b)`` as a product with the patches of x: theta never exists in memory.

    ``geometry`` is stride, padding and dilation, two integers each. ``W`` and ``M`` are contiguous.
    """

    @staticmethod
    def forward(ctx, input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, geometry):
        y, patches = conv2d_product(input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, *geometry)
        # The input is there for derivatives of the backward only; the layer before keeps it as a rule.
        ctx.save_for_backward(input, weight, mask_logits, bias, bias_mask_logits, patches)
        ctx.gate_id, ctx.gate_param, ctx.geometry = gate_id, gate_param, geometry
        return y

    @staticmethod
    def backward(ctx, grad):
        *tensors, patches = ctx.saved_tensors
        output_mask, steps = ctx.needs_input_grad[:5], ctx.steps
        backward: Any = _backward if steps is not None or not torch.is_grad_enabled() else _differentiable_backward
        grads = backward(grad, patches, *tensors, ctx.gate_id, ctx.gate_param, ctx.geometry, output_mask, steps)
        return (
            *grads,
            None,  # gate_id
            None,  # gate_param
            None,  # geometry
        )


set_node_default(MaskedConv2d, "steps", None)


def _backward(
    grad, patches, input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, geometry, output_mask, steps
) -> tuple[Any, ...]:
    arguments = (
        *(grad.reshape(*grad.shape[:2], -1).transpose(1, 2), patches, _rows(weight), _rows(mask_logits)),
        *(bias, bias_mask_logits, gate_id, gate_param, output_mask),
    )
    grads: Any
    if steps is None:
        grads = linear_raw.masked_linear_backward(*arguments)
    else:
        of_weight, of_mask, *of_bias = steps.momentum_buffers
        momentum_buffers = _rows(of_weight), _rows(of_mask), *of_bias
        grads = linear_raw.masked_linear_backward_sgd_(*arguments, steps.updates, momentum_buffers, steps.settings)
    dx, dw, dm, *rest = grads
    if dx is not None:
        dx = raw.col2im(dx, input.shape, weight.shape[2:], *geometry)
    return dx, dw if dw is None else dw.view(weight.shape), dm if dm is None else dm.view(weight.shape), *rest


def _differentiable_backward(
    grad, patches, input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, geometry, output_mask, steps
) -> tuple[Any, ...]:
    grads: list[Any] = [None] * 5
    if output_mask[0]:
        theta = MaskedWeight.apply(weight, mask_logits, gate_id, gate_param)
        grads[0] = conv2d_input(input.shape, theta, grad, *geometry)
    if output_mask[1] or output_mask[2]:
        product = conv2d_weight(input, weight.shape, grad, *geometry)
        grads[1:3] = MaskedWeightBackward.apply(product, weight, mask_logits, gate_id, gate_param, output_mask[1:3])
    grads[3:5] = bias_gradients(grad.sum((0, 2, 3)), bias, bias_mask_logits, gate_id, gate_param, output_mask[3:5])
    return tuple(grads)


def _rows(tensor: Tensor | None) -> Any:
    """``[out, C, kH, kW]`` as ``[out, C * kH * kW]``: the same memory, which an update in place must reach."""
    return None if tensor is None else tensor.view(len(tensor), -1)
