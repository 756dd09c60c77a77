"""The CUDA kernels of the mixed-task ops, in the emulator."""

from __future__ import annotations

import pytest
import torch
from support.emulator import FORWARD, RANDOM_WARPS
from support.mixed_task import Batch, check, check_double_backward, check_without_bias_masks
from support.samples import DTYPES, GATES

from metamask_ext.ops.mixed_task import raw as mixed_task_raw

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("in_the_emulator")]

# Some of mixed_task.py and more like them: full and ragged windows of rows, tasks across windows and several in one, sums of one
# block and of several; the last task, behind whose mask memory ends
CASES = {
    "several windows": ((45,), 1, 40, 24, [i * i % 5 for i in range(45)]),
    "one task in several windows": ((2, 19), 1, 16, 17, [1, 1]),
    "blocks share": ((5,), 1, 300, 70, [2, 0, 2, 5, 5]),
    "groups share": ((3, 2), 2, 264, 132, [5, 0, 5]),
    **{case: case for case in ("1x1", "one row a task", "sorted", "groups", "depthwise")},
    **{case: case for case in ("no samples", "no rows", "no input", "no output")},
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_way = pytest.mark.parametrize(
    ("gate", "stacked", "schedule"),
    [(GATES[1], True, FORWARD), (GATES[3], False, RANDOM_WARPS)],
    ids=["sigmoid-stacked-forward", "hard-list-random-warps"],
)


@each_way
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@each_case
def test_output_and_gradients_equal_plain_torch(emulator, case, dtype, gate, stacked, schedule):
    emulator.set(schedule, 1)
    check(case, gate, dtype, stacked)


@each_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@each_case
def test_second_gradients_equal_plain_torch(emulator, case, dtype, gate, stacked, schedule):
    emulator.set(schedule, 1)
    check_double_backward(case, gate, dtype, stacked)


@pytest.mark.parametrize("case", ["several windows", "groups share"])
def test_a_bias_without_masks(case):
    check_without_bias_masks(CASES[case])


def test_without_a_bias():
    check(CASES["several windows"], GATES[0], torch.float32, True, bias=False)
    check_double_backward(CASES["several windows"], GATES[0], torch.float32, True, bias=False)


def test_blocks_lie_in_the_dimension_that_has_room_for_them(emulator):
    """A device takes 65,535 blocks in the other ones: more groups or rows there would be."""
    emulator.limit_grid(1)
    try:
        check(CASES["groups share"], GATES[0], torch.float32, True)
        check_double_backward(CASES["groups share"], GATES[0], torch.float64, True)
    finally:
        emulator.limit_grid(65535)


def test_a_slot_that_is_no_tasks_ends_the_kernel():
    batch = Batch(((3,), 1, 8, 4, [0, 6, 1]))
    with pytest.raises(RuntimeError, match="assertion failed: task >= 0"):
        mixed_task_raw.task_masked_linear(*batch.arguments(GATES[0]))


def test_the_newer_setting_of_tf32():
    """torch no longer answers by the older setting then."""
    arguments = Batch(CASES["several windows"], torch.float32).arguments(GATES[0])
    exact = mixed_task_raw.task_masked_linear(*arguments)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        rounded = mixed_task_raw.task_masked_linear(*arguments)
    finally:
        matmul.fp32_precision = before
    assert 0 < (rounded - exact).abs().max() <= 2**-8 * exact.abs().max()
