"""Masked linear layers under torch.compile: what each case computes, with our layer or with the same in plain torch.

A case is a function of a layer and of ``compiled`` (:class:`support.compiled.Compiled`); it gives tensors. Beside it stand the
raw ops in the graphs that AOTAutograd makes of it: one that falls back to plain torch has none.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import metamask_ext as mm

DOUBLE = torch.float64
ALL = (0, 1, 2, 3, 4)
TRACED = {"trace_autograd_ops": True}
CASES = {}


DOUBLE_BACKWARD = "aot_autograd does not currently support double backward"
REFUSED = {
    ("autograd.grad with create_graph inside, with a graph break", "counted"): DOUBLE_BACKWARD,
    ("autograd.grad with create_graph inside, with a graph break", "inductor"): DOUBLE_BACKWARD,
    ("autograd.grad with create_graph outside", "counted"): DOUBLE_BACKWARD,
    ("autograd.grad with create_graph outside", "inductor"): DOUBLE_BACKWARD,
    ("a batch of gradients outside", "inductor"): "Cannot access data pointer of Tensor that doesn't have storage",
}
"""Cases and backends that torch refuses of any compiled function, with the words of the error."""
LOST = {("a level of forward-mode AD outside", "inductor")}
"""Inductor's code drops the tangents of its arguments, of any compiled function."""


def case(name, **ops):
    """Enter a case; ``ops`` are the raw ops of its graphs, with how often each stands there."""

    def enter(function):
        assert name not in CASES
        CASES[name] = (function, ops)
        return function

    return enter


def inputs(batch=5, shape=None):
    generator = torch.Generator().manual_seed(0)
    shapes = (shape or (batch, 7), (6, 7), (6, 7), (6,), (6,))
    return [torch.randn(size, generator=generator, dtype=DOUBLE) for size in shapes]


def leaves(tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def ours(x, w, m, b, bm, gate="sigmoid"):
    return mm.masked_linear(x, w, m, b, bm, gate=gate, temperature=0.7)


def plain_gate(logits, gate="sigmoid"):
    if gate == "sigmoid":
        return torch.sigmoid(logits / 0.7)
    return (logits > 0).to(logits.dtype) + (logits - logits.detach())


def plain(x, w, m, b, bm, gate="sigmoid"):
    return torch.nn.functional.linear(x, w * plain_gate(m, gate), b * plain_gate(bm, gate))


def loss_of(layer, gate="sigmoid"):
    """Of two layers that share their parameters."""

    def loss(x, w, m, b, bm):
        hidden = torch.tanh(layer(x, w, m, b, bm, gate))
        y = layer(torch.cat([hidden, hidden[..., :1]], -1), w, m, b, bm, gate)
        return (y.sin() * y).sum()

    return loss


def meta_loss(layer):
    """The loss after a step of gradient descent on the masks."""
    loss = loss_of(layer)

    def after_step(x, w, m, b, bm):
        dm, dbm = torch.autograd.grad(loss(x, w, m, b, bm), (m, bm), create_graph=True)
        return loss(x + 1, w, m - 0.1 * dm, b, bm - 0.1 * dbm)

    return after_step


def step_of(layer):
    def step(x, w, m, b, bm):
        parameters = w, m, b, bm
        grads = torch.autograd.grad(loss_of(layer)(x, *parameters), parameters)
        return tuple(parameter - 0.1 * grad for parameter, grad in zip(parameters, grads))

    return step


def loss_and_gradients(function, tensors):
    loss = function(*tensors)
    return [loss, *torch.autograd.grad(loss, tensors)]


FORWARD = {"masked_linear": 2}
TRAINED = {"masked_linear": 2, "masked_linear_backward": 2}


@case("forward without gradients", **FORWARD)
def _(layer, compiled):
    with torch.no_grad():
        return compiled(loss_of(layer))(*inputs())


@case("inference mode", **FORWARD)
def _(layer, compiled):
    function = compiled(loss_of(layer))
    with torch.inference_mode():
        return function(*inputs())


for gate in ("sigmoid", "hard"):

    @case(f"backward outside, {gate}", **TRAINED)
    def _(layer, compiled, gate=gate):
        return loss_and_gradients(compiled(loss_of(layer, gate)), leaves(inputs()))


@case("the masks alone require gradients", **TRAINED)
def _(layer, compiled):
    x, w, m, b, bm = inputs()
    m.requires_grad_(), bm.requires_grad_()
    loss = compiled(loss_of(layer))(x, w, m, b, bm)
    return [loss, *torch.autograd.grad(loss, (m, bm))]


@case("autograd.grad inside, with a graph break", **TRAINED)
def _(layer, compiled):
    return compiled(step_of(layer), fullgraph=False)(*leaves(inputs()))


@case("autograd.grad with create_graph inside, with a graph break", **TRAINED)
def _(layer, compiled):
    return loss_and_gradients(compiled(meta_loss(layer), fullgraph=False), leaves(inputs()))


@case("autograd.grad with create_graph outside", **TRAINED)
def _(layer, compiled):
    given = leaves(inputs())
    grads = torch.autograd.grad(compiled(loss_of(layer))(*given), given, create_graph=True)
    return [*grads, *torch.autograd.grad(sum(grad.sin().sum() for grad in grads), given)]


@case("a batch of gradients outside", masked_linear=1, masked_linear_backward=1)
def _(layer, compiled):
    given = leaves(inputs())
    y = compiled(lambda *tensors: layer(*tensors).sin(), fullgraph=False)(*given)
    cotangents = torch.stack([torch.ones_like(y), torch.arange(y.numel(), dtype=DOUBLE).reshape(y.shape)])
    return torch.autograd.grad(y, given, cotangents, is_grads_batched=True)


@case("autograd.grad inside, traced", **TRAINED)
def _(layer, compiled):
    return compiled(step_of(layer), config=TRACED)(*leaves(inputs()))


SECOND = {
    "masked_linear": 4,
    "masked_linear_backward": 4,
    "masked_weight": 1,
    "masked_weight_backward": 5,
    "masked_weight_double_backward": 4,
}
THIRD = {
    "masked_linear": 2,
    "masked_linear_backward": 2,
    "masked_weight": 4,
    "masked_weight_backward": 14,
    "masked_weight_double_backward": 14,
}


@case("a meta-step traced, backward outside", **SECOND)
def _(layer, compiled):
    return loss_and_gradients(compiled(meta_loss(layer), config=TRACED), leaves(inputs()))


@case("a meta-step traced in both orders", **SECOND)
def _(layer, compiled):
    def both(*tensors):
        return torch.autograd.grad(meta_loss(layer)(*tensors), tensors)

    return compiled(both, config=TRACED)(*leaves(inputs()))


@case("the third order traced", **THIRD)
def _(layer, compiled):
    def third(*tensors):
        grads = torch.autograd.grad(loss_of(layer)(*tensors), tensors, create_graph=True)
        second = torch.autograd.grad(sum(grad.sin().sum() for grad in grads), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.cos().sum() for grad in second), tensors)

    return compiled(third, config=TRACED)(*leaves(inputs()))


@case("loss.backward() inside, traced", **TRAINED)
def _(layer, compiled):
    def step(*tensors):
        loss = loss_of(layer)(*tensors)
        loss.backward()
        return loss.detach()

    given = leaves(inputs())
    return [compiled(step, config=TRACED)(*given), *(tensor.grad for tensor in given)]


@case("func.grad inside")
def _(layer, compiled):
    return compiled(torch.func.grad(loss_of(layer), ALL))(*inputs())


@case("func.grad inside, backward outside")
def _(layer, compiled):
    def total(*tensors):
        return sum(grad.sin().sum() for grad in torch.func.grad(loss_of(layer), ALL)(*tensors))

    return loss_and_gradients(compiled(total), leaves(inputs()))


@case("func.grad of func.grad inside")
def _(layer, compiled):
    def twice(x, w, m, b, bm):
        return torch.func.grad(lambda m: torch.func.grad(loss_of(layer), 2)(x, w, m, b, bm).sin().sum())(m)

    return compiled(twice)(*inputs())


@case("func.hessian inside")
def _(layer, compiled):
    return compiled(lambda x, w, m, b, bm: torch.func.hessian(lambda bm: loss_of(layer)(x, w, m, b, bm))(bm))(*inputs())


def over_samples(function):
    mapped = torch.func.vmap(function, (0, None, None, None, None))
    return lambda x, *parameters: mapped(x[:, None], *parameters)


@case("vmap inside")
def _(layer, compiled):
    return compiled(over_samples(loss_of(layer)))(*inputs())


@case("vmap over masks inside, backward outside")
def _(layer, compiled):
    def total(x, w, m, b, bm):
        mapped = torch.func.vmap(loss_of(layer), (None, None, 0, None, 0))
        return mapped(x, w, torch.stack([m, -m, 2 * m]), b, torch.stack([bm, -bm, 2 * bm])).sum()

    return loss_and_gradients(compiled(total), leaves(inputs()))


@case("vmap of func.grad inside")
def _(layer, compiled):
    return compiled(over_samples(torch.func.grad(loss_of(layer), (1, 2))))(*inputs())


@case("jvp inside")
def _(layer, compiled):
    def derivative(x, w, m, b, bm):
        return torch.func.jvp(lambda w, m: loss_of(layer)(x, w, m, b, bm), (w, m), (m, w))

    return compiled(derivative)(*inputs())


@case("jacfwd inside")
def _(layer, compiled):
    return compiled(lambda x, w, m, b, bm: torch.func.jacfwd(lambda bm: layer(x, w, m, b, bm))(bm))(*inputs())


def tangent(function, x, w, m, b, bm):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(x, forward_ad.make_dual(w, m), m, b, bm)).tangent


@case("a level of forward-mode AD inside")
def _(layer, compiled):
    return compiled(partial(tangent, loss_of(layer)), fullgraph=False)(*inputs())


@case("a level of forward-mode AD outside")
def _(layer, compiled):
    return tangent(compiled(loss_of(layer), fullgraph=False), *inputs())


@case("func.grad of a compiled function")
def _(layer, compiled):
    return torch.func.grad(compiled(loss_of(layer), fullgraph=False), ALL)(*inputs())


@case("func.grad of a compiled function that was called before", **FORWARD)
def _(layer, compiled):
    function = compiled(loss_of(layer), fullgraph=False)
    return [function(*inputs()), *torch.func.grad(function, ALL)(*inputs())]


@case("vmap of a compiled function that was called before", **FORWARD)
def _(layer, compiled):
    function = compiled(loss_of(layer), fullgraph=False)
    x, *parameters = inputs()
    return [function(x[:1], *parameters), over_samples(function)(x, *parameters)]


@case("jvp of a compiled function that was called before", **FORWARD)
def _(layer, compiled):
    function = compiled(loss_of(layer), fullgraph=False)
    x, w, m, b, bm = inputs()
    return [function(x, w, m, b, bm), *torch.func.jvp(lambda m: function(x, w, m, b, bm), (m,), (w,))]


def checkpointed(layer, **options):
    def loss(x, *parameters):
        hidden = checkpoint(lambda *tensors: torch.tanh(layer(*tensors)), x, *parameters, use_reentrant=False, **options)
        return layer(torch.cat([hidden, hidden[..., :1]], -1), *parameters).square().sum()

    return loss


@case("checkpoint inside", masked_linear=3, masked_linear_backward=2)
def _(layer, compiled):
    return loss_and_gradients(compiled(checkpointed(layer)), leaves(inputs()))


@case("a selective checkpoint inside", **TRAINED)
def _(layer, compiled):
    def policy(context, op, *arguments, **options):
        keep = "metamask" in str(op) or "mm" in str(op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return loss_and_gradients(compiled(checkpointed(layer, context_fn=contexts)), leaves(inputs()))


for reentrant in (False, True):
    # Inside a reentrant one, the first forward is without gradients: a graph of its own.
    @case(f"inside a {'reentrant ' if reentrant else ''}checkpoint", masked_linear=4 if reentrant else 2, masked_linear_backward=2)
    def _(layer, compiled, reentrant=reentrant):
        function = compiled(loss_of(layer), fullgraph=False)
        given = leaves(inputs())
        checkpoint(function, *given, use_reentrant=reentrant).backward()
        return [tensor.grad for tensor in given]


@case("hooks on saved tensors outside", **TRAINED)
def _(layer, compiled):
    function = compiled(loss_of(layer), fullgraph=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        return loss_and_gradients(function, leaves(inputs()))


@case("a dynamic batch", **TRAINED)
def _(layer, compiled):
    function = compiled(loss_of(layer), dynamic=True)
    return [tensor for batch in (3, 5, 2, 7) for tensor in loss_and_gradients(function, leaves(inputs(batch)))]


@case("a batch that becomes dynamic by itself", masked_linear=6, masked_linear_backward=6)
def _(layer, compiled):
    function = compiled(loss_of(layer), dynamic=None)
    return [tensor for batch in (3, 5, 7, 1) for tensor in loss_and_gradients(function, leaves(inputs(batch)))]


@case("an empty batch", **TRAINED)
def _(layer, compiled):
    return loss_and_gradients(compiled(loss_of(layer)), leaves(inputs(0)))


@case("inputs of one and three dimensions", masked_linear=4, masked_linear_backward=4)
def _(layer, compiled):
    function = compiled(loss_of(layer))
    return [tensor for shape in ((7,), (2, 3, 7)) for tensor in loss_and_gradients(function, leaves(inputs(shape=shape)))]


@case("transposed, flipped and expanded inputs", **TRAINED)
def _(layer, compiled):
    x, w, m, b, bm = inputs()
    given = [x[:1].expand(4, 7), w.t().contiguous().t(), m.flip(0), b[::1], bm]
    return loss_and_gradients(compiled(loss_of(layer)), [tensor.detach().requires_grad_() for tensor in given])


@case("one tensor as weight and mask", masked_linear=1, masked_linear_backward=1)
def _(layer, compiled):
    x, w, _, b, _ = leaves(inputs())
    return loss_and_gradients(compiled(lambda x, w, b: layer(x, w, w, b, b).sin().sum()), [x, w, b])


@case("parameters changed in place between two calls", **FORWARD)
def _(layer, compiled):
    def changing(x, w, m, b, bm):
        before = layer(x, w, m, b, bm)
        w.mul_(2), m.add_(1)
        return before, layer(x, w, m, b, bm)

    given = inputs()
    with torch.no_grad():
        return [*compiled(changing)(*given), *given]


@case("the output changed in place", masked_linear=1, masked_linear_backward=1)
def _(layer, compiled):
    def loss(*tensors):
        y = layer(*tensors)
        y[:, 0] = 0
        y.mul_(2)
        return y.view(-1).sin().sum()

    return loss_and_gradients(compiled(loss), leaves(inputs()))


@case("torch.cond", masked_linear=4, masked_linear_backward=2)
def _(layer, compiled):
    def loss(*tensors):
        branches = [lambda *tensors, f=f: f(layer(*tensors)).sum() for f in (torch.sin, torch.cos)]
        return torch.cond(tensors[0].sum() > -1e9, *branches, tensors)

    return loss_and_gradients(compiled(loss), leaves(inputs()))


@case("compiled autograd, traced in one function", **TRAINED)
def _(layer, compiled):
    def step(*tensors):
        loss = loss_of(layer)(*tensors)
        loss.backward()
        return loss

    given = leaves(inputs())
    return [compiled(step, fullgraph=False, config={"compiled_autograd": True})(*given), *(tensor.grad for tensor in given)]


@case("compiled autograd of a compiled forward", **TRAINED)
def _(layer, compiled):
    given = leaves(inputs())
    loss = compiled(loss_of(layer))(*given)
    with compiled.backward():
        loss.backward()
    return [loss, *(tensor.grad for tensor in given)]
