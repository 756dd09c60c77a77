"""Derivatives: the Functions against finite differences, against plain torch, under every transform, and which ops they run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.closeness import assert_close
from support.derivatives import flat, nested_gradients, options
from support.gpu import DEVICES
from support.profiling import metamask_ops
from support.samples import ALL, DTYPES, GATES, SMALL, ids
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import metamask_ext as mm
from metamask_ext.ops.dispatch import use_reference
from metamask_ext.ops.weight import reference as weight_reference


def plain(weight, mask, gate):
    return weight_reference.masked_weight(weight, mask, *gate)


def leaves(sample, dtype=torch.float64, device="cpu", count=2):
    # detach() keeps the strides: gradients of real layouts
    return [tensor.detach().requires_grad_() for tensor in sample.tensors(count, dtype, device)]


# Finite differences need something to vary, and memory of its own for each element.
SMOOTH = tuple(sample for sample in SMALL if sample.name not in ("empty", "no-columns", "expanded"))
sigmoid = pytest.mark.parametrize("temperature", [1.0, 0.5])
each_device = pytest.mark.parametrize("device", DEVICES)
each_gate = pytest.mark.parametrize("gate", [GATES[1], GATES[3]], ids=["sigmoid", "hard"])


@pytest.mark.every_device(
    emulated_if=lambda sample, temperature, **_: sample.name in ("2x3", "mask-wider", "conv") and temperature == 0.5
)
@each_device
@sigmoid
@pytest.mark.parametrize("sample", SMOOTH, ids=ids(SMOOTH))
def test_masked_weight_gradcheck_and_gradgradcheck(sample, temperature, device):
    inputs = tuple(leaves(sample, device=device))

    def function(weight, mask):
        return mm.masked_weight(weight, mask, temperature=temperature)

    # forward AD and batched gradients go through plain torch: one of the paths a user reaches
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


def linear_inputs(device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = {"input": (2, 3, 5), "weight": (4, 5), "mask": (4, 5), "bias": (4,), "bias_mask": (4,)}
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes.values()]


def conv_inputs(device="cpu", dtype=torch.float64, groups=1):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 4, 4, 3), (4, 4 // groups, 2, 2), (4, 4 // groups, 2, 2), (4,), (4,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


@pytest.mark.every_device(emulated_if=lambda temperature, **_: temperature == 0.5)
@each_device
@sigmoid
def test_masked_linear_gradcheck_and_gradgradcheck(temperature, device):
    def function(*tensors):
        return mm.masked_linear(*tensors, temperature=temperature)

    assert gradcheck(function, linear_inputs(device), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, linear_inputs(device))


@each_device
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 2), (1, "same", 2, 1), ((1, 2), "valid", 1, 4)]
)
def test_masked_conv2d_gradcheck_and_gradgradcheck(stride, padding, dilation, groups, device):
    def function(*tensors):
        return mm.masked_conv2d(*tensors, stride, padding, dilation, groups)

    assert gradcheck(function, conv_inputs(device, groups=groups), check_forward_ad=True)
    assert gradgradcheck(function, conv_inputs(device, groups=groups))


@pytest.mark.every_device
@each_device
@each_gate
@pytest.mark.parametrize("sample", SMALL, ids=ids(SMALL))
def test_derivatives_to_the_fourth_order_equal_plain_torch(sample, gate, device):
    ours = nested_gradients(lambda w, m: mm.masked_weight(w, m, **options(gate)), leaves(sample, device=device), 4)
    expected = nested_gradients(lambda w, m: plain(w, m, gate), leaves(sample, device=device), 4)
    assert len(ours) == 8
    for one, other in zip(ours, expected):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@each_device
@each_gate
def test_linear_and_conv_derivatives_to_the_third_order_equal_plain_torch(gate, device):
    def linear(x, w, m, b, bm):
        return F.linear(x, plain(w, m, gate), plain(b, bm, gate))

    def conv(x, w, m, b, bm):
        return F.conv2d(x, plain(w, m, gate), plain(b, bm, gate), padding=1)

    pairs = [
        (lambda *t: mm.masked_linear(*t, **options(gate)), linear, linear_inputs),
        (lambda *t: mm.masked_conv2d(*t, padding=1, **options(gate)), conv, conv_inputs),
    ]
    for function, expected, inputs in pairs:
        ours = nested_gradients(function, inputs(device), 3)
        theirs = nested_gradients(expected, inputs(device), 3)
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.every_device
@each_device
@each_gate
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_gradients_in_every_dtype_equal_the_float64_formula(dtype, gate, device):
    for sample in ALL:
        weight, mask, grad = sample.tensors(3, dtype, device)
        weight, mask = weight.detach().requires_grad_(), mask.detach().requires_grad_()
        got = torch.autograd.grad(mm.masked_weight(weight, mask, **options(gate)), (weight, mask), grad)
        double = [tensor.detach().double().cpu() for tensor in (grad, weight, mask)]
        for name, one, other in zip(("dW", "dM"), got, weight_reference.masked_weight_backward(*double, *gate)):
            assert one.dtype == dtype
            assert_close(one.cpu(), other, f"{sample.name} {name}")


def test_the_references_own_formulas_equal_autograd_through_it():
    for gate in GATES:
        weight, mask, grad, a, b = leaves(SMALL[2], count=5)
        theta = plain(weight, mask, gate)
        first = torch.autograd.grad(theta, (weight, mask), grad, create_graph=True)
        for one, other in zip(first, weight_reference.masked_weight_backward(grad, weight, mask, *gate)):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
        second = torch.autograd.grad(first, (grad, weight, mask), (a, b))
        for one, other in zip(second, weight_reference.masked_weight_double_backward(a, b, grad, weight, mask, *gate)):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [("weight",), ("mask",), ("weight", "mask")], ids=["W", "M", "W-M"])
def test_only_what_requires_grad_gets_a_gradient(wanted):
    weight, mask = SMALL[2].tensors(2, torch.float64)
    inputs = {"weight": weight, "mask": mask}
    for name in wanted:
        inputs[name].requires_grad_()
    mm.masked_weight(weight, mask).sum().backward()
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name in wanted)


# --- The transforms: plain torch runs there, and must give the same numbers.


def loss(w, m, x):
    return mm.masked_linear(x, w, m, temperature=0.5).square().sum()


def manual_loss(w, m, x):
    return F.linear(x, w * torch.sigmoid(m / 0.5)).square().sum()


def transform_inputs():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (4, 3), (2, 3))]


TRANSFORMS = {
    "grad": lambda f, w, m, x: torch.func.grad(f, (0, 1))(w, m, x),
    "grad of grad": lambda f, w, m, x: torch.func.grad(lambda m: torch.func.grad(f, 1)(w, m, x).square().sum())(m),
    "vmap of grad": lambda f, w, m, x: torch.func.vmap(torch.func.grad(f, (0, 1)), (None, None, 0))(w, m, x[:, None]),
    "vmap over masks": lambda f, w, m, x: torch.func.vmap(f, (None, 0, None))(w, torch.stack([m, -m]), x),
    "jvp": lambda f, w, m, x: torch.func.jvp(f, (w, m, x), (m, w, x)),
    "jacrev": lambda f, w, m, x: torch.func.jacrev(lambda m: torch.func.grad(f, 1)(w, m, x))(m),
    "jacfwd": lambda f, w, m, x: torch.func.jacfwd(lambda m: torch.func.grad(f, 1)(w, m, x))(m),
    "hessian": lambda f, w, m, x: torch.func.hessian(f, 1)(w, m, x),
    "vjp": lambda f, w, m, x: torch.func.vjp(f, w, m, x)[1](torch.ones((), dtype=torch.float64)),
    "linearize": lambda f, w, m, x: torch.func.linearize(f, w, m, x)[1](m, w, x),
}


@pytest.mark.once
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_transforms_equal_those_of_plain_torch(name):
    got, expected = (flat(TRANSFORMS[name](f, *transform_inputs())) for f in (loss, manual_loss))
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_hard_gate_under_torch_func_equals_the_function():
    w, m, x = transform_inputs()

    def hard(w, m, x):
        return (mm.masked_linear(x, w, m, gate="hard") + 1).square().sum()

    got = torch.func.grad(hard, (0, 1))(w, m, x)
    leaf_w, leaf_m = w.clone().requires_grad_(), m.clone().requires_grad_()
    expected = torch.autograd.grad(hard(leaf_w, leaf_m, x), (leaf_w, leaf_m))
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    # the mask's gradient of a switched-off weight is not zero: the gate is passed straight through
    assert (expected[1][m <= 0] != 0).all()


def test_forward_mode_ad_equals_plain_torch():
    w, m, x = transform_inputs()
    results = []
    for f in (loss, manual_loss):
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(f(forward_ad.make_dual(w, m), forward_ad.make_dual(m, w), x)).tangent)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_function_inside_the_graph_of_a_transform_keeps_outer_gradients():
    # grad inside, autograd outside: the outer gradient must see through the inner transform
    w, m, x = transform_inputs()
    results = []
    for f in (loss, manual_loss):
        leaf = m.clone().requires_grad_()
        torch.func.grad(f, 0)(w, leaf, x).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


# --- torch.compile: each case is pinned, so that another torch shows what changed.


def train_step(f):
    def step(w, m, x):
        grads = torch.autograd.grad(f(w, m, x), (w, m))
        return w - 0.1 * grads[0], m - 0.1 * grads[1]

    return step


COMPILED = {
    "forward": lambda f: f,
    "func.grad inside": lambda f: lambda w, m, x: torch.func.grad(f, (0, 1))(w, m, x),
    "grad of grad inside": lambda f: lambda w, m, x: torch.func.grad(lambda m: torch.func.grad(f, 1)(w, m, x).sum())(m),
    "vmap inside": lambda f: lambda w, m, x: torch.func.vmap(f, (None, None, 0))(w, m, x[:, None]),
}


@pytest.mark.once
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_cases_equal_eager_plain_torch(name, backend):
    expected = flat(COMPILED[name](manual_loss)(*transform_inputs()))
    got = flat(torch.compile(COMPILED[name](loss), backend=backend, fullgraph=True, dynamic=False)(*transform_inputs()))
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.once
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_backward_through_a_compiled_forward_equals_eager(backend):
    results = []
    for f in (manual_loss, torch.compile(loss, backend=backend, fullgraph=True, dynamic=False)):
        w, m, x = (tensor.requires_grad_() for tensor in transform_inputs())
        f(w, m, x).backward()
        results.append((w.grad, m.grad, x.grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.once
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_step_that_calls_autograd_grad_equals_eager(backend):
    w, m, x = transform_inputs()
    w.requires_grad_(), m.requires_grad_()
    expected = train_step(manual_loss)(w, m, x)
    got = torch.compile(train_step(loss), backend=backend, dynamic=False)(w, m, x)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_which_path_runs_where():
    """The predicate itself: Functions in eager code only."""
    seen = {}

    def note(name):
        def function(w):
            seen[name] = use_reference()
            return (w * w).sum()

        return function

    w = torch.ones(2)
    note("eager")(w)
    torch.func.grad(note("grad"))(w)
    torch.func.vmap(note("vmap"))(w)
    torch.func.jvp(note("jvp"), (w,), (w,))
    with forward_ad.dual_level():
        note("forward AD")(w)
    leaf = torch.ones(2, requires_grad=True)
    torch.autograd.grad(note("autograd")(leaf), leaf)
    assert seen == {"eager": False, "grad": True, "vmap": True, "jvp": True, "forward AD": True, "autograd": False}


# --- What runs: a test that calling reference.py everywhere would fail.


@each_device
def test_eager_forward_backward_and_double_backward_dispatch_the_kernels(device):
    x, w, m, b, bm = linear_inputs(device)
    kept = {}

    def forward():
        kept["y"] = mm.masked_linear(x, w, m, b, bm)

    def backward():
        kept["grads"] = torch.autograd.grad(kept["y"].square().sum(), (x, w, m, b, bm), create_graph=True)

    def double_backward():
        torch.autograd.grad(sum(grad.square().sum() for grad in kept["grads"]), (x, w, m, b, bm))

    assert metamask_ops(forward) == {"masked_linear": 1}
    # Weight and bias: one pass each; theta once more for the gradient of the input
    assert metamask_ops(backward) == {"masked_weight": 1, "masked_weight_backward": 2}
    # the second gradient flows through the first backward and through its theta
    assert metamask_ops(double_backward) == {
        "masked_weight_double_backward": 2,
        "masked_weight_backward": 1,
        "masked_linear_backward": 1,
    }
    forward()
    # Nobody differentiates further: one op
    assert metamask_ops(lambda: torch.autograd.grad(kept["y"].square().sum(), (x, w, m, b, bm))) == {"masked_linear_backward": 1}


def test_no_kernel_runs_where_a_function_cannot_go():
    w, m, x = transform_inputs()
    assert metamask_ops(lambda: torch.func.grad(loss)(w, m, x)) == {}
    # A small weight: tests/ops/test_composite.py has those that are large enough
    assert metamask_ops(lambda: torch.compile(loss, backend="eager")(w, m, x)) == {}
    assert metamask_ops(lambda: loss(w, m, x)) == {"masked_linear": 1}
