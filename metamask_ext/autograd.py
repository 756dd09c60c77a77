"""The autograd Functions over the raw ops, closed under differentiation.

``MaskedWeight`` -> ``MaskedWeightBackward`` -> ``MaskedWeightDoubleBackward`` -> plain torch: each backward calls the next
Function, never a raw op, because a raw op inside a backward gives silently wrong second derivatives. They use the form
``forward(ctx, ...)``: ``setup_context`` costs about twice as much a call. They do not work inside torch.func transforms,
under forward-mode AD or under torch.compile; :mod:`metamask_ext.functional` does not call them there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from . import _ops, reference


class MaskedWeight(Function):
    """``theta = W * g(M)``."""

    @staticmethod
    def forward(ctx, weight, mask_logits, gate, parameter, dtype=None):
        ctx.save_for_backward(weight, mask_logits)
        ctx.gate, ctx.parameter = gate, parameter
        return _ops.masked_weight(weight, mask_logits, gate, parameter, dtype)

    @staticmethod
    def backward(ctx, grad):
        weight, mask_logits = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        grad_weight, grad_mask = MaskedWeightBackward.apply(grad, weight, mask_logits, ctx.gate, ctx.parameter, needs)
        return (
            grad_weight,
            grad_mask,
            None,  # gate
            None,  # parameter
            None,  # dtype
        )


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
