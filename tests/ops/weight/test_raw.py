"""The raw ops against the float64 reference: values, layouts, types, what they refuse, and what opcheck asks."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from support import samples
from support.gpu import DEVICES
from support.samples import ALL, DTYPES, GATE_IDS, GATES, SMALL
from support.weight_checks import MIXED, check, check_forward

from metamask_ext import build_info
from metamask_ext.ops.gate import HARD, SIGMOID
from metamask_ext.ops.weight import raw as weight_raw

each_sample = pytest.mark.parametrize("sample", ALL, ids=samples.ids(ALL))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_gate = pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
each_device = pytest.mark.parametrize("device", DEVICES)


@each_device
@each_gate
@each_dtype
@each_sample
def test_forward_and_derivatives_equal_the_reference(sample, dtype, gate, device):
    check(sample, gate, dtype, device)


@pytest.mark.every_device
@each_device
@each_gate
@pytest.mark.parametrize(("dtype", "other"), MIXED, ids=lambda dtype: str(dtype)[6:])
def test_result_and_gradient_may_have_another_16_or_32_bit_type(dtype, other, gate, device):
    for sample in (SMALL[2], ALL[-1]):
        check(sample, gate, dtype, device, other)


@pytest.mark.every_device
@each_device
def test_answers_worked_out_by_hand(device):
    # sigmoid(ln 3) = 3/4; its derivative 3/16; the second 3/16 * (1 - 3/2) = -3/32
    weight, mask, grad = (torch.tensor([value], dtype=torch.float64, device=device) for value in (8.0, math.log(3), 2.0))
    one = torch.ones_like(weight)
    assert weight_raw.masked_weight(weight, mask, SIGMOID, 1.0).item() == pytest.approx(6.0, rel=1e-15)
    assert [t.item() for t in weight_raw.masked_weight_backward(grad, weight, mask, SIGMOID, 1.0)] == pytest.approx(
        [1.5, 3.0], rel=1e-15
    )
    second = weight_raw.masked_weight_double_backward(one, one, grad, weight, mask, SIGMOID, 1.0)
    assert [t.item() for t in second] == pytest.approx([0.75 + 1.5, 0.375, 0.375 - 1.5], rel=1e-15)
    # Hard: the threshold itself is off
    weight, mask = (torch.tensor(values, device=device) for values in ([5.0, 5.0, 5.0], [0.25, 0.2500001, -3.0]))
    assert weight_raw.masked_weight(weight, mask, HARD, 0.25).tolist() == [0.0, 5.0, 0.0]
    assert weight_raw.masked_weight_backward(torch.ones_like(weight), weight, mask, HARD, 0.25)[1].tolist() == [5.0, 5.0, 5.0]


@pytest.mark.every_device
@each_device
@each_dtype
def test_large_and_infinite_logits_give_exactly_0_and_1(dtype, device):
    mask = torch.tensor([1e4, -1e4, math.inf, -math.inf], device=device).to(dtype)
    weight = torch.full_like(mask, 3.0)
    for gate, parameter in ((SIGMOID, 1.0), (SIGMOID, 1e-3), (HARD, 0.0)):
        assert weight_raw.masked_weight(weight, mask, gate, parameter).tolist() == [3.0, 0.0, 3.0, 0.0]
    grad_weight, grad_mask = weight_raw.masked_weight_backward(weight, weight, mask, SIGMOID, 1.0)
    assert grad_weight.tolist() == [3.0, 0.0, 3.0, 0.0]
    assert grad_mask.tolist() == [0.0] * 4
    second = weight_raw.masked_weight_double_backward(weight, weight, weight, weight, mask, SIGMOID, 1.0)
    assert [t.tolist() for t in second] == [[3.0, 0.0, 3.0, 0.0], [0.0] * 4, [0.0] * 4]


@pytest.mark.every_device
@each_device
@each_dtype
def test_nan_stays_nan(dtype, device):
    nan = torch.tensor([math.nan, 1.0], device=device).to(dtype)
    one = torch.ones_like(nan)
    assert weight_raw.masked_weight(one, nan, SIGMOID, 1.0).isnan().tolist() == [True, False]
    assert weight_raw.masked_weight(nan, one, HARD, 0.0).isnan().tolist() == [True, False]
    assert weight_raw.masked_weight_backward(nan, one, one, SIGMOID, 1.0)[1].isnan().tolist() == [True, False]


def test_gradient_of_a_saturated_mask_keeps_its_accuracy():
    # s rounds to 1 in float32, so s * (1 - s) would be 0; exp(-20) / (1 + exp(-20))^2 is not
    one = torch.ones(1)
    gradient = weight_raw.masked_weight_backward(one, one, torch.tensor([20.0]), SIGMOID, 1.0)[1].item()
    assert gradient == pytest.approx(math.exp(-20) / (1 + math.exp(-20)) ** 2, rel=1e-6)


def every_float16():
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


@pytest.mark.every_device
@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_types_are_read_and_rounded_as_torch_does(dtype, device):
    # Every bit pattern read: W * 1 is the value itself
    every = every_float16().view(dtype).to(device)
    on = torch.full_like(every, math.inf)
    widened = weight_raw.masked_weight(every, on, HARD, 0.0, torch.float32)
    assert torch.equal(widened.nan_to_num(1.5, 3e38, -3e38), every.float().nan_to_num(1.5, 3e38, -3e38))
    # Written: values between neighbours, ties, subnormals, overflow
    finite = every_float16().view(dtype).double()
    finite = finite[finite.isfinite()].sort().values
    between = torch.cat(
        [finite, (finite[1:] + finite[:-1]) / 2, finite * 1.0001, torch.tensor([7e4, -7e4, 65519.0, 65520.0, 1e-9])]
    )
    between = between.float().to(device)
    narrowed = weight_raw.masked_weight(between, torch.full_like(between, math.inf), HARD, 0.0, dtype)
    assert torch.equal(narrowed, between.to(dtype))


@pytest.mark.every_device
@each_device
@each_sample
def test_result_keeps_the_memory_format_of_the_weight(sample, device):
    weight, theta = check_forward(sample, GATES[0], torch.float32, device)
    if sample.layout in (samples.wider, samples.offset) or sample.name == "expanded":
        assert theta.is_contiguous()
    else:
        assert theta.stride() == weight.stride()


@pytest.mark.every_device
@each_device
@pytest.mark.parametrize("gate", GATES[::2], ids=GATE_IDS[::2])
def test_only_the_outputs_that_are_needed_are_made(gate, device):
    weight, mask, grad, a, b = SMALL[2].tensors(5, torch.float32, device)
    both = weight_raw.masked_weight_backward(grad, weight, mask, *gate)
    for needs in ((True, False), (False, True), (False, False)):
        got = weight_raw.masked_weight_backward(grad, weight, mask, *gate, needs)
        assert all(torch.equal(g, e) if need else g is None for g, e, need in zip(got, both, needs))
    everything = weight_raw.masked_weight_double_backward(a, b, grad, weight, mask, *gate)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        got = weight_raw.masked_weight_double_backward(a, b, grad, weight, mask, *gate, needs)
        assert all(torch.equal(g, e) if need else g is None for g, e, need in zip(got, everything, needs))


@pytest.mark.every_device
@each_device
@pytest.mark.parametrize("gate", GATES[::2], ids=GATE_IDS[::2])
def test_a_cotangent_that_is_not_there_is_zero(gate, device):
    weight, mask, grad, a, b = SMALL[2].tensors(5, torch.float32, device)
    zero = torch.zeros_like(a)
    for given, full in (((a, None), (a, zero)), ((None, b), (zero, b))):
        got = weight_raw.masked_weight_double_backward(*given, grad, weight, mask, *gate)
        expected = weight_raw.masked_weight_double_backward(*full, grad, weight, mask, *gate)
        assert all(torch.equal(g, e) for g, e in zip(got, expected))


@pytest.mark.every_device
@each_device
def test_inputs_are_not_written(device):
    given = SMALL[2].tensors(5, torch.float32, device)
    kept = [tensor.clone() for tensor in given]
    weight, mask, grad, a, b = given
    weight_raw.masked_weight(weight, mask, SIGMOID, 1.0)
    weight_raw.masked_weight_backward(grad, weight, mask, SIGMOID, 1.0)
    weight_raw.masked_weight_double_backward(a, b, grad, weight, mask, SIGMOID, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(given, kept))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    weight, mask, grad = ALL[len(SMALL)].tensors(3, dtype)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outputs = [weight_raw.masked_weight(weight, mask, SIGMOID, 1.0)]
        results.append(outputs + list(weight_raw.masked_weight_backward(grad, weight, mask, SIGMOID, 1.0)))
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.once
def test_large_tensors_are_worked_on_by_all_threads():
    """A build without OpenMP would compute the same numbers in one thread."""
    script = (
        "import os, torch; from metamask_ext.ops.weight import raw as weight_raw; "
        "torch.set_num_threads(3); w = torch.empty(1 << 20);"
        "before = len(os.listdir('/proc/self/task')); weight_raw.masked_weight(w, w, 0, 1.0);"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    if sys.platform == "linux":
        started = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert started.stdout.strip() == "2", started
    assert build_info()["threads"] == ("openmp" if sys.platform == "linux" else "none")


@pytest.mark.once
@each_device
@each_dtype
def test_opcheck(dtype, device):
    ops = torch.ops.metamask
    for sample, gate in zip((SMALL[2], SMALL[3], SMALL[7], SMALL[14]), GATES):
        weight, mask, grad, a, b = sample.tensors(5, dtype, device)
        samples.opcheck(ops.masked_weight.default, (weight, mask, *gate))
        samples.opcheck(ops.masked_weight_backward.default, (grad, weight, mask, *gate, (True, True)))
        samples.opcheck(ops.masked_weight_double_backward.default, (a, b, grad, weight, mask, *gate, (True, True, True)))
        samples.opcheck(ops.masked_weight_double_backward.default, (a, None, grad, weight, mask, *gate, (False, True, True)))


@pytest.mark.once
def test_fake_results_have_the_layout_of_the_real_ones():
    for sample in SMALL:
        weight, mask, grad = sample.tensors(3, torch.float32)
        real = [
            weight_raw.masked_weight(weight, mask, SIGMOID, 1.0),
            *weight_raw.masked_weight_backward(grad, weight, mask, SIGMOID, 1.0),
        ]
        weight, mask, grad = (tensor.to("meta") for tensor in (weight, mask, grad))
        meta = [
            weight_raw.masked_weight(weight, mask, SIGMOID, 1.0),
            *weight_raw.masked_weight_backward(grad, weight, mask, SIGMOID, 1.0),
        ]
        for one, other in zip(real, meta):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.stride() == other.stride() or one.numel() < 2, sample.name


# Each refusal: which argument it names, and the call
W = torch.zeros(2, 3)
REFUSED = {
    "integer weight": (TypeError, "weight must be float64", lambda w, m: (w.int(), m.int())),
    "mask of another dtype": (TypeError, "mask_logits must have the dtype of weight", lambda w, m: (w, m.double())),
    "mask of another shape": (
        ValueError,
        "mask_logits must have the shape of weight, \\[2, 3\\], got \\[3, 2\\]",
        lambda w, m: (w, m.t()),
    ),
    "mask that would broadcast": (ValueError, "mask_logits must have the shape", lambda w, m: (w, m[:1])),
    "mask on another device": (ValueError, "mask_logits must be on the device of weight", lambda w, m: (w, m.to("meta"))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_pair_is_refused_by_every_op_and_its_fake_and_the_functional_layer(name):
    import metamask_ext

    error, message, change = REFUSED[name]
    weight, mask = change(W, W)
    with pytest.raises(error, match=message):
        metamask_ext.masked_weight(weight, mask)
    if "device" not in name:  # torch's dispatcher itself refuses mixed devices before our kernels
        calls = [(weight, mask), (weight.to("meta"), mask.to("meta"))]
        for one, other in calls:
            with pytest.raises(error, match=message):
                weight_raw.masked_weight(one, other, SIGMOID, 1.0)
            with pytest.raises(error, match=message):
                weight_raw.masked_weight_backward(one, one, other, SIGMOID, 1.0)
            with pytest.raises(error, match=message):
                weight_raw.masked_weight_double_backward(one, one, one, one, other, SIGMOID, 1.0)


def test_raw_ops_refuse_a_wrong_gate_gradient_and_dtype():
    with pytest.raises(ValueError, match="gate must be 0 .* got 2"):
        weight_raw.masked_weight(W, W, 2, 1.0)
    with pytest.raises(ValueError, match="temperature must be finite and greater than 0, got -1"):
        weight_raw.masked_weight(W, W, SIGMOID, -1.0)
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16 or float16, got Double"):
        weight_raw.masked_weight(W, W, SIGMOID, 1.0, torch.float64)
    with pytest.raises(ValueError, match="grad must have the shape of weight, \\[2, 3\\], got \\[2\\]"):
        weight_raw.masked_weight_backward(torch.zeros(2), W, W, SIGMOID, 1.0)
    with pytest.raises(TypeError, match="grad must be float32, bfloat16 or float16, got Double"):
        weight_raw.masked_weight_backward(W.double(), W, W, SIGMOID, 1.0)
    with pytest.raises(ValueError, match="cotangent_mask must have the shape of weight"):
        weight_raw.masked_weight_double_backward(W, torch.zeros(2), W, W, W, SIGMOID, 1.0)


def test_an_op_that_would_be_differentiated_by_accident_raises():
    weight, mask = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="metamask::masked_weight has no derivative"):
        weight_raw.masked_weight(weight, mask, SIGMOID, 1.0)
    with pytest.raises(RuntimeError, match="metamask::masked_weight_backward has no derivative"):
        weight_raw.masked_weight_backward(mask, mask, weight, SIGMOID, 1.0)
    with pytest.raises(RuntimeError, match="metamask::masked_weight_double_backward has no derivative"):
        weight_raw.masked_weight_double_backward(weight, None, mask, mask, mask, SIGMOID, 1.0)
    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.func.grad(lambda w: weight_raw.masked_weight(w, mask, SIGMOID, 1.0).sum())(mask)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no derivative"):
        weight_raw.masked_weight(torch.autograd.forward_ad.make_dual(mask, mask), mask, SIGMOID, 1.0)
    with torch.no_grad():
        assert weight_raw.masked_weight(weight, mask, SIGMOID, 1.0).shape == (2, 3)


@pytest.mark.once
def test_an_unknown_instruction_set_is_refused():
    child = subprocess.run(
        [sys.executable, "-c", "import metamask_ext"],
        env={**os.environ, "METAMASK_CPU_CAPABILITY": "avx9"},
        capture_output=True,
        text=True,
    )
    assert child.returncode != 0
    assert "METAMASK_CPU_CAPABILITY must be default, avx2, avx512 or avx512_bf16, got 'avx9'" in child.stderr
