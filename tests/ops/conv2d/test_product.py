"""masked_conv2d where it is im2col and a GEMM: values, derivatives of every order, the fused step, and when it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.derivatives import nested_gradients
from support.fused_steps import compare, each_kind, each_setting, error
from support.profiling import largest_allocation, metamask_ops
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import metamask_ext as mm
from metamask_ext.nn import MaskedConv2d
from metamask_ext.ops.conv2d import functional as conv2d_functional
from metamask_ext.ops.conv2d import raw as conv2d_raw
from metamask_ext.ops.geometry import im2col
from metamask_ext.optim import FusedMaskedSGD

# Size of the images, shape of the weight; stride, padding, dilation
CASES = {
    "3x3": ((2, 3, 2, 2), (32, 3, 3, 3), (1, 1, 1)),
    "stride": ((2, 3, 4, 4), (33, 3, 3, 3), (2, 1, 1)),
    "1x1": ((1, 5, 3, 3), (33, 5, 1, 1), (2, 0, 1)),
    "uneven": ((1, 2, 4, 5), (24, 2, 3, 2), ((2, 1), (1, 0), (1, 3))),
    "wide padding": ((1, 2, 1, 1), (40, 2, 2, 2), (2, (2, 3), 2)),
    "one place": ((3, 4, 3, 2), (13, 4, 3, 2), (1, 0, 1)),
}
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda dtype: str(dtype)[6:])


def inputs(case, dtype=torch.float64):
    size, shape, geometry = CASES[case]
    generator = torch.Generator().manual_seed(2)
    shapes = size, shape, shape, shape[:1], shape[:1]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes], geometry


def plain(x, w, m, b, bm, *geometry):
    return F.conv2d(x, w * m.sigmoid(), b * bm.sigmoid(), *geometry)


def is_product(y):
    return type(y.grad_fn).__name__ == "MaskedConv2dBackward"


@each_dtype
@each_case
def test_output_and_gradients_equal_the_convolution(case, dtype):
    tensors, geometry = inputs(case, dtype)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    got, expected = mm.masked_conv2d(*tensors, *geometry), plain(*doubles, *geometry)
    assert is_product(got) and got.is_contiguous() and got.dtype == dtype
    grad = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    results = got, *torch.autograd.grad(got, tensors, grad.to(dtype))
    wanted = expected, *torch.autograd.grad(expected, doubles, grad)
    with torch.no_grad():
        results, wanted = (*results, mm.masked_conv2d(*tensors, *geometry)), (*wanted, expected)
    tolerance = 200 * torch.finfo(dtype).eps
    for one, other in zip(results, wanted):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@each_case
def test_gradcheck_and_gradgradcheck(case):
    tensors, geometry = inputs(case)
    # The output has to be small: a few channels, so few that the product has to be asked for
    tensors = [tensors[0], *(tensor[:3].detach().requires_grad_() for tensor in tensors[1:])]

    def function(*tensors):
        y = mm.masked_conv2d(*tensors, *geometry, temperature=0.7)
        assert is_product(y)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv2d_functional, "CHANNELS_PER_PLACE", 1e-9)
        patch.setattr(conv2d_functional, "CHANNELS_PER_PLACE_1X1", 1e-9)
        assert gradcheck(function, tensors, check_batched_grad=True)
        assert gradgradcheck(function, tensors)


def test_derivatives_to_the_third_order_equal_plain_torch():
    tensors, geometry = inputs("3x3")
    ours = nested_gradients(lambda *t: mm.masked_conv2d(*t, *geometry), tensors, 3)
    for one, other in zip(ours, nested_gradients(lambda *t: plain(*t, *geometry), tensors, 3)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("present", [0, 1, 2], ids=["no bias", "a bias without logits", "both"])
@pytest.mark.parametrize("twice", [False, True], ids=["backward", "double backward"])
def test_each_gradient_alone_and_every_kind_of_bias(present, twice):
    (x, w, m, *biases), geometry = inputs("3x3")
    tensors = [x, w, m, *biases[:present]]
    padded = [*biases[:present], *[None] * (2 - present)]
    b = None if present == 0 else biases[0] * (biases[1].sigmoid() if present == 2 else 1)
    expected = F.conv2d(x, w * m.sigmoid(), b, *geometry)
    wanted = torch.autograd.grad(expected.square().sum(), tensors)
    for tensor, other in zip(tensors, wanted):
        for one in tensors:
            one.requires_grad_(one is tensor)
        got = mm.masked_conv2d(x, w, m, *padded, *geometry)
        assert is_product(got)
        (grad,) = torch.autograd.grad(got.square().sum(), tensor, create_graph=twice)
        assert grad.requires_grad == twice
        torch.testing.assert_close(grad.detach(), other, rtol=1e-12, atol=1e-12)


def test_what_runs():
    tensors, geometry = inputs("3x3")
    kept = []
    assert metamask_ops(lambda: kept.append(mm.masked_conv2d(*tensors, *geometry))) == {"im2col": 1, "masked_linear": 1}
    assert metamask_ops(lambda: torch.autograd.grad(kept[0].sum(), tensors)) == {"masked_linear_backward": 1, "col2im": 1}


def changed(tensors, **changes):
    x, w, m = (changes.get(name, tensor) for name, tensor in zip("xwm", tensors))
    return mm.masked_conv2d(x, w, m, None, None, *changes.get("geometry", (1, 1)), groups=changes.get("groups", 1))


def test_where_torchs_convolution_runs():
    (x, w, m, *_), _ = inputs("3x3")
    assert is_product(changed((x, w, m)))
    last = torch.channels_last
    others = {
        "one channel less than four for each place": {"w": w[:31], "m": m[:31]},
        "1x1 with less than eight": {"w": w[..., :1, :1].contiguous(), "m": m[..., :1, :1].contiguous(), "geometry": (1, 0)},
        "groups": {"x": torch.cat([x, x], 1), "groups": 2},
        "one image without a batch": {"x": x[0]},
        "a padding with a name": {"geometry": (1, "same")},
        "an input in another order": {"x": x.contiguous(memory_format=last)},
        "a weight in another order": {"w": w.contiguous(memory_format=last)},
        "logits in another order": {"m": m.contiguous(memory_format=last)},
        "an empty batch": {"x": x[:0]},
        "bfloat16": {name: tensor.bfloat16() for name, tensor in zip("xwm", (x, w, m))},
    }
    for what, changes in others.items():
        y = changed((x, w, m), **changes)
        assert not is_product(y), what
        one, weight, mask = (changes.get(name, tensor).double() for name, tensor in zip("xwm", (x, w, m)))
        expected = F.conv2d(one, weight * mask.sigmoid(), None, *changes.get("geometry", (1, 1)), 1, changes.get("groups", 1))
        torch.testing.assert_close(y.double(), expected, rtol=1e-12, atol=0.05 if what == "bfloat16" else 1e-12, msg=what)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = changed([tensor.float() for tensor in (x, w, m)])
    assert y.dtype == torch.bfloat16 and not is_product(y)


@pytest.mark.parametrize(
    ("geometry", "message"),
    [((1, 1, 3), "Kernel size can't be greater"), ((0, 1), "non-positive stride"), ((1, -1), "negative padding")],
    ids=["too small an image", "stride", "padding"],
)
def test_torch_words_what_its_convolution_refuses(geometry, message):
    (x, w, m, *_), _ = inputs("3x3")
    with pytest.raises(RuntimeError, match=message):
        changed((x, w, m), geometry=geometry)


# --- The fused step.


def net(dtype=torch.float64):
    torch.manual_seed(0)
    options = {"dtype": dtype}
    return nn.Sequential(
        MaskedConv2d(2, 6, 3, stride=4, **options),
        nn.Tanh(),
        MaskedConv2d(6, 64, 3, padding=1, bias=False, **options),
        nn.Tanh(),
        MaskedConv2d(64, 20, 2, **options),
        nn.Flatten(),
        nn.Linear(20, 3, **options),
    )


@each_setting
def test_the_fused_steps_numbers_are_those_of_torch(kind, settings):
    names = compare(net, kind, settings)
    # The first convolution has too many places; of the others nothing gives a gradient
    assert [names.count(op) for op in kind.ops] == [2 * 4, 2 * 4] and "metamask::masked_linear_backward" not in names


@each_kind
def test_a_penalty_is_not_fused_and_right(kind):
    def loss(model, x, y):
        return error(model, x, y) + 0.1 * model[2].weight.square().sum() + 0.1 * model[4].mask_logits.abs().sum()

    assert kind.ops[0] in compare(net, kind, kind.settings, loss)


@each_kind
def test_state_in_another_order_is_brought_into_that_of_its_weight(kind):
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    moved = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = net()
        optimizer = kind.ours(model, **kind.settings)
        weight = model[2].weight
        buffer = torch.arange(weight.numel(), dtype=weight.dtype).view(weight.shape) / weight.numel()
        for name in kind.state:
            optimizer.state[weight][name] = buffer.clone(memory_format=memory_format)
        optimizer.backward(model(x).square().sum())
        moved.append([weight.detach(), *(optimizer.state[weight][name] for name in kind.state)])
    assert all(torch.equal(one, other) and one.stride() == other.stride() for one, other in zip(*moved))


@each_kind
def test_a_fused_step_tells_those_who_saved_the_weight(kind):
    model = net()
    versions = [parameter._version for parameter in (model[2].weight, model[2].mask_logits)]
    kind.ours(model, 0.1).backward(model(torch.randn(1, 2, 8, 8, dtype=torch.float64)).square().sum())
    assert all(parameter._version > version for parameter, version in zip((model[2].weight, model[2].mask_logits), versions))


def test_a_fused_step_allocates_nothing_of_the_weights_size():
    torch.manual_seed(0)
    model = nn.Sequential(MaskedConv2d(64, 512, 3, padding=1), nn.AvgPool2d(2))
    optimizer = FusedMaskedSGD(model, 0.1)
    x = torch.randn(1, 64, 2, 2, requires_grad=True)
    size = model[0].weight.numel() * 4
    assert largest_allocation(lambda: optimizer.backward(model(x).square().mean())) < size / 8
    assert largest_allocation(lambda: model(x).square().mean().backward()) >= size, "the measurement sees a gradient"


# --- The raw ops.


@each_dtype
@each_case
def test_im2col_and_col2im_equal_the_reference(case, dtype):
    (x, w, *_), geometry = inputs(case)
    kernel = w.shape[2:]
    pairs = [(value, value) if isinstance(value, int) else value for value in geometry]
    expected = im2col(x, kernel, *pairs)
    got = conv2d_raw.im2col(x.detach().to(dtype), kernel, *pairs)
    assert torch.equal(got, expected.detach().to(dtype))
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (wanted,) = torch.autograd.grad(expected, x, grad)
    # In any order: made contiguous
    transposed = grad.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    back = conv2d_raw.col2im(transposed, x.shape, kernel, *pairs)
    assert back.dtype == dtype
    torch.testing.assert_close(back.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=1e-5)


def test_opcheck():
    x, kernel, geometry = torch.randn(2, 3, 5, 4), (3, 2), ((2, 1), (1, 0), (1, 2))
    torch.library.opcheck(torch.ops.metamask.im2col.default, (x, kernel, *geometry))
    grad = torch.ones_like(conv2d_raw.im2col(x, kernel, *geometry))
    torch.library.opcheck(torch.ops.metamask.col2im.default, (grad, x.shape, kernel, *geometry))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"input must be \[N, C, H, W\], got shape \[3, 3\]", lambda x, g: conv2d_raw.im2col(x[0, 0], (1, 1), *g)),
        ("stride must be two integers of at least 1, got", lambda x, g: conv2d_raw.im2col(x, (1, 1), (0, 1), *g[1:])),
        ("padding must be two integers of at least 0, got", lambda x, g: conv2d_raw.im2col(x, (1, 1), g[0], (0, -1), g[2])),
        ("input must not be smaller than the kernel", lambda x, g: conv2d_raw.im2col(x, (1, 4), *g)),
        ("size must be that of images", lambda x, g: conv2d_raw.col2im(x, (3, 3, 1, 1, 1), (1, 1), *g)),
        (r"grad must be \[N, places, values\] = \[1, 9, 2\]", lambda x, g: conv2d_raw.col2im(x[0], x.shape, (1, 1), *g)),
        ("metamask::im2col has no derivative", lambda x, g: conv2d_raw.im2col(x.requires_grad_(), (1, 1), *g)),
    ],
    ids=["dimensions", "stride", "padding", "kernel", "size", "grad", "differentiated"],
)
def test_raw_ops_refuse_what_does_not_fit(message, call):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(torch.zeros(1, 2, 3, 3), ((1, 1), (0, 0), (1, 1)))
