"""float32 logits beside 16-bit weights, in every public function: values, gradients, transforms, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import metamask_ext as mm

SIXTEEN = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", SIXTEEN, ids=lambda dtype: str(dtype)[6:])
GATES = ({"gate": "sigmoid"}, {"gate": "sigmoid", "temperature": 0.3}, {"gate": "hard", "threshold": 0.1})
each_gate = pytest.mark.parametrize("gate", GATES, ids=["sigmoid", "sigmoid-t0.3", "hard"])
SLOTS = torch.tensor([1, 0, 2, 1])


def _made(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def _linear(dtype):
    x, w, b = _made((4, 33), (17, 33), (17,), dtype=dtype)
    m, bm = _made((17, 33), (17,), seed=1)
    return (x, w, m, b, bm), (2, 4), mm.masked_linear


def _conv2d(dtype):
    x, w, b = _made((4, 3, 5, 5), (6, 3, 3, 3), (6,), dtype=dtype)
    m, bm = _made((6, 3, 3, 3), (6,), seed=1)
    return (x, w, m, b, bm), (2, 4), mm.masked_conv2d


def _weight(dtype):
    (w,), (m,) = _made((17, 33), dtype=dtype), _made((17, 33), seed=1)
    return (w, m), (1,), mm.masked_weight


def _list(dtype):
    w, m = _made((17, 33), (5,), dtype=dtype), _made((17, 33), (5,), seed=1)
    return (
        (*w, *m),
        (2, 3),
        lambda a, b, c, d, **gate: torch.cat([one.flatten() for one in mm.masked_weight([a, b], [c, d], **gate)]),
    )


def _tasks(function, shape, image):
    def make(dtype):
        x, w, b = _made(image, shape, shape[:1], dtype=dtype)
        masks = _made(shape, shape, shape, shape[:1], shape[:1], shape[:1], seed=1)

        def run(x, w, b, *masks, **gate):
            return function(x, SLOTS, w, masks[:3], b, masks[3:], **gate)

        return (x, w, b, *masks), range(3, 9), run

    return make


def _stacked(dtype):
    x, w, b = _made((4, 33), (17, 33), (17,), dtype=dtype)
    m, bm = _made((3, 17, 33), (3, 17), seed=1)
    return (x, w, m, b, bm), (2, 4), lambda x, w, m, b, bm, **gate: mm.task_masked_linear(x, SLOTS, w, m, b, bm, **gate)


MAKERS = {
    "masked_weight": _weight,
    "masked_weight-list": _list,
    "masked_linear": _linear,
    "masked_conv2d": _conv2d,
    "task_masked_linear": _tasks(mm.task_masked_linear, (17, 33), (4, 33)),
    "task_masked_linear-stacked": _stacked,
    "task_masked_conv2d": _tasks(mm.task_masked_conv2d, (6, 3, 3, 3), (4, 3, 5, 5)),
}
each_function = pytest.mark.parametrize("name", MAKERS)


@each_function
@each_dtype
@each_gate
def test_values_and_gradients_are_those_of_float32_to_16_bits_and_the_masks_gradients_are_float32(name, dtype, gate):
    arguments, masks, function = MAKERS[name](dtype)
    given = [tensor.clone().requires_grad_() for tensor in arguments]
    exact = [tensor.double().requires_grad_() for tensor in arguments]
    y, wanted = function(*given, **gate), function(*exact, **gate)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wanted, rtol=8 * eps, atol=8 * eps * wanted.abs().max().item())
    y.float().square().sum().backward()
    wanted.square().sum().backward()
    for index, (one, other) in enumerate(zip(given, exact)):
        assert one.grad.dtype == one.dtype == (torch.float32 if index in masks else dtype)
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0.05, atol=16 * eps * other.grad.abs().max().item())


@each_function
@each_dtype
@each_gate
def test_plain_torch_gives_the_same_numbers_as_the_kernels_up_to_the_rounding_of_16_bits(name, dtype, gate):
    arguments, _, function = MAKERS[name](dtype)
    grads = []
    for plain in (False, True):
        given = [tensor.clone().requires_grad_() for tensor in arguments]
        if plain:
            with torch.autograd.forward_ad.dual_level():
                y = function(*given, **gate)
        else:
            y = function(*given, **gate)
        y.float().sum().backward()
        grads.append([y.detach(), *(tensor.grad for tensor in given)])
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=16 * eps * theirs.abs().max().item())


@each_dtype
@pytest.mark.parametrize("threshold", [0.0, 0.1, -0.3, 5.0, -1e4, 1e6, -1e6, float("inf"), float("-inf")])
def test_a_hard_gate_compares_the_logits_as_they_are_also_where_16_bits_would_cross_the_threshold(dtype, threshold):
    near = torch.tensor(threshold if abs(threshold) < 1e30 else 0.0)
    above, below = (torch.nextafter(near, torch.tensor(sign * torch.inf)) for sign in (1, -1))
    m = torch.stack([near, above, below, above + 1, below - 1, torch.tensor(1e5), torch.tensor(-1e5), torch.tensor(torch.inf)])
    w = torch.ones(8, dtype=dtype)
    wanted = (m > threshold).to(dtype)
    assert torch.equal(mm.masked_weight(w, m, gate="hard", threshold=threshold), wanted)
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(mm.masked_weight(w, m, gate="hard", threshold=threshold), wanted)
    bits = mm.unpack_mask(mm.pack_mask(m, threshold=threshold), m.shape)
    assert torch.equal(bits.to(dtype), wanted)
    leaf = m.clone().requires_grad_()
    mm.masked_weight(w * 2, leaf, gate="hard", threshold=threshold).float().sum().backward()
    assert torch.equal(leaf.grad[:7], torch.full((7,), 2.0))  # straight through


@each_dtype
def test_large_and_small_logits_give_gates_of_0_and_1_and_no_nan(dtype):
    m = torch.tensor([1e5, -1e5, 3e38, -3e38, torch.inf, -torch.inf, 1e-40, 0.0], requires_grad=True)
    theta = mm.masked_weight(torch.ones(8, dtype=dtype), m)
    assert theta.tolist() == [1, 0, 1, 0, 1, 0, 0.5, 0.5]
    theta.float().sum().backward()
    assert m.grad.isfinite().all()


@each_dtype
def test_second_derivatives_and_transforms(dtype):
    x, w, m = (*_made((3, 9), (5, 9), dtype=dtype), *_made((5, 9), seed=1))

    def loss(mask, weight):
        return mm.masked_linear(x.to(weight.dtype), weight, mask).float().square().sum()

    exact = torch.func.grad(loss)(m, w.float())
    for found in (torch.func.grad(loss)(m, w), torch.func.vmap(torch.func.grad(loss), (0, None))(m[None], w)[0]):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
    leaf = m.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf, w), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    wide = m.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(wide, w.float()), wide, create_graph=True)
    (wanted,) = torch.autograd.grad(wanted.sum(), wide)
    assert second.dtype == torch.float32
    torch.testing.assert_close(second, wanted, rtol=0.1, atol=0.05 * wanted.abs().max().item())
    _, tangent = torch.func.jvp(lambda mask: mm.masked_linear(x, w, mask).float(), (m,), (torch.ones_like(m),))
    _, wanted = torch.func.jvp(lambda mask: mm.masked_linear(x.float(), w.float(), mask), (m,), (torch.ones_like(m),))
    torch.testing.assert_close(tangent, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    x, w, m = (*_made((3, 9), (5, 9), dtype=torch.bfloat16), *_made((5, 9), seed=1))
    for gate in GATES:
        compiled = torch.compile(lambda mask, gate=gate: mm.masked_linear(x, w, mask, **gate), backend=backend, fullgraph=True)
        leaf, other = m.clone().requires_grad_(), m.clone().requires_grad_()
        y, wanted = compiled(leaf), mm.masked_linear(x, w, other, **gate)
        torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.05)
        y.float().sum().backward(), wanted.float().sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=0.05, atol=0.05)


def test_masks_of_16_bits_and_of_float32_may_share_a_mixed_task_batch():
    x, w = _made((4, 33), (17, 33), dtype=torch.bfloat16)
    masks = _made((17, 33), (17, 33), (17, 33), seed=1)
    y = mm.task_masked_linear(x, SLOTS, w, [masks[0], masks[1].bfloat16(), masks[2]])
    wanted = mm.task_masked_linear(x, SLOTS, w, [mask.bfloat16() for mask in masks])
    exact = mm.task_masked_linear(x, SLOTS, w, [masks[0], masks[1].bfloat16().float(), masks[2]])
    assert torch.equal(y, exact)
    torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.05)
    leaves = [
        mask.detach().to(dtype).requires_grad_() for mask, dtype in zip(masks, (torch.float32, torch.bfloat16, torch.float32))
    ]
    mm.task_masked_linear(x, SLOTS, w, leaves).float().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    weights = mm.masked_weight([w, w], leaves[:2])
    assert torch.equal(weights[1], mm.masked_weight(w, leaves[1]))


@each_dtype
def test_under_autocast(dtype):
    (x, w, m, b, bm), _, function = _linear(torch.bfloat16)
    with torch.autocast("cpu", dtype=dtype):
        y = function(x, w, m, b, bm)
        plain = F.linear(x, w, b)
    assert y.dtype == plain.dtype == dtype


W16 = torch.zeros(4, 3, dtype=torch.bfloat16)
REFUSED = [
    (torch.zeros(4, 3, dtype=torch.float64), torch.float32),
    (torch.zeros(4, 3, dtype=torch.float64), torch.bfloat16),
    (torch.zeros(4, 3), torch.bfloat16),
    (torch.zeros(4, 3), torch.float64),
    (W16, torch.float64),
    (W16, torch.float16),
    (W16, torch.int32),
]


@pytest.mark.parametrize(("weight", "dtype"), REFUSED, ids=lambda value: str(getattr(value, "dtype", value))[6:])
def test_other_mixtures_are_refused_in_words_by_every_function(weight, dtype):
    mask, x, bias = weight.to(dtype), torch.zeros(2, 3, dtype=weight.dtype), torch.zeros(4, dtype=weight.dtype)
    kernel, image = weight[:, :, None, None], x[:, :, None, None]
    slots = torch.tensor([0, 0])
    calls = (
        ("mask_logits", lambda: mm.masked_weight(weight, mask)),
        (r"mask_logits\[0\]", lambda: mm.masked_weight([weight], [mask])),
        ("mask_logits", lambda: mm.masked_linear(x, weight, mask)),
        ("bias_mask_logits", lambda: mm.masked_linear(x, weight, weight, bias, bias.to(dtype))),
        ("mask_logits", lambda: mm.masked_conv2d(image, kernel, kernel.to(dtype))),
        ("bias_mask_logits", lambda: mm.masked_conv2d(image, kernel, kernel, bias, bias.to(dtype))),
        (r"masks\[0\]", lambda: mm.task_masked_linear(x, slots, weight, [mask])),
        ("masks", lambda: mm.task_masked_linear(x, slots, weight, mask[None])),
        ("bias_masks", lambda: mm.task_masked_linear(x, slots, weight, [weight], bias, bias.to(dtype)[None])),
        (r"masks\[0\]", lambda: mm.task_masked_conv2d(image, slots, kernel, [kernel.to(dtype)])),
    )
    for name, call in calls:
        for context in (torch.no_grad, torch.autograd.forward_ad.dual_level):
            with (
                context(),
                pytest.raises(TypeError, match=f"{name} must have the dtype of (weight|bias).*{weight.dtype}, got {dtype}"),
            ):
                call()
