"""The raw ops whose backward takes a step of SGD or AdamW: against float64, every dtype, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from support.gpu import DEVICES
from support.linear_checks import inputs
from support.samples import DTYPES, GATE_IDS, GATES
from support.step_checks import (
    EVERY,
    SETTINGS,
    SHAPES,
    check,
    descend,
    each_rule,
    each_step,
    has_kernels,
    near,
    state_of,
    tensors_of,
)

from metamask_ext.ops.gate import SIGMOID
from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.weight import raw as weight_raw
from metamask_ext.ops.weight import reference as weight_reference

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.mark.every_device(emulated_if=has_kernels)
@each_step(*SETTINGS)
@each_dtype
@pytest.mark.parametrize("gate", GATES[::2], ids=GATE_IDS[::2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_step_of_every_parameter_of_masked_linear(shape, gate, dtype, step, device):
    check(*shape, gate, dtype, step, True, device)


@pytest.mark.every_device
@pytest.mark.parametrize("device", DEVICES)
@each_dtype
@pytest.mark.parametrize("gate", GATES[::2], ids=GATE_IDS[::2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_step_without_momentum(shape, gate, dtype, device):
    check(*shape, gate, dtype, "sgd", False, device)


@pytest.mark.every_device(emulated_if=has_kernels)
@each_step(*SETTINGS)
@each_dtype
@pytest.mark.parametrize("updates", [(True, False), (False, True), (True, True)], ids=["weight", "mask", "both"])
def test_masked_weight_updates_what_is_asked_for_and_gives_the_rest(updates, dtype, step, device):
    generator = torch.Generator().manual_seed(1)
    g, w, m = (torch.randn(6, 2, 3, 5, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3))
    g, w, m = (t.to(memory_format=torch.channels_last) for t in (g, w, m))
    before = [p.double().cpu().clone() for p in (w, m)]
    states = [state_of(step, p) if update else None for p, update in zip((w, m), updates)]
    exact = weight_reference.masked_weight_backward(g.double().cpu(), *before, SIGMOID, 0.5)
    moved = [descend(step, start, grad, state_of(step, start), its)[0] for start, grad, its in zip(before, exact, SETTINGS[step])]
    got = weight_raw.UPDATES[step](g, w, m, SIGMOID, 0.5, (True, True), updates, states, SETTINGS[step][:2])
    for p, start, grad, update, result, wanted in zip((w, m), before, exact, updates, got, moved):
        if update:
            assert result is None
            near(p, wanted, dtype, "parameter")
        else:
            near(result, grad, dtype, "gradient")
            assert torch.equal(p.double().cpu(), start)


@pytest.mark.every_device(emulated_if=has_kernels)
@each_step(*SETTINGS)
def test_a_gradient_that_is_not_needed_is_not_given_and_does_not_move(step, device):
    x, w, m, b, bm, grad = inputs((3, 17), 9, torch.float32, device)
    start = m.clone()
    needs, updates = (False, True, False, False, True), (True, False, False, True)
    states = [state_of(step, p) if update else None for p, update in zip((w, m, b, bm), updates)]
    got = linear_raw.UPDATES[step](grad, x, w, m, b, bm, SIGMOID, 1.0, needs, updates, states, SETTINGS[step])
    assert got == (None,) * 5 and torch.equal(m, start)


@pytest.mark.once
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, w, m, b, bm, grad = inputs((3, 5), 4, torch.float32, device)
    linear, weight = torch.ops.metamask.masked_linear_backward_sgd_, torch.ops.metamask.masked_weight_backward_sgd_
    settings = SETTINGS["sgd"]
    numbers = [number for its in settings for number in its]
    momentum_buffers = [torch.zeros_like(p) for p in (w, m, b, bm)]
    torch.library.opcheck(
        linear.default, (grad, x, w, m, b, bm, *momentum_buffers, SIGMOID, 1.0, EVERY, (True, False, True, True), numbers)
    )
    plain = [number for its in settings for number in (*its[:2], 0.0)]
    torch.library.opcheck(
        linear.default,
        (grad, x, w, m, None, None, *[None] * 4, SIGMOID, 1.0, (True, True, True, False, False), (True, True, False, False), plain),
    )
    both = (True, True)
    arguments = (torch.ones_like(w), w, m, *momentum_buffers[:2], SIGMOID, 1.0, both, (True, False), settings[0], settings[1])
    torch.library.opcheck(weight.default, arguments)


@pytest.mark.once
def test_opcheck_of_adamw():
    x, w, m, b, bm, grad = inputs((3, 5), 4, torch.float32)
    linear, weight = torch.ops.metamask.masked_linear_backward_adamw_, torch.ops.metamask.masked_weight_backward_adamw_
    numbers = [number for its in SETTINGS["adamw"] for number in its]
    state = [tensor for p in (w, b, bm) for tensor in state_of("adamw", p)]
    torch.library.opcheck(linear.default, (grad, x, w, m, b, bm, state, SIGMOID, 1.0, EVERY, (True, False, True, True), numbers))
    none = (False,) * 4
    torch.library.opcheck(linear.default, (grad, x, w, m, None, None, [], SIGMOID, 1.0, EVERY, none, numbers))
    arguments = (torch.ones_like(w), w, m, state[:3], SIGMOID, 1.0, (True, True), (True, False), numbers[:10])
    torch.library.opcheck(weight.default, arguments)


@each_rule
def test_versions_move(rule):
    x, w, m, b, bm, grad = inputs((3, 5), 4, torch.float32)
    states = [state_of(rule, p) for p in (w, m, b, bm)]
    changed = [w, m, b, bm, *(tensor for state in states for tensor in tensors_of(state))]
    versions = [tensor._version for tensor in changed]
    linear_raw.UPDATES[rule](grad, x, w, m, b, bm, SIGMOID, 1.0, EVERY, (True,) * 4, states, SETTINGS[rule])
    assert all(tensor._version > version for tensor, version in zip(changed, versions))


def test_what_a_step_of_adamw_refuses_changes_nothing():
    x, w, m, b, _, grad = inputs((3, 5), 4, torch.float32)
    g, both = torch.ones(4, 5), (True, True)
    states = [state_of("adamw", p) for p in (w, m)]
    kept = [w, m, *states[0], *states[1]]
    start = [t.clone() for t in kept]

    def refused(message, states=states, settings=SETTINGS["adamw"][:2], weight=w):
        with pytest.raises(ValueError, match=message):
            weight_raw.masked_weight_backward_adamw_(g, weight, m, SIGMOID, 1.0, both, both, states, settings)

    refused("exp_avg of mask_logits must have its shape", [states[0], states[1]._replace(exp_avg=torch.zeros(5))])
    refused("exp_avg_sq of weight must have its shape", [states[0]._replace(exp_avg_sq=torch.zeros(4, 5).double()), states[1]])
    refused("step of weight must be one float32", [states[0]._replace(step=torch.zeros(2)), states[1]])
    refused("step of weight must be one float32", [states[0]._replace(step=torch.tensor(2)), states[1]])
    refused("state must be exp_avg, exp_avg_sq and step of 2 updated parameters, got 3 tensors", [states[0], None])
    refused("settings must be lr, beta1, beta2, eps and weight_decay of 2 parameters, got 5", settings=SETTINGS["adamw"][:1])
    refused(r"the betas of weight must be in \[0, 1\), got 0.9 and 1", settings=[(0.1, 0.9, 1.0, 0.0, 0.0)] * 2)
    refused("exp_avg must not share memory with exp_avg_sq", [states[0]._replace(exp_avg_sq=states[0].exp_avg), states[1]])
    refused("step must not share memory with step", [states[0], states[1]._replace(step=states[0].step)])
    refused("weight must be dense", weight=torch.zeros(4, 10)[:, ::2])
    with pytest.raises(ValueError, match="bias must have logits to be updated here"):
        linear_raw.masked_linear_backward_adamw_(
            *(grad, x, w, m, b, None, SIGMOID, 1.0, EVERY, (False, False, True, False)),
            *([None, None, state_of("adamw", b), None], SETTINGS["adamw"]),
        )
    with pytest.raises(RuntimeError, match="masked_weight_backward_adamw_ has no derivative"):
        leaf = w.clone().requires_grad_()
        weight_raw.masked_weight_backward_adamw_(g, leaf, m, SIGMOID, 1.0, both, both, states, SETTINGS["adamw"][:2])
    assert all(map(torch.equal, kept, start))


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
