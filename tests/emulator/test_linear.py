"""The CUDA kernels of masked_linear, those for small batches above all, in the emulator."""

from __future__ import annotations

import pytest
import torch
from support.emulator import FORWARD, RANDOM_WARPS
from support.linear_checks import SHAPES, check, expected, inputs
from support.profiling import aten_products
from support.samples import DTYPES, GATES

from metamask_ext.ops.linear import raw as linear_raw

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("in_the_emulator")]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# Some of linear_checks.py and more like them: the kernels for small batches, theta and a GEMM, nothing at all
LINEAR = {
    "3-d": ((2, 3, 17), 33),
    "batch 40": ((40, 33), 70),
    **{name: SHAPES[name] for name in ("1x1x1", "vector", "no batch", "no input", "no output")},
}


# The gate is in the arithmetic, the schedule decides which thread comes first.
@pytest.mark.parametrize(
    ("gate", "schedule"), [(GATES[1], FORWARD), (GATES[3], RANDOM_WARPS)], ids=["sigmoid-forward", "hard-random-warps"]
)
@each_dtype
@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR.keys())
def test_output_and_gradients_equal_the_reference(emulator, case, dtype, gate, schedule):
    emulator.set(schedule, 1)
    check(*case, gate, dtype)


# The kernels for small batches: full and ragged tiles, steps and rooms of the batch, rows that are whole packs and rows
# that are not, sums of one block and of several
FUSED = {
    "aligned": ((8, 64), 48),
    "ragged rows": ((7, 64), 37),
    "ragged columns": ((5, 67), 33),
    "second room": ((9, 40), 19),
    "full second room": ((32, 96), 70),
    "odd": ((31, 33), 65),
    "blocks share": ((3, 1100), 20),
    "blocks share, ragged": ((17, 531), 300),
    "two windows": ((45, 72), 35),
    "two windows, blocks share": ((64, 1100), 20),
}
each_fused = pytest.mark.parametrize("case", FUSED.values(), ids=FUSED.keys())


@pytest.mark.parametrize("schedule", [FORWARD, RANDOM_WARPS], ids=["forward", "random-warps"])
@each_fused
@each_dtype
def test_linear_of_a_small_batch(emulator, case, dtype, schedule):
    emulator.set(schedule, 1)
    check(*case, GATES[1], dtype)


# torch has an older and a newer setting, and does not answer by the older one once the newer one has been used.
@pytest.fixture(params=[("allow_tf32", True), ("fp32_precision", "tf32")], ids=["older", "newer"])
def _tf32(request):
    matmul, (name, value) = torch.backends.cuda.matmul, request.param
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    yield
    setattr(matmul, name, before)


@pytest.mark.usefixtures("_tf32")
@each_fused
def test_linear_of_a_small_batch_with_tf32(case):
    tensors = inputs(*case, torch.float32)
    y, grads = expected(tensors, GATES[0])
    *arguments, grad = tensors
    (batch, columns), out = case
    got = [linear_raw.masked_linear(*arguments, *GATES[0]), *linear_raw.masked_linear_backward(grad, *arguments, *GATES[0])]
    for name, one, exact, terms in zip(("y", "dx", "dW", "dM"), got, (y, *grads), (columns, out, batch, batch)):
        # Both factors are rounded to 10 bits of mantissa
        error, unit = (one.double() - exact).abs().max(), exact.abs().max() * terms**0.5
        assert error <= 4 * 2**-11 * unit, f"{name}: {(error / unit).item():.3g}"
    # and not more exactly than that: the tensor cores were used
    assert (got[0].double() - y).abs().max() > 1e-6 * y.abs().max()


@pytest.mark.parametrize("case", [((64, 40), 33), ((33, 72), 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_forward_of_a_batch_that_only_tensor_cores_have_room_for(case, dtype):
    check(*case, GATES[1], dtype)


@pytest.mark.parametrize(("batch", "products"), [(1, (0, 0)), (32, (0, 0)), (33, (0, 2)), (64, (0, 2)), (65, (1, 2))], ids=str)
def test_a_small_batch_takes_no_gemm_and_a_large_one_does(batch, products):
    *arguments, grad = inputs((batch, 24), 20, torch.float32)
    assert aten_products(lambda: linear_raw.masked_linear(*arguments, *GATES[0])) == products[0]
    assert aten_products(lambda: linear_raw.masked_linear_backward(grad, *arguments, *GATES[0])) == products[1]


def test_sums_of_blocks_are_added_in_one_order(emulator):
    *arguments, grad = inputs((17, 531), 40, torch.float32)

    def run(schedule, seed):
        emulator.set(schedule, seed)
        return [linear_raw.masked_linear(*arguments, *GATES[0]), *linear_raw.masked_linear_backward(grad, *arguments, *GATES[0])]

    first = run(FORWARD, 1)
    for seed in (1, 2):
        assert all(torch.equal(one, other) for one, other in zip(first, run(RANDOM_WARPS, seed)))
