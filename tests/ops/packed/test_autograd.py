"""Derivatives of the ops on bit-packed masks: finite differences, higher orders, transforms, torch.compile, and which ops run."""

from __future__ import annotations

import pytest
import torch
from support.derivatives import nested_gradients
from support.profiling import metamask_ops
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import metamask_ext as mm
from metamask_ext.ops.packed import reference as packed_reference

SLOTS = torch.tensor([2, 0, 2, 1])
# All of one task: theta is expanded
MANY = torch.ones(8, dtype=torch.int64)
each_batch = pytest.mark.parametrize("slots", [SLOTS, MANY], ids=["few", "many"])


def masks(shape, tasks=3):
    generator = torch.Generator().manual_seed(5)
    return torch.stack([mm.pack_mask(torch.randn(shape, generator=generator)) for _ in range(tasks)])


def leaves(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


P, PB = masks((6, 11)), masks((6,))
KERNEL_MASKS = masks((4, 2, 3, 2))


def linear(slots, packed=P, packed_bias=PB):
    return lambda x, w, b: mm.packed_masked_linear(x, slots, w, packed, b, packed_bias)


def plain(slots, packed=(P,), packed_bias=(PB,)):
    return lambda x, w, b: packed_reference.packed_masked_linear(x, slots, w, packed, b, packed_bias, 1)


def linear_inputs(slots):
    return leaves((len(slots), 2, 11), (6, 11), (6,))


@each_batch
def test_linear_gradcheck_and_gradgradcheck(slots):
    inputs = linear_inputs(slots)
    assert gradcheck(linear(slots), inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(linear(slots), inputs)
    assert gradgradcheck(linear(slots, list(P), None), inputs)


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, "same", (2, 1))])
def test_conv2d_gradcheck_and_gradgradcheck(stride, padding, dilation):
    def function(x, w, b):
        return mm.packed_masked_conv2d(x, SLOTS[:2], w, KERNEL_MASKS, b, None, stride, padding, dilation, 2)

    inputs = leaves((2, 4, 5, 4), (4, 2, 3, 2), (4,))
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs)


@each_batch
@pytest.mark.parametrize("packed_bias", [PB, None], ids=["masked", "unmasked"])
@pytest.mark.parametrize("first", [False, True], ids=["second order", "first order"])
def test_batched_gradients_equal_one_after_the_other(slots, packed_bias, first):
    inputs = linear_inputs(slots)
    y = linear(slots, P, packed_bias)(*inputs)
    outputs = y if first else torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    shapes = [(5, *output.shape) for output in ([y] if first else outputs)]
    many = [tensor.detach() for tensor in leaves(*shapes)]
    got = torch.autograd.grad(outputs, inputs, many, is_grads_batched=True, retain_graph=True)
    for index in range(5):
        one = torch.autograd.grad(outputs, inputs, [tensor[index] for tensor in many], retain_graph=True)
        for batched, single in zip(got, one):
            torch.testing.assert_close(batched[index], single, rtol=1e-12, atol=1e-12)


@each_batch
def test_derivatives_to_the_fourth_order_equal_plain_torch(slots):
    ours = nested_gradients(lambda *t: linear(slots)(*t).sin(), linear_inputs(slots), 4)
    theirs = nested_gradients(lambda *t: plain(slots)(*t).sin(), linear_inputs(slots), 4)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed_bias", [PB, None], ids=["masked", "unmasked"])
def test_second_derivative_that_flows_through_the_bias_alone(packed_bias):
    """Also where the input is not finite, which db does not depend on."""
    found = []
    for function in (linear(SLOTS, P, packed_bias), plain(SLOTS, (P,), None if packed_bias is None else (packed_bias,))):
        x, w, b = linear_inputs(SLOTS)
        with torch.no_grad():
            x[0, 0, 0] = float("inf")
        grad = torch.randn(4, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (db,) = torch.autograd.grad(function(x, w, b), b, grad, create_graph=True)
        found += torch.autograd.grad(db.square().sum(), grad)
    assert bool(found[0].any())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("wanted", [("x",), ("w",), ("b",), ("x", "b")], ids="-".join)
def test_only_what_requires_grad_gets_a_gradient(wanted):
    inputs = dict(zip("xwb", (tensor.detach() for tensor in linear_inputs(SLOTS))))
    for name in wanted:
        inputs[name].requires_grad_()
    linear(SLOTS)(**inputs).sum().backward()
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name in wanted)


def test_masks_changed_between_forward_and_backward_are_refused():
    packed = P.clone()
    y = linear(SLOTS, packed)(*linear_inputs(SLOTS))
    packed[0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def loss(x, w, b):
    return linear(SLOTS)(x, w, b).square().sum()


def plain_loss(x, w, b):
    return plain(SLOTS)(x, w, b).square().sum()


TRANSFORMS = {
    "grad": lambda f, *t: torch.func.grad(f, (0, 1, 2))(*t),
    "grad of grad": lambda f, x, w, b: torch.func.grad(lambda w: torch.func.grad(f)(x, w, b).square().sum())(w),
    "vmap over weights": lambda f, x, w, b: torch.func.vmap(f, (None, 0, None))(x, torch.stack([w, -w]), b),
    "jvp": lambda f, *t: torch.func.jvp(f, t, t[::1]),
    "hessian": lambda f, *t: torch.func.hessian(f, 2)(*t),
}


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [tensor for part in result for tensor in flat(part)]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_transforms_equal_the_functions(name):
    inputs = [tensor.detach() for tensor in linear_inputs(SLOTS)]
    got, wanted = flat(TRANSFORMS[name](loss, *inputs)), flat(TRANSFORMS[name](plain_loss, *inputs))
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_grad_transform_equals_the_kernels():
    inputs = linear_inputs(SLOTS)
    for one, other in zip(torch.func.grad(loss, (0, 1, 2))(*inputs), torch.autograd.grad(loss(*inputs), inputs)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_vmap_over_samples_and_slots():
    x, w, b = (tensor.detach() for tensor in linear_inputs(SLOTS))
    got = torch.func.vmap(lambda x, slot: mm.packed_masked_linear(x[None], slot[None], w, P, b, PB)[0])(x, SLOTS)
    torch.testing.assert_close(got, linear(SLOTS)(x, w, b), rtol=1e-12, atol=1e-12)
    with pytest.raises((IndexError, RuntimeError), match="index"):
        torch.func.vmap(lambda x, slot: mm.packed_masked_linear(x[None], slot[None], w, P)[0])(x, torch.tensor([0, -1, 1, 2]))


def test_forward_mode_ad():
    x, w, b = (tensor.detach() for tensor in linear_inputs(SLOTS))
    with forward_ad.dual_level():
        y = linear(SLOTS)(x, forward_ad.make_dual(w, 2 * w), b)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, linear(SLOTS)(x, 2 * w, torch.zeros_like(b)), rtol=1e-12, atol=1e-12)


@pytest.mark.once
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_backward_through_a_compiled_forward_equals_eager(backend):
    results = []
    for f in (loss, torch.compile(loss, backend=backend, fullgraph=True, dynamic=False)):
        inputs = linear_inputs(SLOTS)
        f(*inputs).backward()
        results.append([tensor.grad for tensor in inputs])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.once
def test_pack_mask_compiles():
    logits = torch.randn(3, 17)
    got = torch.compile(lambda m: mm.unpack_mask(mm.pack_mask(m), m.shape), backend="aot_eager", fullgraph=True)(logits)
    assert torch.equal(got, logits > 0)


def test_eager_forward_backward_and_double_backward_dispatch_the_kernels():
    inputs, kept = linear_inputs(SLOTS), {}

    def forward():
        kept["y"] = linear(SLOTS)(*inputs)

    def backward():
        kept["grads"] = torch.autograd.grad(kept["y"].square().sum(), inputs, create_graph=True)

    assert metamask_ops(forward) == {"packed_masked_linear": 1}
    assert metamask_ops(backward) == {"packed_masked_linear_backward": 1}
    second = metamask_ops(lambda: torch.autograd.grad(sum(grad.square().sum() for grad in kept["grads"]), inputs))
    # Through dx and through dW with db; each gives gradients again
    assert second == {"packed_masked_linear": 2, "packed_masked_linear_backward": 3}
    x, w, b = (tensor.detach() for tensor in inputs)
    assert metamask_ops(lambda: torch.func.grad(loss)(x, w, b)) == {}
