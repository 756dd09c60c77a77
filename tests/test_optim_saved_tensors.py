"""Fused optimisers under hooks on saved tensors: a step never goes to a copy, the numbers are those of torch's."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

import pytest
import torch
from support.fused_steps import assert_equal_models, batch, cnn, compare, each_kind, each_setting, error, mlp
from torch import nn
from torch.autograd import graph
from torch.utils.checkpoint import checkpoint

from metamask_ext import add_task, using_task
from metamask_ext.nn import MaskedLinear


def to_disk(folder):
    count = iter(range(1_000_000))

    def pack(tensor):
        path = folder / f"{next(count)}.pt"
        torch.save(tensor, path)
        return path

    return graph.saved_tensors_hooks(pack, torch.load)


HOOKS = {
    "clone": lambda folder: graph.saved_tensors_hooks(torch.clone, lambda t: t),
    "clone at unpack": lambda folder: graph.saved_tensors_hooks(lambda t: t, torch.clone),
    "identity": lambda folder: graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "detach": lambda folder: graph.saved_tensors_hooks(torch.detach, torch.detach),
    "quantise": lambda folder: graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.double()),
    "numpy": lambda folder: graph.saved_tensors_hooks(lambda t: t.clone().numpy(), torch.from_numpy),
    "shared numpy": lambda folder: graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy),
    "only weights": lambda folder: graph.saved_tensors_hooks(lambda t: t.clone() if t.dim() == 2 else t, lambda t: t),
    "save_on_cpu": lambda folder: graph.save_on_cpu(),
    "disk": to_disk,
    "disabled": lambda folder: graph.disable_saved_tensors_hooks("none here"),
}
each_hook = pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)


@each_setting
@each_hook
@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_hooks_around_the_forward(make, hooks, settings, tmp_path, kind):
    def loss(model, x, y):
        with hooks(tmp_path):
            return error(model, x, y)

    compare(make, kind, settings, loss)


@each_hook
@each_kind
def test_hooks_around_one_layer(hooks, tmp_path, kind):
    def loss(model, x, y):
        with hooks(tmp_path):
            x = model[0](x)
        return error(model[1:], x, y)

    assert kind.ops[0] in compare(mlp, kind, kind.settings, loss)


@each_hook
@each_kind
def test_hooks_around_forward_and_backward(hooks, tmp_path, kind):
    """A backward may also run inside the block."""
    ours, theirs = mlp(), mlp()
    fused, plain = kind.ours(ours, **kind.settings), kind.torchs(theirs, **kind.settings)
    for seed in range(3):
        with hooks(tmp_path):
            fused.backward(error(ours, *batch(ours, seed)))
            error(theirs, *batch(theirs, seed)).backward()
        plain.step()
        plain.zero_grad()
    assert_equal_models(ours, theirs)


@each_hook
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@each_kind
def test_hooks_and_a_checkpoint(hooks, outside, tmp_path, kind):
    """An off-loading checkpoint: hooks around it, or around the layers in it."""
    if hooks is HOOKS["disabled"]:
        pytest.skip("a checkpoint needs hooks")

    def loss(model, x, y):
        def run(x):
            with nullcontext() if outside else hooks(tmp_path):
                return model(x)

        with hooks(tmp_path) if outside else nullcontext():
            return (checkpoint(run, x, use_reentrant=False) - y).square().mean()

    compare(mlp, kind, kind.settings, loss)


@each_kind
def test_a_copy_is_not_kept_as_the_parameter(kind):
    """The tensor that the hook gave back is as before, the parameter has moved, and nothing but the parameter."""
    model = nn.Sequential(MaskedLinear(5, 3, dtype=torch.float64))
    kept = []

    def unpack(tensor):
        kept.append((tensor, tensor.clone()))
        return tensor

    optimizer = kind.ours(model, 0.5)
    before = model[0].weight.detach().clone()
    with graph.saved_tensors_hooks(torch.clone, unpack):
        value = error(model, *batch(model, 0))
    optimizer.backward(value)
    assert all(torch.equal(*pair) for pair in kept) and len(kept) >= 5
    assert not torch.equal(model[0].weight, before)


@each_kind
def test_identity_hooks_leave_the_step_in_the_backward_and_bump_versions(kind):
    """torch packs an alias that counts its own versions: the step must be seen by the parameter's counter."""
    model = mlp()
    optimizer = kind.ours(model, **kind.plain)
    versions = [p._version for p in model.parameters()]
    with HOOKS["identity"](None):
        value = error(model, *batch(model, 0))
    optimizer.backward(value)
    assert all(p._version > version for p, version in zip(model.parameters(), versions))


@each_kind
def test_another_reader_of_the_old_weight_behind_identity_hooks(kind):
    model = mlp()
    optimizer = kind.ours(model, 0.1)
    x, y = batch(model, 0)
    first = nn.functional.linear(x.requires_grad_(), model[0].weight.detach())
    with HOOKS["identity"](None):
        value = error(model, x, y) + first.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        optimizer.backward(value)


@each_kind
def test_mutation_on_saved_tensors_is_allowed(kind):
    def loss(model, x, y):
        stack.enter_context(graph.allow_mutation_on_saved_tensors())
        return error(model, x, y)

    ours, theirs = mlp(), mlp()
    fused, plain = kind.ours(ours, **kind.settings), kind.torchs(theirs, **kind.settings)
    for seed in range(3):
        with ExitStack() as stack:
            fused.backward(loss(ours, *batch(ours, seed)))
        with ExitStack() as stack:
            loss(theirs, *batch(theirs, seed)).backward()
        plain.step()
        plain.zero_grad()
    assert_equal_models(ours, theirs)


@each_hook
@each_kind
def test_several_tasks(hooks, tmp_path, kind):
    def make():
        model = mlp()
        add_task(model, "second", init="copy:default")
        return model

    def loss(model, x, y):
        with hooks(tmp_path), using_task(model, "second"):
            return error(model, x, y)

    compare(make, kind, kind.settings, loss)


@each_kind
def test_nested_hooks(kind):
    def loss(model, x, y):
        with graph.save_on_cpu(), HOOKS["quantise"](None):
            return error(model, x, y)

    compare(mlp, kind, kind.settings, loss)
