"""The autograd Functions over the raw ops, closed under differentiation.

``MaskedWeight`` -> ``MaskedWeightBackward`` -> ``MaskedWeightDoubleBackward`` -> plain torch: each backward calls the next
Function, never a raw op, because a raw op inside a backward gives silently wrong second derivatives. ``MaskedLinear`` has one raw
backward for gradients that nobody differentiates further, and else builds them from products and these Functions. They use the form
``forward(ctx, ...)``: ``setup_context`` costs about twice as much a call. They do not work inside torch.func transforms,
under forward-mode AD or under torch.compile; :mod:`metamask_ext.functional` does not call them there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _ops, reference


class Steps(NamedTuple):
    """Steps of SGD that a node's backward takes instead of giving gradients, set by :class:`metamask_ext.optim.FusedMaskedSGD`.

    For each parameter of the node, in its order: whether it takes a step, its momentum buffer, and ``lr, weight_decay, momentum``.
    """

    updates: tuple[bool, ...]
    velocities: tuple[Tensor | None, ...]
    settings: tuple[tuple[float, float, float], ...]


class MaskedWeight(Function):
    """``theta = W * g(M)``."""

    @staticmethod
    def forward(ctx, weight, mask_logits, gate, parameter, dtype=None):
        ctx.save_for_backward(weight, mask_logits)
        ctx.gate, ctx.parameter = gate, parameter
        ctx.same_order = weight.stride() == mask_logits.stride()
        return _ops.masked_weight(weight, mask_logits, gate, parameter, dtype)

    @staticmethod
    def backward(ctx, grad):
        weight, mask_logits = ctx.saved_tensors
        needs, steps = ctx.needs_input_grad[:2], ctx.steps
        if steps is None:
            grads = MaskedWeightBackward.apply(grad, weight, mask_logits, ctx.gate, ctx.parameter, needs)
        else:
            grads = _ops.masked_weight_backward_sgd_(
                grad, weight, mask_logits, ctx.gate, ctx.parameter, needs, steps.updates, steps.velocities, steps.settings
            )
        return (
            *grads,
            None,  # gate
            None,  # parameter
            None,  # dtype
        )


# A node without steps. On the class of the nodes: set in every forward, it would cost a small layer time.
MaskedWeight._backward_cls.steps = None  # type: ignore[attr-defined]


class MaskedWeightBackward(Function):
    """``dL/dW = G * s`` and ``dL/dM = G * W * d``; only those in ``needs``."""

    @staticmethod
    def forward(ctx, grad, weight, mask_logits, gate, parameter, needs):
        ctx.save_for_backward(grad, weight, mask_logits)
        ctx.set_materialize_grads(False)
        ctx.gate, ctx.parameter = gate, parameter
        return _ops.masked_weight_backward(grad, weight, mask_logits, gate, parameter, needs)

    @staticmethod
    def backward(ctx, cotangent_weight, cotangent_mask):
        grads = (None, None, None)
        if cotangent_weight is not None or cotangent_mask is not None:
            grads = MaskedWeightDoubleBackward.apply(
                cotangent_weight, cotangent_mask, *ctx.saved_tensors, ctx.gate, ctx.parameter, ctx.needs_input_grad[:3]
            )
        return (
            *grads,
            None,  # gate
            None,  # parameter
            None,  # needs
        )


class MaskedWeightDoubleBackward(Function):
    """The gradients of :class:`MaskedWeightBackward`, in one pass; its own backward is plain torch."""

    @staticmethod
    def forward(ctx, cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate, parameter, needs):
        ctx.save_for_backward(cotangent_weight, cotangent_mask, grad, weight, mask_logits)
        ctx.gate, ctx.parameter, ctx.needs = gate, parameter, needs
        return _ops.masked_weight_double_backward(
            cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate, parameter, needs
        )

    @staticmethod
    def backward(ctx, *cotangents):
        present = [index for index, tensor in enumerate(ctx.saved_tensors) if tensor is not None]
        tensors = [ctx.saved_tensors[index] for index in present]

        def double_backward(*given):
            arguments: list[Any] = [None] * 5
            for index, tensor in zip(present, given):
                arguments[index] = tensor
            a, b, grad, weight, mask_logits = arguments
            outputs = reference.masked_weight_double_backward(a, b, grad, weight, mask_logits, ctx.gate, ctx.parameter, ctx.needs)
            return tuple(output for output in outputs if output is not None)

        pull_back = torch.func.vjp(double_backward, *tensors)[1]
        grads: list[Any] = [None] * 5
        wanted = tuple(cotangent for cotangent, need in zip(cotangents, ctx.needs) if need)
        for index, grad in zip(present, pull_back(wanted)):
            if ctx.needs_input_grad[index]:
                grads[index] = grad
        return (
            *grads,
            None,  # gate
            None,  # parameter
            None,  # needs
        )


class MaskedLinear(Function):
    """``y = x @ (W * g(M)).T + b * g(M_b)``, the product in ``dtype``."""

    @staticmethod
    def forward(ctx, input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, dtype):
        ctx.save_for_backward(input, weight, mask_logits, bias, bias_mask_logits)
        ctx.gate, ctx.parameter = gate, parameter
        return _ops.masked_linear(input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, dtype)

    @staticmethod
    def backward(ctx, grad):
        needs, steps = ctx.needs_input_grad[:5], ctx.steps
        if steps is not None:
            update: Any = _ops.masked_linear_backward_sgd_
            settings = steps.updates, steps.velocities, steps.settings
            grads = update(grad, *ctx.saved_tensors, ctx.gate, ctx.parameter, needs, *settings)
        else:
            backward: Any = _differentiable_linear_backward if torch.is_grad_enabled() else _ops.masked_linear_backward
            grads = backward(grad, *ctx.saved_tensors, ctx.gate, ctx.parameter, needs)
        return (
            *grads,
            None,  # gate
            None,  # parameter
            None,  # dtype
        )


MaskedLinear._backward_cls.steps = None  # type: ignore[attr-defined]


def _differentiable_linear_backward(
    grad, input, weight, mask_logits, bias, bias_mask_logits, gate, parameter, needs
) -> tuple[Any, ...]:
    """What masked_linear_backward computes, of parts that have derivatives: ``dx = dy @ theta``, ``G = dy.T @ x``."""
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
    grads: list[Any] = [None] * 5
    if needs[0]:
        theta = MaskedWeight.apply(weight, mask_logits, gate, parameter, grad.dtype)
        grads[0] = (grad @ theta).to(input.dtype)
    if needs[1] or needs[2]:
        inputs = input.flatten(0, -2) if input.dim() > 1 else input[None]
        product = rows.t() @ inputs.to(grad.dtype)
        grads[1:3] = MaskedWeightBackward.apply(product, weight, mask_logits, gate, parameter, needs[1:3])
    grads[3:5] = bias_gradients(rows.sum(0), bias, bias_mask_logits, gate, parameter, needs[3:5])
    return tuple(grads)


def bias_gradients(grad, bias, bias_mask_logits, gate, parameter, needs) -> tuple[Any, Any]:
    """The gradients of the bias and of its logits, differentiable, from that of the masked bias."""
    if bias is None or not any(needs):
        return None, None
    if bias_mask_logits is None:
        return grad.to(bias.dtype), None
    return MaskedWeightBackward.apply(grad, bias, bias_mask_logits, gate, parameter, needs)
