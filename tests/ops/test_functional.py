"""masked_weight, masked_linear and masked_conv2d: values, dtypes, autocast, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.gpu import DEVICES
from support.samples import DTYPES

import metamask_ext as mm

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def tensors(*shapes, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def theta(weight, mask, temperature=1.0):
    return weight.double() * torch.sigmoid(mask.double() / temperature)


# GEMMs and convolutions accumulate in their own order: error grows with the square root of the reduction, here at most 129 long
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def assert_near(got, expected, dtype):
    assert got.dtype == dtype
    scale = max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@each_device
@each_dtype
@pytest.mark.parametrize("shape", [(129,), (3, 129), (2, 3, 129), (0, 129)], ids=str)
def test_masked_linear_values(shape, dtype, device):
    x, w, m, b, bm = tensors(shape, (17, 129), (17, 129), (17,), (17,), dtype=dtype, device=device)
    expected = F.linear(x.double(), theta(w, m, 0.5), theta(b, bm, 0.5))
    assert_near(mm.masked_linear(x, w, m, b, bm, temperature=0.5), expected, dtype)
    assert_near(mm.masked_linear(x, w, m), F.linear(x.double(), theta(w, m)), dtype)


@each_device
@each_dtype
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batched", "unbatched"])
@pytest.mark.parametrize(
    "geometry",
    [(1, 0, 1, 1), (2, (1, 2), 1, 2), (1, "same", (2, 1), 4), ((1, 2), "valid", 1, 1)],
    ids=["plain", "groups", "same", "valid"],
)
def test_masked_conv2d_values(geometry, batch, dtype, device):
    groups = geometry[3]
    x, w, m, b, bm = tensors(
        (*batch, 4, 7, 6), (8, 4 // groups, 3, 2), (8, 4 // groups, 3, 2), (8,), (8,), dtype=dtype, device=device
    )
    expected = F.conv2d(x.double(), theta(w, m), theta(b, bm), *geometry)
    assert_near(mm.masked_conv2d(x, w, m, b, bm, *geometry), expected, dtype)
    channels_last = w.contiguous(memory_format=torch.channels_last)
    assert_near(mm.masked_conv2d(x, channels_last, m, b, bm, *geometry), expected, dtype)


def test_the_convolutions_of_tests_are_exact_and_repeat():
    """On a GPU the comparisons above fail without the one, gradcheck without the other."""
    assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic


def test_by_hand():
    # hard gate, one input switched off: y = 2 * 3 + 0 * 5 + bias 1
    x, w, m = torch.tensor([3.0, 5.0]), torch.tensor([[2.0, 7.0]]), torch.tensor([[1.0, -1.0]])
    assert mm.masked_linear(x, w, m, torch.tensor([1.0]), gate="hard").item() == 7.0
    assert mm.masked_linear(x, w, m, torch.tensor([1.0]), torch.tensor([-1.0]), gate="hard").item() == 6.0
    # sigmoid(2 ln 3 / 2) = 3/4
    weight = mm.masked_weight(torch.tensor(8.0), torch.tensor(2 * math.log(3)), temperature=2.0)
    assert weight.item() == pytest.approx(6.0, rel=1e-6)


def test_a_bias_without_logits_is_not_masked():
    x, w, m, b = tensors((2, 3), (4, 3), (4, 3), (4,))
    torch.testing.assert_close(mm.masked_linear(x, w, m, b), F.linear(x, w * torch.sigmoid(m), b))


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_as_torch_linear_and_conv2d(dtype, device):
    x, w, m, b, bm = (t.requires_grad_() for t in tensors((3, 129), (17, 129), (17, 129), (17,), (17,), device=device))
    with torch.autocast(device, dtype=dtype):
        y, plain = mm.masked_linear(x, w, m, b, bm), F.linear(x, w, b)
        weight = mm.masked_weight(w, m)
    assert y.dtype == plain.dtype == dtype
    assert weight.dtype == torch.float32  # an element-wise op, which autocast leaves alone
    assert_near(y.detach(), F.linear(x.double(), theta(w, m), theta(b, bm)).detach(), dtype)
    got = torch.autograd.grad(y.float().sum(), (x, w, m, b, bm))
    expected = torch.autograd.grad(F.linear(x.double(), theta(w, m), theta(b, bm)).sum(), (x, w, m, b, bm))
    for one, other in zip(got, expected):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * other.abs().max().item())

    image, kernel, logits = tensors((1, 2, 5, 5), (3, 2, 3, 3), (3, 2, 3, 3), device=device)
    with torch.autocast(device, dtype=dtype):
        y, plain = mm.masked_conv2d(image, kernel, logits), F.conv2d(image, kernel)
    assert y.dtype == plain.dtype == dtype
    assert_near(y, F.conv2d(image.double(), theta(kernel, logits)), dtype)


@each_device
def test_autocast_leaves_float64_alone(device):
    x, w, m = tensors((3, 5), (4, 5), (4, 5), dtype=torch.float64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = mm.masked_linear(x, w, m)
    assert_near(y, F.linear(x, theta(w, m)), torch.float64)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_autocast_takes_the_inputs_that_torch_takes(input_dtype, weight_dtype):
    x, w, m = torch.ones(2, 3, dtype=input_dtype), torch.ones(4, 3, dtype=weight_dtype), torch.ones(4, 3, dtype=weight_dtype)
    image, kernel = torch.ones(1, 3, 5, 5, dtype=input_dtype), torch.ones(4, 3, 3, 3, dtype=weight_dtype)
    calls = (
        (lambda: F.linear(x, w), lambda: mm.masked_linear(x, w, m)),
        (lambda: F.conv2d(image, kernel), lambda: mm.masked_conv2d(image, kernel, kernel)),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for plain, ours in calls:
            try:
                dtype = plain().dtype
            except RuntimeError:
                with pytest.raises(TypeError, match=rf"input must have .*got {input_dtype}"):
                    ours()
            else:
                assert ours().dtype == dtype


def test_the_least_temperature_gives_finite_numbers():
    x, w, m = (t.requires_grad_() for t in tensors((3, 5), (4, 5), (4, 5)))
    with torch.no_grad():
        m[0] = torch.tensor([0.0, 1e-38, -1e-38, 1e4, -1e4])
    y = mm.masked_linear(x, w, m, temperature=2.0**-126)
    assert y.isfinite().all()
    grad_x, grad_w = torch.autograd.grad(y.sum(), (x, w))
    assert grad_x.isfinite().all() and grad_w.isfinite().all()
    assert_near(y.detach(), F.linear(x.double(), w.double() * torch.sigmoid(m.double() * 2.0**126)).detach(), torch.float32)


def test_autocast_under_a_transform_gives_the_autocast_dtype_too():
    x, w, m = tensors((3, 5), (4, 5), (4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.func.vmap(lambda row: mm.masked_linear(row, w, m))(x)
    assert_near(y, F.linear(x.double(), theta(w, m)), torch.bfloat16)


X, W, M, B = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4)
IMAGE, KERNEL = torch.zeros(1, 4, 5, 5), torch.zeros(6, 2, 3, 3)
REFUSED = {
    "gate": (ValueError, r"gate must be one of \['hard', 'sigmoid'\], got 'relu'", lambda: mm.masked_weight(W, M, gate="relu")),
    "temperature 0": (
        ValueError,
        "temperature must be finite and greater than 0, got 0",
        lambda: mm.masked_weight(W, M, temperature=0),
    ),
    "temperature < 0": (ValueError, "temperature .* got -1.0", lambda: mm.masked_linear(X, W, M, temperature=-1.0)),
    "temperature nan": (ValueError, "temperature .* got nan", lambda: mm.masked_weight(W, M, temperature=math.nan)),
    "temperature inf": (ValueError, "temperature .* got inf", lambda: mm.masked_weight(W, M, temperature=math.inf)),
    "temperature whose inverse is not finite": (
        ValueError,
        r"temperature .* got 1e-39 \(the least is 2\*\*-126\)",
        lambda: mm.masked_weight(W, M, temperature=1e-39),
    ),
    "temperature text": (TypeError, "temperature must be a number, got '1'", lambda: mm.masked_weight(W, M, temperature="1")),
    "threshold text": (
        TypeError,
        "threshold must be a number, got None",
        lambda: mm.masked_weight(W, M, gate="hard", threshold=None),
    ),
    "threshold nan": (ValueError, "threshold must be a number", lambda: mm.masked_weight(W, M, gate="hard", threshold=math.nan)),
    "no tensor": (TypeError, "mask_logits must be a tensor, got list", lambda: mm.masked_weight(W, [0.0])),
    "input no tensor": (TypeError, "input must be a tensor, got list", lambda: mm.masked_linear([1.0], W, M)),
    "input width": (
        ValueError,
        r"input must be \[..., in\] with in = 3 .* got \[2, 5\]",
        lambda: mm.masked_linear(torch.zeros(2, 5), W, M),
    ),
    "input scalar": (ValueError, r"input must be .* got \[\]", lambda: mm.masked_linear(torch.zeros(()), W, M)),
    "input dtype": (
        TypeError,
        "input must have the dtype of weight, torch.float32, got torch.float64",
        lambda: mm.masked_linear(X.double(), W, M),
    ),
    "input device": (
        ValueError,
        "input must be on the device of weight, cpu, got meta",
        lambda: mm.masked_linear(X.to("meta"), W, M),
    ),
    "weight 1-d": (ValueError, r"weight must be \[out, in\], got shape \[4\]", lambda: mm.masked_linear(X, B, B)),
    "bias shape": (ValueError, r"bias must be \[out\] = \[4\], got \[3\]", lambda: mm.masked_linear(X, W, M, torch.zeros(3))),
    "bias device": (
        ValueError,
        "bias must be on the device of weight, cpu, got meta",
        lambda: mm.masked_linear(X, W, M, B.to("meta")),
    ),
    "bias dtype": (TypeError, "bias must have the dtype of weight", lambda: mm.masked_linear(X, W, M, B.double())),
    "bias mask shape": (
        ValueError,
        "bias_mask_logits must have the shape of bias",
        lambda: mm.masked_linear(X, W, M, B, torch.zeros(3)),
    ),
    "bias mask dtype": (
        TypeError,
        "bias_mask_logits must have the dtype of bias",
        lambda: mm.masked_linear(X, W, M, B, B.double()),
    ),
    "bias mask alone": (ValueError, "bias_mask_logits needs a bias", lambda: mm.masked_linear(X, W, M, None, B)),
    "kernel 2-d": (ValueError, r"weight must be \[C_out, C_in / groups, kH, kW\]", lambda: mm.masked_conv2d(IMAGE, W, M)),
    "channels": (ValueError, "C_in = 2 .* groups=1", lambda: mm.masked_conv2d(IMAGE, KERNEL, KERNEL)),
    "groups": (ValueError, "C_in = 6 .* groups=3", lambda: mm.masked_conv2d(IMAGE, KERNEL, KERNEL, groups=3)),
    "image 2-d": (ValueError, "input must be .*C_in, H, W", lambda: mm.masked_conv2d(X, KERNEL, KERNEL)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_the_arguments_name(name):
    error, message, call = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
    # and in the same words where plain torch runs
    with torch.autograd.forward_ad.dual_level(), pytest.raises(error, match=message):
        call()
