"""The raw ops whose backward takes a step of SGD: against float64, every dtype and instruction set, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from support.gpu import DEVICES
from support.linear_checks import inputs
from support.samples import DTYPES, GATE_IDS, GATES
from support.sgd_checks import EVERY, SETTINGS, SHAPES, check, descend, near

from metamask_ext.ops.gate import SIGMOID
from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.weight import raw as weight_raw
from metamask_ext.ops.weight import reference as weight_reference

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.mark.every_device
@each_device
@each_dtype
@pytest.mark.parametrize("gate", GATES[::2], ids=GATE_IDS[::2])
@pytest.mark.parametrize("momentum", [False, True], ids=["no momentum", "momentum"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_step_of_every_parameter_of_masked_linear(shape, momentum, gate, dtype, device):
    check(*shape, gate, dtype, momentum, device)


@pytest.mark.every_device
@each_device
@each_dtype
@pytest.mark.parametrize("updates", [(True, False), (False, True), (True, True)], ids=["weight", "mask", "both"])
def test_masked_weight_updates_what_is_asked_for_and_gives_the_rest(updates, dtype, device):
    generator = torch.Generator().manual_seed(1)
    g, w, m = (torch.randn(6, 2, 3, 5, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3))
    g, w, m = (t.to(memory_format=torch.channels_last) for t in (g, w, m))
    before = [p.double().cpu().clone() for p in (w, m)]
    momentum_buffers = [torch.full_like(p, 0.25) if update else None for p, update in zip((w, m), updates)]
    exact = weight_reference.masked_weight_backward(g.double().cpu(), *before, SIGMOID, 0.5)
    got = weight_raw.masked_weight_backward_sgd_(g, w, m, SIGMOID, 0.5, (True, True), updates, momentum_buffers, SETTINGS[:2])
    for p, start, grad, update, result, its in zip((w, m), before, exact, updates, got, SETTINGS):
        if update:
            assert result is None
            near(p, descend(start, grad, torch.full_like(p, 0.25), its)[0], dtype, "parameter")
        else:
            near(result, grad, dtype, "gradient")
            assert torch.equal(p.double().cpu(), start)


@pytest.mark.every_device
@each_device
def test_a_gradient_that_is_not_needed_is_not_given_and_does_not_move(device):
    x, w, m, b, bm, grad = inputs((3, 17), 9, torch.float32, device)
    start = m.clone()
    needs, updates = (False, True, False, False, True), (True, False, False, True)
    settings = [(0.1, 0.0, 0.0)] * 4
    got = linear_raw.masked_linear_backward_sgd_(grad, x, w, m, b, bm, SIGMOID, 1.0, needs, updates, [None] * 4, settings)
    assert got == (None,) * 5 and torch.equal(m, start)


@pytest.mark.once
@each_device
def test_opcheck(device):
    x, w, m, b, bm, grad = inputs((3, 5), 4, torch.float32, device)
    linear, weight = torch.ops.metamask.masked_linear_backward_sgd_, torch.ops.metamask.masked_weight_backward_sgd_
    numbers = [number for its in SETTINGS for number in its]
    momentum_buffers = [torch.zeros_like(p) for p in (w, m, b, bm)]
    torch.library.opcheck(
        linear.default, (grad, x, w, m, b, bm, *momentum_buffers, SIGMOID, 1.0, EVERY, (True, False, True, True), numbers)
    )
    plain = [number for its in SETTINGS for number in (*its[:2], 0.0)]
    torch.library.opcheck(
        linear.default,
        (grad, x, w, m, None, None, *[None] * 4, SIGMOID, 1.0, (True, True, True, False, False), (True, True, False, False), plain),
    )
    both = (True, True)
    arguments = (torch.ones_like(w), w, m, *momentum_buffers[:2], SIGMOID, 1.0, both, (True, False), SETTINGS[0], SETTINGS[1])
    torch.library.opcheck(weight.default, arguments)


def test_refusals_change_nothing():
    x, w, m, b, bm, grad = inputs((3, 5), 4, torch.float32)
    both, pairs = (True, True), [(0.1, 0.0, 0.0)] * 2
    g = torch.ones(4, 5)
    start = [t.clone() for t in (w, m)]
    with pytest.raises(ValueError, match="weight has momentum 0.9 and no buffer"):
        weight_raw.masked_weight_backward_sgd_(g, w, m, SIGMOID, 1.0, both, both, [None] * 2, [(0.1, 0.0, 0.9)] * 2)
    with pytest.raises(ValueError, match="momentum buffer of mask_logits must have its shape"):
        weight_raw.masked_weight_backward_sgd_(g, w, m, SIGMOID, 1.0, both, both, [None, torch.zeros(5)], pairs)
    with pytest.raises(ValueError, match="mask_logits must have the strides of weight to be updated in place"):
        weight_raw.masked_weight_backward_sgd_(g, w, m.t().contiguous().t(), SIGMOID, 1.0, both, both, [None] * 2, pairs)
    with pytest.raises(ValueError, match="weight must be dense"):
        weight_raw.masked_weight_backward_sgd_(g, torch.zeros(4, 10)[:, ::2], m, SIGMOID, 1.0, both, both, [None] * 2, pairs)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        transposed = w.t().contiguous().t()
        linear_raw.masked_linear_backward_sgd_(
            grad, x, transposed, m, b, bm, SIGMOID, 1.0, EVERY, (True, False, False, False), [None] * 4, [*pairs, *pairs]
        )
    with pytest.raises(ValueError, match="bias must have logits to be updated here"):
        linear_raw.masked_linear_backward_sgd_(
            grad, x, w, m, b, None, SIGMOID, 1.0, EVERY, (False, False, True, False), [None] * 4, [*pairs, *pairs]
        )
    with pytest.raises(RuntimeError, match="masked_weight_backward_sgd_ has no derivative"):
        weight_raw.masked_weight_backward_sgd_(g, w.clone().requires_grad_(), m, SIGMOID, 1.0, both, both, [None] * 2, pairs)
    assert torch.equal(w, start[0]) and torch.equal(m, start[1])
