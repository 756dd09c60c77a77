"""The memory that MAML keeps over its inner steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from metamask_ext.meta import MAML
from metamask_ext.meta.steps import KEPT, _random_states, _Reverse
from metamask_ext.nn import MaskedConv2d, MaskedLinear

SIZES = {
    "sine": (
        25,
        10,
        1,
        lambda: nn.Sequential(MaskedLinear(1, 40), nn.ReLU(), MaskedLinear(40, 40), nn.ReLU(), MaskedLinear(40, 1)),
    ),
    "activations": (4, 200, 16, lambda: nn.Sequential(MaskedLinear(16, 32), nn.Tanh(), MaskedLinear(32, 16))),
    # Nearly all of the memory is that of the adapted tensors. Before the first step they are one for all tasks.
    "masks": (4, 4, 64, lambda: nn.Sequential(MaskedLinear(64, 96), nn.Tanh(), MaskedLinear(96, 64))),
}


def peak(function) -> int:
    """The most bytes that were in use at once, beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    del kept
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most > 0
    return most


def of_step(size: str, steps: int, adapt: str = "masks", **options) -> int:
    tasks, shots, width, make = SIZES[size]
    torch.manual_seed(0)
    model = make()
    support, query = ((torch.randn(tasks, shots, width), torch.randn(tasks, shots, width)) for _ in range(2))
    maml = MAML(model, 0.01, steps, adapt, **options)
    maml(F.mse_loss, support, query).backward()  # what is allocated once
    model.zero_grad()
    return peak(lambda: maml(F.mse_loss, support, query).backward())


@pytest.mark.parametrize("adapt", ["masks", "all"])
@pytest.mark.parametrize("size", SIZES)
def test_checkpoint_keeps_memory_flat_over_inner_steps(size, adapt):
    one, two, five, twenty = (of_step(size, steps, adapt, checkpoint=True) for steps in (1, 2, 5, 20))
    if size == "masks":
        assert max(five, twenty) < 1.3 * two
    else:
        assert max(two, five, twenty) < 1.3 * one
    assert of_step(size, 20, adapt) > 4 * one, "the measurement sees what 20 steps keep"


@pytest.mark.parametrize("adapt", ["masks", "all"])
@pytest.mark.parametrize("size", SIZES)
def test_first_order_keeps_no_graph_of_the_steps(size, adapt):
    first = [of_step(size, steps, adapt, first_order=True) for steps in (2, 5, 20)]
    assert max(first) < 1.05 * first[0]
    assert first[1] < 0.5 * of_step(size, 5, adapt), "the graph of five steps"


def test_a_convolution():
    model = nn.Sequential(MaskedConv2d(3, 8, 3), nn.Tanh(), MaskedConv2d(8, 8, 3))
    support, query = ((torch.randn(4, 5, 3, 12, 12), torch.randn(4, 5, 8, 8, 8)) for _ in range(2))
    used = []
    for steps in (1, 20):
        maml = MAML(model, 0.01, steps, checkpoint=True)
        maml(F.mse_loss, support, query).backward()
        used.append(peak(lambda maml=maml: maml(F.mse_loss, support, query).backward()))
    assert used[1] < 1.3 * used[0]


def test_without_a_graph_nothing_is_kept():
    tasks, shots, width, make = SIZES["activations"]
    support = torch.randn(tasks, shots, width), torch.randn(tasks, shots, width)
    used = []
    for steps in (1, 20):
        maml = MAML(make(), 0.01, steps)
        with torch.no_grad():
            used.append(peak(lambda maml=maml: maml.adapt(F.mse_loss, support)))
    assert used[1] < 1.1 * used[0]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 20, 35, 50])
def test_how_often_a_step_is_computed_again(steps):
    """With KEPT states, binomial(KEPT + r, r) steps need each step at most r times before its own turn."""
    counts = [0] * steps

    def gradients(state, create_graph):
        counts[round(state[0].item())] += 1
        return [torch.tensor(-1.0, requires_grad=True)]

    class Counted(_Reverse):
        def _pull_back(self, state, random):
            turns.append(round(state[0].item()))

    turns: list[int] = []
    start = [torch.tensor(0.0)]
    reverse = Counted([1.0], [])
    reverse.begin(gradients, [torch.tensor(0.0)], owned=False)
    reverse(0, steps, start, _random_states(start), KEPT - 1)
    assert turns == list(reversed(range(steps)))
    again = next(r for r in range(steps) if math.comb(KEPT + r, r) >= steps)
    assert max(counts) == again
