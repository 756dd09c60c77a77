"""Sine waves as tasks: what is drawn, and from where."""

from __future__ import annotations

import math

import pytest
import torch

from metamask_ext.data import SineTasks, sine_tasks


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_values_by_hand():
    tasks = SineTasks(torch.tensor([2.0, 3.0]).view(2, 1, 1), torch.tensor([0.0, math.pi / 2]).view(2, 1, 1))
    x = torch.tensor([[0.0], [math.pi / 2]])
    torch.testing.assert_close(tasks(x), torch.tensor([[[0.0], [2.0]], [[-3.0], [0.0]]]), rtol=1e-6, atol=1e-6)


def test_what_is_drawn():
    tasks = sine_tasks(4000, generator())
    x, y = tasks.samples(5, generator(1))
    assert x.shape == y.shape == (4000, 5, 1) and x.dtype == y.dtype == torch.float32
    torch.testing.assert_close(y, tasks.amplitude * torch.sin(x - tasks.phase))
    # Uniform: the standard error of a mean is width / sqrt(12 n); five of them
    for values, low, high in ((tasks.amplitude, 0.1, 5.0), (tasks.phase, 0.0, math.pi), (x, -5.0, 5.0)):
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        error = 5 * (high - low) / math.sqrt(12 * values.numel())
        assert abs(float(values.mean()) - (low + high) / 2) < error
    assert len(tasks.phase.unique()) > 3900, "each task has its own"


def test_the_seed_decides():
    first, again, other = (sine_tasks(3, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.phase, again.phase) and not torch.equal(first.phase, other.phase)
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        sine_tasks(0, generator())
