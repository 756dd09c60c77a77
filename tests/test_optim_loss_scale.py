"""Fused optimisers beside torch.amp.GradScaler: a scaled loss is refused, a scaled ordinary step is right."""

from __future__ import annotations

import copy
import gc
import time

import pytest
import torch
from support.fused_steps import assert_equal_models, batch, each_kind, error, mlp, ops_of
from torch.autograd import graph

from metamask_ext import add_task, loss_scale, using_task

REFUSED = pytest.raises(ValueError, match="loss must not be scaled.*GradScaler.*unscaled loss.*scaler.step")


@pytest.fixture(autouse=True)
def _as_a_new_process(monkeypatch):
    monkeypatch.setattr(loss_scale, "_SEARCHES", loss_scale._Searches())


def scaler(**options):
    return torch.amp.GradScaler("cpu", **options)


def behind_hooks(scale, model, x, y):
    with graph.save_on_cpu():
        return scale.scale(error(model, x, y))


def a_list(scale, model, x, y):
    return sum(scale.scale([error(model, x, y), error(model, 2 * x, y)]))


WAYS = {
    "the loss": lambda scale, model, x, y: scale.scale(error(model, x, y)),
    "two losses": lambda scale, model, x, y: scale.scale(error(model, x, y)) + scale.scale(error(model, -x, y)),
    "a mean over steps": lambda scale, model, x, y: scale.scale(error(model, x, y)) / 4,
    "outputs": lambda scale, model, x, y: scale.scale((model(x) - y).square()).mean(),
    "a list": a_list,
    "behind hooks": behind_hooks,
    "a weighted loss": lambda scale, model, x, y: 0.5 * scale.scale(torch.tensor(2.0) * error(model, x, y)),
    "a float loss": lambda scale, model, x, y: scale.scale(error(model, x, y).float()).double(),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@each_kind
def test_a_scaled_loss_is_refused(way, kind):
    model = mlp()
    optimizer = kind.ours(model, **kind.settings)
    before = copy.deepcopy(model)
    scale = scaler()
    value = way(scale, model, *batch(model, 0))
    with REFUSED:
        optimizer.backward(value)
    assert_equal_models(model, before, tolerance=0.0)
    assert not optimizer.state and all(p.grad is None for p in model.parameters())
    # The graph is whole: what the message says works
    value.backward()
    scale.step(optimizer)
    scale.update()


@pytest.mark.parametrize("options", [{"init_scale": 1000.0}, {"init_scale": 2.0}, {"init_scale": 0.25, "growth_factor": 1.5}])
@each_kind
def test_other_scales(options, kind):
    model = mlp()
    scale = scaler(**options)
    with REFUSED:
        kind.ours(model, 0.1).backward(scale.scale(error(model, *batch(model, 0))))


@each_kind
def test_outputs_with_a_gradient(kind):
    model = mlp()
    x, y = batch(model, 0)
    scale = scaler()
    with REFUSED:
        kind.ours(model, 0.1).backward(scale.scale(model(x)), y)


@each_kind
def test_what_is_no_scale(kind):
    """A disabled scaler returns the loss; weights of losses are no scales, beside a scaler that lives."""
    ours, theirs = mlp(), mlp()
    fused, plain = kind.ours(ours, **kind.settings), kind.torchs(theirs, **kind.settings)
    off, other = scaler(enabled=False), scaler()
    other.scale(torch.ones((), requires_grad=True))
    weight = torch.tensor(0.5)
    ways = [
        lambda value: off.scale(value),
        lambda value: value * weight,
        lambda value: value * torch.tensor(1024.0),
        lambda value: value * 65536.0,
        lambda value: value * torch.tensor(65536.0, dtype=torch.float64),
        lambda value: 2 * value,
    ]
    for group in (*fused.param_groups, *plain.param_groups):
        group["lr"] = 1e-5
    for seed, way in enumerate(ways):
        value = way(error(ours, *batch(ours, seed)))
        assert set(ops_of(lambda value=value: fused.backward(value))) == {kind.ops[0]}
        way(error(theirs, *batch(theirs, seed))).backward()
        plain.step()
        plain.zero_grad()
    assert_equal_models(ours, theirs, tolerance=1e-9)


@each_kind
def test_a_weight_is_looked_up_once_and_new_ones_not_for_ever(monkeypatch, kind):
    calls = []
    monkeypatch.setattr(loss_scale, "_scalers", lambda: calls.append(1) or [])
    model = mlp()
    optimizer = kind.ours(model, 1e-3)
    weight = torch.tensor(0.3)
    for seed in range(5):
        optimizer.backward(weight * error(model, *batch(model, seed)) * weight)
    assert len(calls) <= 1
    for seed in range(30):
        optimizer.backward(error(model, *batch(model, seed)) * torch.tensor(0.1 + seed))
    assert len(calls) <= loss_scale._MOST_SEARCHES
    del weight
    gc.collect()
    assert len(loss_scale._SEARCHES.of_no_scaler) <= 1


@each_kind
def test_a_second_backward_over_a_freed_graph_is_torchs_error(kind):
    model = mlp()
    optimizer = kind.ours(model, 0.1)
    value = torch.tensor(0.5) * error(model, *batch(model, 0))
    value.backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.backward(value)


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_ and step"])
@pytest.mark.parametrize("new", [False, True], ids=["", "a new task"])
@each_kind
def test_an_ordinary_step_of_a_scaler(unscale, new, kind):
    """Also of a task that was added after the optimiser was made: its gradients are unscaled too."""
    ours, theirs = mlp(), mlp()
    fused, plain = kind.ours(ours, **kind.settings), kind.torchs(theirs, **kind.settings)
    task = "default"
    if new:
        task = "second"
        for model in (ours, theirs):
            add_task(model, task, init="copy:default")
        plain.param_groups[1]["params"].extend(p for n, p in theirs.named_parameters() if task in n)
    scale = scaler()
    for seed in range(3):
        with using_task(ours, task):
            scale.scale(error(ours, *batch(ours, seed))).backward()
        if unscale:
            scale.unscale_(fused)
            torch.nn.utils.clip_grad_norm_([p for group in fused.param_groups for p in group["params"]], 1e6)
        scale.step(fused)
        scale.update()
        fused.zero_grad()
        with using_task(theirs, task):
            error(theirs, *batch(theirs, seed)).backward()
        plain.step()
        plain.zero_grad()
    assert_equal_models(ours, theirs, tolerance=1e-10)


@each_kind
def test_a_step_is_skipped_where_a_gradient_is_infinite(kind):
    model = mlp()
    optimizer = kind.ours(model, **kind.settings)
    before = copy.deepcopy(model)
    scale = scaler()
    x, y = batch(model, 0)
    scale.scale(error(model, x * float("inf"), y)).backward()
    scale.step(optimizer)
    scale.update()
    assert scale.get_scale() == 2.0**15
    assert_equal_models(model, before, tolerance=0.0)


@each_kind
def test_param_groups_are_those_of_the_model_now(kind):
    model = mlp()
    optimizer = kind.ours(model, 0.1)
    add_task(model, "second")
    assert set(model.parameters()) == {p for group in optimizer.param_groups for p in group["params"]}
    assert optimizer.param_groups[1]["param_names"][-1] == "2.bias_masks.second"
    twin = copy.deepcopy(optimizer)
    add_task(twin.model, "third")
    assert len(twin.param_groups[1]["params"]) == 12 and len(optimizer.param_groups[1]["params"]) == 8


@each_kind
def test_reading_param_groups_costs_little(kind):
    model = torch.nn.Sequential(*(mlp() for _ in range(50)))
    optimizer = kind.ours(model, 0.1)
    started = time.perf_counter()
    for _ in range(1000):
        assert optimizer.param_groups
    assert time.perf_counter() - started < 0.05
