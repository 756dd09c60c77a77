"""Sizes that would overflow, rows without columns, shared memory: right, or refused in words before anything changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import metamask_ext as mm
from metamask_ext.nn import MaskedConv2d
from metamask_ext.ops.conv2d import raw as conv2d_raw
from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.mixed_task import raw as mixed_task_raw
from metamask_ext.ops.packed import raw as packed_raw
from metamask_ext.ops.packed.functional import superposition_gradient
from metamask_ext.ops.weight import raw as weight_raw

GATE = (0, 1.0)
STEP = (0.5, 0.0, 0.0)
ROWS = 2**40
TOO_MANY = r"must have at most 2\*\*48 elements, with 1 for each size of 0, got"


def bits(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def slots(*values: int) -> Tensor:
    return torch.tensor(values)


def image(*shape: int) -> Tensor:
    return torch.ones(shape or (1, 1, 5, 5))


REFUSED = {
    "im2col": (
        "kernel must be at most 2147483647",
        lambda: conv2d_raw.im2col(image(), [2**32] * 2, [2**40] * 2, [0, 0], [2**32] * 2),
    ),
    "stride": ("stride must be at most 2147483647", lambda: conv2d_raw.im2col(image(), [1, 1], [1, 2**62], [0, 0], [1, 1])),
    "padding": ("padding must be at most", lambda: conv2d_raw.im2col(image(), [1, 1], [1, 1], [0, 2**63 - 1], [1, 1])),
    "dilation": ("dilation must be at most", lambda: conv2d_raw.im2col(image(), [3, 3], [1, 1], [0, 0], [2**62, 1])),
    "places": (TOO_MANY, lambda: conv2d_raw.im2col(image(), [1, 1], [1, 1], [2**31 - 1] * 2, [1, 1])),
    "places of no image": (TOO_MANY, lambda: conv2d_raw.im2col(image(0, 1, 5, 5), [1, 1], [1, 1], [2**31 - 1] * 2, [1, 1])),
    "values": (TOO_MANY, lambda: conv2d_raw.im2col(image(), [2**31 - 1] * 2, [1, 1], [2**30] * 2, [1, 1])),
    "pixels": (TOO_MANY, lambda: conv2d_raw.col2im(image(1, 1, 1), [1, 1, 2**40, 2**40], [1, 1], [1, 1], [0, 0], [1, 1])),
    "negative": (
        "size must be that of images",
        lambda: conv2d_raw.col2im(image(1, 1, 1), [1, -1, 3, 3], [3, 3], [1, 1], [0, 0], [1, 1]),
    ),
    "col2im": (
        "padding must be at most",
        lambda: conv2d_raw.col2im(image(1, 1, 1), [1, 1, 3, 3], [3, 3], [1, 1], [2**62, 0], [1, 1]),
    ),
    "integers": ("input must be float32 or float64", lambda: conv2d_raw.im2col(image().long(), [1, 1], [1, 1], [0, 0], [1, 1])),
    "weight": (TOO_MANY, lambda: weight_raw.masked_weight(torch.empty(0, 2**62), torch.empty(0, 2**62), *GATE)),
    "list": (TOO_MANY, lambda: weight_raw.masked_weight_list([torch.empty(0, 2**49)], [torch.empty(0, 2**49)], *GATE)),
    "linear": (
        TOO_MANY,
        lambda: linear_raw.masked_linear(torch.empty(0, 2**63 - 1), *[torch.empty(0, 2**63 - 1)] * 2, None, None, *GATE),
    ),
    "rows": (
        TOO_MANY,
        lambda: linear_raw.masked_linear(torch.empty(2**62, 0), torch.empty(0, 0), torch.empty(0, 0), None, None, *GATE),
    ),
    "output": (
        "the output " + TOO_MANY,
        lambda: linear_raw.masked_linear(torch.empty(2**40, 0), torch.empty(2**20, 0), torch.empty(2**20, 0), None, None, *GATE),
    ),
    "groups": (
        "groups times the columns of weight must be at most",
        lambda: mixed_task_raw.task_masked_linear(
            torch.empty(1, 0), slots(0), torch.empty(0, 4), [torch.empty(1, 0, 4)], None, [], *GATE, 2**62
        ),
    ),
    "packed groups": (
        "groups times the columns of weight must be at most",
        lambda: packed_raw.packed_masked_linear_backward(
            torch.empty(1, 0), torch.empty(1, 0), slots(0), torch.empty(0, 4), [bits(1, 0, 1)], None, None, 2**62
        ),
    ),
    "superposition groups": (
        "groups times the columns of weight must be at most",
        lambda: packed_raw.packed_superposition_gradient(
            torch.empty(1, 0), torch.empty(1, 0), torch.empty(0, 4), [bits(1, 0, 1)], 2**62
        ),
    ),
    "tasks": (
        r"masks must hold at most 2\*\*24 tasks",
        lambda: mixed_task_raw.task_masked_linear(
            torch.ones(1, 3), slots(0), torch.ones(4, 3), [torch.ones(4, 3).expand(2**25, 4, 3)], None, [], *GATE
        ),
    ),
    "packed tasks": (
        r"packed must hold at most 2\*\*24 tasks",
        lambda: packed_raw.packed_superposition_gradient(
            torch.ones(1, 4), torch.ones(1, 3), torch.ones(4, 3), [bits(1, 4, 1).expand(2**25, 4, 1)], 1
        ),
    ),
    "masks": (
        TOO_MANY,
        lambda: mixed_task_raw.task_masked_linear(
            torch.zeros(1, 1).expand(1, 2**20), slots(0), torch.empty(0, 2**20), [torch.empty(2**30, 0, 2**20)], None, [], *GATE
        ),
    ),
    "result": (
        "the result " + TOO_MANY,
        lambda: packed_raw.packed_superposition_gradient(
            torch.empty(2**40, 0), torch.empty(2**40, 0), torch.empty(0, 0), [bits(2**20, 0, 0)], 1
        ),
    ),
    "pack": (TOO_MANY, lambda: packed_raw.pack_mask(torch.empty(0, 2**62), 0.0)),
    "unpack": (TOO_MANY, lambda: packed_raw.unpack_mask(bits(0, 4), [0, 2**40, 2**40])),
}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_size_that_would_overflow_is_refused(case, fake):
    message, call = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        if fake:
            with FakeTensorMode():
                call()
        else:
            call()


@pytest.mark.parametrize("argument", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [2**31, 2**62, 2**63 - 1, 2**64, (1, 2**62)], ids=str)
def test_a_convolution_refuses_what_torch_computes_garbage_with(argument, value):
    x, weight, mask = image(), image(2, 1, 3, 3), image(1, 2, 1, 3, 3)
    given = {argument: value}
    calls = (
        lambda: mm.masked_conv2d(x, weight, mask[0], **given),
        lambda: mm.masked_conv2d(x, image(64, 1, 3, 3), image(64, 1, 3, 3), **given),
        lambda: mm.task_masked_conv2d(x, slots(0), weight, mask, **given),
        lambda: mm.packed_masked_conv2d(x, slots(0), weight, bits(1, 2, 2), **given),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"{argument} must be at most 2147483647, got"):
            call()


@pytest.mark.parametrize("setting", ["stride", "padding", "dilation"])
def test_a_layer_refuses_them_on_each_of_its_ways(setting):
    layer = MaskedConv2d(1, 2, 3, **{setting: 2**62})
    stacked = image(1, 2, 5, 5), slots(0, 1), torch.zeros(2, 2, 1, 3, 3), None
    ways = (
        lambda: layer(image()),
        lambda: layer._plain(image(), layer.weight, None),
        lambda: layer._stacked_tasks(*stacked),
        lambda: layer._mixed_task(image(), slots(0), [torch.zeros(2, 1, 3, 3)], None),
        lambda: layer._packed(image(), slots(0), [bits(2, 2)], None),
    )
    for way in ways:
        with pytest.raises(ValueError, match=f"{setting} must be at most 2147483647, got"):
            way()


def test_a_convolution_refuses_groups_whose_channels_overflow():
    with pytest.raises((ValueError, RuntimeError), match="groups"):
        mm.masked_conv2d(image(1, 0, 5, 5), image(0, 0, 3, 3), image(0, 0, 3, 3), groups=2**62)
    with pytest.raises(ValueError, match="groups must divide the rows of weight"):
        mm.task_masked_conv2d(image(), slots(0), image(1, 1, 3, 3), image(1, 1, 1, 3, 3), groups=2**63 - 1)


def test_a_large_stride_is_right():
    x, weight, mask = image(), image(2, 1, 3, 3), torch.full((2, 1, 3, 3), 0.5)
    wanted = F.conv2d(x, weight * mask.sigmoid(), stride=2**31 - 1)
    torch.testing.assert_close(mm.masked_conv2d(x, weight, mask, stride=2**31 - 1), wanted)
    torch.testing.assert_close(mm.task_masked_conv2d(x, slots(0), weight, mask[None], stride=2**31 - 1), wanted)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_columns_take_no_time(dtype):
    """Of a walk through 2**40 rows there would be no end."""
    rows, batch, nothing = empty(ROWS, 0, dtype=dtype), empty(2, ROWS, 0, dtype=dtype), empty(0, 0, dtype=dtype)
    masks, bias, of_batch = [empty(2, 0, 0, dtype=dtype)], empty(0, dtype=dtype), slots(1, 0)
    linear = linear_raw.masked_linear_backward(rows, rows, nothing, nothing, bias, bias, *GATE)
    assert [list(one.shape) for one in linear] == [[ROWS, 0], [0, 0], [0, 0], [0], [0]]
    assert linear_raw.masked_linear(rows, nothing, nothing, bias, bias, *GATE).shape == (ROWS, 0)
    arguments = batch, of_batch, nothing, masks, bias, [empty(2, 0, dtype=dtype)], *GATE
    assert mixed_task_raw.task_masked_linear(*arguments).shape == (2, ROWS, 0)
    assert mixed_task_raw.task_masked_linear_backward(batch, *arguments)[0].shape == (2, ROWS, 0)
    cotangents = batch, nothing, masks, bias, []
    assert mixed_task_raw.task_masked_linear_double_backward(*cotangents, batch, *arguments)[0].shape == (2, ROWS, 0)
    packed = batch, of_batch, nothing, [bits(2, 0, 0)], bias, [bits(2, 0)], 1
    assert packed_raw.packed_masked_linear(*packed).shape == (2, ROWS, 0)
    assert packed_raw.packed_masked_linear_backward(batch, *packed)[0].shape == (2, ROWS, 0)
    assert superposition_gradient(batch, batch, nothing, bits(2, 0, 0)).tolist() == [[0, 0], [0, 0]]
    assert mm.pack_mask(rows).shape == (ROWS, 0)
    assert mm.unpack_mask(bits(ROWS, 0), (ROWS, 0)).shape == (ROWS, 0)
    assert conv2d_raw.im2col(image(1, 0, 5, 5), [1, 1], [1, 1], [2**20] * 2, [1, 1]).numel() == 0
    assert conv2d_raw.col2im(image(0, 1, 9), [0, 1, 3, 3], [3, 3], [1, 1], [0, 0], [1, 1]).numel() == 0


def test_one_slot_for_a_batch_of_any_size_is_checked_once():
    rows, nothing, masks = torch.empty(ROWS, 0), torch.empty(0, 0), bits(2, 0, 0)
    assert mm.packed_masked_linear(rows, slots(1).expand(ROWS), nothing, masks).shape == (ROWS, 0)
    with pytest.raises(ValueError, match=r"slots must be in \[0, 2\), got 7 at position 0"):
        mm.packed_masked_linear(rows, slots(7).expand(ROWS), nothing, masks)


def test_layers_without_features():
    """As the product in float64: of inputs without features it is zero, and of outputs without features nothing."""
    for out, columns in ((0, 3), (3, 0), (0, 0)):
        x, w, grad = torch.randn(2, 4, columns), torch.randn(out, columns), torch.randn(2, 4, out)
        dx = linear_raw.masked_linear_backward(grad, x, w, w, None, None, *GATE)[0]
        assert torch.equal(dx, torch.zeros(2, 4, columns))
        masks = torch.randn(2, out, columns)
        dx, _, dm, *_ = mixed_task_raw.task_masked_linear_backward(grad, x, slots(1, 0), w, [masks], None, [], *GATE)
        assert torch.equal(dx, torch.zeros(2, 4, columns)) and dm[0].shape == masks.shape
        packed = [bits(2, out, (columns + 7) // 8)]
        dx, dw, db = packed_raw.packed_masked_linear_backward(grad, x, slots(1, 0), w, packed, torch.ones(out), None, 1)
        assert torch.equal(dx, torch.zeros(2, 4, columns)) and dw.shape == w.shape
        torch.testing.assert_close(db, grad.sum((0, 1)))


class TestSteps:
    """Ops that take steps of SGD in place."""

    @pytest.mark.parametrize("updates", [(True, False), (False, True), (True, True)], ids=str)
    def test_a_step_does_not_depend_on_which_gradients_are_wanted(self, updates):
        grad, weight, mask = torch.randn(3, 5, 7).unbind()
        found = []
        for wanted in (True, False):
            w, m = weight.clone(), mask.clone()
            weight_raw.masked_weight_backward_sgd_(grad, w, m, *GATE, (wanted,) * 2, updates, (None, None), (STEP, STEP))
            found.append((w, m))
        for one, other, before, update in zip(*found, (weight, mask), updates):
            assert torch.equal(one, other) and torch.equal(one, before) != update

    @pytest.mark.parametrize("updates", [(True,) * 4, (False, False, True, False), (True, False, False, True)], ids=str)
    def test_a_bias_moves_as_the_weight_does(self, updates):
        grad, input = torch.randn(3, 4), torch.randn(3, 6)
        before = [torch.randn(4, 6), torch.randn(4, 6), torch.randn(4), torch.randn(4)]
        found = []
        for wanted in (True, False):
            now = [one.clone() for one in before]
            left = linear_raw.masked_linear_backward_sgd_(
                grad, input, *now, *GATE, (wanted,) * 5, updates, (None,) * 4, (STEP,) * 4
            )
            assert wanted or left == (None,) * 5
            found.append(now)
        for one, other, was, update in zip(*found, before, updates):
            assert torch.equal(one, other) and torch.equal(one, was) != update

    def overlapping(self, count: int) -> tuple[Tensor, Tensor]:
        memory = torch.randn(count + 1)
        return memory[1:], memory[:-1]

    @pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
    @pytest.mark.parametrize("same", [False, True], ids=["partly", "wholly"])
    @pytest.mark.parametrize("pair", [(0, 1), (1, 2), (1, 3), (2, 4), (3, 4), (0, 3), (2, 3)], ids=str)
    def test_shared_memory_is_refused(self, pair, same, fake):
        tensors = [torch.randn(4, 6) for _ in range(5)]
        one, other = self.overlapping(24)
        tensors[pair[0]], tensors[pair[1]] = one.view(4, 6), (one if same else other).view(4, 6)
        before = [tensor.clone() for tensor in tensors]

        def step(grad, weight, mask, *buffers):
            settings = ((0.5, 0.0, 0.9),) * 2
            weight_raw.masked_weight_backward_sgd_(grad, weight, mask, *GATE, (True, True), (True, True), buffers, settings)

        with pytest.raises(ValueError, match="must not share memory with .* to be updated in place"):
            if fake:
                with FakeTensorMode() as mode:
                    step(*map(mode.from_tensor, tensors))
            else:
                step(*tensors)
        assert all(map(torch.equal, tensors, before))

    @pytest.mark.parametrize("pair", [(1, 2), (0, 2), (2, 3), (4, 5), (2, 6), (4, 8), (6, 7), (8, 9), (3, 5)], ids=str)
    def test_shared_memory_of_a_layer_is_refused(self, pair):
        """grad, input, weight, mask_logits, bias, bias_mask_logits and four momentum buffers, all of 16 elements or parts of 16."""
        shapes = [(4, 4)] * 4 + [(4,)] * 2 + [(4, 4)] * 2 + [(4,)] * 2
        tensors = [torch.randn(shape) for shape in shapes]
        memory = torch.randn(17)
        for place, begin in zip(pair, (0, 1)):
            count = tensors[place].numel()
            tensors[place] = memory[begin : begin + count].view(shapes[place])
        before = [tensor.clone() for tensor in tensors]
        with pytest.raises(ValueError, match="must not share memory with .* to be updated in place"):
            linear_raw.masked_linear_backward_sgd_(
                *tensors[:6], *GATE, (True,) * 5, (True,) * 4, tensors[6:], ((0.5, 0.0, 0.9),) * 4
            )
        assert all(map(torch.equal, tensors, before))

    def test_neighbours_in_one_memory_are_no_overlap(self):
        flat = torch.randn(5, 24)
        grad, weight, mask, *buffers = (row.view(4, 6) for row in flat)
        settings = ((0.5, 0.0, 0.9),) * 2
        weight_raw.masked_weight_backward_sgd_(grad, weight, mask, *GATE, (True, True), (True, True), buffers, settings)

    def test_an_input_that_is_the_weight_is_refused(self):
        """Later rows would meet what earlier ones have changed."""
        weight, mask, grad = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4)
        with pytest.raises(ValueError, match="weight must not share memory with input"):
            linear_raw.masked_linear_backward_sgd_(
                *(grad, weight, weight, mask, None, None, *GATE, (True,) * 5, (True, False, False, False)),
                *((None,) * 4, (STEP,) * 4),
            )
