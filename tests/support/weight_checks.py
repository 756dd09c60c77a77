"""Comparisons of the masked-weight ops with their float64 reference."""

from __future__ import annotations

import torch
from support.closeness import assert_close
from support.samples import ALL, SMALL, Sample

from metamask_ext.ops.gate import SIGMOID, gate_values
from metamask_ext.ops.weight import raw as weight_raw
from metamask_ext.ops.weight import reference as weight_reference

# Of the parameters and of the gradient or the result: what autocast makes of them
MIXED = (
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
)


def as_double(*tensors):
    return [tensor.double().cpu() for tensor in tensors]


def check_forward(sample, gate, dtype, device, out_dtype=None, mask_dtype=None):
    weight, mask = sample.tensors(2, dtype, device, mask_dtype=mask_dtype)
    got = weight_raw.masked_weight(weight, mask, *gate, out_dtype)
    expected = weight_reference.masked_weight(*as_double(weight, mask), *gate)
    assert got.dtype == (out_dtype or dtype)
    assert got.device == weight.device
    assert_close(got.cpu(), expected, "theta")
    return weight, got


def check_backward(sample, gate, dtype, device, grad_dtype=None, mask_dtype=None):
    weight, mask, grad = sample.tensors(3, dtype, device, mask_dtype=mask_dtype)
    grad = grad.to(grad_dtype or dtype)
    got = weight_raw.masked_weight_backward(grad, weight, mask, *gate)
    expected = weight_reference.masked_weight_backward(*as_double(grad, weight, mask), *gate)
    for name, one, other, kind in zip(("dW", "dM"), got, expected, (dtype, mask.dtype)):
        assert one.dtype == kind
        assert_close(one.cpu(), other, name)


def check_double_backward(sample, gate, dtype, device, grad_dtype=None, mask_dtype=None):
    weight, mask, grad, a, b = sample.tensors(5, dtype, device, mask_dtype=mask_dtype)
    grad, b = grad.to(grad_dtype or dtype), b.to(mask.dtype)
    got = weight_raw.masked_weight_double_backward(a, b, grad, weight, mask, *gate)
    double = as_double(a, b, grad, weight, mask)
    expected = weight_reference.masked_weight_double_backward(*double, *gate)
    # Each output is a sum of two terms: their sizes, one by one
    sizes = [term.abs() for term in double[:4]]
    scale = weight_reference.masked_weight_double_backward(*sizes, double[4], *gate)[0].abs(), 0.0, terms_to_mask(*double, *gate)
    for name, one, other, terms, kind in zip(("dG", "dW", "dM"), got, expected, scale, (grad.dtype, dtype, mask.dtype)):
        assert one.dtype == kind
        assert_close(one.cpu(), other, name, terms)


def check(sample, gate, dtype, device="cpu", other=None, mask_dtype=None):
    """Output, gradients and second gradients; ``other`` is the dtype of the output and of its gradient."""
    check_forward(sample, gate, dtype, device, other, mask_dtype)
    check_backward(sample, gate, dtype, device, other, mask_dtype)
    check_double_backward(sample, gate, dtype, device, other, mask_dtype)


def terms_to_mask(a, b, grad, weight, mask, gate, parameter):
    _, d, d2 = gate_values(mask, gate, parameter)
    # 1 - 2s is itself a difference: its error is relative to 1
    return (a * grad * d).abs() + (b * grad * weight).abs() * torch.maximum(
        d2.abs(), d / parameter if gate == SIGMOID else d2.abs()
    )


BY_NAME = {sample.name: sample for sample in ALL}


# Every shape and memory order at once, also those that a launch skips and those that no pack fits; whole packs throughout; several
# blocks each; one alone; more than a launch has room for, forward and backward
LISTS = {
    "all small": SMALL,
    "packs": tuple(BY_NAME[name] for name in ("17x3", "vector", "conv", "channels-last", "empty", "mask-transposed")),
    "blocks": (BY_NAME["17x3"], Sample("50x45", (50, 45)), BY_NAME["vector"], Sample("1100", (1100,)), Sample("33x65", (33, 65))),
    "one": (BY_NAME["2x3"],),
    "many": tuple(Sample(str(i), (1 + i % 7,)) for i in range(113)),
}


def columns(listed, count, dtype=torch.float64, device="cpu", mask_dtype=None):
    """For each role (weight, logits, and more of the weight's kind) the tensors of all weights."""
    samples = listed if isinstance(listed, tuple) else LISTS[listed]
    made = [sample.tensors(count, dtype, device, seed, mask_dtype) for seed, sample in enumerate(samples)]
    return [list(column) for column in zip(*made)]
