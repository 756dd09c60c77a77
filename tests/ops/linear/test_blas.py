"""masked_linear through BLAS: against float64, in every type, and against the same product by panels."""

from __future__ import annotations

import pytest
import torch
from support.blas import through_blas as through_blas  # a fixture
from support.linear_checks import check, inputs
from support.samples import DTYPES, GATE_IDS, GATES
from support.step_checks import check as check_step

from metamask_ext import masked_linear, products
from metamask_ext.ops.gate import SIGMOID
from metamask_ext.ops.linear import raw as linear_raw

SHAPES = {
    "one row": ((1, 260), 257),
    "vector": ((17,), 3),
    "3-d": ((2, 5, 129), 512),
    "ragged": ((19, 1030), 65),
    "no batch": ((0, 17), 9),
}

pytestmark = pytest.mark.usefixtures("through_blas")

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_gate = pytest.mark.parametrize("gate", GATES[1::2], ids=GATE_IDS[1::2])
mask_types = [(dtype, None) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
each_dtype = pytest.mark.parametrize("dtypes", mask_types, ids=lambda dtypes: " ".join(str(one)[6:] for one in dtypes if one))


@each_gate
@each_dtype
@each_shape
def test_output_and_gradients_equal_the_reference(shape, dtypes, gate):
    dtype, mask_dtype = dtypes
    check(*shape, gate, dtype, mask_dtype=mask_dtype)


@each_gate
@each_dtype
@pytest.mark.parametrize("step", [("sgd", False), ("sgd", True), ("adamw", True)], ids=["no momentum", "momentum", "adamw"])
def test_a_step_of_every_parameter(step, dtypes, gate):
    dtype, mask_dtype = dtypes
    check_step((40, 96), 1134, gate, dtype, *step, mask_dtype=mask_dtype)


def test_each_gradient_alone_equals_all_together():
    *arguments, grad = inputs((5, 260), 257, torch.float32)
    together = linear_raw.masked_linear_backward(grad, *arguments, *GATES[0])
    for index in range(5):
        needs = tuple(position == index for position in range(5))
        got = linear_raw.masked_linear_backward(grad, *arguments, *GATES[0], needs)
        assert [one is not None for one in got] == list(needs)
        torch.testing.assert_close(got[index], together[index], rtol=1e-6, atol=1e-6)


def test_derivatives_of_first_and_second_order():
    x, w, m, b, bm, _ = inputs((3, 260), 257, torch.float64)
    arguments = [tensor.requires_grad_() for tensor in (x, w, m, b, bm)]

    def function(*tensors):
        return masked_linear(*tensors)[:, :4]

    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_saturated_masks_are_exact_and_nan_stays_where_it_is():
    x, w, m, _, _, grad = inputs((3, 260), 257, torch.float32)
    m = torch.where(torch.arange(260) % 3 == 0, 1e4, -1e4).expand(257, 260).contiguous()
    alone = torch.eye(260)
    assert torch.equal(linear_raw.masked_linear(alone, w, m, None, None, SIGMOID, 1.0), (w * (m > 0)).t())
    m[4, 69] = float("nan")
    bad = torch.isnan(linear_raw.masked_linear(x, w, m, None, None, SIGMOID, 1.0))
    assert bool(bad[:, 4].all()) and int(bad.sum()) == 3
    dx, dw, dm, *_ = linear_raw.masked_linear_backward(grad, x, w, m, None, None, SIGMOID, 1.0)
    assert bool(torch.isnan(dx[:, 69]).all()) and int(torch.isnan(dx).sum()) == 3
    for one in (dw, dm):
        assert bool(torch.isnan(one[4, 69])) and int(torch.isnan(one).sum()) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_panels_give_the_same_up_to_rounding(dtype):
    *arguments, grad = inputs((70, 260), 257, dtype)
    blas = linear_raw.masked_linear(*arguments, *GATES[0]), *linear_raw.masked_linear_backward(grad, *arguments, *GATES[0])
    with products.using_table(products.PANELS):
        panels = linear_raw.masked_linear(*arguments, *GATES[0]), *linear_raw.masked_linear_backward(grad, *arguments, *GATES[0])
    for one, other in zip(blas, panels):
        scale = other.double().abs().amax().item()
        assert (one.double() - other.double()).abs().max().item() <= 8 * torch.finfo(dtype).eps * scale
