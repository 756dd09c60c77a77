"""Fused optimisers: torch's step is left out where it has nothing to do, and never where somebody watches it."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import metamask_ext as mm


def test_a_step_with_nothing_to_do_and_nobody_to_see_it_is_left_out(monkeypatch):
    model = mm.nn.MaskedLinear(3, 2)
    optimizer, calls = mm.optim.FusedMaskedSGD(model, 0.1), []
    monkeypatch.setattr(sys.modules["torch.optim.sgd"], "sgd", lambda *arguments, **options: calls.append(1))
    optimizer.backward(model(torch.ones(4, 3)).sum())
    assert not calls
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert calls


def _watched(kind, optimizer, seen):
    """Let something watch or replace the steps of ``optimizer``; a callable that takes it away."""
    if kind == "hook before":
        return optimizer.register_step_pre_hook(lambda *_: seen.append(1)).remove
    if kind == "hook after":
        return optimizer.register_step_post_hook(lambda *_: seen.append(1)).remove
    if kind == "hook of all optimisers":
        return register_optimizer_step_post_hook(lambda *_: seen.append(1)).remove
    assert kind == "replaced"
    step = optimizer.step
    optimizer.step = lambda *arguments: (seen.append(1), step(*arguments))
    return lambda: delattr(optimizer, "step")


@pytest.mark.parametrize("kind", ["hook before", "hook after", "hook of all optimisers", "replaced"])
def test_a_step_with_nothing_left_to_do_is_seen_by_who_watches(kind):
    model = torch.nn.Sequential(mm.nn.MaskedLinear(3, 2), torch.nn.ReLU(), mm.nn.MaskedLinear(2, 1))
    optimizer, x, seen = mm.optim.FusedMaskedSGD(model, 0.1), torch.ones(4, 3), []
    end = _watched(kind, optimizer, seen)
    optimizer.backward(model(x).sum())
    assert len(seen) == 1
    end()
    optimizer.backward(model(x).sum())
    assert len(seen) == 1


def test_a_subclass_takes_its_own_step():
    class Counting(mm.optim.FusedMaskedSGD):
        count = 0

        def step(self, closure=None):
            self.count += 1
            return super().step(closure)

    class Further(Counting):
        pass

    model = mm.nn.MaskedLinear(3, 2)
    for optimizer in (Counting(model, 0.1), Further(model, 0.1)):
        optimizer.backward(model(torch.ones(4, 3)).sum())
        assert optimizer.count == 1


def test_a_scheduler_sees_the_steps_of_a_backward():
    model = mm.nn.MaskedLinear(3, 2)
    optimizer = mm.optim.FusedMaskedSGD(model, 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.backward(model(torch.ones(4, 3)).sum())
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_parameter_outside_of_masked_layers_still_takes_its_step():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), mm.nn.MaskedLinear(2, 1))
    optimizer = mm.optim.FusedMaskedSGD(model, 0.1)
    before = model[0].weight.detach().clone()
    optimizer.backward(model(torch.ones(4, 3)).sum())
    assert model[0].weight.grad is None and not torch.equal(model[0].weight, before)
