"""packed_masked_linear and its gradients through BLAS, for tasks with many rows: against float64, in every type."""

from __future__ import annotations

import pytest
import torch
from support.blas import through_blas as through_blas  # a fixture
from support.packed_checks import SHAPES, check, inputs
from support.samples import DTYPES

from metamask_ext import products
from metamask_ext.ops.packed import raw as packed_raw

pytestmark = pytest.mark.usefixtures("through_blas")

# Tasks with six rows and more, alone and beside tasks with fewer; columns that are whole vectors, and not
MANY = {
    "two tasks": ([0, 1, 0], (8,), 1, 37, 64, 2),
    "three tasks, 17 columns": ([2, 0, 1, 2], (7,), 1, 129, 17, 3),
    "16 bits' padding": ([1] * 9 + [0], (), 1, 20, 1134, 3),
}


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *MANY.values()], ids=[*SHAPES, *MANY])
def test_output_and_gradients_equal_plain_torch_sample_by_sample(shape, dtype, stacked):
    check(shape, dtype, stacked)


@pytest.mark.parametrize("shape", [SHAPES["few and many"], *MANY.values()], ids=["few and many", *MANY])
def test_each_gradient_alone_equals_all_together(shape):
    x, slots, w, b, grad, packed, packed_bias = inputs(shape, torch.float64)
    together = packed_raw.packed_masked_linear_backward(grad, x, slots, w, packed, b, packed_bias, 1)
    for index in range(3):
        needs = tuple(position == index for position in range(3))
        got = packed_raw.packed_masked_linear_backward(grad, x, slots, w, packed, b, packed_bias, 1, needs)
        assert [one is not None for one in got] == list(needs)
        torch.testing.assert_close(got[index], together[index], rtol=1e-12, atol=1e-12)


def test_panels_differ_by_rounding_alone():
    x, slots, w, b, _, packed, packed_bias = inputs(MANY["16 bits' padding"], torch.float32)
    blas = packed_raw.packed_masked_linear(x, slots, w, packed, b, packed_bias, 1)
    with products.using_table(products.PANELS):
        panels = packed_raw.packed_masked_linear(x, slots, w, packed, b, packed_bias, 1)
    torch.testing.assert_close(blas, panels, rtol=1e-4, atol=1e-4)
    assert not torch.equal(blas, panels)  # else one of the two was not what this file is about
