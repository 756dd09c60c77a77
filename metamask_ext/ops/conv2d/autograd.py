"""The autograd Function of a masked convolution that is a product, closed under differentiation.

Its form is that of :mod:`metamask_ext.ops.weight.autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.grad import conv2d_input, conv2d_weight

from metamask_ext.torch_private import set_node_default

from ..geometry import Geometry, Pair, output_size
from ..linear import raw as linear_raw
from ..linear.raw import Gradients
from ..weight.autograd import State, Steps, bias_gradients, theta_of, weight_gradients
from ..weight.raw import AdamWState
from . import raw


def conv2d_product(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, Tensor]:
    """The convolution as masked_linear of the input's patches, and the patches. Not differentiable."""
    kernel = weight.shape[2:]
    patches = raw.im2col(input, kernel, stride, padding, dilation)
    y = linear_raw.masked_linear(patches, _rows(weight), _rows(mask_logits), bias, bias_mask_logits, gate_id, gate_param)
    size = output_size(input.shape, kernel, stride, padding, dilation)
    # With one place a contiguous tensor would be y itself, seen another way: no output is a view, an activation may write to it.
    return torch.unflatten(y.transpose(1, 2), 2, size).clone(memory_format=torch.contiguous_format), patches


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
        backward: Callable[..., Gradients] = (
            _backward if steps is not None or not torch.is_grad_enabled() else _differentiable_backward
        )
        grads = backward(grad, patches, *tensors, ctx.gate_id, ctx.gate_param, ctx.geometry, output_mask, steps)
        return (
            *grads,
            None,  # gate_id
            None,  # gate_param
            None,  # geometry
        )


set_node_default(MaskedConv2d, "steps", None)
_input_gradient: Callable[..., Tensor] = conv2d_input
_weight_gradient: Callable[..., Tensor] = conv2d_weight


def _backward(
    grad: Tensor,
    patches: Tensor,
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
    geometry: Geometry,
    output_mask: Sequence[bool],
    steps: Steps | None,
) -> Gradients:
    rows = grad.reshape(*grad.shape[:2], -1).transpose(1, 2)
    gate = gate_id, gate_param
    if steps is None:
        backward: Callable[..., Gradients] = linear_raw.masked_linear_backward
        grads = backward(rows, patches, _rows(weight), _rows(mask_logits), bias, bias_mask_logits, *gate, output_mask)
    else:
        update = linear_raw.UPDATES[steps.rule]
        parameters, (updates, states, settings) = steps.on((weight, mask_logits, bias, bias_mask_logits))
        matrices = [None if tensor is None else _rows(tensor) for tensor in parameters[:2]]
        kept = [*map(_state_rows, states[:2]), *states[2:]]
        grads = update(rows, patches, *matrices, *parameters[2:], *gate, output_mask, updates, kept, settings)
    dx, dw, dm, db, dbm = grads
    if dx is not None:
        dx = raw.col2im(dx, input.shape, weight.shape[2:], *geometry)
    return dx, dw if dw is None else dw.view(weight.shape), dm if dm is None else dm.view(weight.shape), db, dbm


def _differentiable_backward(
    grad: Tensor,
    patches: Tensor,
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
    geometry: Geometry,
    output_mask: Sequence[bool],
    steps: Steps | None,
) -> Gradients:
    dx = dw = dm = None
    if output_mask[0]:
        theta = theta_of(weight, mask_logits, gate_id, gate_param)
        dx = _input_gradient(input.shape, theta, grad, *geometry)
    if output_mask[1] or output_mask[2]:
        product = _weight_gradient(input, weight.shape, grad, *geometry)
        dw, dm = weight_gradients(product, weight, mask_logits, gate_id, gate_param, output_mask[1:3])
    db, dbm = bias_gradients(grad.sum((0, 2, 3)), bias, bias_mask_logits, gate_id, gate_param, output_mask[3:5])
    return dx, dw, dm, db, dbm


def _state_rows(state: State | None) -> State | None:
    """The state of a weight or of its mask, as rows."""
    if isinstance(state, AdamWState):
        return AdamWState(_rows(state.exp_avg), _rows(state.exp_avg_sq), state.step)
    return None if state is None else _rows(state)


def _rows(tensor: Tensor) -> Tensor:
    """``[out, C, kH, kW]`` as ``[out, C * kH * kW]``: the same memory, which an update in place must reach."""
    return tensor.view(len(tensor), -1)
