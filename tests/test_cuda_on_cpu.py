"""The CUDA kernels' own source, run by the emulator: the tests of the ops and of their derivatives that every device passes.

Between ``enter`` and ``leave`` every metamask op on CPU tensors runs the CUDA side of the library, launchers and kernels, in the
check build (tests/cuda_on_cpu): a race, an access out of bounds or a value that nothing wrote raises. So the tests below, which are
those of the CPU and of a GPU, need no change. It takes the CUDA toolkit's headers, not a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "cuda_on_cpu"))
from emulator import FORWARD, RANDOM_WARPS, Emulator, why_not

if why_not():
    pytest.skip(why_not(), allow_module_level=True)

import test_autograd
import test_linear_ops
import test_ops
import test_sgd_ops
from samples import DTYPES, GATES, Sample

from metamask_ext import _ops

# Those that test what only the CPU's kernels have are left out.
ON_EVERY_DEVICE = {
    test_ops: (
        "test_forward_and_derivatives_equal_the_reference",
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
    test_linear_ops: (
        "test_output_and_gradients_equal_the_reference",
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
        "test_masked_weight_gradcheck_and_gradgradcheck",
        "test_masked_linear_gradcheck_and_gradgradcheck",
        "test_derivatives_to_the_fourth_order_equal_plain_torch",
        "test_gradients_in_every_dtype_equal_the_float64_formula",
    ),
}
for module, names in ON_EVERY_DEVICE.items():
    for name in names:
        assert name not in globals()
        globals()[name] = getattr(module, name)


@pytest.fixture(scope="module")
def emulator():
    return Emulator("check")


@pytest.fixture(autouse=True, params=[FORWARD, RANDOM_WARPS], ids=["forward", "random-warps"])
def _in_the_emulator(emulator, request):
    with emulator.running(request.param):
        yield


SMALLEST = Sample("2x9", (2, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_the_ops_run_in_the_emulator(emulator, dtype):
    """Without this, tests that never reached it would pass too."""
    weight, mask = SMALLEST.tensors(2, dtype)
    before = emulator.launches()
    assert torch.isfinite(_ops.masked_weight(weight, mask, *GATES[0])).all()
    assert emulator.launches() == before + 1
