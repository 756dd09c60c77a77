"""masked_weight of a list of weights: against the float64 reference, its derivatives, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from support.closeness import assert_close
from support.derivatives import nested_gradients, options
from support.gpu import DEVICES
from support.profiling import metamask_ops
from support.samples import DTYPES, GATE_IDS, GATES, LARGE
from support.weight_checks import BY_NAME, LISTS, MIXED, as_double, columns, terms_to_mask
from torch.autograd import gradcheck, gradgradcheck

import metamask_ext as mm
from metamask_ext.ops.gate import SIGMOID
from metamask_ext.ops.weight import raw as weight_raw
from metamask_ext.ops.weight import reference as weight_reference

each_device = pytest.mark.parametrize("device", DEVICES)
each_gate = pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_list = pytest.mark.parametrize("listed", LISTS)


def check(listed, gate, dtype, device, other=None):
    weight, mask, grad, a, b = columns(listed, 5, dtype, device)
    grad = [one.to(other or dtype) for one in grad]
    theta = weight_raw.masked_weight_list(weight, mask, *gate, other)
    first = weight_raw.masked_weight_list_backward(grad, weight, mask, *gate)
    second = weight_raw.masked_weight_list_double_backward(a, b, grad, weight, mask, *gate)
    assert [len(column) for column in (theta, *first, *second)] == [len(weight)] * 6
    for i in range(len(weight)):
        w, m, g, a_, b_ = as_double(weight[i], mask[i], grad[i], a[i], b[i])
        sizes = [term.abs() for term in (a_, b_, g, w)]
        scale = (
            weight_reference.masked_weight_double_backward(*sizes, m, *gate)[0].abs(),
            0.0,
            terms_to_mask(a_, b_, g, w, m, *gate),
        )
        wanted = [
            ("theta", theta[i], other or dtype, weight_reference.masked_weight(w, m, *gate), 0.0),
            *zip(
                ("dW", "dM"),
                (column[i] for column in first),
                (dtype, dtype),
                weight_reference.masked_weight_backward(g, w, m, *gate),
                (0.0, 0.0),
            ),
            *zip(
                ("dG", "ddW", "ddM"),
                (column[i] for column in second),
                (other or dtype, dtype, dtype),
                weight_reference.masked_weight_double_backward(a_, b_, g, w, m, *gate),
                scale,
            ),
        ]
        for name, one, kind, exact, terms in wanted:
            assert one.dtype == kind and one.device == weight[i].device
            assert_close(one.cpu(), exact, f"{name}[{i}]", terms)


@pytest.mark.every_device
@each_device
@each_gate
@each_dtype
@each_list
def test_a_list_and_its_derivatives_equal_the_reference(listed, dtype, gate, device):
    check(listed, gate, dtype, device)


@pytest.mark.every_device
@each_device
@pytest.mark.parametrize(("dtype", "other"), MIXED, ids=lambda dtype: str(dtype)[6:])
def test_results_and_gradients_of_a_list_may_have_another_16_or_32_bit_type(dtype, other, device):
    for listed in ("all small", "blocks"):
        check(listed, GATES[1], dtype, device, other)


def test_a_list_of_large_weights_does_not_depend_on_the_number_of_threads():
    weight, mask, grad = columns(LARGE, 3, torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        dw, dm = weight_raw.masked_weight_list_backward(grad, weight, mask, SIGMOID, 1.0)
        results.append([*weight_raw.masked_weight_list(weight, mask, SIGMOID, 1.0), *dw, *dm])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    for one, w, m in zip(results[0], weight, mask):
        assert torch.equal(one, weight_raw.masked_weight(w, m, SIGMOID, 1.0))


@pytest.mark.every_device
@each_device
def test_only_the_lists_that_are_needed_are_made(device):
    weight, mask, grad, a, b = columns("all small", 5, torch.float32, device)
    backward = weight_raw.masked_weight_list_backward(grad, weight, mask, *GATES[0])
    for needs in ((True, False), (False, True), (False, False)):
        got = weight_raw.masked_weight_list_backward(grad, weight, mask, *GATES[0], needs)
        assert_same(got, [column if need else [] for column, need in zip(backward, needs)])
    both = weight_raw.masked_weight_list_double_backward(a, b, grad, weight, mask, *GATES[0])
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        got = weight_raw.masked_weight_list_double_backward(a, b, grad, weight, mask, *GATES[0], needs)
        assert_same(got, [column if need else [] for column, need in zip(both, needs)])


@pytest.mark.every_device
@each_device
def test_a_cotangent_of_a_list_that_is_not_there_is_zero(device):
    weight, mask, grad, a, b = columns("all small", 5, torch.float32, device)
    zero = [torch.zeros_like(one) for one in a]
    some, full = ([one if i % 2 else other for i, one in enumerate(a)] for other in (None, zero[0]))
    full = [zero[i] if one is zero[0] else one for i, one in enumerate(full)]
    for given, whole in (((a, []), (a, zero)), (([], b), (zero, b)), ((some, b), (full, b))):
        got = weight_raw.masked_weight_list_double_backward(*given, grad, weight, mask, *GATES[0])
        assert_same(got, weight_raw.masked_weight_list_double_backward(*whole, grad, weight, mask, *GATES[0]))


def assert_same(got, wanted):
    assert [len(column) for column in got] == [len(column) for column in wanted]
    assert all(torch.equal(one, other) for mine, theirs in zip(got, wanted) for one, other in zip(mine, theirs))


def leaves(listed, device="cpu"):
    return [tensor.detach().requires_grad_() for column in columns(listed, 2, device=device) for tensor in column]


def ours(*tensors, gate=GATES[1]):
    count = len(tensors) // 2
    return mm.masked_weight(tensors[:count], tensors[count:], **options(gate))


def plain(*tensors, gate=GATES[1]):
    count = len(tensors) // 2
    return [weight_reference.masked_weight(*pair, *gate) for pair in zip(tensors[:count], tensors[count:])]


# Finite differences need memory of its own for each element.
SMOOTH = tuple(BY_NAME[name] for name in ("2x3", "scalar", "mask-transposed", "channels-last"))


@pytest.mark.every_device
@each_device
def test_list_gradcheck_and_gradgradcheck(device):
    function = lambda *tensors: tuple(ours(*tensors))  # noqa: E731
    assert gradcheck(function, leaves(SMOOTH, device), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves(SMOOTH, device), check_batched_grad=True)


def joined(function, chosen):
    """Some of the results as one tensor: the others get no gradient."""

    def chosen_of(*tensors):
        thetas = function(*tensors)
        return torch.cat([thetas[index].flatten() for index in chosen])

    return chosen_of


@pytest.mark.every_device
@each_device
@pytest.mark.parametrize("chosen", [range(16), (1, 8)], ids=["all", "two of them"])
@pytest.mark.parametrize("gate", [GATES[1], GATES[3]], ids=["sigmoid", "hard"])
def test_derivatives_of_a_list_to_the_fourth_order_equal_plain_torch(gate, chosen, device):
    got = nested_gradients(joined(lambda *t: ours(*t, gate=gate), chosen), leaves("all small", device), 4)
    wanted = nested_gradients(joined(lambda *t: plain(*t, gate=gate), chosen), leaves("all small", device), 4)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_only_what_requires_grad_in_a_list_gets_a_gradient():
    weight, mask = columns("packs", 2)
    wanted = [weight[1].requires_grad_(), mask[0].requires_grad_(), mask[1].requires_grad_()]
    thetas = mm.masked_weight(weight, mask)
    assert isinstance(thetas, list) and all(theta.requires_grad for theta in thetas)
    sum(theta.sum() for theta in thetas[:2]).backward()
    for one in (*weight, *mask):
        assert (one.grad is not None) == any(one is other for other in wanted)
    expected = torch.autograd.grad(sum(theta.sum() for theta in plain(*weight, *mask, gate=(SIGMOID, 1.0))[:2]), wanted)
    for one, other in zip(wanted, expected):
        torch.testing.assert_close(one.grad, other)


def test_a_weight_twice_in_a_list_gets_both_gradients():
    (weight,), (mask,) = columns("one", 2)
    weight.requires_grad_()
    first, second = mm.masked_weight([weight, weight], [mask, -mask])
    torch.testing.assert_close(torch.autograd.grad((first + second).sum(), weight)[0], torch.ones_like(weight))


def test_a_list_runs_one_op_for_each_order():
    tensors, kept = leaves("packs"), {}

    def forward():
        kept["theta"] = joined(ours, range(6))(*tensors)

    def backward():
        kept["grads"] = torch.autograd.grad(kept["theta"].square().sum(), tensors, create_graph=True)

    def double_backward():
        torch.autograd.grad(sum(grad.square().sum() for grad in kept["grads"]), tensors)

    assert metamask_ops(forward) == {"masked_weight_list": 1}
    assert metamask_ops(backward) == {"masked_weight_list_backward": 1}
    assert metamask_ops(double_backward) == {"masked_weight_list_double_backward": 1, "masked_weight_list_backward": 1}


@pytest.mark.once
def test_transforms_and_torch_compile_of_a_list():
    tensors = [tensor.detach() for tensor in leaves(SMOOTH)]
    loss = lambda function: lambda *t: sum((theta**2).sum() for theta in function(*t))  # noqa: E731
    everything = tuple(range(len(tensors)))
    wanted = torch.func.grad(loss(plain), everything)(*tensors)
    compiled = torch.compile(loss(ours), backend="aot_eager", fullgraph=True, dynamic=False)
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    for got in (torch.func.grad(loss(ours), everything)(*tensors), torch.autograd.grad(compiled(*inputs), inputs)):
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_fused_sgd_takes_the_step_of_sgd_through_a_list():
    """The list's node is not one whose parameters are updated inside the backward: they get ordinary gradients."""
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(mm.nn.MaskedLinear(5, 4, bias=False), mm.nn.MaskedLinear(4, 3, bias=False)).double()
        parameters = [layer.weight for layer in layers], [layer.masks["default"] for layer in layers]
        x = torch.randn(7, 5, dtype=torch.float64)
        first, second = mm.masked_weight(*parameters)
        loss = (layers[0](x) @ second.t() + (x @ first.t()) @ second.t()).square().sum()
        if fused:
            mm.optim.FusedMaskedSGD(layers, lr=1e-3).backward(loss)
        else:
            loss.backward()
            torch.optim.SGD(layers.parameters(), lr=1e-3).step()
        results.append([parameter.detach() for column in parameters for parameter in column])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.once
@each_device
@each_dtype
def test_opcheck_of_the_list_ops(dtype, device):
    ops = torch.ops.metamask
    weight, mask, grad, a, b = columns("packs", 5, dtype, device)
    torch.library.opcheck(ops.masked_weight_list.default, (weight, mask, *GATES[0]))
    torch.library.opcheck(ops.masked_weight_list_backward.default, (grad, weight, mask, *GATES[0], (True, True)))
    torch.library.opcheck(ops.masked_weight_list_backward.default, (grad, weight, mask, *GATES[0], (False, True)))
    for a_, b_ in ((a, b), (a, []), ([None, *a[1:]], b)):
        torch.library.opcheck(
            ops.masked_weight_list_double_backward.default, (a_, b_, grad, weight, mask, *GATES[0], (True, False, True))
        )


def test_an_op_on_a_list_that_would_be_differentiated_by_accident_raises():
    weight, mask = [torch.ones(2), torch.ones(3, requires_grad=True)], [torch.ones(2), torch.ones(3)]
    with pytest.raises(RuntimeError, match="metamask::masked_weight_list has no derivative"):
        weight_raw.masked_weight_list(weight, mask, *GATES[0])
    with pytest.raises(RuntimeError, match="metamask::masked_weight_list_backward has no derivative"):
        weight_raw.masked_weight_list_backward(mask, mask, weight, *GATES[0])
    with pytest.raises(RuntimeError, match="metamask::masked_weight_list_double_backward has no derivative"):
        weight_raw.masked_weight_list_double_backward([None, weight[1]], [], mask, mask, mask, *GATES[0])


W = [torch.zeros(2, 3), torch.zeros(4)]
REFUSED = {
    "not as many": (ValueError, "expected 2 mask_logits tensors, one per weight, got 1", W, W[:1]),
    "none": (ValueError, "weight must have at least one tensor", [], []),
    "mask of another shape": (
        ValueError,
        r"mask_logits\[1\] must have the shape of weight\[1\], \[4\], got \[5\]",
        W,
        [W[0], torch.zeros(5)],
    ),
    "mask of another dtype": (TypeError, r"mask_logits\[1\] must have the dtype of weight\[1\]", W, [W[0], W[1].double()]),
    "integers": (TypeError, r"weight\[0\] must be float64, .* got", [W[0].int()], [W[0].int()]),
    "two dtypes": (TypeError, r"weight\[1\] must have the dtype of weight\[0\]", [W[0], W[1].double()], [W[0], W[1].double()]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_list_is_refused_by_the_op_its_fake_and_the_functional_layer(name):
    error, message, weight, mask = REFUSED[name]
    with pytest.raises(error, match=message):
        mm.masked_weight(weight, mask)
    if weight:  # without a tensor the dispatcher finds no kernel
        for to in ("cpu", "meta"):
            with pytest.raises(error, match=message):
                weight_raw.masked_weight_list([one.to(to) for one in weight], [one.to(to) for one in mask], SIGMOID, 1.0)


def test_what_is_no_list_and_gradients_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="mask_logits must be a sequence of tensors as weight is, got Tensor"):
        mm.masked_weight(W, W[0])
    with pytest.raises(TypeError, match="mask_logits must be a tensor, got list"):
        mm.masked_weight(W[0], W)
    with pytest.raises(TypeError, match=r"weight\[0\] must be a tensor, got float"):
        mm.masked_weight([1.0], [1.0])
    with pytest.raises(ValueError, match=r"weight\[1\] must be on the device of weight\[0\], cpu, got meta"):
        mm.masked_weight([W[0], W[1].to("meta")], [W[0], W[1].to("meta")])
    with pytest.raises(ValueError, match="temperature must be finite and greater than 0, got -1"):
        weight_raw.masked_weight_list(W, W, SIGMOID, -1.0)
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16 or float16, got Double"):
        weight_raw.masked_weight_list(W, W, SIGMOID, 1.0, torch.float64)
    for to in ("cpu", "meta"):
        w = [one.to(to) for one in W]
        with pytest.raises(ValueError, match="expected 2 grad tensors, one per weight, got 1"):
            weight_raw.masked_weight_list_backward(w[:1], w, w, SIGMOID, 1.0)
        with pytest.raises(ValueError, match=r"grad\[1\] must have the shape of weight"):
            weight_raw.masked_weight_list_backward([w[0], w[0]], w, w, SIGMOID, 1.0)
        with pytest.raises(ValueError, match="expected 2 cotangent_mask tensors, one per weight, got 1"):
            weight_raw.masked_weight_list_double_backward([], w[:1], w, w, w, SIGMOID, 1.0)
        with pytest.raises(ValueError, match=r"cotangent_weight\[0\] must have the shape of weight"):
            weight_raw.masked_weight_list_double_backward([w[1], None], [], w, w, w, SIGMOID, 1.0)
    with pytest.raises(TypeError, match=r"grad\[1\] must have the dtype of grad\[0\]"):
        weight_raw.masked_weight_list_backward([W[0], W[1].half()], W, W, SIGMOID, 1.0)
