"""``masked_linear``: a linear layer with a masked weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metamask_ext.torch_private import bare_apply, fx_trace, traced_function

from ..checks import check_dense, check_linear, check_pair
from ..composite import composite_op
from ..dispatch import (
    autocast_dtype,
    check_input_dtype,
    in_compiled_graph,
    is_differentiated,
    is_plain,
    is_small,
    use_reference,
    worded,
)
from ..gate import resolve_gate
from . import raw, reference
from .autograd import MaskedLinear

_apply_linear: Callable[..., Tensor] = bare_apply(MaskedLinear)


def masked_linear(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None = None,
    bias_mask_logits: Tensor | None = None,
    *,
    gate: str = "sigmoid",
    temperature: float = 1.0,
    threshold: float = 0.0,
) -> Tensor:
    """``y = x @ (W * g(M)).T + b * g(M_b)``: :func:`torch.nn.functional.linear` with a masked weight.

    Args:
        input: ``x``, ``[..., in]``.
        weight: ``W``, ``[out, in]``.
        mask_logits: ``M``, ``[out, in]``; in the dtype of ``weight``, or float32 (see :func:`masked_weight`).
        bias: ``b``, ``[out]``, or None.
        bias_mask_logits: ``M_b``, ``[out]``; None leaves the bias unmasked.
        gate, temperature, threshold: see :func:`masked_weight`.

    Returns:
        ``y``, ``[..., out]``; under autocast in the autocast dtype, as ``linear`` does.

    Raises:
        TypeError, ValueError: as :func:`masked_weight`; also when ``input`` does not fit ``weight``.
    """
    if fx_trace._is_fx_tracing_flag and (traced := traced_function(masked_linear, locals())) is not None:
        return traced
    gate_id, gate_param = resolve_gate(gate, temperature, threshold)
    parameters = (weight, mask_logits, bias, bias_mask_logits)
    if use_reference():
        _check(input, *parameters)
        run = _compiled if in_compiled_graph() else reference.masked_linear
        return run(input, *parameters, gate_id, gate_param)
    try:
        if input.dtype != weight.dtype:
            check_input_dtype(input, weight)
        dtype = autocast_dtype(weight)
        if torch.is_grad_enabled() and (
            weight.requires_grad
            or mask_logits.requires_grad
            or input.requires_grad
            or (bias is not None and bias.requires_grad)
            or (bias_mask_logits is not None and bias_mask_logits.requires_grad)
        ):
            return _apply_linear(input, *parameters, gate_id, gate_param, dtype)
        run = raw.masked_linear if type(input) is Tensor else raw.masked_linear_of_class
        return run(input, *parameters, gate_id, gate_param, dtype)
    except Exception as error:
        raise worded(error, _check, input, *parameters) from None


def _check(input: Tensor, weight: Tensor, mask_logits: Tensor, bias: Tensor | None, bias_mask_logits: Tensor | None) -> None:
    check_dense(input=input, weight=weight, mask_logits=mask_logits, bias=bias, bias_mask_logits=bias_mask_logits)
    check_pair(weight, mask_logits)
    check_linear(input, weight, bias, bias_mask_logits)
    check_input_dtype(input, weight)


def _in_graph(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
) -> Tensor:
    tensors = (input, weight, mask_logits, bias, bias_mask_logits)
    if is_plain(tensors, gate_param) or is_small(weight):
        return reference.masked_linear(*tensors, gate_id, gate_param)
    run: Callable[..., Tensor] = _apply_linear if is_differentiated(tensors) else raw.masked_linear
    return run(*tensors, gate_id, gate_param, autocast_dtype(weight))


_compiled = composite_op(
    "compiled_linear(Tensor input, Tensor weight, Tensor mask_logits, Tensor? bias, Tensor? bias_mask_logits, int gate_id, "
    "Scalar gate_param) -> Tensor",
    _in_graph,
)
