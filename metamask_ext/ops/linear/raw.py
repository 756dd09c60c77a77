"""The raw ops of the family, typed, and their fake kernels: see :mod:`metamask_ext.ops.weight.raw`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from metamask_ext._build import BACKEND

from ..checks import check_flags, check_linear, check_pair, check_storage, check_tensor
from ..gate import check_gate
from ..geometry import check_sizes
from ..step_checks import adamw_updates, check_apart, sgd_updates
from ..weight.raw import AdamWSettings, AdamWState, Rule, SgdSettings, state_of

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of input, weight, mask_logits, bias and bias_mask_logits; None where not needed."""

if TYPE_CHECKING:

    def masked_linear(
        input: Tensor,
        weight: Tensor,
        mask_logits: Tensor,
        bias: Tensor | None,
        bias_mask_logits: Tensor | None,
        gate_id: int,
        gate_param: float,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See :func:`metamask_ext.ops.linear.reference.masked_linear`; the product is taken, and given, in ``dtype``."""

    def masked_linear_backward(
        grad: Tensor,
        input: Tensor,
        weight: Tensor,
        mask_logits: Tensor,
        bias: Tensor | None,
        bias_mask_logits: Tensor | None,
        gate_id: int,
        gate_param: float,
        output_mask: Sequence[bool] = (True, True, True, True, True),
    ) -> Gradients:
        """The gradients of :func:`masked_linear`."""

    masked_linear_of_class = masked_linear
    _backward_sgd_: Callable[..., Gradients]

elif BACKEND != "reference":
    # Not by torch.ops, which compares the arguments with the schema and boxes them: in a small layer that takes as long as the
    # kernel. Where Dynamo traces a backward it can put only those of torch.ops into its graph.
    from metamask_ext._C import masked_linear
    from metamask_ext._C import masked_linear_backward as _backward
    from metamask_ext._C import masked_linear_backward_sgd_ as _backward_sgd_

    masked_linear_of_class = torch.ops.metamask.masked_linear.default
    """:func:`masked_linear` for inputs of a subclass of Tensor, whose ``__torch_function__`` it asks."""

    def masked_linear_backward(*arguments, **named):
        run = torch.ops.metamask.masked_linear_backward.default if is_dynamo_compiling() else _backward
        return run(*arguments, **named)


def masked_linear_backward_sgd_(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
    output_mask: Sequence[bool],
    updates: Sequence[bool],
    momentum_buffers: Sequence[Tensor | None],
    settings: Sequence[SgdSettings],
) -> Gradients:
    """As :func:`masked_linear_backward`, with steps as :func:`metamask_ext.ops.weight.raw.masked_weight_backward_sgd_` takes them.

    ``updates``, ``momentum_buffers`` and ``settings`` are those of weight, mask_logits, bias and bias_mask_logits.
    """
    numbers = [number for its in settings for number in its]
    tensors = (grad, input, weight, mask_logits, bias, bias_mask_logits, *momentum_buffers)
    run = torch.ops.metamask.masked_linear_backward_sgd_.default if is_dynamo_compiling() else _backward_sgd_
    return run(*tensors, gate_id, gate_param, output_mask, updates, numbers)


def masked_linear_backward_adamw_(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
    output_mask: Sequence[bool],
    updates: Sequence[bool],
    states: Sequence[AdamWState | None],
    settings: Sequence[AdamWSettings],
) -> Gradients:
    """As :func:`masked_linear_backward`, with steps as
    :func:`metamask_ext.ops.weight.raw.masked_weight_backward_adamw_` takes them.

    ``updates``, ``states`` and ``settings`` are those of weight, mask_logits, bias and bias_mask_logits. CPU only.
    """
    grads: Gradients = torch.ops.metamask.masked_linear_backward_adamw_.default(
        *(grad, input, weight, mask_logits, bias, bias_mask_logits, state_of(updates, states)),
        *(gate_id, gate_param, output_mask, updates),
        [number for its in settings for number in its],
    )
    return grads


UPDATES: dict[Rule, Callable[..., Gradients]] = {
    "sgd": masked_linear_backward_sgd_,
    "adamw": masked_linear_backward_adamw_,
}
"""As those of :mod:`metamask_ext.ops.weight.raw`."""


if BACKEND != "reference":

    @torch.library.register_fake("metamask::masked_linear")
    def _(input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, dtype=None):
        _check(input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param)
        check_storage("dtype", dtype or weight.dtype, weight)
        return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=dtype or weight.dtype)

    @torch.library.register_fake("metamask::masked_linear_backward")
    def _(grad, input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, output_mask=(True,) * 5):
        _check(input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param)
        _check_grad(grad, input, weight)
        check_flags("output_mask", output_mask, 5)
        return _gradients(input, weight, mask_logits, bias, bias_mask_logits, output_mask)

    @torch.library.register_fake("metamask::masked_linear_backward_sgd_")
    def _(
        grad,
        input,
        weight,
        mask_logits,
        bias,
        bias_mask_logits,
        v_w,
        v_m,
        v_b,
        v_bm,
        gate_id,
        gate_param,
        output_mask,
        updates,
        settings,
    ):
        if len(settings) != 12:
            raise ValueError(f"settings must be lr, weight_decay and momentum of four parameters, got {len(settings)} numbers")
        tensors = (weight, mask_logits, bias, bias_mask_logits)

        def updated():
            its = [settings[first : first + 3] for first in range(0, 12, 3)]
            return sgd_updates(tensors, updates, (v_w, v_m, v_b, v_bm), its)

        return _updated(grad, input, *tensors, gate_id, gate_param, output_mask, updates, updated)

    @torch.library.register_fake("metamask::masked_linear_backward_adamw_")
    def _(grad, input, weight, mask_logits, bias, bias_mask_logits, state, gate_id, gate_param, output_mask, updates, settings):
        tensors = (weight, mask_logits, bias, bias_mask_logits)

        def updated():
            return adamw_updates(tensors, updates, state, settings)

        return _updated(grad, input, *tensors, gate_id, gate_param, output_mask, updates, updated)

    def _updated(grad, input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, output_mask, updates, updated):
        check_flags("output_mask", output_mask, 5)
        check_flags("updates", updates, 4)
        _check(input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param)
        _check_grad(grad, input, weight)
        if (updates[2] or updates[3]) and bias_mask_logits is None:
            raise ValueError("bias must have logits to be updated here")
        parameters = updated()
        for name, update, parameter in (("weight", updates[0], weight), ("mask_logits", updates[1], mask_logits)):
            if update and not parameter.is_contiguous():
                raise ValueError(f"{name} must be contiguous to be updated in place, got strides {list(parameter.stride())}")
        check_apart(parameters, {"grad": grad, "input": input})
        left = [output_mask[0], *(need and not update for need, update in zip(output_mask[1:], updates))]
        return _gradients(input, weight, mask_logits, bias, bias_mask_logits, left)

    def _check(input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param):
        check_gate(gate_id, gate_param)
        check_pair(weight, mask_logits)
        check_sizes("weight", weight.shape)
        check_tensor("input", input)
        check_storage("input", input.dtype, weight)
        check_linear(input, weight, bias, bias_mask_logits)

    def _check_grad(grad, input, weight):
        check_tensor("grad", grad)
        check_storage("grad", grad.dtype, weight)
        wanted = (*input.shape[:-1], weight.shape[0])
        if grad.shape != wanted:
            raise ValueError(f"grad must be [..., out] = {list(wanted)}, got {list(grad.shape)}")
        if grad.device != weight.device:
            raise ValueError(f"grad must be on the device of weight, {weight.device}, got {grad.device}")

    def _gradients(input, weight, mask_logits, bias, bias_mask_logits, output_mask):
        return (
            input.new_empty(input.shape) if output_mask[0] else None,
            weight.new_empty(weight.shape) if output_mask[1] else None,
            mask_logits.new_empty(mask_logits.shape) if output_mask[2] else None,
            bias.new_empty(bias.shape) if bias is not None and output_mask[3] else None,
            bias_mask_logits.new_empty(bias.shape) if bias_mask_logits is not None and output_mask[4] else None,
        )
