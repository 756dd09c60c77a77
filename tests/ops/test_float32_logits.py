"""Logits of float32 beside weights of 16 bits in the raw ops: against float64, and bit for bit against logits of 16 bits."""

from __future__ import annotations

import pytest
import torch
from support import linear_checks, mixed_task, samples, step_checks, weight_checks
from support.closeness import assert_close
from support.gpu import DEVICES
from support.linear_checks import inputs
from support.mixed_task import Batch, cotangents_of
from support.samples import ALL, GATE_IDS, GATES, PAIR_IDS, PAIRS, SMALL, opcheck
from torch.utils._pytree import tree_leaves, tree_map

from metamask_ext.ops.gate import HARD, SIGMOID
from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.linear import reference as linear_reference
from metamask_ext.ops.mixed_task import raw as mixed_task_raw
from metamask_ext.ops.mixed_task import reference as mixed_task_reference
from metamask_ext.ops.weight import raw as weight_raw
from metamask_ext.ops.weight import reference as weight_reference

each_pair = pytest.mark.parametrize(("dtype", "mask_dtype"), PAIRS, ids=PAIR_IDS)
each_gate = pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
each_device = pytest.mark.parametrize("device", DEVICES)
of_16_bits = pytest.mark.parametrize("dtype", [dtype for dtype, _ in PAIRS], ids=lambda dtype: str(dtype)[6:])


def few(sample, gate, **_):
    return sample in SMALL[2:] and gate in GATES[1:4:2]


@pytest.mark.every_device(emulated_if=few)
@each_device
@each_gate
@each_pair
@pytest.mark.parametrize("sample", ALL, ids=samples.ids(ALL))
def test_masked_weight(sample, dtype, mask_dtype, gate, device):
    weight_checks.check(sample, gate, dtype, device, mask_dtype=mask_dtype)


@pytest.mark.every_device
@each_device
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@each_pair
def test_the_result_of_masked_weight_and_its_gradient_may_have_another_type(dtype, mask_dtype, other, device):
    for sample in (SMALL[2], ALL[-1]):
        weight_checks.check(sample, GATES[1], dtype, device, other, mask_dtype)


@pytest.mark.every_device
@each_device
@each_pair
@pytest.mark.parametrize("listed", ["all small", "packs", "many"])
def test_a_list_gives_what_its_weights_give_alone(listed, dtype, mask_dtype, device):
    weight, mask, grad, a, b = weight_checks.columns(listed, 5, dtype, device, mask_dtype)
    gate = GATES[1]
    b = [one.float() for one in b]
    together = (
        weight_raw.masked_weight_list(weight, mask, *gate),
        *weight_raw.masked_weight_list_backward(grad, weight, mask, *gate),
        *weight_raw.masked_weight_list_double_backward(a, b, grad, weight, mask, *gate),
    )
    for index, (w, m, g, one, two) in enumerate(zip(weight, mask, grad, a, b)):
        alone = (
            weight_raw.masked_weight(w, m, *gate),
            *weight_raw.masked_weight_backward(g, w, m, *gate),
            *weight_raw.masked_weight_double_backward(one, two, g, w, m, *gate),
        )
        for column, expected in zip(together, alone):
            assert column[index].dtype == expected.dtype
            # Other threads or other packs: the remainder of a vector may round otherwise.
            assert_close(column[index].cpu(), expected.double().cpu(), "a list")


@each_device
@pytest.mark.parametrize("gate", GATES[1::2], ids=GATE_IDS[1::2])
@each_pair
@pytest.mark.parametrize("shape", linear_checks.SHAPES.values(), ids=linear_checks.SHAPES.keys())
def test_masked_linear(shape, dtype, mask_dtype, gate, device):
    linear_checks.check(*shape, gate, dtype, device, mask_dtype)


# Small batches and large ones, whole and ragged tiles, sums of one block and of several
EMULATED = {
    "vector": ((17,), 3),
    "aligned": ((8, 64), 48),
    "ragged": ((17, 531), 300),
    "second room": ((32, 96), 70),
    "two windows": ((45, 72), 35),
    "gemm": ((65, 40), 24),
}


@pytest.mark.emulated
@pytest.mark.usefixtures("in_the_emulator")
@pytest.mark.parametrize("gate", GATES[1::2], ids=GATE_IDS[1::2])
@each_pair
@pytest.mark.parametrize("shape", EMULATED.values(), ids=EMULATED.keys())
def test_masked_linear_in_the_emulator(shape, dtype, mask_dtype, gate):
    linear_checks.check(*shape, gate, dtype, mask_dtype=mask_dtype)


@each_device
@each_pair
@pytest.mark.parametrize("batch", [1, 32, 200])
def test_the_gradient_of_the_logits_was_never_rounded_to_16_bits(batch, dtype, mask_dtype, device):
    tensors = inputs((batch, 129), 65, dtype, device, mask_dtype)
    *arguments, grad = tensors
    got = linear_raw.masked_linear_backward(grad, *arguments, *GATES[0])
    exact = linear_checks.expected(tensors, GATES[0])[1]
    for index in (2, 4):
        error = (got[index].double().cpu() - exact[index]).abs().max() / exact[index].abs().max()
        assert error < 1e-5, f"gradient {index}: {error:.3g}"


@pytest.mark.every_device(emulated_if=step_checks.has_kernels)
@step_checks.each_step(("sgd", False), ("sgd", True), ("adamw", True))
@each_pair
@pytest.mark.parametrize("gate", GATES[::2], ids=GATE_IDS[::2])
@pytest.mark.parametrize("shape", step_checks.SHAPES.values(), ids=step_checks.SHAPES.keys())
def test_a_step_of_every_parameter_of_masked_linear(shape, step, gate, dtype, mask_dtype, device):
    """``step``: a rule, and whether something is kept of the parameters."""
    step_checks.check(*shape, gate, dtype, *step, device, mask_dtype)


@pytest.mark.every_device
@each_device
@of_16_bits
def test_a_step_that_16_bits_would_round_away_moves_float32_logits(dtype, device):
    w, grad = (torch.ones(33, 17, dtype=dtype, device=device) for _ in range(2))
    m, buffer = torch.full((33, 17), 4.0, device=device), torch.zeros(33, 17, device=device)
    step = (1e-3, 0.0, 0.9)
    for momentum_buffer in (None, buffer):
        start, its = m.clone(), step if momentum_buffer is not None else (*step[:2], 0.0)
        arguments = (SIGMOID, 1.0, (False, True), (False, True), [None, momentum_buffer], [(0.0,) * 3, its])
        weight_raw.masked_weight_backward_sgd_(grad, w, m, *arguments)
        s = torch.sigmoid(start.double().cpu())
        assert_close(m.cpu(), start.double().cpu() - 1e-3 * s * (1 - s), "step")
        assert not torch.equal(m, start)
    assert_close(buffer.cpu(), s * (1 - s), "momentum buffer")


@pytest.mark.every_device(emulated_if=lambda case, **_: case not in ("ragged", "wide", "129 rows", "groups over panels"))
@each_device
@each_pair
@pytest.mark.parametrize(("gate", "stacked"), [(GATES[1], True), (GATES[3], False)], ids=["sigmoid-stacked", "hard-list"])
@pytest.mark.parametrize("case", mixed_task.CASES)
def test_task_masked_linear(case, gate, stacked, dtype, mask_dtype, device):
    mixed_task.check(case, gate, dtype, stacked, device=device, mask_dtype=mask_dtype)
    mixed_task.check_double_backward(case, gate, dtype, stacked, device=device, mask_dtype=mask_dtype)


@pytest.mark.every_device
@each_device
@of_16_bits
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
@pytest.mark.parametrize("wide", ["masks", "bias_masks"])
def test_the_masks_of_a_bias_may_have_another_type_than_those_of_its_weight(wide, stacked, dtype, device):
    batch = Batch("groups", dtype, stacked, device=device)
    setattr(batch, wide, [mask.float() for mask in getattr(batch, wide)])
    gate, double = GATES[1], batch.double()
    got = mixed_task_raw.task_masked_linear(*batch.arguments(gate))
    mixed_task.assert_near(got, mixed_task.plain(double, gate), batch.weight.shape[1], "y")
    found = mixed_task.leaves(mixed_task_raw.task_masked_linear_backward(batch.grad, *batch.arguments(gate)))
    cotangents = cotangents_of(batch)
    second = mixed_task.leaves(mixed_task_raw.task_masked_linear_double_backward(*cotangents, batch.grad, *batch.arguments(gate)))
    exact = tree_map(lambda one: one.double().cpu(), cotangents)
    wanted = mixed_task_reference.task_masked_linear_double_backward(*exact, double.grad, *double.arguments(gate))
    expected = [*mixed_task.plain_gradients(double, gate), *mixed_task.leaves(wanted)]
    for one, other, like in zip([*found, *second], expected, [*batch.tensors(), batch.grad, *batch.tensors()]):
        assert one.dtype == like.dtype
        mixed_task.assert_near(one, other, mixed_task.terms_of(batch), "gradient")


def bits_of(tree):
    return [leaf for leaf in tree_leaves(tree) if leaf is not None]


def same_after_rounding(wide, narrow, dtype):
    """Logits of 16 bits in float32: the results are the same, but for the logits' gradients, which round to those of 16 bits."""
    wide, narrow = bits_of(wide), bits_of(narrow)
    assert len(wide) == len(narrow)
    for one, other in zip(wide, narrow):
        assert torch.equal(one.to(dtype), other)


@pytest.mark.every_device
@of_16_bits
@each_gate
def test_logits_that_16_bits_hold_give_the_results_of_logits_of_16_bits(gate, dtype):
    w, m, g, a, b = samples.Sample("33x65", (33, 65)).tensors(5, dtype)
    for op, before in (
        (weight_raw.masked_weight, ()),
        (weight_raw.masked_weight_backward, (g,)),
        (weight_raw.masked_weight_double_backward, (a, b, g)),
    ):
        same_after_rounding(op(*before, w, m.float(), *gate), op(*before, w, m, *gate), dtype)
    x, w, m, b, bm, grad = inputs((5, 129), 33, dtype)
    wide, narrow = (x, w, m.float(), b, bm.float(), *gate), (x, w, m, b, bm, *gate)
    same_after_rounding(linear_raw.masked_linear(*wide), linear_raw.masked_linear(*narrow), dtype)
    got, wanted = (linear_raw.masked_linear_backward(grad, *arguments) for arguments in (wide, narrow))
    same_after_rounding(got[:3], wanted[:3], dtype)  # the bias's sum is not rounded before the gate
    batch = Batch("3-d", dtype)
    arguments = batch.arguments(gate)
    masks, bias_masks = ([mask.float() for mask in given] for given in (batch.masks, batch.bias_masks))
    widened = (*arguments[:3], masks, batch.bias, bias_masks, *arguments[6:])
    for op, before in (
        (mixed_task_raw.task_masked_linear, ()),
        (mixed_task_raw.task_masked_linear_backward, (batch.grad,)),
        (mixed_task_raw.task_masked_linear_double_backward, (*cotangents_of(batch), batch.grad)),
    ):
        same_after_rounding(op(*before, *widened), op(*before, *arguments), dtype)


@pytest.mark.every_device
@of_16_bits
@pytest.mark.parametrize("threshold", [0.0, 0.1, -0.3, 1e6])
def test_a_hard_gate_compares_float32_logits_themselves(threshold, dtype):
    c = torch.tensor(threshold)
    m = torch.stack([c, torch.nextafter(c, torch.tensor(torch.inf)), torch.nextafter(c, torch.tensor(-torch.inf))]).repeat(15)
    w = torch.ones(45, dtype=dtype)
    on = m > c
    assert torch.equal(weight_raw.masked_weight(w, m, HARD, threshold), on.to(dtype))
    grid, eye = m.expand(45, 45).t().contiguous(), torch.eye(45, dtype=dtype)
    product = linear_raw.masked_linear(eye, w.expand(45, 45), grid, None, None, HARD, threshold)
    assert torch.equal(product, on.to(dtype).expand(45, 45))
    slots = torch.zeros(45, dtype=torch.int64)
    product = mixed_task_raw.task_masked_linear(eye, slots, w.expand(45, 45), [grid], None, [], HARD, threshold)
    assert torch.equal(product, on.to(dtype).expand(45, 45))


@each_pair
def test_references_give_the_gradients_of_logits_in_their_dtype(dtype, mask_dtype):
    w, m, g, a, b = samples.Sample("3x5", (3, 5)).tensors(5, dtype, mask_dtype=mask_dtype)
    assert [t.dtype for t in weight_reference.masked_weight_backward(g, w, m, *GATES[0])] == [dtype, mask_dtype]
    second = weight_reference.masked_weight_double_backward(a, b.float(), g, w, m, *GATES[0])
    assert [t.dtype for t in second] == [dtype, dtype, mask_dtype]
    x, w, m, b, bm, grad = inputs((2, 5), 3, dtype, mask_dtype=mask_dtype)
    leaves = [t.requires_grad_() for t in (x, w, m, b, bm)]
    grads = torch.autograd.grad(linear_reference.masked_linear(*leaves, *GATES[0]), leaves, grad)
    assert [t.dtype for t in grads] == [t.dtype for t in leaves]


@pytest.mark.once
@of_16_bits
def test_opcheck(dtype):
    w, m, g, a, b = samples.Sample("3x5", (3, 5), samples.transposed).tensors(5, dtype, mask_dtype=torch.float32)
    gate, b = GATES[0], b.float()
    op = torch.ops.metamask
    opcheck(op.masked_weight.default, (w, m, *gate))
    opcheck(op.masked_weight_backward.default, (g, w, m, *gate))
    opcheck(op.masked_weight_double_backward.default, (a, b, g, w, m, *gate))
    opcheck(op.masked_weight_list_backward.default, ([g, g], [w, w], [m, m], *gate))
    opcheck(op.masked_weight_list_double_backward.default, ([a], [b], [g], [w], [m], *gate))
    steps = (m.clone(), None, torch.zeros_like(m), *gate, (True, True), (False, True), [0.0] * 3, [0.1, 0.0, 0.9])
    opcheck(op.masked_weight_backward_sgd_.default, (g, w, *steps))
    x, w, m, b, bm, grad = inputs((2, 5), 3, dtype, mask_dtype=torch.float32)
    opcheck(op.masked_linear.default, (x, w, m, b, bm, *gate))
    opcheck(op.masked_linear_backward.default, (grad, x, w, m, b, bm, *gate))
    batch = Batch("3-d", dtype, tasks=4, mask_dtype=torch.float32)
    opcheck(op.task_masked_linear.default, batch.arguments(gate))
    opcheck(op.task_masked_linear_backward.default, (batch.grad, *batch.arguments(gate)))
    opcheck(op.task_masked_linear_double_backward.default, (*cotangents_of(batch), batch.grad, *batch.arguments(gate)))


def refusals(weight, mask):
    bias, x, slots, gate = weight[:, 0].contiguous(), weight[:1], torch.zeros(1, dtype=torch.int64), GATES[0]
    given = mask[:, 0].contiguous()
    return {
        "mask_logits": lambda: weight_raw.masked_weight(weight, mask, *gate),
        "mask_logits[1]": lambda: weight_raw.masked_weight_list([weight] * 2, [weight, mask], *gate),
        "bias_mask_logits": lambda: linear_raw.masked_linear(x, weight, weight, bias, given, *gate),
        "masks": lambda: mixed_task_raw.task_masked_linear(x, slots, weight, [mask[None]], None, [], *gate),
        "masks[1]": lambda: mixed_task_raw.task_masked_linear(x, slots, weight, [weight, mask], None, [], *gate),
        "bias_masks[0]": lambda: mixed_task_raw.task_masked_linear(x, slots, weight, [weight], bias, [given], *gate),
    }


@pytest.mark.every_device
@pytest.mark.parametrize("name", refusals(torch.zeros(1, 1), torch.zeros(1, 1)))
@pytest.mark.parametrize(
    ("weight", "mask"),
    [
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=lambda dtype: str(dtype)[6:],
)
def test_other_types_are_refused(weight, mask, name):
    with pytest.raises(TypeError) as refused:
        refusals(torch.zeros(3, 2, dtype=weight), torch.zeros(3, 2, dtype=mask))[name]()
    assert str(refused.value).startswith(f"{name} must have the dtype of ")


@pytest.mark.every_device
def test_a_list_takes_one_dtype_of_logits():
    w, gate = torch.zeros(3, 2, dtype=torch.bfloat16), GATES[0]
    x, slots = w[:1], torch.zeros(1, dtype=torch.int64)
    for masks in ([w, w.float()], [w.float(), w]):
        first, second = (str(mask.dtype) for mask in masks)
        kinds = {"torch.bfloat16": "BFloat16", "torch.float32": "Float"}
        wanted = (
            f"mask(s|_logits).1. must have the dtype of mask(s|_logits).0., (c10::)?{kinds[first]}, got (c10::)?{kinds[second]}"
        )
        with pytest.raises(TypeError, match=wanted):
            weight_raw.masked_weight_list([w, w], masks, *gate)
        with pytest.raises(TypeError, match=wanted):
            mixed_task_raw.task_masked_linear(x, slots, w, masks, None, [], *gate)
