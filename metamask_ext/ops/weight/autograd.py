"""The autograd Functions of the family, closed under differentiation.

``MaskedWeight`` -> ``MaskedWeightBackward`` -> ``MaskedWeightDoubleBackward`` -> plain torch: each backward calls the next
Function, never a raw op, because a raw op inside a backward gives silently wrong second derivatives. They use the form
``forward(ctx, ...)``: ``setup_context`` costs about twice as much a call. They do not work inside torch.func transforms,
under forward-mode AD or under torch.compile: :mod:`metamask_ext.ops.dispatch` keeps them from there.

``MaskedWeightList`` and its like do the same for a list of weights. A Function sees tensors among its arguments, not in lists: it
gets columns, one after another, of as many tensors as there are weights. A weight whose gradient nothing wants has no part in a
backward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from metamask_ext.torch_private import is_legacy_batched, set_node_default

from ..streams import Streams
from ..vjp import pull_back
from . import raw, reference

State = Tensor | raw.AdamWState
"""The state of a parameter: a momentum buffer, or AdamW's means and number of steps."""
Arguments = tuple[Sequence[bool], Sequence[State | None], Sequence[tuple[float, ...]]]


class Steps(NamedTuple):
    """Steps that a node's backward takes instead of giving gradients, set by the optimisers of :mod:`metamask_ext.optim`.

    For each parameter of the node, in its order: whether it takes a step, what the optimiser keeps of it, the numbers of the step,
    and the parameter itself. ``streams`` are those on which nodes take their steps.
    """

    rule: raw.Rule
    updates: tuple[bool, ...]
    states: tuple[State | None, ...]
    settings: tuple[tuple[float, ...], ...]
    parameters: tuple[Tensor | None, ...]
    streams: Streams

    def on(self, saved: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Arguments]:
        """The tensors to compute with, and the arguments ``updates, states, settings`` of the op that takes these steps.

        Only a parameter whose saved tensor is its own memory takes its step, on the parameter itself. Hooks on saved tensors
        (off-loading, quantisation) may give back a copy: a step on that would be lost, so the parameter gets a gradient instead.
        """
        weight = saved[0]
        assert weight is not None
        self.streams.note(weight)
        if all(map(operator.is_, saved, self.parameters)):
            return list(saved), (self.updates, self.states, self.settings)
        tensors, updates, states = list(saved), list(self.updates), list(self.states)
        for index, tensor in enumerate(saved):
            parameter = self.parameters[index]
            if tensor is not parameter and updates[index]:
                if _same_memory(tensor, parameter):
                    tensors[index] = parameter
                else:
                    updates[index], states[index] = False, None
        return tensors, (updates, states, self.settings)


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    """Two tensors over the same elements. The detached ones of a checkpoint count their versions on their own."""
    if a is None or b is None:
        return False
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


class MaskedWeight(Function):
    """``theta = W * g(M)``."""

    @staticmethod
    def forward(ctx, weight, mask_logits, gate_id, gate_param, dtype=None):
        ctx.save_for_backward(weight, mask_logits)
        ctx.gate_id, ctx.gate_param = gate_id, gate_param
        ctx.same_order = weight.stride() == mask_logits.stride()
        return raw.masked_weight(weight, mask_logits, gate_id, gate_param, dtype)

    @staticmethod
    def backward(ctx, grad):
        weight, mask_logits = ctx.saved_tensors
        output_mask, steps = ctx.needs_input_grad[:2], ctx.steps
        if steps is None:
            grads = MaskedWeightBackward.apply(grad, weight, mask_logits, ctx.gate_id, ctx.gate_param, output_mask)
        else:
            (weight, mask_logits), arguments = steps.on((weight, mask_logits))
            update = raw.UPDATES[steps.rule]
            grads = update(grad, weight, mask_logits, ctx.gate_id, ctx.gate_param, output_mask, *arguments)
        return (
            *grads,
            None,  # gate_id
            None,  # gate_param
            None,  # dtype
        )


set_node_default(MaskedWeight, "steps", None)


class MaskedWeightBackward(Function):
    """``dL/dW = G * s`` and ``dL/dM = G * W * d``; only those in ``output_mask``."""

    @staticmethod
    def forward(ctx, grad, weight, mask_logits, gate_id, gate_param, output_mask):
        ctx.save_for_backward(grad, weight, mask_logits)
        ctx.set_materialize_grads(False)
        ctx.gate_id, ctx.gate_param = gate_id, gate_param
        return raw.masked_weight_backward(grad, weight, mask_logits, gate_id, gate_param, output_mask)

    @staticmethod
    def backward(ctx, cotangent_weight, cotangent_mask):
        grads = (None, None, None)
        if cotangent_weight is not None or cotangent_mask is not None:
            grads = MaskedWeightDoubleBackward.apply(
                cotangent_weight, cotangent_mask, *ctx.saved_tensors, ctx.gate_id, ctx.gate_param, ctx.needs_input_grad[:3]
            )
        return (
            *grads,
            None,  # gate_id
            None,  # gate_param
            None,  # output_mask
        )


class MaskedWeightDoubleBackward(Function):
    """The gradients of :class:`MaskedWeightBackward`, in one pass; its own backward is plain torch."""

    @staticmethod
    def forward(ctx, cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate_id, gate_param, output_mask):
        ctx.save_for_backward(cotangent_weight, cotangent_mask, grad, weight, mask_logits)
        ctx.gate_id, ctx.gate_param, ctx.output_mask = gate_id, gate_param, output_mask
        return raw.masked_weight_double_backward(
            cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate_id, gate_param, output_mask
        )

    @staticmethod
    def backward(ctx, *cotangents):
        def double_backward(a, b, grad, weight, mask_logits):
            gate = ctx.gate_id, ctx.gate_param
            return reference.masked_weight_double_backward(a, b, grad, weight, mask_logits, *gate, ctx.output_mask)

        found = pull_back(double_backward, ctx.saved_tensors, cotangents)
        grads = (grad if need else None for grad, need in zip(found, ctx.needs_input_grad))
        return (
            *grads,
            None,  # gate_id
            None,  # gate_param
            None,  # output_mask
        )


theta_of: Callable[..., Tensor] = MaskedWeight.apply
weight_gradients: Callable[..., tuple[Tensor | None, Tensor | None]] = MaskedWeightBackward.apply


def sum_dtype(grad: Tensor, parameter: Tensor | None, logits: Tensor | None) -> torch.dtype:
    """The dtype of a sum over a batch that becomes the gradient of ``theta``.

    Logits of float32 beside a parameter of 16 bits get a gradient that was never rounded to 16 bits.
    """
    return grad.dtype if parameter is None or logits is None or logits.dtype == parameter.dtype else logits.dtype


def bias_gradients(
    grad: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the bias and of its logits, differentiable, from that of the masked bias."""
    if bias is None or not any(output_mask):
        return None, None
    if bias_mask_logits is None:
        return grad.to(bias.dtype), None
    return weight_gradients(grad, bias, bias_mask_logits, gate_id, gate_param, output_mask)


class MaskedWeightList(Function):
    """``theta_i = W_i * g(M_i)``; columns: W, M."""

    @staticmethod
    def forward(ctx, gate_id, gate_param, dtype, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.gate_id, ctx.gate_param = gate_id, gate_param
        weight, mask_logits = _columns(tensors, 2)
        return tuple(raw.masked_weight_list(weight, mask_logits, gate_id, gate_param, dtype))

    @staticmethod
    def backward(ctx, *grads):
        wanted = ctx.needs_input_grad[3:]
        made: list[Tensor | None] = [None] * len(wanted)
        used = [index for index, grad in enumerate(grads) if grad is not None]
        if used:
            output_mask = tuple(any(column[index] for index in used) for column in _columns(wanted, 2))
            tensors = _rows((*grads, *ctx.saved_tensors), 3, used)
            if is_legacy_batched(*tensors):
                found = _backward(reference.masked_weight_list_backward, ctx.gate_id, ctx.gate_param, output_mask, tensors)
            else:
                found = MaskedWeightListBackward.apply(ctx.gate_id, ctx.gate_param, output_mask, *tensors)
            made = _placed(found, wanted, 2, used)
        return (
            None,  # gate_id
            None,  # gate_param
            None,  # dtype
            *made,
        )


class MaskedWeightListBackward(Function):
    """The columns dL/dW and dL/dM, or Nones where ``output_mask`` says so; columns: grads, W, M."""

    @staticmethod
    def forward(ctx, gate_id, gate_param, output_mask, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.gate_id, ctx.gate_param = gate_id, gate_param
        return _backward(raw.masked_weight_list_backward, gate_id, gate_param, output_mask, tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        wanted = ctx.needs_input_grad[3:]
        made: list[Tensor | None] = [None] * len(wanted)
        used = [index for index, pair in enumerate(zip(*_columns(cotangents, 2))) if any(one is not None for one in pair)]
        if used:
            output_mask = tuple(any(column[index] for index in used) for column in _columns(wanted, 3))
            tensors = _rows((*cotangents, *ctx.saved_tensors), 5, used)
            if is_legacy_batched(*tensors):
                found = _double_backward(
                    reference.masked_weight_list_double_backward, ctx.gate_id, ctx.gate_param, output_mask, tensors
                )
            else:
                found = MaskedWeightListDoubleBackward.apply(ctx.gate_id, ctx.gate_param, output_mask, *tensors)
            made = _placed(found, wanted, 3, used)
        return (
            None,  # gate_id
            None,  # gate_param
            None,  # output_mask
            *made,
        )


class MaskedWeightListDoubleBackward(Function):
    """The gradients of :class:`MaskedWeightListBackward`, in one pass; its own backward is plain torch.

    Columns: cotangents of dL/dW and of dL/dM (None: zero), then those of the backward.
    """

    @staticmethod
    def forward(ctx, gate_id, gate_param, output_mask, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.gate_id, ctx.gate_param, ctx.output_mask = gate_id, gate_param, output_mask
        return _double_backward(raw.masked_weight_list_double_backward, gate_id, gate_param, output_mask, tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        def double_backward(*tensors):
            return _double_backward(
                reference.masked_weight_list_double_backward, ctx.gate_id, ctx.gate_param, ctx.output_mask, tensors
            )

        grads = pull_back(double_backward, ctx.saved_tensors, cotangents)
        return (
            None,  # gate_id
            None,  # gate_param
            None,  # output_mask
            *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[3:])),
        )


def _backward(function, gate_id, gate_param, output_mask, tensors):
    grad, weight, mask_logits = _columns(tensors, 3)
    return _flat(function(grad, weight, mask_logits, gate_id, gate_param, output_mask), len(weight))


def _double_backward(function, gate_id, gate_param, output_mask, tensors):
    cotangent_weight, cotangent_mask, grad, weight, mask_logits = _columns(tensors, 5)
    made = function(cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate_id, gate_param, output_mask)
    return _flat(made, len(weight))


def _columns(tensors, count):
    length = len(tensors) // count
    return [tensors[start : start + length] for start in range(0, count * length, length)]


def _rows(tensors, count, rows):
    """These rows of the columns, as shorter columns one after another."""
    return [column[index] for column in _columns(tensors, count) for index in rows]


def _flat(columns, length):
    """The columns one after another; an empty one is Nones."""
    return tuple(tensor for column in columns for tensor in (column or [None] * length))


def _placed(tensors, wanted, count, rows) -> list[Tensor | None]:
    """The way back from :func:`_rows`, to columns of full length, with None for what is not ``wanted``."""
    placed: list[Tensor | None] = [None] * len(wanted)
    length = len(wanted) // count
    for start, column in zip(range(0, len(wanted), length), _columns(tensors, count)):
        for index, tensor in zip(rows, column):
            if wanted[start + index]:
                placed[start + index] = tensor
    return placed
