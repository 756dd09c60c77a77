"""Derivatives of mixed-task batches: finite differences, plain torch, transforms, torch.compile, and which ops run."""

from __future__ import annotations

import pytest
import torch
from support.derivatives import flat, nested_gradients, options
from support.fused_steps import SGD, assert_equal_models, each_setting
from support.mixed_task import Batch, assert_near, cotangents_of, plain, plain_gradients
from support.profiling import allocated, metamask_ops
from support.samples import DTYPES, GATES
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import metamask_ext as mm
from metamask_ext.nn import MaskedLinear
from metamask_ext.ops.gate import IDENTITY
from metamask_ext.ops.mixed_task.functional import task_linear

each_gate = pytest.mark.parametrize("gate", [GATES[1], GATES[3]], ids=["sigmoid", "hard"])
each_form = pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
each_form_of_bias = pytest.mark.parametrize("biases", [True, False], ids=["biases", "one bias"])
# Repeated, absent (task 1) and unsorted tasks, and rows between
SMALL = ((5, 2), 1, 3, 4, [2, 0, 2, 3, 0])


def batch(stacked=True, case=SMALL, bias=True, **kinds):
    return Batch(case, stacked=stacked, tasks=4, bias=bias, **kinds)


def function_of(batch, gate=GATES[1]):
    """The public function of the tensors of a batch, and those tensors as leaves."""

    def function(*tensors):
        return call(batch.with_tensors(tensors), gate)

    return function, [tensor.detach().requires_grad_() for tensor in batch.tensors()]


def call(given, gate=GATES[1]):
    masks = given.masks[0] if len(given.masks) == 1 else given.masks
    bias_masks = given.bias_masks[0] if len(given.bias_masks) == 1 else given.bias_masks or None
    return mm.task_masked_linear(given.input, given.slots, given.weight, masks, given.bias, bias_masks, **options(gate))


@each_form
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck_and_gradgradcheck(stacked, bias):
    function, inputs = function_of(batch(stacked, bias=bias))
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, inputs)


def test_gradcheck_where_the_bias_has_no_masks():
    b = batch()

    def function(x, w, m, bias):
        return mm.task_masked_linear(x, b.slots, w, m, bias)

    inputs = [tensor.detach().requires_grad_() for tensor in (b.input, b.weight, b.masks[0], b.bias)]
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


@each_form
@each_gate
def test_derivatives_to_the_fourth_order_equal_plain_torch(gate, stacked):
    given = batch(stacked, ((3,), 1, 2, 3, [2, 0, 2]))
    function, inputs = function_of(given, gate)
    ours = nested_gradients(function, inputs, 4)
    theirs = nested_gradients(lambda *tensors: plain(given.with_tensors(tensors), gate), inputs, 4)
    assert len(ours) == 4 * len(inputs)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@each_form
def test_second_derivatives_by_hand(stacked):
    """A gradient step on the masks, as MAML takes it, differentiated through; both formulas written out in plain torch."""
    given = batch(stacked)
    x, slots = given.input.flatten(0, 1), given.slots.repeat_interleave(2)

    def by_hand(w, m, b, bm):
        """``m``, ``bm``: stacked."""

        def loss(m, bm):
            rows = torch.stack([(w * torch.sigmoid(m[t])) @ row + b * torch.sigmoid(bm[t]) for row, t in zip(x, slots.tolist())])
            return rows.sin().square().sum()

        steps = torch.autograd.grad(loss(m, bm), (m, bm), create_graph=True)
        return loss(m - 0.1 * steps[0], bm - 0.1 * steps[1])

    def ours(w, m, b, bm):
        def loss(m, bm):
            masks, bias_masks = (m, bm) if stacked else (list(m), list(bm))
            return mm.task_masked_linear(x, slots, w, masks, b, bias_masks).sin().square().sum()

        steps = torch.autograd.grad(loss(m, bm), (m, bm), create_graph=True)
        return loss(m - 0.1 * steps[0], bm - 0.1 * steps[1])

    stack = batch(True)
    results = []
    for function in (ours, by_hand):
        inputs = [t.clone().requires_grad_() for t in (stack.weight, stack.masks[0], stack.bias, stack.bias_masks[0])]
        results.append(torch.autograd.grad(function(*inputs), inputs))
    for one, other in zip(*results):
        assert bool((other != 0).any())
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@each_form
@each_gate
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_gradients_in_every_dtype_equal_the_float64_formula(dtype, gate, stacked):
    given = Batch("ragged" if stacked else "3-d", dtype, stacked)
    function, inputs = function_of(given, gate)
    got = torch.autograd.grad(function(*inputs), inputs, given.grad)
    for index, (one, other) in enumerate(zip(got, plain_gradients(given.double(), gate))):
        assert one.dtype == dtype
        assert_near(one, other, 1134, f"gradient {index}")


def test_only_what_requires_grad_gets_a_gradient():
    for index in range(len(batch(False).tensors())):
        function, inputs = function_of(batch(False))
        for position, tensor in enumerate(inputs):
            tensor.requires_grad_(position == index)
        function(*inputs).sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == [position == index for position in range(len(inputs))]


def test_a_mask_that_stands_twice_in_the_list_gets_the_sum():
    given = batch(False, bias=False)
    shared = given.masks[0].clone().requires_grad_()
    y = mm.task_masked_linear(given.input, given.slots, given.weight, [shared, given.masks[1], shared, given.masks[3]])
    twice = torch.autograd.grad(y, shared, given.grad)[0]
    given.masks[2] = given.masks[0]
    alone = plain_gradients(given, GATES[0])
    torch.testing.assert_close(twice, alone[2] + alone[4], rtol=1e-13, atol=1e-13)


def test_masks_of_one_tensor_are_rows_of_it_or_a_view():
    """Unbound rows of a parameter [T, out, in] as a list give the same gradient as the parameter itself."""
    given = batch()
    stack = given.masks[0].clone().requires_grad_()
    grads = [
        torch.autograd.grad(mm.task_masked_linear(given.input, given.slots, given.weight, masks), stack, given.grad)[0]
        for masks in (stack, stack.unbind())
    ]
    assert torch.equal(*grads)


def test_autocast_gives_its_dtype_and_gradients_of_the_parameters_dtype():
    given = Batch("3-d", torch.float32)
    function, inputs = function_of(given)
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*inputs)
        grads = torch.autograd.grad(y, inputs, given.grad.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert_near(y, plain(given.double(), GATES[1]), 17, "y")
    for one, other in zip(grads, plain_gradients(given.double(), GATES[1])):
        assert one.dtype == torch.float32
        assert_near(one.to(torch.bfloat16), other, 129, "gradient")
    with torch.autocast("cpu", torch.bfloat16):
        assert call(given.double()).dtype == torch.float64


@each_form_of_bias
def test_weights_that_differ_by_task(biases):
    """The same op with the weights in the place of logits: derivatives of the factors too, to the third order."""
    given = batch()
    tensors = [given.input, given.weight, given.masks[0], given.bias, *([given.bias_masks[0]] if biases else [])]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]

    def ours(x, factor, weights, bias, stack=None):
        return task_linear(x, given.slots, factor, weights, bias, stack, IDENTITY, 0.0)

    def by_hand(x, factor, weights, bias, stack=None):
        y = torch.einsum("bli,boi->blo", x, (factor * weights)[given.slots])
        return y + (bias if stack is None else (bias * stack)[given.slots][:, None])

    assert gradgradcheck(ours, inputs, check_batched_grad=True, fast_mode=True)
    for one, other in zip(nested_gradients(ours, inputs, 3), nested_gradients(by_hand, inputs, 3), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# --- The transforms: plain torch runs there.


def loss(w, m, x, slots):
    return mm.task_masked_linear(x, slots, w, m, temperature=0.5).square().sum()


def manual_loss(w, m, x, slots):
    return torch.einsum("bi,boi->bo", x, w * torch.sigmoid(m[slots] / 0.5)).square().sum()


def transform_inputs():
    generator = torch.Generator().manual_seed(2)
    w, m, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (3, 4, 3), (5, 3)))
    return w, m, x, torch.tensor([2, 0, 0, 2, 2])


TRANSFORMS = {
    "grad": lambda f, w, m, x, s: torch.func.grad(f, (0, 1))(w, m, x, s),
    "grad of grad": lambda f, w, m, x, s: torch.func.grad(lambda m: torch.func.grad(f, 1)(w, m, x, s).square().sum())(m),
    "vmap of grad": lambda f, w, m, x, s: torch.func.vmap(torch.func.grad(f, (0, 1)), (None, None, 0, 0))(
        w, m, x[:, None], s[:, None]
    ),
    "vmap over masks": lambda f, w, m, x, s: torch.func.vmap(f, (None, 0, None, None))(w, torch.stack([m, -m]), x, s),
    "jvp": lambda f, w, m, x, s: torch.func.jvp(lambda *t: f(*t, s), (w, m, x), (w.cos(), m.cos(), x.cos())),
    "hessian": lambda f, w, m, x, s: torch.func.hessian(f, 1)(w, m, x, s),
}


@pytest.mark.once
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_transforms_equal_those_of_plain_torch(name):
    got, expected = (flat(TRANSFORMS[name](f, *transform_inputs())) for f in (loss, manual_loss))
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_forward_mode_ad_equals_plain_torch():
    w, m, x, slots = transform_inputs()
    results = []
    for f in (loss, manual_loss):
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(f(forward_ad.make_dual(w, w.cos()), m, x, slots)).tangent)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_negative_slot_does_not_count_from_the_end_where_nobody_can_look_at_it():
    w, m, x, slots = transform_inputs()
    for wrong in (-1, 3):
        slots[1] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of (range|bounds)"):
            torch.func.vmap(loss, (None, None, 0, 0))(w, m, x[:, None], slots[:, None])
        # Under a transform of something else it can be looked at, and the kernel of a compiled graph looks at it.
        for function in (torch.func.grad(loss), torch.compile(loss, backend="eager", fullgraph=True)):
            with pytest.raises(ValueError, match=rf"slots must be in \[0, 3\), got {wrong} at position 1"):
                function(w, m, x, slots)


@pytest.mark.once
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_forward_and_backward_equal_eager(backend):
    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=False)
    results = []
    for f in (manual_loss, compiled):
        w, m, x, slots = transform_inputs()
        inputs = [tensor.requires_grad_() for tensor in (w, m, x)]
        results.append(torch.autograd.grad(f(*inputs, slots), inputs))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    other_slots = torch.tensor([1, 1, 2, 0, 1])  # the graph does not know the tasks
    torch.testing.assert_close(compiled(w, m, x, other_slots), manual_loss(w, m, x, other_slots), rtol=1e-11, atol=1e-11)


# --- What runs.


@each_form
def test_forward_backward_and_double_backward_are_one_op_each(stacked):
    function, inputs = function_of(batch(stacked))
    kept = {}

    def forward():
        kept["y"] = function(*inputs)

    def backward():
        kept["grads"] = torch.autograd.grad(kept["y"].square().sum(), inputs, create_graph=True)

    def double_backward():
        torch.autograd.grad(sum(grad.square().sum() for grad in kept["grads"]), inputs)

    assert metamask_ops(forward) == {"task_masked_linear": 1}
    assert metamask_ops(backward) == {"task_masked_linear_backward": 1}
    # The second gradient flows through the first backward, and through the forward that its gradient came from
    assert metamask_ops(double_backward) == {"task_masked_linear_double_backward": 1, "task_masked_linear_backward": 1}
    w, m, x, slots = transform_inputs()
    assert metamask_ops(lambda: torch.func.grad(loss)(w, m, x, slots)) == {}
    with torch.no_grad():
        assert metamask_ops(lambda: function(*inputs)) == {"task_masked_linear": 1}


def test_a_training_step_from_a_list_allocates_only_the_gradients_of_the_masks_in_it():
    """4 masks of the list of 32, 64 samples: a stack, or a theta a sample, would be 32 or 64 arrays of the weight's size."""
    slots = [7 * i % 4 for i in range(64)]
    given = Batch(((64,), 1, 256, 256, slots), torch.float32, stacked=False, bias=False, tasks=4)
    function, inputs = function_of(given)
    size = given.weight.numel() * 4
    assert allocated(lambda: torch.autograd.grad(function(*inputs).square().sum(), inputs)) < 6 * size

    def second():
        grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        weights = cotangents_of(given)
        total = sum((grad * weight).sum() for grad, weight in zip(grads, [*weights[:2], *weights[2]]))
        return torch.autograd.grad(total, inputs)

    assert allocated(second) < 12 * size


# --- Fused optimisers: parameters that a mixed-task batch reaches get ordinary gradients, and the step of torch's.


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(MaskedLinear(5, 9, dtype=torch.float64), nn.Tanh(), MaskedLinear(9, 3, dtype=torch.float64))
    for task in ("b", "c"):
        mm.add_task(model, task)
    return model


def mixed_layer(layer, x, slots):
    return mm.task_masked_linear(x, slots, layer.weight, list(layer.masks.values()), layer.bias, list(layer.bias_masks.values()))


def only_mixed(model, x, slots):
    hidden = mixed_layer(model[0], x, slots).tanh()
    return mixed_layer(model[2], hidden, slots).square().mean()


def mixed_and_ordinary(model, x, slots):
    """The first layer by both; the second by an ordinary node alone, whose parameters are updated inside the backward."""
    with mm.using_task(model, "b"):
        return model[2](mixed_layer(model[0], x, slots).tanh() + model[0](x).tanh()).square().mean()


@each_setting
@pytest.mark.parametrize("make_loss", [only_mixed, mixed_and_ordinary], ids=lambda function: function.__name__)
def test_a_fused_optimiser_takes_torchs_step_where_a_batch_mixes_tasks(make_loss, kind, settings):
    ours, theirs = two_layers(), two_layers()
    fused, plain = kind.ours(ours, **settings), kind.torchs(theirs, **settings)
    ops = {}
    for seed in range(3):
        torch.manual_seed(seed)
        x, slots = torch.randn(6, 5, dtype=torch.float64), torch.tensor([2, 0, 2, 1, 1, 2])
        value = make_loss(ours, x, slots)
        ops = metamask_ops(lambda value=value: fused.backward(value))
        assert all(p.grad is None for p in ours.parameters())
        make_loss(theirs, x, slots).backward()
        plain.step()
        plain.zero_grad()
    assert_equal_models(ours, theirs, kind.tolerance)
    assert ops == (
        {"task_masked_linear_backward": 2}
        if make_loss is only_mixed
        else {"task_masked_linear_backward": 1, "masked_linear_backward": 1, kind.ops[0].removeprefix("metamask::"): 1}
    )


def test_a_mask_that_the_batch_does_not_use_decays_only_if_it_is_passed():
    """A zero gradient is a gradient: SGD with weight decay moves the mask. One that is not in the list does not move."""
    model = two_layers()
    optimizer = SGD.ours(model, **SGD.settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    layer = model[0]
    masks = [layer.masks["b"], layer.masks["c"]]
    optimizer.backward(mm.task_masked_linear(torch.randn(2, 5).double(), torch.tensor([0, 0]), layer.weight, masks).sum())
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"0.weight", "0.masks.b", "0.masks.c"}
