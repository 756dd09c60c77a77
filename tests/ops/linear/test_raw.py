"""masked_linear and its gradients as raw ops: against float64, at the edges of panels, in every type, and what they allocate."""

from __future__ import annotations

import pytest
import torch
from support.closeness import assert_near
from support.gpu import DEVICES
from support.linear_checks import SHAPES, check, expected, inputs
from support.profiling import largest_allocation
from support.samples import DTYPES, GATE_IDS, GATES, offset, opcheck, transposed, wider

import metamask_ext as mm
from metamask_ext.ops.gate import SIGMOID
from metamask_ext.ops.linear import raw as linear_raw

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_gate = pytest.mark.parametrize("gate", GATES[1::2], ids=GATE_IDS[1::2])

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@each_device
@each_gate
@each_dtype
@each_shape
def test_output_and_gradients_equal_the_reference(shape, dtype, gate, device):
    check(*shape, gate, dtype, device)


@pytest.mark.every_device
@each_device
@pytest.mark.parametrize("layout", [transposed, wider, offset], ids=["transposed", "wider", "offset"])
def test_any_strides(layout, device):
    tensors = inputs((5, 17), 129, torch.float32, device)
    y, grads = expected(tensors, GATES[0])
    x, w, m, b, bm, grad = [layout(t) if t.dim() == 2 else wider(t) for t in tensors]
    assert_near(linear_raw.masked_linear(x, w, m, b, bm, *GATES[0]), y, 17, "y")
    got = linear_raw.masked_linear_backward(grad, x, w, m, b, bm, *GATES[0])
    for one, other in zip(got, grads):
        assert_near(one, other, 129, "gradient")


@pytest.mark.every_device
@each_device
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_float32_parameters_with_a_16_bit_product(out, device):
    tensors = inputs((4, 129), 300, torch.float32, device)
    y, grads = expected(tensors, GATES[0])
    *arguments, grad = tensors
    got = linear_raw.masked_linear(*arguments, *GATES[0], out)
    assert got.dtype == out
    assert_near(got, y, 129, "y")
    for one, other in zip(linear_raw.masked_linear_backward(grad.to(out), *arguments, *GATES[0]), grads):
        assert one.dtype == torch.float32
        bound = 4 * torch.finfo(out).eps * 300**0.5 * other.abs().amax().item()
        assert bool(((one.double().cpu() - other).abs() <= bound).all())


@pytest.mark.every_device
@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_gradient_of_the_input_is_as_accurate_as_a_dense_layers(dtype, device):
    """Many panels: adding them up in 16 bits was eight times worse than one dense product."""
    x, w, m, _, _, grad = inputs((8, 1024), 4096, dtype, device)
    theta = w.double() * torch.sigmoid(m.double())
    exact = grad.double() @ theta
    needs = (True, False, False, False, False)
    ours = linear_raw.masked_linear_backward(grad, x, w, m, None, None, SIGMOID, 1.0, needs)[0].double()
    dense = (grad @ theta.to(dtype)).double()
    assert (ours - exact).norm() <= 1.5 * (dense - exact).norm()


# Odd batches, odd and even rows, widths on both sides of a vector of 32, rows of several tiles
BFLOAT16_SHAPES = (((1, 31), 1), ((5, 33), 7), ((7, 64), 33), ((8, 512), 12), ((3, 2081), 65), ((65, 1024), 130))


@pytest.mark.every_device
@each_device
@each_gate
@pytest.mark.parametrize("shape", BFLOAT16_SHAPES, ids=str)
@pytest.mark.parametrize("param", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_bfloat16_products_of_any_parameters(param, shape, gate, device):
    (shape, out), product = shape, torch.bfloat16
    x, w, m, b, bm, grad = inputs(shape, out, product, device)
    tensors = [x, w.to(param), m.to(param), b.to(param), bm.to(param), grad]
    y, grads = expected(tensors, gate)
    *arguments, grad = tensors
    got = linear_raw.masked_linear(*arguments, *gate, product)
    assert got.dtype == product
    assert_near(got, y, shape[-1], "y")
    got = linear_raw.masked_linear_backward(grad, *arguments, *gate)
    for name, one, other, reduction in zip(("dx", "dW", "dM"), got, grads, (out, shape[0], shape[0])):
        assert_near(one if one.dtype == product else one.to(product), other, reduction, name)


@pytest.mark.every_device
@each_device
def test_bfloat16_saturates_exactly_and_keeps_nan_where_it_is(device):
    x, w, m, _, _, grad = inputs((3, 70), 9, torch.bfloat16, device)
    on = torch.arange(70, device=device) % 3 == 0
    for size in (200.0, 1e4, 3e38, float("inf")):
        saturated = torch.where(on, size, -size).to(m.dtype).expand_as(m).contiguous()
        dense = (x.double() * on) @ w.double().t()
        assert_near(linear_raw.masked_linear(x, w, saturated, None, None, SIGMOID, 1.0), dense.cpu(), 70, "y")
        alone = torch.eye(70, dtype=x.dtype, device=device)
        assert torch.equal(linear_raw.masked_linear(alone, w, saturated, None, None, SIGMOID, 1.0), (w * on).t())
        dx, dw, dm, *_ = linear_raw.masked_linear_backward(grad, x, w, saturated, None, None, SIGMOID, 1.0)
        assert bool(torch.isfinite(dx).all()) and bool((dw[:, ~on] == 0).all()) and bool((dm == 0).all())
    m[4, 69] = float("nan")
    bad = torch.isnan(linear_raw.masked_linear(x, w, m, None, None, SIGMOID, 1.0))
    assert bool(bad[:, 4].all()) and int(bad.sum()) == 3
    dx, dw, dm, *_ = linear_raw.masked_linear_backward(grad, x, w, m, None, None, SIGMOID, 1.0)
    assert bool(torch.isnan(dx[:, 69]).all()) and int(torch.isnan(dx).sum()) == 3
    for one in (dw, dm):
        assert bool(torch.isnan(one[4, 69])) and int(torch.isnan(one).sum()) == 1


@pytest.mark.every_device
@each_device
def test_bias_without_logits_and_no_bias(device):
    x, w, m, b, _, grad = inputs((4, 17), 129, torch.float64, device)
    theta = w * torch.sigmoid(m)
    assert_near(linear_raw.masked_linear(x, w, m, None, None, SIGMOID, 1.0), (x @ theta.t()).cpu(), 17, "no bias")
    assert_near(linear_raw.masked_linear(x, w, m, b, None, SIGMOID, 1.0), (x @ theta.t() + b).cpu(), 17, "plain bias")
    *_, db, dbm = linear_raw.masked_linear_backward(grad, x, w, m, b, None, SIGMOID, 1.0, (False, False, False, True, False))
    assert_near(db, grad.sum(0).cpu(), 4, "db")
    assert dbm is None


@pytest.mark.every_device
@each_device
def test_each_gradient_alone_equals_all_together(device):
    *arguments, grad = inputs((5, 129), 1134, torch.float32, device)
    together = linear_raw.masked_linear_backward(grad, *arguments, *GATES[0])
    for index in range(5):
        needs = tuple(position == index for position in range(5))
        got = linear_raw.masked_linear_backward(grad, *arguments, *GATES[0], needs)
        assert [one is not None for one in got] == list(needs)
        torch.testing.assert_close(got[index], together[index], rtol=1e-6, atol=1e-6)


def test_the_same_numbers_every_time_for_a_number_of_threads():
    *arguments, grad = inputs((33, 1134), 1134, torch.float32)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first = [linear_raw.masked_linear(*arguments, *GATES[0]), *linear_raw.masked_linear_backward(grad, *arguments, *GATES[0])]
        for _ in range(3):
            again = [
                linear_raw.masked_linear(*arguments, *GATES[0]),
                *linear_raw.masked_linear_backward(grad, *arguments, *GATES[0]),
            ]
            assert all(torch.equal(one, other) for one, other in zip(first, again))


@pytest.mark.once
@each_device
@each_dtype
def test_opcheck(dtype, device):
    for shape, out in (((2, 3, 5), 4), ((3, 5), 4), ((5,), 4)):
        *arguments, grad = inputs(shape, out, dtype, device)
        x, w, m, b, _ = arguments
        opcheck(torch.ops.metamask.masked_linear.default, (*arguments, SIGMOID, 1.0))
        opcheck(torch.ops.metamask.masked_linear.default, (x, w, m, None, None, SIGMOID, 1.0))
        opcheck(torch.ops.metamask.masked_linear_backward.default, (grad, *arguments, SIGMOID, 1.0, (True,) * 5))
        needs = (False, True, False, True, False)
        opcheck(torch.ops.metamask.masked_linear_backward.default, (grad, x, w, m, b, None, SIGMOID, 1.0, needs))


def test_nothing_of_the_weights_size_is_allocated_but_the_gradients():
    *arguments, grad = inputs((4, 1024), 8192, torch.float32)
    size = arguments[1].numel() * 4
    assert largest_allocation(lambda: linear_raw.masked_linear(*arguments, *GATES[0])) < size / 8
    # Only dx: no gradient of the weight's size
    only_input = (True, False, False, False, False)
    assert largest_allocation(lambda: linear_raw.masked_linear_backward(grad, *arguments, *GATES[0], only_input)) < size / 8
    # dW alone is one array, not two (the measured function holds its result until it ends)
    only_weight = (False, True, False, False, False)
    used = largest_allocation(lambda: linear_raw.masked_linear_backward(grad, *arguments, *GATES[0], only_weight))
    assert size <= used < 1.25 * size


def test_raw_ops_refuse_what_does_not_fit():
    x, w, m, b, bm, grad = inputs((2, 3), 4, torch.float32)
    with pytest.raises(ValueError, match=r"input must be \[..., in\] with in = 3"):
        linear_raw.masked_linear(x[:, :2], w, m, b, bm, SIGMOID, 1.0)
    with pytest.raises(ValueError, match=r"weight must be \[out, in\]"):
        linear_raw.masked_linear(x, b, b, None, None, SIGMOID, 1.0)
    with pytest.raises(ValueError, match=r"bias must be \[out\] = \[4\]"):
        linear_raw.masked_linear(x, w, m, b[:3], None, SIGMOID, 1.0)
    with pytest.raises(ValueError, match="bias_mask_logits must have the shape of bias"):
        linear_raw.masked_linear(x, w, m, b, bm[:3], SIGMOID, 1.0)
    with pytest.raises(ValueError, match=r"grad must be \[..., out\] = \[2, 4\], got \[2, 3\]"):
        linear_raw.masked_linear_backward(grad[:, :3], x, w, m, b, bm, SIGMOID, 1.0)
    with pytest.raises(RuntimeError, match="metamask::masked_linear has no derivative"):
        linear_raw.masked_linear(x, w.requires_grad_(), m, b, bm, SIGMOID, 1.0)


def test_backward_in_a_pool_thread_of_another_parallel_region():
    """Two modules at once from two Python threads: each has its own scratch."""
    from concurrent.futures import ThreadPoolExecutor

    *arguments, _ = inputs((7, 257), 1134, torch.float64)
    wanted = mm.masked_linear(*arguments)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: mm.masked_linear(*arguments), range(16)):
            torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)
