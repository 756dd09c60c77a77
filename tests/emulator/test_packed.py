"""The CUDA kernels of the ops on bit-packed masks, in the emulator."""

from __future__ import annotations

import pytest
import torch
from support import packed_checks
from support.emulator import FORWARD, RANDOM_WARPS
from support.packed_checks import check, inputs
from support.samples import DTYPES

from metamask_ext.ops.packed import raw as packed_raw

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("in_the_emulator")]

# Some of packed_checks.py and more like them: rows that are whole packs and rows that are not, windows of rows, sums of one block
# and of several, more tasks and samples than a tile of the superposition has. Strips of 128 columns: their ring goes round twice
# and a last row has no partner; with a fifth strip a warp has two.
SHAPES = {
    "strips": ([i * i % 5 for i in range(19)], (), 1, 40, 256, 5),
    "ragged strips": ([2, 0, 1, 2, 2, 0, 1, 1, 0], (), 1, 3, 637, 3),
    "two strips a warp": ([1, 0], (), 16, 1, 640, 2),
    "aligned": ([0, 1, 1], (), 1, 24, 64, 2),
    "windows share": ([i * i % 7 for i in range(35)], (), 1, 70, 280, 7),
    "many tasks": (list(range(0, 70, 4)), (), 1, 3, 72, 70),
    "groups share": ([1, 0, 1], (2,), 2, 66, 264, 2),
    **{name: packed_checks.SHAPES[name] for name in ("1x1", "3 columns", "all one task", "few and many", "rows", "groups")},
    **{name: packed_checks.SHAPES[name] for name in ("empty batch", "no rows", "no columns", "no outputs")},
}


@pytest.mark.parametrize(
    ("stacked", "schedule"), [(True, FORWARD), (False, RANDOM_WARPS)], ids=["stacked-forward", "list-random-warps"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients_equal_float64(emulator, shape, dtype, stacked, schedule):
    emulator.set(schedule, 1)
    check(shape, dtype, stacked)


def test_blocks_lie_in_the_dimension_that_has_room_for_them(emulator):
    """A device takes 65,535 blocks in the other ones: more groups, rows or samples there would be."""
    emulator.limit_grid(1)
    try:
        check(SHAPES["groups share"], torch.float32)
    finally:
        emulator.limit_grid(65535)


def test_a_slot_that_is_no_tasks_ends_the_kernel():
    x, _, w, b, _, packed, packed_bias = inputs(SHAPES["aligned"], torch.float32)
    with pytest.raises(RuntimeError, match="assertion failed: task >= 0"):
        packed_raw.packed_masked_linear(x, torch.tensor([0, 2, 1]), w, packed, b, packed_bias, 1)
