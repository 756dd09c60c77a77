"""The CUDA kernels of masked_weight, one weight and a list, in the emulator."""

from __future__ import annotations

import pytest
import torch
from support.emulator import FORWARD, RANDOM_WARPS
from support.samples import DTYPES, GATES, SMALL, Sample, ids, wider
from support.weight_checks import check, columns

from metamask_ext.ops.weight import raw as weight_raw

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("in_the_emulator")]

# Some of samples.py and more like them; several blocks are enough.
WEIGHTS = (
    *SMALL,
    Sample("37x129", (37, 129)),
    Sample("logits-to-1e4", (5, 33), scale=1e4),
    Sample("37x129-wider", (37, 129), wider),
)
SMALLEST = Sample("2x9", (2, 9))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


# The gate is in the arithmetic, the schedule decides which thread comes first.
@pytest.mark.parametrize(
    ("gate", "schedule"), [(GATES[1], FORWARD), (GATES[3], RANDOM_WARPS)], ids=["sigmoid-forward", "hard-random-warps"]
)
@each_dtype
@pytest.mark.parametrize("sample", WEIGHTS, ids=ids(WEIGHTS))
def test_forward_and_derivatives_equal_the_reference(emulator, sample, dtype, gate, schedule):
    emulator.set(schedule, 1)
    check(sample, gate, dtype)


@each_dtype
def test_the_ops_run_in_the_emulator(emulator, dtype):
    """Without this, tests that never reached it would pass too."""
    weight, mask = SMALLEST.tensors(2, dtype)
    before = emulator.launches()
    assert torch.isfinite(weight_raw.masked_weight(weight, mask, *GATES[0])).all()
    assert emulator.launches() == before + 1


@pytest.mark.parametrize(("listed", "launches"), [("all small", (1, 1, 1)), ("many", (2, 2, 3))], ids=["all-small", "many"])
def test_a_list_takes_one_launch_until_its_arguments_are_too_many(emulator, listed, launches):
    weight, mask, grad, a, b = columns(listed, 5, torch.float32)
    runs = (
        lambda: weight_raw.masked_weight_list(weight, mask, *GATES[0]),
        lambda: weight_raw.masked_weight_list_backward(grad, weight, mask, *GATES[0]),
        lambda: weight_raw.masked_weight_list_double_backward(a, b, grad, weight, mask, *GATES[0]),
    )
    for run, wanted in zip(runs, launches):
        before = emulator.launches()
        run()
        assert emulator.launches() == before + wanted


def test_the_sigmoid_of_float32_is_close_to_float64_and_exact_at_both_ends():
    logits = torch.cat([torch.linspace(-30, 30, 8001), torch.tensor([0.0, -86.0, 86.0, 1e4, torch.inf])])
    got = weight_raw.masked_weight(torch.ones_like(logits), logits, *GATES[0])
    exact = torch.sigmoid(logits.double())
    unit = torch.nextafter(exact.float(), torch.tensor(2.0)).double() - exact.float()
    assert ((got.double() - exact).abs() / unit).max() <= 4
    ends = torch.tensor([-torch.inf, -1e4, -120.0, 0.0, 17.5, 1e4, torch.inf, torch.nan])
    at_ends = weight_raw.masked_weight(torch.ones_like(ends), ends, *GATES[0])
    assert torch.equal(at_ends[:-1], torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0])) and at_ends[-1].isnan()
