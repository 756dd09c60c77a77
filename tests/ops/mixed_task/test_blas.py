"""task_masked_linear and its gradients through BLAS, task by task: against float64, sample by sample, in every type."""

from __future__ import annotations

import pytest
import torch
from support.blas import through_blas as through_blas  # a fixture
from support.mixed_task import CASES, GATE, Batch, check, check_without_bias_masks, leaves
from support.samples import DTYPES, GATES

from metamask_ext import products
from metamask_ext.ops.mixed_task import raw as mixed_task_raw

pytestmark = pytest.mark.usefixtures("through_blas")

mask_types = [(dtype, None) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
each_dtype = pytest.mark.parametrize("dtypes", mask_types, ids=lambda dtypes: " ".join(str(one)[6:] for one in dtypes if one))


@pytest.mark.parametrize(("gate", "stacked"), [(GATES[1], True), (GATES[3], False)], ids=["sigmoid-stacked", "hard-list"])
@each_dtype
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_plain_torch_sample_by_sample(case, dtypes, gate, stacked):
    dtype, mask_dtype = dtypes
    check(case, gate, dtype, stacked, mask_dtype=mask_dtype)


@pytest.mark.parametrize("case", CASES)
def test_without_a_bias_and_with_one_that_has_no_masks(case):
    check(case, GATE, torch.float64, True, bias=False)
    check_without_bias_masks(case)


@pytest.mark.parametrize("case", ["one row a task", "ragged"])
def test_each_gradient_alone_equals_all_together(case):
    batch = Batch(case, torch.float64, False)
    together = mixed_task_raw.task_masked_linear_backward(batch.grad, *batch.arguments(GATE))
    for index in range(5):
        needs = tuple(position == index for position in range(5))
        got = mixed_task_raw.task_masked_linear_backward(batch.grad, *batch.arguments(GATE), needs)
        for one, other in zip(leaves(got[index]), leaves(together[index]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_panels_differ_by_rounding_alone():
    batch = Batch("ragged", torch.float32, True)
    blas = mixed_task_raw.task_masked_linear(*batch.arguments(GATE))
    with products.using_table(products.PANELS):
        panels = mixed_task_raw.task_masked_linear(*batch.arguments(GATE))
    torch.testing.assert_close(blas, panels, rtol=1e-4, atol=1e-4)
    assert not torch.equal(blas, panels)  # else one of the two was not what this file is about
