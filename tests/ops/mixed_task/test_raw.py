"""task_masked_linear and its derivatives as raw ops: against float64 sample by sample, in every type, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from support.gpu import DEVICES
from support.mixed_task import (
    CASES,
    GATE,
    TASKS,
    Batch,
    assert_near,
    check,
    check_double_backward,
    check_without_bias_masks,
    cotangents_of,
    leaves,
    plain,
    plain_gradients,
)
from support.profiling import allocated
from support.samples import DTYPES, GATES, opcheck

import metamask_ext as mm
from metamask_ext.ops.gate import SIGMOID
from metamask_ext.ops.mixed_task import raw as mixed_task_raw
from metamask_ext.ops.mixed_task import reference as mixed_task_reference

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_gate = pytest.mark.parametrize("gate", [GATES[1], GATES[3]], ids=["sigmoid", "hard"])
each_case = pytest.mark.parametrize("case", CASES)
each_form = pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
# The gate is in the arithmetic, the form in the addresses: each with each is tested where it costs nothing.
each_gate_and_form = pytest.mark.parametrize(
    ("gate", "stacked"), [(GATES[1], True), (GATES[3], False)], ids=["sigmoid-stacked", "hard-list"]
)
NAMES = ("dx", "dW", "dM", "db", "dMb")


@each_device
@each_gate_and_form
@each_dtype
@each_case
def test_output_and_gradients_equal_plain_torch_sample_by_sample(case, dtype, gate, stacked, device):
    check(case, gate, dtype, stacked, device=device)


@each_device
@each_gate_and_form
@each_dtype
@each_case
def test_second_gradients_equal_plain_torch_sample_by_sample(case, dtype, gate, stacked, device):
    check_double_backward(case, gate, dtype, stacked, device=device)


@each_case
def test_without_a_bias(case):
    check(case, GATE, torch.float64, True, bias=False)
    check_double_backward(case, GATE, torch.float64, False, bias=False)


@pytest.mark.parametrize("case", ["3-d", "ragged", "groups"])
def test_a_bias_without_masks(case):
    check_without_bias_masks(case)


@each_form
@each_gate
@pytest.mark.parametrize("case", ["one row a task", "3-d", "groups", "no samples"])
def test_the_reference_equals_plain_torch_sample_by_sample(case, gate, stacked):
    batch = Batch(case, torch.float64, stacked)
    arguments = batch.arguments(gate)
    assert_near(mixed_task_reference.task_masked_linear(*arguments), plain(batch, gate), 17, "y")
    got = leaves(mixed_task_reference.task_masked_linear_backward(batch.grad, *arguments))
    for one, other in zip(got, plain_gradients(batch, gate)):
        assert_near(one, other, 129, "gradient")


@pytest.mark.parametrize("case", ["3-d", "ragged", "groups"])
@each_form
def test_any_strides(case, stacked):
    batch = Batch(case, torch.float32, stacked)
    loose = batch.wider()
    assert torch.equal(
        mixed_task_raw.task_masked_linear(*loose.arguments(GATE)), mixed_task_raw.task_masked_linear(*batch.arguments(GATE))
    )
    got = mixed_task_raw.task_masked_linear_backward(loose.grad, *loose.arguments(GATE))
    wanted = mixed_task_raw.task_masked_linear_backward(batch.grad, *batch.arguments(GATE))
    assert all(torch.equal(one, other) for one, other in zip(leaves(got), leaves(wanted)))


@pytest.mark.every_device
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_float32_parameters_with_a_16_bit_product(out):
    batch = Batch("ragged", torch.float32)
    double = batch.double()
    y = mixed_task_raw.task_masked_linear(*batch.arguments(GATE), out)
    assert y.dtype == out
    assert_near(y, plain(double, GATE), 129, "y")
    got = leaves(mixed_task_raw.task_masked_linear_backward(batch.grad.to(out), *batch.arguments(GATE)))
    for one, other in zip(got, plain_gradients(double, GATE)):
        assert one.dtype == torch.float32
        assert_near(one.to(out), other, 1134, "gradient")


@each_form
@pytest.mark.parametrize("case", ["3-d", "ragged"])
def test_each_gradient_alone_equals_all_together(case, stacked):
    batch = Batch(case, torch.float64, stacked)
    arguments = batch.arguments(GATE)
    together = mixed_task_raw.task_masked_linear_backward(batch.grad, *arguments)
    for index in range(5):
        needs = tuple(position == index for position in range(5))
        got = mixed_task_raw.task_masked_linear_backward(batch.grad, *arguments, needs)
        assert [bool(leaves(one)) for one in got] == list(needs)
        for one, other in zip(leaves(got[index]), leaves(together[index])):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    cotangents = cotangents_of(batch)
    together = mixed_task_raw.task_masked_linear_double_backward(*cotangents, batch.grad, *arguments)
    for index in range(6):
        needs = tuple(position == index for position in range(6))
        got = mixed_task_raw.task_masked_linear_double_backward(*cotangents, batch.grad, *arguments, needs)
        assert [bool(leaves(one)) for one in got] == list(needs)
        for one, other in zip(leaves(got[index]), leaves(together[index])):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.every_device(emulated_if=lambda case, stacked, **_: case == "groups" and not stacked)
@each_form
@pytest.mark.parametrize("case", ["3-d", "groups"])
def test_a_cotangent_that_is_not_there_is_zero(case, stacked):
    batch = Batch(case, torch.float64, stacked)
    arguments = batch.arguments(GATE)
    full = cotangents_of(batch)
    zero = [[torch.zeros_like(one) for one in c] if isinstance(c, list) else torch.zeros_like(c) for c in full]
    for index in range(5):
        absent = [] if isinstance(full[index], list) else None
        only = [full[i] if i == index else zero[i] for i in range(5)]
        missing = [full[i] if i == index else ([] if isinstance(full[i], list) else None) for i in range(5)]
        without = [absent if i == index else full[i] for i in range(5)]
        with_zero = [zero[i] if i == index else full[i] for i in range(5)]
        for given, wanted in ((missing, only), (without, with_zero)):
            got = mixed_task_raw.task_masked_linear_double_backward(*given, batch.grad, *arguments)
            expected = mixed_task_raw.task_masked_linear_double_backward(*wanted, batch.grad, *arguments)
            for one, other in zip(leaves(got), leaves(expected)):
                torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.every_device
def test_some_cotangents_of_a_list_of_masks():
    batch = Batch("3-d", torch.float64, stacked=False)
    dx, dw, dm, db, dbm = cotangents_of(batch)
    some = [one if index % 2 else None for index, one in enumerate(dm)]
    zeros = [one if index % 2 else torch.zeros_like(one) for index, one in enumerate(dm)]
    got, wanted = (
        mixed_task_raw.task_masked_linear_double_backward(dx, dw, given, db, dbm, batch.grad, *batch.arguments(GATE))
        for given in (some, zeros)
    )
    assert all(torch.equal(one, other) for one, other in zip(leaves(got), leaves(wanted)))


@pytest.mark.every_device
@each_form
def test_absent_tasks_get_zeros_and_the_others_do_not(stacked):
    batch = Batch("3-d", torch.float32, stacked)  # tasks 0, 1 and 3 of 6
    _, _, dm, _, dbm = mixed_task_raw.task_masked_linear_backward(batch.grad, *batch.arguments(GATE))
    for grads in (dm, dbm):
        by_task = grads[0] if stacked else grads
        assert len(by_task) == TASKS
        assert [bool((one != 0).any()) for one in by_task] == [True, True, False, True, False, False]


@pytest.mark.every_device
def test_values_that_are_not_finite_stay_in_their_row_and_task():
    batch = Batch("3-d", torch.float32)
    masks = batch.masks[0]
    y = mixed_task_raw.task_masked_linear(*batch.arguments(GATE))
    for value in (float("nan"), float("inf")):
        batch.weight[7, 16] = value  # the last column: next to the padding
        masks[0, 7, 16] = float("nan")
        bad = ~torch.isfinite(mixed_task_raw.task_masked_linear(*batch.arguments(GATE)))
        assert bool(bad[:, :, 7].all()) and int(bad.sum()) == 4 * 3
    batch.weight[7, 16] = 1.0
    got = mixed_task_raw.task_masked_linear(*batch.arguments(GATE))
    assert torch.isnan(got[:, :, 7]).all(-1).tolist() == [False, True, False, False]  # the sample of task 0
    assert int(torch.isnan(got).sum()) == 3
    rest = torch.arange(129) != 7
    assert torch.equal(got[..., rest], y[..., rest])
    dx, dw, dm, *_ = mixed_task_raw.task_masked_linear_backward(batch.grad, *batch.arguments(GATE))
    assert torch.isnan(dx).nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[1, 16]]
    assert torch.isnan(dw).nonzero().tolist() == [[7, 16]]
    assert torch.isnan(dm[0]).nonzero().tolist() == [[0, 7, 16]]


@pytest.mark.every_device
def test_large_logits_give_the_dense_layer_or_nothing():
    batch = Batch("one row a task", torch.float32, bias=False)
    for logit in (100.0, 1e4, float("inf")):
        batch.masks[0].fill_(logit)
        dense = batch.input.double() @ batch.weight.double().t()
        assert_near(mixed_task_raw.task_masked_linear(*batch.arguments(GATE)), dense, 17, "on")
        batch.masks[0].neg_()
        off = mixed_task_raw.task_masked_linear(*batch.arguments(GATE))
        assert (off.abs().max() < 1e-36).item()
        grads = leaves(mixed_task_raw.task_masked_linear_backward(batch.grad, *batch.arguments(GATE)))
        assert all(bool(torch.isfinite(grad).all()) for grad in grads)


@pytest.mark.parametrize("case", ["ragged", "129 rows"])
def test_the_same_numbers_every_time_for_a_number_of_threads(case):
    batch = Batch(case, torch.float32)
    arguments, cotangents = batch.arguments(GATE), cotangents_of(batch)

    def everything():
        return leaves(
            (
                mixed_task_raw.task_masked_linear(*arguments),
                mixed_task_raw.task_masked_linear_backward(batch.grad, *arguments),
                mixed_task_raw.task_masked_linear_double_backward(*cotangents, batch.grad, *arguments),
            )
        )

    for threads in (1, 2):
        torch.set_num_threads(threads)
        first = everything()
        for _ in range(3):
            assert all(torch.equal(one, other) for one, other in zip(first, everything()))


@pytest.mark.every_device
def test_inputs_are_not_written():
    batch = Batch("3-d", torch.float32)
    tensors = leaves((batch.tensors(), batch.grad, cotangents_of(batch)))
    kept = [tensor.clone() for tensor in tensors]
    cotangents = cotangents_of(batch)
    mixed_task_raw.task_masked_linear(*batch.arguments(GATE))
    mixed_task_raw.task_masked_linear_backward(batch.grad, *batch.arguments(GATE))
    mixed_task_raw.task_masked_linear_double_backward(*cotangents, batch.grad, *batch.arguments(GATE))
    assert all(torch.equal(one, other) for one, other in zip(tensors, kept))


@pytest.mark.every_device
@each_dtype
def test_one_mask_expanded_for_all_tasks(dtype):
    """As it is where a meta-learner starts: the same numbers as from a copy for each task, and the gradients one array a task."""
    batch = Batch("one row a task", dtype)
    expanded = [[one[1].expand_as(one)] for one in (batch.masks[0], batch.bias_masks[0])]
    made = []
    for masks, bias_masks in (expanded, [[one.clone()] for (one,) in expanded]):
        batch.masks, batch.bias_masks = masks, bias_masks
        arguments = batch.arguments(GATE)
        first = leaves(mixed_task_raw.task_masked_linear_backward(batch.grad, *arguments))
        second = leaves(mixed_task_raw.task_masked_linear_double_backward(*cotangents_of(batch), batch.grad, *arguments))
        made.append([mixed_task_raw.task_masked_linear(*arguments), *first, *second])
    assert expanded[0][0].stride(0) == expanded[1][0].stride(0) == 0
    assert all(torch.equal(one, other) and one.is_contiguous() for one, other in zip(*made, strict=True))


@pytest.mark.once
@each_form
@each_dtype
def test_opcheck(dtype, stacked):
    ops = torch.ops.metamask
    for case in ("one row a task", "groups", "no samples"):
        batch = Batch(case, dtype, stacked)
        arguments, cotangents = batch.arguments(GATE), cotangents_of(batch)
        opcheck(ops.task_masked_linear.default, arguments)
        opcheck(ops.task_masked_linear_backward.default, (batch.grad, *arguments, (True,) * 5))
        opcheck(ops.task_masked_linear_double_backward.default, (*cotangents, batch.grad, *arguments, (True,) * 6))
        needs = (True, False, True, False, False)
        opcheck(ops.task_masked_linear_backward.default, (batch.grad, *arguments, needs))


def test_nothing_of_the_size_of_all_thetas_is_allocated_from_a_list():
    """32 samples of 16 tasks. Of the weight's size there are its gradient and those of the masks that the list has, and no more."""
    slots = [5 * i % 16 for i in range(32)]
    batch = Batch(((32,), 1, 512, 512, slots), torch.float32, stacked=False, tasks=16)
    size = batch.weight.numel() * 4
    arguments, cotangents = batch.arguments(GATE), cotangents_of(batch)
    assert allocated(lambda: mixed_task_raw.task_masked_linear(*arguments)) < size / 2
    for masks, arrays in ((True, 17), (False, 1)):
        needs = (True, True, masks, True, masks)
        used = allocated(lambda needs=needs: mixed_task_raw.task_masked_linear_backward(batch.grad, *arguments, needs))
        assert arrays * size <= used < (arrays + 0.5) * size
        used = allocated(
            lambda needs=needs: mixed_task_raw.task_masked_linear_double_backward(
                *cotangents, batch.grad, *arguments, (True, *needs)
            )
        )
        assert arrays * size <= used < (arrays + 1) * size


# --- What is refused: by the op, its fake, the functional layer and its reference path.


def change(batch, **changes):
    for name, value in changes.items():
        setattr(batch, name, value)
    return batch


SLOTS = torch.tensor([3, 0, 3, 1])
REFUSED = {
    "slots too large": (ValueError, r"slots must be in \[0, 6\), got 6 at position 2", {"slots": torch.tensor([3, 0, 6, 1])}),
    "slots negative": (ValueError, r"slots must be in \[0, 6\), got -1 at position 1", {"slots": torch.tensor([3, -1, 3, 9])}),
    "slots int32": (TypeError, "slots must be int64, got", {"slots": SLOTS.int()}),
    "slots of floats": (TypeError, "slots must be int64, got", {"slots": SLOTS.double()}),
    "slots too short": (ValueError, r"slots must be \[B\] = \[4\] as in input \[4, 3, 17\], got \[3\]", {"slots": SLOTS[:3]}),
    "slots 2-d": (ValueError, r"slots must be \[B\] = \[4\]", {"slots": SLOTS[:, None]}),
    "input too narrow": (ValueError, r"input must be \[B, ..., in\] with in = 17", {"input": torch.zeros(4, 16).double()}),
    "input without samples": (ValueError, r"input must be \[B, ..., in\] with in = 17", {"input": torch.zeros(17).double()}),
    "weight 1-d": (ValueError, r"weight must be \[out, in\], got", {"weight": torch.zeros(17).double(), "masks": []}),
    "integer weight": (TypeError, "weight must be float64, float32, bfloat16 or float16", {"weight": torch.ones(129, 17).int()}),
    "bias too short": (ValueError, r"bias must be \[out\] = \[129\], got \[5\]", {"bias": torch.zeros(5).double()}),
    "bias of another dtype": (TypeError, "bias must have the dtype of weight", {"bias": torch.zeros(129)}),
    "bias masks without a bias": (ValueError, "bias_masks needs a bias", {"bias": None}),
}


def other_masks(batch, index, mask):
    return change(batch, masks=[mask if i == index else one for i, one in enumerate(batch.masks)])


REFUSED_MASKS = {
    "stacked of another shape": (
        ValueError,
        r"masks must be T masks of the shape of weight, \[129, 17\], got \[6, 129, 16\]",
        lambda batch: change(batch, masks=[torch.zeros(6, 129, 16).double()]),
    ),
    "stacked of another dtype": (
        TypeError,
        "masks must have the dtype of weight",
        lambda batch: change(batch, masks=[torch.zeros(6, 129, 17)]),
    ),
    "one of another shape": (
        ValueError,
        r"masks\[3\] must have the shape of weight, \[129, 17\], got \[129, 16\]",
        lambda batch: other_masks(batch, 3, torch.zeros(129, 16).double()),
    ),
    "one of another dtype": (
        TypeError,
        r"masks\[2\] must have the dtype of weight",
        lambda batch: other_masks(batch, 2, torch.zeros(129, 17)),
    ),
    "fewer bias masks": (
        ValueError,
        "bias_masks must have as many tasks as masks, 6, got 2",
        lambda batch: change(batch, bias_masks=batch.bias_masks[:2]),
    ),
    "a bias mask of another shape": (
        ValueError,
        r"bias_masks\[1\] must have the shape of bias",
        lambda batch: change(batch, bias_masks=[one[: 129 - index] for index, one in enumerate(batch.bias_masks)]),
    ),
}


def refused(error, message, batch, values=False):
    arguments = batch.arguments(GATE)
    with pytest.raises(error, match=message):
        mixed_task_raw.task_masked_linear(*arguments)
    with pytest.raises(error, match=message):
        mixed_task_raw.task_masked_linear_backward(batch.grad, *arguments)
    with pytest.raises(error, match=message):
        mixed_task_raw.task_masked_linear_double_backward(None, None, [], None, [], batch.grad, *arguments)

    def call():
        masks = batch.masks[0] if len(batch.masks) == 1 else batch.masks
        return mm.task_masked_linear(batch.input, batch.slots, batch.weight, masks, batch.bias, batch.bias_masks)

    with pytest.raises(error, match=message):
        call()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(error, match=message):
        call()
    if not values:  # nobody can look at the values of a fake tensor
        meta = batch.with_tensors(tensor.to("meta") for tensor in batch.tensors())
        meta.slots = batch.slots.to("meta")
        meta.bias_masks = [one.to("meta") for one in batch.bias_masks]
        with pytest.raises(error, match=message):
            mixed_task_raw.task_masked_linear(*meta.arguments(GATE))


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_refused_everywhere(name):
    error, message, changes = REFUSED[name]
    refused(error, message, change(Batch("3-d", stacked=False), **changes), values=" at position" in message)


@pytest.mark.parametrize("name", REFUSED_MASKS)
def test_masks_that_do_not_fit_are_refused_everywhere(name):
    error, message, make = REFUSED_MASKS[name]
    refused(error, message, make(Batch("3-d", stacked=False)))


def test_other_refusals():
    batch = Batch("3-d", stacked=False)
    x, slots, w, masks, b, bm, *_ = batch.arguments(GATE)
    with pytest.raises(ValueError, match="masks\\[1\\] must be on the device of weight, cpu, got meta"):
        mm.task_masked_linear(x, slots, w, [masks[0], masks[1].to("meta")])
    with pytest.raises(TypeError, match="masks\\[1\\] must be a tensor, got int"):
        mm.task_masked_linear(x, slots, w, [masks[0], 3])
    with pytest.raises(TypeError, match="masks must be a tensor or a sequence of tensors, got set"):
        mm.task_masked_linear(x, slots, w, set(masks))
    with pytest.raises(TypeError, match="slots must be a tensor, got list"):
        mm.task_masked_linear(x, slots.tolist(), w, masks)
    with pytest.raises(ValueError, match=r"slots must be in \[0, 0\), got 3 at position 0"):
        mm.task_masked_linear(x, slots, w, [])
    with pytest.raises(ValueError, match="bias_masks must have as many tasks as masks, 6, got 0"):
        mm.task_masked_linear(x, slots, w, masks, b, [])
    with pytest.raises(TypeError, match="input must have the dtype of weight, torch.float64, got torch.float32"):
        mm.task_masked_linear(x.float(), slots, w, masks)
    with pytest.raises(ValueError, match="gate must be one of"):
        mm.task_masked_linear(x, slots, w, masks, gate="soft")
    with pytest.raises(ValueError, match="gate must be 0 .* got 2"):
        mixed_task_raw.task_masked_linear(x, slots, w, masks, b, bm, 2, 1.0)
    for groups in (0, 2):
        with pytest.raises(ValueError, match=f"groups must divide the rows of weight, 129, got {groups}"):
            mixed_task_raw.task_masked_linear(x, slots, w, masks, b, bm, SIGMOID, 1.0, groups)
    with pytest.raises(ValueError, match=r"grad must be \[B, ..., out\] = \[4, 3, 129\], got \[4, 3, 2\]"):
        mixed_task_raw.task_masked_linear_backward(batch.grad[..., :2], *batch.arguments(GATE))
    with pytest.raises(ValueError, match="expected 6 cotangent_masks tensors, one per mask, or none, got 1"):
        mixed_task_raw.task_masked_linear_double_backward(None, None, [masks[0]], None, [], batch.grad, *batch.arguments(GATE))
    with pytest.raises(ValueError, match="cotangent_input must have the shape of input"):
        mixed_task_raw.task_masked_linear_double_backward(x[:1], None, [], None, [], batch.grad, *batch.arguments(GATE))


def test_a_raw_op_refuses_to_be_differentiated_also_through_a_list():
    batch = Batch("3-d", stacked=False)
    batch.masks[2].requires_grad_()
    with pytest.raises(RuntimeError, match="metamask::task_masked_linear has no derivative"):
        mixed_task_raw.task_masked_linear(*batch.arguments(GATE))
