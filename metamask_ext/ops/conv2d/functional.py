"""``masked_conv2d``: a convolution with a masked weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from metamask_ext.torch_private import bare_apply, fx_trace, traced_function

from ..checks import check_bias, check_conv2d, check_dense, check_pair
from ..composite import composite_op
from ..dispatch import (
    autocast_dtype,
    check_input_dtype,
    in_compiled_graph,
    is_differentiated,
    is_plain,
    use_reference,
    worded,
)
from ..gate import resolve_gate
from ..geometry import Geometry, check_steps, output_size
from ..weight.functional import theta
from . import reference
from .autograd import MaskedConv2d, conv2d_product

_apply_conv2d: Callable[..., Tensor] = bare_apply(MaskedConv2d)


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None = None,
    bias_mask_logits: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    gate: str = "sigmoid",
    temperature: float = 1.0,
    threshold: float = 0.0,
) -> Tensor:
    """``y = conv2d(x, W * g(M)) + b * g(M_b)``: :func:`torch.nn.functional.conv2d` with a masked weight.

    On a CPU, a convolution whose output has few positions for its channels runs as a product that never writes ``theta`` to memory.

    Args:
        input: ``x``, ``[N, C_in, H, W]`` or ``[C_in, H, W]``.
        weight: ``W``, ``[C_out, C_in / groups, kH, kW]``.
        mask_logits: ``M``, of the shape of ``weight``; in its dtype, or float32 (see :func:`masked_weight`).
        bias: ``b``, ``[C_out]``, or None.
        bias_mask_logits: ``M_b``, ``[C_out]``; None leaves the bias unmasked.
        stride, padding, dilation, groups: as in ``conv2d``; padding may be ``"valid"`` or ``"same"``.
        gate, temperature, threshold: see :func:`masked_weight`.

    Returns:
        ``y``, ``[N, C_out, H', W']`` or ``[C_out, H', W']``; under autocast in the autocast dtype, as ``conv2d`` does.

    Raises:
        TypeError, ValueError: as :func:`masked_weight`; also when ``input`` does not fit ``weight``.
    """
    if fx_trace._is_fx_tracing_flag and (traced := traced_function(masked_conv2d, locals())) is not None:
        return traced
    gate_id, gate_param = resolve_gate(gate, temperature, threshold)
    try:
        return _conv2d(input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, stride, padding, dilation, groups)
    except Exception as error:
        given = {"input": input, "weight": weight, "mask_logits": mask_logits, "bias": bias, "bias_mask_logits": bias_mask_logits}
        raise worded(error, partial(check_dense, **given)) from None


def _conv2d(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
) -> Tensor:
    parameters = (weight, mask_logits, bias, bias_mask_logits)
    check_pair(weight, mask_logits)
    check_conv2d(input, weight, groups)
    check_steps(stride, padding, dilation)
    check_input_dtype(input, weight)
    check_bias(weight, bias, bias_mask_logits)
    if use_reference():
        if groups == 1 and not isinstance(padding, str) and in_compiled_graph():
            return _compiled(input, *parameters, *_pairs(stride, padding, dilation), gate_id, gate_param)
        return reference.masked_conv2d(input, *parameters, stride, padding, dilation, groups, gate_id, gate_param)
    if groups == 1 and (geometry := _product_geometry(input, weight, mask_logits, stride, padding, dilation)) is not None:
        return _product(input, *parameters, gate_id, gate_param, geometry)
    weights, bias = _masked_parameters(*parameters, gate_id, gate_param)
    return F.conv2d(input, weights, bias, stride, padding, dilation, groups)


def _product(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
    geometry: Geometry,
) -> Tensor:
    tensors = (input, weight, mask_logits, bias, bias_mask_logits)
    if is_differentiated(tensors):
        return _apply_conv2d(*tensors, gate_id, gate_param, geometry)
    return conv2d_product(*tensors, gate_id, gate_param, *geometry)[0]


def _in_graph(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    gate_id: int,
    gate_param: float,
) -> Tensor:
    tensors = (input, weight, mask_logits, bias, bias_mask_logits)
    pairs = (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1])
    geometry = None if is_plain(tensors, gate_param) else _product_geometry(input, weight, mask_logits, *pairs)
    if geometry is None:
        # Inductor writes theta in one pass, as the kernel would, and fuses it with what it finds.
        return reference.masked_conv2d(*tensors, *pairs, 1, gate_id, gate_param)
    return _product(*tensors, gate_id, gate_param, geometry)


_compiled = composite_op(
    "compiled_conv2d(Tensor input, Tensor weight, Tensor mask_logits, Tensor? bias, Tensor? bias_mask_logits, int[2] stride, "
    "int[2] padding, int[2] dilation, int gate_id, Scalar gate_param) -> Tensor",
    _in_graph,
)
CHANNELS_PER_PLACE, CHANNELS_PER_PLACE_1X1 = 4, 8
"""A convolution is a product with patches where its output has at least this many channels for each place (of all samples).

With a kernel of one pixel torch's convolution is a product as well, and loses later."""


def _product_geometry(
    input: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: int | tuple[int, int],
) -> Geometry | None:
    """The geometry of a convolution that is to be a product; None: torch's must run.

    With few output positions for the channels a convolution waits for theta: it is written, read, brought into oneDNN's order, and
    its gradient likewise. In the product they exist in cache only. Patches, as long as theta's rows, are written and read instead,
    which pays while they are few (measured: docs/internals/performance.md).
    """
    if weight.dtype not in (torch.float32, torch.float64) or weight.device.type != "cpu" or input.dim() != 4:
        return None
    pairs = _pairs(stride, padding, dilation)
    if any(isinstance(both, str) or len(both) != 2 for both in pairs):
        return None
    geometry = Geometry(*pairs)  # type: ignore[arg-type]  # no string is left
    strides, margins, dilations = geometry
    if min(*strides, *dilations) < 1 or min(margins) < 0:  # torch's convolution words what it refuses
        return None
    out, _, *kernel = weight.shape
    height, width = output_size(input.shape, kernel, *geometry)
    least = CHANNELS_PER_PLACE_1X1 if kernel == [1, 1] else CHANNELS_PER_PLACE
    if height < 1 or width < 1 or weight.numel() == 0 or not 0 < least * input.shape[0] * height * width <= out:
        return None
    in_order = input.is_contiguous() and weight.is_contiguous() and mask_logits.is_contiguous()
    return geometry if in_order and autocast_dtype(weight) is None else None


def _pairs(*steps: int | str | tuple[int, int]) -> list[str | tuple[int, int]]:
    return [(value, value) if isinstance(value, int) else value for value in steps]


def _masked_parameters(
    weight: Tensor,
    mask_logits: Tensor,
    bias: Tensor | None,
    bias_mask_logits: Tensor | None,
    gate_id: int,
    gate_param: float,
) -> tuple[Tensor, Tensor | None]:
    """``theta`` and the masked bias, written at once in the dtype in which autocast will use them."""
    dtype = autocast_dtype(weight)
    weights = theta(weight, mask_logits, gate_id, gate_param, dtype)
    if bias is not None and bias_mask_logits is not None:
        bias = theta(bias, bias_mask_logits, gate_id, gate_param, dtype)
    return weights, bias
