"""The CUDA kernels of the ops on masks of one bit a weight, run by the emulator: see test_cuda_on_cpu.py."""

from __future__ import annotations

import pytest
import test_packed
import torch
from support.emulated import FORWARD, RANDOM_WARPS, bring, emulator, in_the_emulator  # noqa: F401  fixtures
from support.samples import DTYPES

bring(
    globals(),
    test_packed,
    (
        "test_pack_and_unpack",
        "test_pack_by_hand",
        "test_any_strides",
        "test_masks_anywhere_in_memory_are_read_to_their_end_only",
        "test_a_weight_that_is_off_is_zero_whatever_it_was_and_a_bad_input_shows",
        "test_each_gradient_alone_equals_all_together",
    ),
)
# As in test_packed.py: rows that are whole packs and rows that are not, windows of rows, sums of one block and of several, more
# tasks and samples than a tile of the superposition has
SHAPES = {
    "aligned": ([0, 1, 1], (), 1, 24, 64, 2),
    "windows share": ([i * i % 7 for i in range(35)], (), 1, 70, 280, 7),
    "many tasks": (list(range(0, 70, 4)), (), 1, 3, 72, 70),
    "groups share": ([1, 0, 1], (2,), 2, 66, 264, 2),
    **{name: test_packed.SHAPES[name] for name in ("1x1", "3 columns", "all one task", "few and many", "rows", "groups")},
    **{name: test_packed.SHAPES[name] for name in ("empty batch", "no rows", "no columns", "no outputs")},
}


@pytest.mark.parametrize(
    ("stacked", "schedule"), [(True, FORWARD), (False, RANDOM_WARPS)], ids=["stacked-forward", "list-random-warps"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients_equal_float64(emulator, shape, dtype, stacked, schedule):  # noqa: F811
    emulator.set(schedule, 1)
    test_packed.check(shape, dtype, stacked)


def test_a_slot_that_is_no_tasks_ends_the_kernel():
    x, _, w, b, _, packed, packed_bias = test_packed.inputs(SHAPES["aligned"], torch.float32)
    with pytest.raises(RuntimeError, match="assertion failed: task >= 0"):
        test_packed.ops.packed_masked_linear(x, torch.tensor([0, 2, 1]), w, packed, b, packed_bias, 1)
