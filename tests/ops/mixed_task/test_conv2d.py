"""task_masked_conv2d: against conv2d sample by sample, its derivatives, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.derivatives import nested_gradients, options
from support.gpu import DEVICES
from support.mixed_task import assert_near
from support.profiling import metamask_ops
from support.samples import DTYPES, GATES, channels_last, wider
from torch.autograd import gradcheck, gradgradcheck

import metamask_ext as mm
from metamask_ext.ops.mixed_task import functional as mixed
from metamask_ext.ops.weight import reference as weight_reference

each_gate = pytest.mark.parametrize("gate", [GATES[1], GATES[3]], ids=["sigmoid", "hard"])
# C_in, C_out, kernel, stride, padding, dilation, groups
SHAPES = {
    "3x3": (4, 6, (3, 3), 1, 1, 1, 1),
    "1x1": (4, 6, (1, 1), 1, 0, 1, 1),
    "uneven": (4, 6, (3, 2), (2, 1), (1, 2), 1, 1),
    "groups": (4, 6, (3, 3), 1, 0, 1, 2),
    "depthwise": (4, 8, (2, 3), 2, 1, 1, 4),
    "dilated": (2, 3, (3, 2), 1, 2, (2, 1), 1),
    "same": (2, 3, (3, 2), 1, "same", (1, 3), 1),
    "valid": (2, 4, (2, 2), 2, "valid", 1, 2),
    "many": (40, 130, (3, 3), 1, 1, 1, 1),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)
SLOTS = torch.tensor([2, 0, 2])


each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True, params=["im2col", "one convolution"])
def path(request, monkeypatch):
    """The path of the CPU and that of a GPU, also on CPU tensors. In "many" theta is larger than the columns of im2col."""
    if request.param == "one convolution":
        monkeypatch.setattr(mixed, "ONE_CONVOLUTION_ON", ("cpu", "cuda"))
    elif request.node.callspec.params.get("device") == "cuda":
        monkeypatch.setattr(mixed, "ONE_CONVOLUTION_ON", ())
    return request.param


def inputs(shape, dtype=torch.float64, tasks=3, device="cpu"):
    """input, weight, masks, bias, bias masks."""
    c_in, c_out, kernel, *_, groups = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, c_in, 6, 7), (c_out, c_in // groups, *kernel), (tasks, c_out, c_in // groups, *kernel), (c_out,), (tasks, c_out)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def plain(x, w, m, b, bm, shape, gate, slots=SLOTS):
    settings = SHAPES[shape][3:]
    samples = []
    for one, slot in zip(x, slots.tolist()):
        theta, row = weight_reference.masked_weight(w, m[slot], *gate), weight_reference.masked_weight(b, bm[slot], *gate)
        samples.append(F.conv2d(one, theta, row, *settings))
    return torch.stack(samples)


def ours(x, w, m, b, bm, shape, gate, slots=SLOTS):
    return mm.task_masked_conv2d(x, slots.to(x.device), w, m, b, bm, *SHAPES[shape][3:], **options(gate))


@pytest.mark.every_device(
    emulated_if=lambda path, shape, dtype, gate, **_: (
        path == "one convolution" and shape in ("3x3", "groups", "uneven") and dtype != torch.float16 and gate == GATES[1]
    )
)
@each_device
@each_gate
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@each_shape
def test_output_and_gradients_equal_conv2d_sample_by_sample(shape, dtype, gate, device):
    tensors = [tensor.requires_grad_() for tensor in inputs(shape, dtype, device=device)]
    doubles = [tensor.detach().double().cpu().requires_grad_() for tensor in tensors]
    got, wanted = ours(*tensors, shape, gate), plain(*doubles, shape, gate)
    assert got.dtype == dtype and got.is_contiguous()
    terms = tensors[1][0].numel()
    assert_near(got.detach(), wanted.detach(), terms, "y")
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(got, tensors, grad.to(device))
    for index, (one, other) in enumerate(zip(grads, torch.autograd.grad(wanted, doubles, grad.double()))):
        assert one.dtype == dtype and one.shape == tensors[index].shape
        # col2im adds gradients up in the tensor's dtype, one for each place of the kernel
        assert_near(one, other, 3 * 42 * 9, f"gradient {index}")


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "many"])
def test_gradcheck_and_gradgradcheck(shape):
    function = lambda *tensors: ours(*tensors, shape, GATES[1])  # noqa: E731
    tensors = [tensor.requires_grad_() for tensor in inputs(shape)]
    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.every_device(emulated_if=lambda path, gate, **_: path == "one convolution" and gate == GATES[1])
@each_device
@each_gate
def test_derivatives_to_the_third_order_equal_conv2d(gate, device):
    tensors = [tensor.requires_grad_() for tensor in inputs("groups", device=device)]
    got = nested_gradients(lambda *t: ours(*t, "groups", gate), tensors, 3)
    wanted = nested_gradients(lambda *t: plain(*t, "groups", gate), tensors, 3)
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@each_device
def test_a_list_of_masks_equals_one_tensor_also_in_the_gradients(device):
    results = []
    for listed in (False, True):
        x, w, m, b, bm = (tensor.requires_grad_() for tensor in inputs("groups", device=device))
        masks, bias_masks = (list(m.unbind()), list(bm.unbind())) if listed else (m, bm)
        y = mm.task_masked_conv2d(x, SLOTS.to(device), w, masks, b, bias_masks, groups=2)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, w, m, b, bm))))
    for one, other in zip(*results):
        # A GPU computes from memory that is aligned otherwise, in another order.
        torch.testing.assert_close(one, other, rtol=0 if device == "cpu" else 1e-12, atol=0 if device == "cpu" else 1e-12)


@each_device
@pytest.mark.parametrize("layout", [channels_last, wider], ids=["channels-last", "wider"])
def test_any_strides(layout, device):
    x, w, m, b, bm = inputs("groups", device=device)
    wanted = ours(x, w, m, b, bm, "groups", GATES[0])
    loose = ours(layout(x), layout(w), wider(m), wider(b), wider(bm), "groups", GATES[0])
    torch.testing.assert_close(loose, wanted, rtol=1e-13, atol=1e-13)


def test_no_bias_a_bias_without_masks_and_one_sample_without_a_batch():
    x, w, m, b, bm = inputs("3x3")
    both = ours(x, w, m, b, bm, "3x3", GATES[0])
    none = mm.task_masked_conv2d(x, SLOTS, w, m, padding=1)
    rows = (b * torch.sigmoid(bm[SLOTS]))[:, :, None, None]
    torch.testing.assert_close(none + rows, both, rtol=1e-12, atol=1e-12)
    unmasked = mm.task_masked_conv2d(x, SLOTS, w, m, b, padding=1)
    torch.testing.assert_close(unmasked, none + b[:, None, None], rtol=1e-12, atol=1e-12)
    alone = mm.task_masked_conv2d(x[1], SLOTS[1:2], w, m, padding=1)
    torch.testing.assert_close(alone, none[1], rtol=1e-12, atol=1e-12)


@each_device
def test_an_empty_batch(device):
    x, w, m, b, bm = (tensor.requires_grad_() for tensor in inputs("3x3", device=device))
    y = mm.task_masked_conv2d(x[:0], SLOTS[:0].to(device), w, m, b, bm, padding=1)
    assert y.shape == (0, 6, 6, 7)
    y.sum().backward()
    assert all(bool((tensor.grad == 0).all()) for tensor in (x, w, m, b, bm))


@pytest.mark.once
def test_transforms_and_torch_compile():
    x, w, m, b, bm = inputs("groups")

    def loss(function, w, m):
        return function(x, w, m, b, bm, "groups", GATES[1]).square().sum()

    wanted = torch.func.grad(lambda w, m: loss(plain, w, m), (0, 1))(w, m)
    got = torch.func.grad(lambda w, m: loss(ours, w, m), (0, 1))(w, m)
    step = torch.compile(lambda w, m: loss(ours, w, m), backend="aot_eager", fullgraph=True)
    leaves = w.clone().requires_grad_(), m.clone().requires_grad_()
    compiled = torch.autograd.grad(step(*leaves), leaves)
    for one, other, third in zip(got, compiled, wanted):
        torch.testing.assert_close(one, third, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(other, third, rtol=1e-11, atol=1e-11)
    vmapped = torch.func.vmap(lambda m: ours(x, w, m, b, bm, "groups", GATES[1]))(torch.stack([m, -m]))
    torch.testing.assert_close(vmapped[1], plain(x, w, -m, b, bm, "groups", GATES[1]), rtol=1e-12, atol=1e-12)


@each_device
def test_autocast(device):
    x, w, m, b, bm = inputs("3x3", torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = ours(x, w, m, b, bm, "3x3", GATES[0])
    assert y.dtype == torch.bfloat16
    assert_near(y, plain(*(t.double() for t in (x, w, m, b, bm)), "3x3", GATES[0]), 36, "y")


@pytest.mark.parametrize("shape", ["groups", "many"])
def test_forward_backward_and_double_backward_run_the_ops(shape, path):
    tensors = [tensor.requires_grad_() for tensor in inputs(shape)]
    kept = {}

    def forward():
        kept["y"] = ours(*tensors, shape, GATES[0])

    def backward():
        kept["grads"] = torch.autograd.grad(kept["y"].square().sum(), tensors, create_graph=True)

    def double_backward():
        torch.autograd.grad(sum(grad.square().sum() for grad in kept["grads"]), tensors)

    op = "masked_weight_list" if path == "one convolution" and shape != "many" else "task_masked_linear"
    assert metamask_ops(forward) == {op: 1}
    assert metamask_ops(backward) == {f"{op}_backward": 1}
    assert metamask_ops(double_backward) == {f"{op}_double_backward": 1, f"{op}_backward": 1}


X, W, M, B, BM = inputs("3x3")
REFUSED = {
    "weight of a linear layer": (
        ValueError,
        r"weight must be \[C_out, C_in / groups, kH, kW\]",
        (X, SLOTS, W[0, 0], [W[0, 0]]),
        {},
    ),
    "input of other channels": (ValueError, "input must be .* with C_in = 4", (X[:, :3], SLOTS, W, M), {}),
    "groups": (ValueError, "input must be .* with C_in = 8", (X, SLOTS, W, M), {"groups": 2}),
    "groups that do not divide": (ValueError, "groups must divide the rows of weight, 6, got 4", (X, SLOTS, W, M), {"groups": 4}),
    "mask of another shape": (ValueError, r"masks\[1\] must have the shape of weight", (X, SLOTS, W, [W, W[:5]]), {}),
    "stack of another shape": (ValueError, "masks must be T masks of the shape of weight", (X, SLOTS, W, M[:, :5]), {}),
    "slots of another length": (ValueError, r"slots must be \[B\] = \[3\]", (X, SLOTS[:2], W, M), {}),
    "two slots without a batch": (ValueError, r"slots must be \[B\] = \[1\]", (X[0], SLOTS[:2], W, M), {}),
    "slot out of range": (ValueError, r"slots must be in \[0, 2\), got 2 at position 0", (X, SLOTS, W, M[:2]), {}),
    "slots of another dtype": (TypeError, "slots must be int64", (X, SLOTS.int(), W, M), {}),
    "bias masks without a bias": (ValueError, "bias_masks needs a bias", (X, SLOTS, W, M, None, BM), {}),
    "input of another dtype": (TypeError, "input must have the dtype of weight", (X.float(), SLOTS, W, M), {}),
    "padding": (
        ValueError,
        "padding must be 'valid', 'same', an integer or two, got 'full'",
        (X, SLOTS, W, M),
        {"padding": "full"},
    ),
    "negative padding": (ValueError, "padding must be an integer of at least 0", (X, SLOTS, W, M), {"padding": -1}),
    "stride": (ValueError, "stride must be an integer of at least 1, or two, got 0", (X, SLOTS, W, M), {"stride": 0}),
    "three strides": (ValueError, "stride must be an integer of at least 1, or two", (X, SLOTS, W, M), {"stride": (1, 1, 1)}),
    "same with stride": (ValueError, "padding='same' needs stride 1", (X, SLOTS, W, M), {"padding": "same", "stride": 2}),
    "too small an input": (ValueError, "input must not be smaller than the kernel", (X[..., :2], SLOTS, W, M), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_refused(name):
    error, message, arguments, settings = REFUSED[name]
    with pytest.raises(error, match=message):
        mm.task_masked_conv2d(*arguments, **settings)
