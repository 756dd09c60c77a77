"""The CUDA kernels of the ops on batches that mix tasks, run by the emulator: see test_cuda_on_cpu.py."""

from __future__ import annotations

import pytest
import test_task_conv
import test_task_linear
import torch
from support.emulated import FORWARD, RANDOM_WARPS, bring, emulator, in_the_emulator  # noqa: F401  fixtures
from support.samples import DTYPES, GATES

bring(
    globals(),
    test_task_linear,
    (
        "test_float32_parameters_with_a_16_bit_product",
        "test_some_cotangents_of_a_list_of_masks",
        "test_absent_tasks_get_zeros_and_the_others_do_not",
        "test_values_that_are_not_finite_stay_in_their_row_and_task",
        "test_large_logits_give_the_dense_layer_or_nothing",
        "test_inputs_are_not_written",
        "test_one_mask_expanded_for_all_tasks",
    ),
)
# As in tasks.py: full and ragged windows of rows, tasks across windows and several in one, sums of one block and of several; the
# last task, behind whose mask memory ends
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
def test_output_and_gradients_equal_plain_torch(emulator, case, dtype, gate, stacked, schedule):  # noqa: F811
    emulator.set(schedule, 1)
    test_task_linear.check(case, gate, dtype, stacked)


@each_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@each_case
def test_second_gradients_equal_plain_torch(emulator, case, dtype, gate, stacked, schedule):  # noqa: F811
    emulator.set(schedule, 1)
    test_task_linear.check_double_backward(case, gate, dtype, stacked)


def test_a_cotangent_that_is_not_there_is_zero():
    test_task_linear.check_absent_cotangents(test_task_linear.Batch(CASES["groups"], torch.float64, False))


def test_a_bias_without_masks():
    for case in ("several windows", "groups share"):
        test_task_linear.check_without_bias_masks(CASES[case])


def test_without_a_bias():
    test_task_linear.check(CASES["several windows"], GATES[0], torch.float32, True, bias=False)
    test_task_linear.check_double_backward(CASES["several windows"], GATES[0], torch.float32, True, bias=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["3x3", "groups", "uneven"])
def test_convolution_as_a_gpu_takes_it(monkeypatch, shape, dtype):
    monkeypatch.setattr(mixed, "ONE_CONVOLUTION_ON", ("cpu",))
    test_task_conv.test_output_and_gradients_equal_conv2d_sample_by_sample(shape, dtype, GATES[1])


def test_derivatives_of_a_convolution_as_a_gpu_takes_it(monkeypatch):
    monkeypatch.setattr(mixed, "ONE_CONVOLUTION_ON", ("cpu",))
    test_task_conv.test_derivatives_to_the_third_order_equal_conv2d(GATES[1])


def test_a_slot_that_is_no_tasks_ends_the_kernel():
    batch = test_task_linear.Batch(((3,), 1, 8, 4, [0, 6, 1]))
    with pytest.raises(RuntimeError, match="assertion failed: task >= 0"):
        test_task_linear._task_ops.task_masked_linear(*batch.arguments(GATES[0]))
