"""The CUDA kernels' own source, run by the emulator: the tests of the ops and of their derivatives that every device passes.

Between ``enter`` and ``leave`` every metamask op on CPU tensors runs the CUDA side of the library, launchers and kernels, in the
check build (tests/cuda_on_cpu): a race, an access out of bounds or a value that nothing wrote raises. So the tests below, which are
those of the CPU and of a GPU, need no change. It takes the CUDA toolkit's headers, not a GPU.
"""

from __future__ import annotations

import pytest
import test_autograd
import test_linear_ops
import test_ops
import test_sgd_ops
import test_weight_list
import torch
from support.emulated import FORWARD, RANDOM_WARPS, bring, emulator, in_the_emulator  # noqa: F401  fixtures
from support.samples import DTYPES, GATES, SMALL, Sample, ids, wider

from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.weight import raw as weight_raw

# Those that test what only the CPU's kernels have are left out.
ON_EVERY_DEVICE = {
    test_ops: (
        "test_result_and_gradient_may_have_another_16_or_32_bit_type",
        "test_answers_worked_out_by_hand",
        "test_large_and_infinite_logits_give_exactly_0_and_1",
        "test_nan_stays_nan",
        "test_16_bit_types_are_read_and_rounded_as_torch_does",
        "test_result_keeps_the_memory_format_of_the_weight",
        "test_only_the_outputs_that_are_needed_are_made",
        "test_a_cotangent_that_is_not_there_is_zero",
        "test_inputs_are_not_written",
    ),
    test_weight_list: (
        "test_a_list_and_its_derivatives_equal_the_reference",
        "test_results_and_gradients_of_a_list_may_have_another_16_or_32_bit_type",
        "test_only_the_lists_that_are_needed_are_made",
        "test_a_cotangent_of_a_list_that_is_not_there_is_zero",
        "test_list_gradcheck_and_gradgradcheck",
        "test_derivatives_of_a_list_to_the_fourth_order_equal_plain_torch",
    ),
    test_linear_ops: (
        "test_any_strides",
        "test_float32_parameters_with_a_16_bit_product",
        "test_16_bit_gradient_of_the_input_is_as_accurate_as_a_dense_layers",
        "test_bfloat16_products_of_any_parameters",
        "test_bfloat16_saturates_exactly_and_keeps_nan_where_it_is",
        "test_bias_without_logits_and_no_bias",
        "test_each_gradient_alone_equals_all_together",
    ),
    test_sgd_ops: (
        "test_a_step_of_every_parameter_of_masked_linear",
        "test_masked_weight_updates_what_is_asked_for_and_gives_the_rest",
        "test_a_gradient_that_is_not_needed_is_not_given_and_does_not_move",
    ),
    test_autograd: (
        "test_derivatives_to_the_fourth_order_equal_plain_torch",
        "test_gradients_in_every_dtype_equal_the_float64_formula",
    ),
}
for module, names in ON_EVERY_DEVICE.items():
    bring(globals(), module, names)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# The gate is in the arithmetic, the schedule decides which thread comes first.
each_way = pytest.mark.parametrize(
    ("gate", "schedule"), [(GATES[1], FORWARD), (GATES[3], RANDOM_WARPS)], ids=["sigmoid-forward", "hard-random-warps"]
)
# As in samples.py; the emulator takes a thousand times longer, and several blocks are enough.
WEIGHTS = (
    *SMALL,
    Sample("37x129", (37, 129)),
    Sample("logits-to-1e4", (5, 33), scale=1e4),
    Sample("37x129-wider", (37, 129), wider),
)


@each_way
@each_dtype
@pytest.mark.parametrize("sample", WEIGHTS, ids=ids(WEIGHTS))
def test_forward_and_derivatives_equal_the_reference(emulator, sample, dtype, gate, schedule):  # noqa: F811
    emulator.set(schedule, 1)
    test_ops.check_forward(sample, gate, dtype, "cpu")
    test_ops.check_backward(sample, gate, dtype, "cpu")
    test_ops.check_double_backward(sample, gate, dtype, "cpu")


@pytest.mark.parametrize(
    "sample", [sample for sample in SMALL if sample.name in ("2x3", "mask-wider", "conv")], ids=lambda s: s.name
)
def test_masked_weight_gradcheck_and_gradgradcheck(sample):
    test_autograd.test_masked_weight_gradcheck_and_gradgradcheck(sample, 0.5, "cpu")


def test_masked_linear_gradcheck_and_gradgradcheck():
    test_autograd.test_masked_linear_gradcheck_and_gradgradcheck(0.5, "cpu")


# As in test_linear_ops.py: what the kernels for small batches take, what goes by theta and a product, nothing at all
LINEAR = {
    "3-d": ((2, 3, 17), 33),
    "batch 40": ((40, 33), 70),
    **{name: test_linear_ops.SHAPES[name] for name in ("1x1x1", "vector", "no batch", "no input", "no output")},
}


@each_way
@each_dtype
@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR.keys())
def test_output_and_gradients_equal_the_reference(emulator, case, dtype, gate, schedule):  # noqa: F811
    emulator.set(schedule, 1)
    test_linear_ops.check(*case, gate, dtype)


SMALLEST = Sample("2x9", (2, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_the_ops_run_in_the_emulator(emulator, dtype):  # noqa: F811
    """Without this, tests that never reached it would pass too."""
    weight, mask = SMALLEST.tensors(2, dtype)
    before = emulator.launches()
    assert torch.isfinite(weight_raw.masked_weight(weight, mask, *GATES[0])).all()
    assert emulator.launches() == before + 1


@pytest.mark.parametrize(("listed", "launches"), [("all small", (1, 1, 1)), ("many", (2, 2, 3))], ids=["all-small", "many"])
def test_a_list_takes_one_launch_until_its_arguments_are_too_many(emulator, listed, launches):  # noqa: F811
    weight, mask, grad, a, b = test_weight_list.columns(listed, 5, torch.float32)
    runs = (
        lambda: weight_raw.masked_weight_list(weight, mask, *GATES[0]),
        lambda: weight_raw.masked_weight_list_backward(grad, weight, mask, *GATES[0]),
        lambda: weight_raw.masked_weight_list_double_backward(a, b, grad, weight, mask, *GATES[0]),
    )
    for run, wanted in zip(runs, launches):
        before = emulator.launches()
        run()
        assert emulator.launches() == before + wanted


# masked_linear's kernels for small batches: full and ragged tiles, steps and rooms of the batch, rows that are whole packs and rows
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
def test_linear_of_a_small_batch(emulator, case, dtype, schedule):  # noqa: F811
    emulator.set(schedule, 1)
    test_linear_ops.check(*case, GATES[1], dtype)


@pytest.fixture
def _tf32():
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@each_fused
def test_linear_of_a_small_batch_with_tf32(case, _tf32):
    tensors = test_linear_ops.inputs(*case, torch.float32)
    y, grads = test_linear_ops.expected(tensors, GATES[0])
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
    test_linear_ops.check(*case, GATES[1], dtype)


@pytest.mark.parametrize(("batch", "products"), [(1, (0, 0)), (32, (0, 0)), (33, (0, 2)), (64, (0, 2)), (65, (1, 2))], ids=str)
def test_a_small_batch_takes_no_gemm_and_a_large_one_does(batch, products):
    *arguments, grad = test_linear_ops.inputs((batch, 24), 20, torch.float32)
    assert aten_products(lambda: linear_raw.masked_linear(*arguments, *GATES[0])) == products[0]
    assert aten_products(lambda: linear_raw.masked_linear_backward(grad, *arguments, *GATES[0])) == products[1]


def test_sums_of_blocks_are_added_in_one_order(emulator):  # noqa: F811
    *arguments, grad = test_linear_ops.inputs((17, 531), 40, torch.float32)

    def run(schedule, seed):
        emulator.set(schedule, seed)
        return [linear_raw.masked_linear(*arguments, *GATES[0]), *linear_raw.masked_linear_backward(grad, *arguments, *GATES[0])]

    first = run(FORWARD, 1)
    for seed in (1, 2):
        assert all(torch.equal(one, other) for one, other in zip(first, run(RANDOM_WARPS, seed)))
