"""The autograd Function of a masked convolution that is a product, closed under differentiation as :mod:`metamask_ext.autograd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.grad import conv2d_input, conv2d_weight

from . import _ops, reference
from .autograd import MaskedWeight, MaskedWeightBackward, bias_gradients


def conv2d_product(
    input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, stride, padding, dilation
) -> tuple[Tensor, Tensor]:
    """The convolution as masked_linear of the input's patches, and the patches. Not differentiable."""
    kernel = weight.shape[2:]
    patches = _ops.patches(input, kernel, stride, padding, dilation)
    y = _ops.masked_linear(patches, _rows(weight), _rows(mask_logits), bias, bias_mask_logits, gate, parameter)
    size = reference.conv2d_size(input.shape, kernel, stride, padding, dilation)
    return y.transpose(1, 2).unflatten(2, size).contiguous(), patches


class MaskedConv2d(Function):
    """``y = conv2d(x, W * g(M)) + b * g(M_b)`` as a product with the patches of x: theta never exists in memory.

    ``geometry`` is stride, padding and dilation, two integers each. ``W`` and ``M`` are contiguous.
    """

    @staticmethod
    def forward(ctx, input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, geometry):
        y, patches = conv2d_product(input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, *geometry)
        # The input is there for derivatives of the backward only; the layer before keeps it as a rule.
        ctx.save_for_backward(input, weight, mask_logits, bias, bias_mask_logits, patches)
        ctx.gate, ctx.parameter, ctx.geometry = gate, parameter, geometry
        return y

    @staticmethod
    def backward(ctx, grad):
        *tensors, patches = ctx.saved_tensors
        needs, steps = ctx.needs_input_grad[:5], ctx.steps
        backward: Any = _backward if steps is not None or not torch.is_grad_enabled() else _differentiable_backward
        grads = backward(grad, patches, *tensors, ctx.gate, ctx.parameter, ctx.geometry, needs, steps)
        return (
            *grads,
            None,  # gate
            None,  # parameter
            None,  # geometry
        )


MaskedConv2d._backward_cls.steps = None  # type: ignore[attr-defined]


def _backward(
    grad, patches, input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, geometry, needs, steps
) -> tuple[Any, ...]:
    arguments = (
        *(grad.reshape(*grad.shape[:2], -1).transpose(1, 2), patches, _rows(weight), _rows(mask_logits)),
        *(bias, bias_mask_logits, gate, parameter, needs),
    )
    grads: Any
    if steps is None:
        grads = _ops.masked_linear_backward(*arguments)
    else:
        of_weight, of_mask, *of_bias = steps.velocities
        velocities = _rows(of_weight), _rows(of_mask), *of_bias
        grads = _ops.masked_linear_backward_sgd_(*arguments, steps.updates, velocities, steps.settings)
    dx, dw, dm, *rest = grads
    if dx is not None:
        dx = _ops.patches_backward(dx, input.shape, weight.shape[2:], *geometry)
    return dx, dw if dw is None else dw.view(weight.shape), dm if dm is None else dm.view(weight.shape), *rest


def _differentiable_backward(
    grad, patches, input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, geometry, needs, steps
) -> tuple[Any, ...]:
    grads: list[Any] = [None] * 5
    if needs[0]:
        theta = MaskedWeight.apply(weight, mask_logits, gate, parameter)
        grads[0] = conv2d_input(input.shape, theta, grad, *geometry)
    if needs[1] or needs[2]:
        product = conv2d_weight(input, weight.shape, grad, *geometry)
        grads[1:3] = MaskedWeightBackward.apply(product, weight, mask_logits, gate, parameter, needs[1:3])
    grads[3:5] = bias_gradients(grad.sum((0, 2, 3)), bias, bias_mask_logits, gate, parameter, needs[3:5])
    return tuple(grads)


def _rows(tensor: Tensor | None) -> Any:
    """``[out, C, kH, kW]`` as ``[out, C * kH * kW]``: the same memory, which an update in place must reach."""
    return None if tensor is None else tensor.view(len(tensor), -1)
