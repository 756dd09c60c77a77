"""Masks of one bit a weight: packing, the linear and convolution ops as raw ops and functions against float64, and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.closeness import assert_near
from support.gpu import DEVICES
from support.packed_checks import SHAPES, by_hand, check, expected, inputs
from support.samples import DTYPES, offset, transposed, wider
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

import metamask_ext as mm
from metamask_ext.ops.gate import compute_dtype
from metamask_ext.ops.packed import raw as packed_raw
from metamask_ext.ops.packed import reference as packed_reference
from metamask_ext.ops.packed.functional import superposition_gradient

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_form = pytest.mark.parametrize("stacked", [True, False], ids=["one tensor", "list"])

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@each_device
@each_form
@each_dtype
@each_shape
def test_output_and_gradients_equal_float64(shape, dtype, stacked, device):
    check(shape, dtype, stacked, device)


@each_form
@each_shape
def test_the_reference_equals_a_loop_over_samples(shape, stacked):
    x, slots, w, b, grad, packed, packed_bias = inputs(shape, torch.float64, stacked)
    y, grads = expected(x, slots, w, b, grad, packed, packed_bias, shape[2])
    leaves = [tensor.clone().requires_grad_() for tensor in (x, w, b)]
    got = packed_reference.packed_masked_linear(leaves[0], slots, leaves[1], packed, leaves[2], packed_bias, shape[2])
    torch.testing.assert_close(got.detach(), y, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(got, leaves, grad, allow_unused=True), grads):
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other, rtol=1e-12, atol=1e-12)
    needs = (True, True, True)
    got = packed_reference.packed_masked_linear_backward(grad, x, slots, w, packed, b, packed_bias, shape[2], needs)
    for one, other in zip(got, grads):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.every_device
@pytest.mark.parametrize(
    "shape", [(1,), (17,), (3, 1), (5, 129), (4, 1134), (3, 2, 3, 3), (3, 8), (67, 64), (0, 5), (3, 0)], ids=str
)
@each_dtype
def test_pack_and_unpack(shape, dtype):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    for threshold in (0.0, 0.3, -float("inf"), float("inf")):
        on = logits.to(compute_dtype(dtype)) > threshold
        packed = mm.pack_mask(logits, threshold=threshold)
        assert packed.dtype == torch.uint8
        assert torch.equal(packed, packed_reference.pack_mask(logits, threshold))
        rows = on if on.dim() == 1 else on.flatten(1)
        assert torch.equal(by_hand(packed, rows.shape), rows.double())
        for unpack in (mm.unpack_mask, packed_reference.unpack_mask):
            mask = unpack(packed, shape)
            assert mask.dtype == torch.bool and torch.equal(mask, on)
        if on.numel():
            assert int((packed[..., -1] >> ((rows.shape[-1] - 1) % 8 + 1)).max()) == 0  # padding


@pytest.mark.every_device
def test_pack_by_hand():
    logits = torch.tensor([[1.0, -1, 0, 2, -1, -1, -1, 3, 1], [-1.0] * 8 + [-torch.inf]])
    assert mm.pack_mask(logits).tolist() == [[0b10001001, 1], [0, 0]]
    assert mm.pack_mask(logits.t()[:, 0]).tolist() == [0b10001001, 1]
    assert mm.pack_mask(logits.requires_grad_()).tolist() == [[137, 1], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_is_not_packed(dtype):
    logits = torch.zeros(5, 9, dtype=dtype)
    for place in ((0, 0), (4, 8), (2, 3)):
        bad = logits.index_put((torch.tensor(place[0]), torch.tensor(place[1])), torch.tensor(torch.nan, dtype=dtype))
        for given in (bad, bad.requires_grad_(), bad.t(), bad[:, place[1]]):
            with pytest.raises(ValueError, match=f"mask_logits must not hold NaN, got 1 of {given.numel()}"):
                mm.pack_mask(given)
        assert packed_raw.pack_mask(bad.detach(), 0.0).equal(packed_raw.pack_mask(logits, 0.0)), "the op leaves that to its callers"
    infinite = torch.tensor([torch.inf, -torch.inf, 0.0], dtype=dtype)
    assert mm.pack_mask(infinite).tolist() == [1] and mm.pack_mask(infinite[:0]).tolist() == []


def spread(bits):
    memory = torch.full((*bits.shape[:-1], bits.shape[-1] + 23), 255, dtype=torch.uint8)
    memory[..., 3:-20] = bits
    return memory[..., 3:-20]


@pytest.mark.every_device
@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "listed"])
@pytest.mark.parametrize("layout", [transposed, wider, offset], ids=["transposed", "wider", "offset"])
def test_any_strides(layout, listed):
    shape = SHAPES["few and many"]
    x, slots, w, b, grad, packed, packed_bias = inputs(shape, torch.float32)
    y, grads = expected(x, slots, w, b, grad, packed, packed_bias, 1)
    spaced = spread(packed[0])
    masks, bias_masks = (list(spaced), list(spread(packed_bias[0]))) if listed else ([spaced], [spread(packed_bias[0])])
    assert not masks[0].is_contiguous()
    args = (layout(x), slots.repeat_interleave(2)[::2], layout(w), masks, wider(b), bias_masks, 1)
    assert_near(packed_raw.packed_masked_linear(*args), y, 129, "y")
    for one, other in zip(packed_raw.packed_masked_linear_backward(layout(grad), *args), grads):
        assert_near(one, other, 129, "gradient")
    exact = packed_reference.packed_superposition_gradient(grad.double(), x.double(), w.double(), packed, 1)
    got = superposition_gradient(layout(grad), layout(x), layout(w), masks)
    assert_near(got, exact, w.numel(), "superposition")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_does_not_depend_on_its_neighbours(dtype):
    """Bit by bit: where four samples and four rows of W are summed at once, too."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 71, generator=generator, dtype=dtype) for rows in (9, 10))
    packed = [torch.randint(0, 256, (9, 10, 9), generator=generator, dtype=torch.uint8)]
    slots = torch.arange(9)
    y = packed_raw.packed_masked_linear(x, slots, w, packed, None, None, 1)
    for first, last in ((0, 1), (1, 4), (2, 9)):
        part = packed_raw.packed_masked_linear(x[first:last], slots[first:last], w, packed, None, None, 1)
        assert torch.equal(part, y[first:last])
    assert torch.equal(packed_raw.packed_masked_linear(x, slots, w[3:5], [packed[0][:, 3:5]], None, None, 1), y[:, 3:5])


@pytest.mark.every_device
@pytest.mark.parametrize("columns", [17, 256])
def test_masks_anywhere_in_memory_are_read_to_their_end_only(columns):
    """Rows of bits that begin at any byte, the last one at the end of its memory."""
    x, slots, w, b, _, packed, packed_bias = inputs(([0], (), 1, 7, columns, 1), torch.float32)
    want = packed_raw.packed_masked_linear(x, slots, w, packed, b, packed_bias, 1)
    for start in range(1, 9):
        memory = torch.full((start + packed[0].numel(),), 255, dtype=torch.uint8)
        memory[start:] = packed[0].flatten()
        moved = memory[start:].view(packed[0].shape)
        assert torch.equal(packed_raw.packed_masked_linear(x, slots, w, [moved], b, packed_bias, 1), want)


@pytest.mark.every_device
@pytest.mark.parametrize("wide", [0, 70, 253])
def test_a_weight_that_is_off_is_zero_whatever_it_was_and_a_bad_input_shows(wide):
    """The same rule where bits are tested (few rows; wide: two vectors of them at once) and where theta is expanded (many)."""
    for samples in (1, 30):
        w = torch.tensor([[float("nan"), 2.0, float("inf")], [1.0, 1.0, 1.0]])
        mask = torch.tensor([[-1.0, 1.0, -1.0], [1.0, 1.0, -1.0]])
        # Behind columns that are off: in a vector of its own, and in the last, shorter one.
        w, mask = (torch.cat([torch.full((2, wide), value), tensor], 1) for value, tensor in ((float("inf"), w), (-1.0, mask)))
        packed = mm.pack_mask(mask)[None]
        x, slots = torch.ones(samples, wide + 3), torch.zeros(samples, dtype=torch.int64)
        for run in (mm.packed_masked_linear, lambda *t: packed_reference.packed_masked_linear(*t[:3], [t[3]], None, None, 1)):
            assert run(x, slots, w, packed).tolist() == [[2.0, 2.0]] * samples
            for column in (0, wide + 2):
                for value in (float("nan"), float("inf")):
                    bad = x.clone()
                    bad[0, column] = value
                    y = run(bad, slots, w, packed)
                    alone = wide == 0 and column == 0 and value > 0  # there row 1 is on: 1 times infinity
                    assert bool(y[0, 0].isnan()) and (y[0, 1].item() == value if alone else bool(y[0, 1].isnan()))
                    assert not bool(y[1:].isnan().any())


@each_dtype
@pytest.mark.parametrize("batch", [3, 1, None, 0], ids=["batch", "one", "unbatched", "empty"])
@pytest.mark.parametrize(
    "geometry",
    [(1, 0, 1, 1), (2, (1, 2), 1, 2), (1, "same", (2, 1), 4), ((1, 2), "valid", 1, 1), (1, 2, (1, 3), 1)],
    ids=["plain", "groups", "same", "valid", "dilation"],
)
def test_conv2d(geometry, batch, dtype):
    groups = geometry[3]
    generator = torch.Generator().manual_seed(4)
    sizes = ((3 if batch is None else batch, 4, 7, 8), (8, 4 // groups, 3, 2), (8,))
    x, w, b = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    masks = [torch.randn(w.shape, generator=generator) for _ in range(3)]
    bias_masks = [torch.randn(b.shape, generator=generator) for _ in range(3)]
    x = x[0] if batch is None else x
    slots = torch.tensor([2, 0, 2][: 1 if batch is None else batch], dtype=torch.int64)
    y = mm.packed_masked_conv2d(x, slots, w, [*map(mm.pack_mask, masks)], b, [*map(mm.pack_mask, bias_masks)], *geometry)
    each = [
        F.conv2d(image[None].double(), w.double() * (masks[slot] > 0), b.double() * (bias_masks[slot] > 0), *geometry)
        for image, slot in zip(x[None] if batch is None else x, slots.tolist())
    ]
    dense = torch.cat(each) if each else F.conv2d(x.double(), w.double(), b.double(), *geometry)
    assert y.dtype == dtype and y.is_contiguous()
    assert_near(y, dense[0] if batch is None else dense, 24, "y")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(dtype):
    x, slots, w, b, grad, packed, packed_bias = inputs(SHAPES["17 columns"], torch.float32)
    y, grads = expected(x, slots, w, b, grad, packed, packed_bias, 1)
    leaves = [tensor.requires_grad_() for tensor in (x, w, b)]
    with torch.autocast("cpu", dtype=dtype):
        got = mm.packed_masked_linear(x, slots, w, packed[0], b, packed_bias[0])
    assert got.dtype == dtype
    assert_near(got.detach(), y, 17, "y")
    for one, other in zip(torch.autograd.grad(got, leaves, grad.to(dtype)), grads):
        assert one.dtype == torch.float32
        assert_near(one.to(dtype), other, 129, "gradient")


def test_the_same_numbers_every_time_for_a_number_of_threads():
    x, slots, w, b, grad, packed, packed_bias = inputs(([i % 13 for i in range(40)], (), 1, 257, 1134, 13), torch.float32)
    for threads in (1, 2):
        torch.set_num_threads(threads)

        def run():
            args = (x, slots, w, packed, b, packed_bias, 1)
            backward = packed_raw.packed_masked_linear_backward(grad, *args)
            return [
                packed_raw.packed_masked_linear(*args),
                *backward,
                packed_raw.packed_superposition_gradient(grad, x, w, packed, 1),
            ]

        first = run()
        for _ in range(3):
            assert all(torch.equal(one, other) for one, other in zip(first, run()))


@pytest.mark.every_device
def test_each_gradient_alone_equals_all_together():
    x, slots, w, b, grad, packed, packed_bias = inputs(SHAPES["few and many"], torch.float32)
    args = (grad, x, slots, w, packed, b, packed_bias, 1)
    together = packed_raw.packed_masked_linear_backward(*args)
    for index in range(3):
        needs = tuple(position == index for position in range(3))
        got = packed_raw.packed_masked_linear_backward(*args, needs)
        assert [one is not None for one in got] == list(needs)
        torch.testing.assert_close(got[index], together[index], rtol=1e-6, atol=1e-6)


def largest_allocation(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return max((event.cpu_memory_usage for event in profiler.events() if event.cpu_memory_usage > 0), default=0)


def test_no_theta_is_allocated():
    x, slots, w, b, grad, packed, packed_bias = inputs((list(range(8)), (), 1, 4096, 1024, 8), torch.float32)
    size = w.numel() * 4
    args = (x, slots, w, packed, b, packed_bias, 1)
    assert largest_allocation(lambda: packed_raw.packed_masked_linear(*args)) < size / 4
    assert largest_allocation(lambda: packed_raw.packed_masked_linear_backward(grad, *args, (True, False, True))) < size / 4
    # dW alone is one array
    assert largest_allocation(lambda: packed_raw.packed_masked_linear_backward(grad, *args, (False, True, False))) < 1.5 * size
    assert largest_allocation(lambda: packed_raw.packed_superposition_gradient(grad, x, w, packed, 1)) < size / 4


@pytest.mark.once
@each_form
def test_opcheck(stacked):
    for shape in (([0, 2], (), 1, 4, 9, 3), ([1, 1, 0], (2,), 2, 4, 5, 2)):
        x, slots, w, b, grad, packed, packed_bias = inputs(shape, torch.float32, stacked)
        space, groups = torch.ops.metamask, shape[2]
        torch.library.opcheck(space.packed_masked_linear.default, (x, slots, w, packed, b, packed_bias, groups))
        torch.library.opcheck(space.packed_masked_linear.default, (x, slots, w, packed, None, None, groups, torch.bfloat16))
        args = (grad, x, slots, w, packed, b, packed_bias, groups)
        torch.library.opcheck(space.packed_masked_linear_backward.default, (*args, (True, True, True)))
        torch.library.opcheck(space.packed_masked_linear_backward.default, (*args, (False, True, False)))
        torch.library.opcheck(space.packed_superposition_gradient.default, (grad, x, w, packed, groups))
        torch.library.opcheck(space.pack_mask.default, (w, 0.0))
        torch.library.opcheck(space.unpack_mask.default, (mm.pack_mask(w), w.shape))


X, W, B, SLOTS = torch.zeros(2, 9), torch.zeros(4, 9), torch.zeros(4), torch.tensor([0, 2])
P, PB = torch.zeros(3, 4, 2, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8)
IMAGE, KERNEL, KP = torch.zeros(2, 4, 5, 5), torch.zeros(6, 2, 3, 3), torch.zeros(3, 6, 3, dtype=torch.uint8)


def linear(input=X, slots=SLOTS, weight=W, packed=P, bias=B, packed_bias=PB):
    return mm.packed_masked_linear(input, slots, weight, packed, bias, packed_bias)


RANGE = r"slots must be in \[0, 3\), got"
REFUSED = {
    "slot too large": (ValueError, rf"{RANGE} 3 at position 1", lambda: linear(slots=torch.tensor([0, 3]))),
    "slot negative": (ValueError, rf"{RANGE} -1 at position 0", lambda: linear(slots=torch.tensor([-1, 0]))),
    "slots dtype": (TypeError, "slots must be int64, got", lambda: linear(slots=SLOTS.int())),
    "slots shape": (
        ValueError,
        r"slots must be \[B\] = \[2\] as in input \[2, 9\], got \[3\]",
        lambda: linear(slots=torch.tensor([0, 1, 2])),
    ),
    "slots 2-d": (
        ValueError,
        r"slots must be \[B\] = \[2\] as in input \[2, 9\], got \[2, 1\]",
        lambda: linear(slots=SLOTS[:, None]),
    ),
    "slots list": (TypeError, "slots must be a tensor, got list", lambda: linear(slots=[0, 2])),
    "slots device": (ValueError, "slots must be on the device of weight, cpu, got meta", lambda: linear(slots=SLOTS.to("meta"))),
    "packed dtype": (TypeError, "packed must be uint8, as pack_mask gives it, got", lambda: linear(packed=P.int())),
    "packed shape": (
        ValueError,
        r"packed must be \[tasks, out, ceil\(in / 8\)\], a task's being \[4, 2\], got \[3, 4, 1\]",
        lambda: linear(packed=P[..., :1]),
    ),
    "packed list": (
        ValueError,
        r"packed\[2\] must be \[out, ceil\(in / 8\)\], a task's being \[4, 2\], got \[4, 1\]",
        lambda: linear(packed=[P[0], P[1], P[2, :, :1]]),
    ),
    "packed device": (ValueError, "packed must be on the device of weight, cpu, got meta", lambda: linear(packed=P.to("meta"))),
    "packed none": (TypeError, "packed must be a tensor or a sequence of tensors, got NoneType", lambda: linear(packed=None)),
    "packed text": (TypeError, "packed must be a tensor or a sequence of tensors, got str in it", lambda: linear(packed="ab")),
    "no task": (ValueError, "packed must hold at least one task, got none", lambda: linear(packed=[], packed_bias=[])),
    "no task, stacked": (ValueError, "packed must hold at least one task", lambda: linear(packed=P[:0], packed_bias=PB[:0])),
    "bias masks": (ValueError, "packed_bias must have the tasks of packed, 3, got 2", lambda: linear(packed_bias=PB[:2])),
    "bias masks shape": (ValueError, r"packed_bias must be .*being \[1\], got", lambda: linear(packed_bias=PB.expand(3, 2))),
    "bias masks alone": (ValueError, "packed_bias needs a bias, got bias=None", lambda: linear(bias=None)),
    "bias shape": (ValueError, r"bias must be \[out\] = \[4\], got \[3\]", lambda: linear(bias=B[:3])),
    "bias dtype": (TypeError, "bias must have the dtype of weight", lambda: linear(bias=B.double())),
    "input width": (ValueError, r"input must be \[B, ..., in\] with in = 9 .* got \[2, 5\]", lambda: linear(X[:, :5])),
    "input 1-d": (ValueError, r"input must be \[B, ..., in\].* got \[9\]", lambda: linear(X[0])),
    "input dtype": (TypeError, "input must have the dtype of weight", lambda: linear(X.double())),
    "input none": (TypeError, "input must be a tensor, got NoneType", lambda: linear(None)),
    "weight 1-d": (ValueError, r"weight must be \[out, in\], got shape \[4\]", lambda: linear(weight=B)),
    "weight dtype": (TypeError, "weight must be float64, float32, bfloat16 or float16, got", lambda: linear(weight=W.int())),
    "kernel 2-d": (ValueError, "weight must be .*kH, kW", lambda: mm.packed_masked_conv2d(IMAGE, SLOTS, W, P)),
    "channels": (ValueError, "C_in = 2 .*groups=1", lambda: mm.packed_masked_conv2d(IMAGE, SLOTS, KERNEL, KP)),
    "padding": (
        ValueError,
        "padding must be 'valid', 'same', an integer or two, got 'full'",
        lambda: mm.packed_masked_conv2d(IMAGE, SLOTS, KERNEL, KP, padding="full", groups=2),
    ),
    "stride": (
        ValueError,
        "stride must be an integer of at least 1, or two, got 0",
        lambda: mm.packed_masked_conv2d(IMAGE, SLOTS, KERNEL, KP, stride=0, groups=2),
    ),
    "same with a stride": (
        ValueError,
        "padding='same' needs stride 1",
        lambda: mm.packed_masked_conv2d(IMAGE, SLOTS, KERNEL, KP, padding="same", stride=2, groups=2),
    ),
    "image too small": (
        ValueError,
        "input must not be smaller than the kernel",
        lambda: mm.packed_masked_conv2d(IMAGE[..., :2, :2], SLOTS, KERNEL, KP, groups=2),
    ),
    "pack scalar": (ValueError, r"mask_logits must be \[out, ...\] or \[n\], got a scalar", lambda: mm.pack_mask(B[0])),
    "pack dtype": (TypeError, "mask_logits must be float64", lambda: mm.pack_mask(P)),
    "pack nan": (ValueError, "threshold must be a number, got nan", lambda: mm.pack_mask(B, threshold=float("nan"))),
    "unpack shape": (ValueError, r"packed must be \[4, 2\] for the shape \[4, 9\]", lambda: mm.unpack_mask(P[0, :3], (4, 9))),
    "unpack dtype": (TypeError, "packed must be uint8", lambda: mm.unpack_mask(W, (4, 9))),
    "superposition grad": (
        ValueError,
        r"grad must be \[B, ..., out\] = \[2, 4\], got \[4\]",
        lambda: superposition_gradient(B, X, W, P),
    ),
    "superposition grad dtype": (TypeError, "grad must be float32,", lambda: superposition_gradient(X[:, :4].double(), X, W, P)),
    "superposition groups": (ValueError, "groups must .*divide out = 4, got 3", lambda: superposition_gradient(B, X, W, P, 3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_the_arguments_name(name):
    error, message, call = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
    # and in the same words where plain torch runs
    with forward_ad.dual_level(), pytest.raises(error, match=message):
        call()


def test_raw_ops_refuse_what_does_not_fit():
    """The op's own checks: the functions reach some of them in Python first."""
    args = (X, SLOTS, W, [P], B, [PB], 1)
    with pytest.raises(ValueError, match=rf"{RANGE} 7 at position 1"):
        packed_raw.packed_masked_linear(X, torch.tensor([0, 7]), *args[2:])
    with pytest.raises(ValueError, match=r"packed\[0\] must be \[out, ceil\(in / 8\)\], a task's being \[4, 2\], got \[4, 1\]"):
        packed_raw.packed_masked_linear(X, SLOTS, W, [P[0, :, :1], P[1]], None, None, 1)
    with pytest.raises(ValueError, match="groups must be at least 1 and divide out = 4, got 3"):
        packed_raw.packed_masked_linear(X, SLOTS, W, [P], None, None, 3)
    with pytest.raises(ValueError, match=r"grad must be \[B, ..., out\] = \[2, 4\], got \[2, 3\]"):
        packed_raw.packed_masked_linear_backward(torch.zeros(2, 3), *args)
    with pytest.raises(ValueError, match=r"packed must be \[4, 2\] for the shape"):
        packed_raw.unpack_mask(P[0, :3], (4, 9))
    with pytest.raises(ValueError, match="mask_logits must be"):
        packed_raw.pack_mask(B[0], 0.0)
    with pytest.raises(RuntimeError, match="packed_superposition_gradient has no derivative"):
        superposition_gradient(torch.zeros(2, 4, requires_grad=True), X, W, P)


@pytest.mark.parametrize(
    "op", [packed_raw.packed_masked_linear, torch.ops.metamask.packed_masked_linear], ids=["direct", "torch.ops"]
)
def test_both_ways_to_the_op_are_alike(op):
    """torch.ops and the function of the extension that takes its place: neither is a constant silently, both know fake tensors."""
    x, slots, w, b, _, packed, packed_bias = inputs(([0, 2], (), 1, 4, 9, 3), torch.float32)
    args = [x, slots, w, packed, b, packed_bias, 1]
    want = packed_reference.packed_masked_linear(*args)
    assert_near(op(*args), want, 9, "y")
    for place in (0, 2, 4):
        differentiated = [*args[:place], args[place].clone().requires_grad_(), *args[place + 1 :]]
        with pytest.raises(RuntimeError, match="metamask::packed_masked_linear has no derivative"):
            op(*differentiated)
        with torch.no_grad():
            assert_near(op(*differentiated), want, 9, "y")
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="metamask::packed_masked_linear has no derivative"):
            op(*args[:place], forward_ad.make_dual(args[place], args[place]), *args[place + 1 :])
    with FakeTensorMode() as mode:
        fake = [[mode.from_tensor(each[0])] if isinstance(each, list) else each for each in args[:6]]
        fake = [mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in fake]
        y = op(*fake, 1)
    assert isinstance(y, FakeTensor) and y.shape == want.shape and y.dtype == want.dtype
