"""Sinusoids of linear functions as tasks: what is drawn, against the formula sample by sample."""

from __future__ import annotations

import math

import pytest
import torch

from metamask_ext.data import sine_of_linear_tasks, sinusoid_tasks
from metamask_ext.data.sinusoid import MAGNITUDES

LOW, HIGH = MAGNITUDES


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["masked", "unrelated", "cosine"])
def test_samples_follow_the_formula(kind):
    if kind == "masked":
        tasks, support = sine_of_linear_tasks(4, generator(), variables=3)
        assert support.shape == (4, 4) and support.dtype == torch.bool
    else:
        tasks = sinusoid_tasks(4, generator(), variables=3, cosine=0.5 if kind == "cosine" else 0.0)
    x, y = tasks.samples(6, generator(1))
    assert x.shape == (4, 6, 3) and y.shape == (4, 6, 1) and x.dtype == y.dtype == torch.float32
    for task in range(4):
        wave = math.cos if tasks.cosine[task] else math.sin
        for sample in range(6):
            z = sum(float(tasks.weight[task, k] * x[task, sample, k]) for k in range(3)) + float(tasks.phase[task])
            assert abs(float(y[task, sample, 0]) - (wave(z) + float(tasks.offset[task]))) < 1e-5
    assert tasks(x[0]).shape == (4, 6, 1), "the same x for all tasks"
    torch.testing.assert_close(tasks(x[0])[0], y[0])


def test_masked_tasks_share_their_parameters():
    tasks, support = sine_of_linear_tasks(400, generator())
    theta = torch.cat([tasks.weight, tasks.phase[:, None]], 1)
    shared = theta.abs().amax(0)
    assert float(shared.min()) >= LOW and float(shared.max()) <= HIGH
    for column in range(6):
        values = theta[:, column][support[:, column]]
        assert (values == values[0]).all() and abs(float(values[0])) == float(shared[column])
    assert (theta[~support] == 0).all() and (tasks.offset == 0).all() and not tasks.cosine.any()
    # 2,400 draws with probability 1/2: standard deviation 0.0102; five of them
    assert abs(float(support.double().mean()) - 0.5) < 0.051
    x, _ = tasks.samples(500, generator(1))
    z = x @ tasks.weight[:, :, None] + tasks.phase[:, None, None]
    assert float((z.abs() < 2 * math.pi).double().mean()) > 0.99, "two periods"


def test_unrelated_tasks_share_nothing():
    tasks = sinusoid_tasks(2000, generator(), cosine=0.3)
    for values, low, high in ((tasks.weight.abs(), LOW, HIGH), (tasks.phase, -math.pi, math.pi), (tasks.offset, -1.0, 1.0)):
        assert len(values.unique()) > 0.99 * values.numel()
        assert low <= float(values.min()) and float(values.max()) <= high
        # Uniform: the standard error of a mean is width / sqrt(12 n); five of them
        assert abs(float(values.mean()) - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * values.numel())
    # 2,000 draws with probability 0.3: standard deviation 0.0102; 10,000 signs: 0.01
    assert abs(float(tasks.cosine.double().mean()) - 0.3) < 0.051 and abs(float(tasks.weight.sign().mean())) < 0.05


def test_related_tasks_differ_in_the_wave_only():
    tasks = sinusoid_tasks(50, generator(), related=True, cosine=0.3)
    assert (tasks.weight == tasks.weight[0]).all() and (tasks.phase == 0).all() and (tasks.offset == 0).all()
    assert 0 < int(tasks.cosine.sum()) < 50
    assert not sinusoid_tasks(50, generator(), related=True).cosine.any()


def test_the_seed_decides():
    first, again, other = (sinusoid_tasks(3, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)


def test_refused():
    for draw in (sine_of_linear_tasks, sinusoid_tasks):
        with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
            draw(0, generator())
        with pytest.raises(ValueError, match="variables must be at least 1, got 0"):
            draw(1, generator(), variables=0)
    with pytest.raises(ValueError, match=r"cosine must be a probability, in 0\.\.1, got 1\.5"):
        sinusoid_tasks(1, generator(), cosine=1.5)
    with pytest.raises(ValueError, match=r"magnitudes must be two numbers from 0 on, the smaller first, got \[2\.0, 1\.0\]"):
        sinusoid_tasks(1, generator(), magnitudes=[2.0, 1.0])


def test_magnitudes():
    weight = sinusoid_tasks(500, generator(), magnitudes=(2.0, 3.0)).weight.abs()
    assert 2.0 <= float(weight.min()) < 2.01 and 2.99 < float(weight.max()) <= 3.0
