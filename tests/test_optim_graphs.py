"""Fused optimisers on graphs in which a parameter cannot be updated inside the backward, or not every one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.fused_steps import (
    assert_equal_models,
    batch,
    compare,
    each_kind,
    each_setting,
    error,
    mlp,
    ops_of,
    penalty,
    twice,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import metamask_ext as mm
from metamask_ext import add_task, using_task
from metamask_ext.nn import MaskedLinear

# What cannot be updated inside the backward: the same numbers, by ordinary gradients.


def first_layer_twice(model, x, y):
    return error(model, x, y) + model[0](x).square().sum()


def gradient_penalty(model, x, y):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return error(model, x, y) + slope.square().sum()


def reentrant(model, x, y):
    return (checkpoint(model, x.clone().requires_grad_(), use_reentrant=True) - y).square().mean()


def inside_and_outside_a_reentrant_checkpoint(model, x, y):
    return reentrant(model, x, y) + error(model, x, y)


@each_setting
@pytest.mark.parametrize(
    "loss", [twice, reentrant, inside_and_outside_a_reentrant_checkpoint], ids=lambda function: function.__name__
)
def test_right_where_nothing_can_be_fused(loss, settings, kind):
    assert not set(compare(mlp, kind, settings, loss)) & set(kind.ops)


@each_setting
@pytest.mark.parametrize("loss", [first_layer_twice, penalty, gradient_penalty], ids=lambda function: function.__name__)
def test_right_where_some_parameters_can_be_fused(loss, settings, kind):
    names = compare(mlp, kind, settings, loss)
    assert kind.ops[0] in names


@each_kind
def test_a_penalty_leaves_only_the_parameters_it_reads_unfused(kind):
    model = mlp()
    optimizer = kind.ours(model, 0.1)
    nodes = optimizer._fused_nodes(penalty(model, *batch(model, 0)).grad_fn)
    assert sorted(steps.updates for _, steps in nodes) == [(False, True, True, True), (True, False, True, True)]


def two_tasks(model, x, y):
    value = 0.0
    for task, factor in (("default", 1.0), ("second", 2.0)):
        with using_task(model, task):
            value = value + factor * error(model, x, y)
    return value


@each_setting
def test_two_tasks_in_one_loss_share_the_weight_and_not_the_masks(settings, kind):
    def make():
        model = mlp()
        add_task(model, "second")
        return model

    torch.manual_seed(1)
    assert kind.ops[0] in compare(lambda: (torch.manual_seed(1), make())[1], kind, settings, two_tasks)


@each_setting
def test_tied_weights(settings, kind):
    def make():
        torch.manual_seed(0)
        layer = MaskedLinear(3, 3, dtype=torch.float64)
        return nn.Sequential(MaskedLinear(5, 3, dtype=torch.float64), layer, nn.Tanh(), layer)

    assert kind.ops[0] in compare(make, kind, settings)


@each_kind
def test_two_parameters_over_one_memory(kind):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(MaskedLinear(5, 5, dtype=torch.float64), nn.Tanh(), MaskedLinear(5, 3, dtype=torch.float64))
        twin = MaskedLinear(5, 5, dtype=torch.float64)
        twin.weight = nn.Parameter(model[0].weight.data)
        return model.insert(1, twin)

    compare(make, kind, kind.plain)
    model = make()
    nodes = kind.ours(model, 0.1)._fused_nodes(error(model, *batch(model, 0)).grad_fn)
    assert sorted(steps.updates for _, steps in nodes) == [(False, True, True, True)] * 2 + [(True,) * 4]


class PlainBias(nn.Module):
    """A function of the package with parameters of the user's, the bias without logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = MaskedLinear(5, 9, dtype=torch.float64)
        self.weight, self.mask = (nn.Parameter(torch.randn(3, 9, dtype=torch.float64)) for _ in range(2))
        self.bias = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return mm.masked_linear(self.layer(x).tanh(), self.weight, self.mask, self.bias)


@each_setting
def test_a_bias_without_logits_gets_an_ordinary_step(kind, settings):
    assert set(compare(PlainBias, kind, settings)) == {kind.ops[0]}
    model = PlainBias()
    nodes = kind.ours(model, 0.1)._fused_nodes(error(model, *batch(model, 0)).grad_fn)
    assert sorted(steps.updates for _, steps in nodes) == [(True, True, False, False), (True,) * 4]


@each_setting
def test_checkpoint_without_reentry_is_fused(settings, kind):
    def loss(model, x, y):
        return (checkpoint(model, x, use_reentrant=False) - y).square().mean()

    assert set(kind.ops) & set(compare(mlp, kind, settings, loss)) == {kind.ops[0]}


@each_setting
@pytest.mark.parametrize("frozen", ["weight", "mask_logits"])
def test_frozen_parameters(frozen, settings, kind):
    def prepare(model, optimizer):
        getattr(model[0], frozen).requires_grad_(False)

    assert kind.ops[0] in compare(mlp, kind, settings, prepare=prepare)


@pytest.mark.once
@each_setting
def test_a_compiled_model(settings, kind):
    ours, theirs = mlp(), mlp()
    fused, plain = kind.ours(ours, **settings), kind.torchs(theirs, **settings)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x, y = batch(ours, seed)
        value = (compiled(x) - y).square().mean()
        assert not ops_of(lambda value=value: fused.backward(value))
        error(theirs, x, y).backward()
        plain.step()
        plain.zero_grad()
    assert_equal_models(ours, theirs)


@each_setting
def test_gradient_accumulation(settings, kind):
    ours, theirs = mlp(), mlp()
    fused, plain = kind.ours(ours, **settings), kind.torchs(theirs, **settings)
    for seed in range(2):
        for model in (ours, theirs):
            error(model, *batch(model, 10 + seed)).backward()
        fused.backward(error(ours, *batch(ours, seed)))
        error(theirs, *batch(theirs, seed)).backward()
        plain.step()
        plain.zero_grad()
    assert_equal_models(ours, theirs)


@each_kind
@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_see_the_gradient_and_may_change_it(hook, kind):
    def prepare(model, optimizer):
        seen = model.seen = []
        if hook == "register_hook":
            model[0].weight.register_hook(lambda grad: seen.append(grad.clone()) or 2 * grad)
        else:

            def double(p):
                seen.append(p.grad.clone())
                p.grad.mul_(2)

            model[0].weight.register_post_accumulate_grad_hook(double)

    models = []
    compare(mlp, kind, kind.settings, prepare=lambda model, optimizer: (prepare(model, optimizer), models.append(model)))
    assert len(models[0].seen) == len(models[1].seen) == 4
    for ours, theirs in zip(models[0].seen, models[1].seen):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@each_kind
def test_another_reader_of_the_old_weight_is_an_error_not_a_wrong_number(kind):
    """A detached use has no edge in the graph; the version counter shows that its saved weight was changed."""
    model = mlp()
    optimizer = kind.ours(model, 0.1)
    x, y = batch(model, 0)
    first = F.linear(x.requires_grad_(), model[0].weight.detach())  # its backward comes after the layer's
    value = error(model, x, y) + first.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        optimizer.backward(value)


@each_kind
def test_version_counters_are_bumped(kind):
    model = mlp()
    optimizer = kind.ours(model, **kind.settings)
    parameters = list(model.parameters())
    before = [p._version for p in parameters]
    optimizer.backward(error(model, *batch(model, 0)))
    assert all(p._version > version for p, version in zip(parameters, before))
