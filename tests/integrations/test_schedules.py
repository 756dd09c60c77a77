"""Schedules of tasks and temperatures, which the callbacks of every engine use, and the numbers that they log of masks."""

from __future__ import annotations

import math

import pytest
import torch

import metamask_ext as mm
from metamask_ext.integrations.schedules import Annealing, TaskSchedule
from metamask_ext.integrations.views import gates, mask_overlap, overlap_figure


@pytest.mark.parametrize(
    ("tasks", "names", "chosen"),
    [
        ("a", ["a"], "aaaaaa"),
        (["a", "b"], ["a", "b"], "ababab"),
        (["a", "a", "b"], ["a", "b"], "aabaab"),
        ({2: "b", 0: "a", 5: "a"}, ["a", "b"], "aabbba"),
        (lambda number: "xyz"[number // 2], [], "xxyyzz"),
    ],
)
def test_schedules(tasks, names, chosen):
    schedule = TaskSchedule(tasks)
    assert schedule.names == names and "".join(map(schedule.task, range(6))) == chosen


@pytest.mark.parametrize(
    ("tasks", "every", "error", "message"),
    [
        ([], "epoch", ValueError, "tasks must name at least one task"),
        ("", "epoch", ValueError, "task name"),
        (["a", 3], "epoch", TypeError, "task name must be a string, got int"),
        (3, "epoch", TypeError, "tasks must be a name, a sequence of names, a mapping from number to name or a function, got int"),
        (b"ab", "epoch", TypeError, "got bytes"),
        ({1: "a"}, "epoch", ValueError, r"tasks must name the task of 0, got a mapping from \[1\]"),
        ({}, "epoch", ValueError, "tasks must name the task of 0"),
        ({-1: "a", 0: "b"}, "epoch", ValueError, "numbers of at least 0, got -1"),
        ({0.5: "a", 0: "b"}, "epoch", TypeError, "a mapping from integers, got the key 0.5"),
        ({True: "a", 0: "b"}, "epoch", TypeError, "a mapping from integers, got the key True"),
        ("a", "batch", ValueError, "every must be one of epoch, step, got 'batch'"),
    ],
)
def test_refused_schedules(tasks, every, error, message):
    with pytest.raises(error, match=message):
        TaskSchedule(tasks, every)
    with pytest.raises(TypeError, match="task name must be a string"):
        TaskSchedule(lambda number: None).task(0)


def test_missing_tasks_are_added():
    model = torch.nn.Sequential(mm.nn.MaskedLinear(3, 2), mm.nn.MaskedLinear(2, 2))
    assert TaskSchedule(["b", "default", "c"]).add_missing(model) == ["b", "c"]
    assert mm.tasks(model) == ["default", "b", "c"] and TaskSchedule("b").add_missing(model) == []


def test_annealing():
    annealing = Annealing((1.0, 0.01))
    assert [annealing.temperature(part) for part in (-1, 0, 0.5, 1, 2)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    model = torch.nn.Sequential(mm.nn.MaskedLinear(3, 2), mm.nn.MaskedLinear(2, 2, gate="hard"))
    annealing.check(model)
    assert annealing.apply(model, 0.5) == model[0].temperature == pytest.approx(0.1) and model[1].temperature == 1.0
    with pytest.raises(ValueError, match="no masked layer of the model has a sigmoid gate"):
        annealing.check(model[1])


@pytest.mark.parametrize(
    ("ends", "error"), [((1.0, 0.0), ValueError), ((math.nan, 1.0), ValueError), (1.0, TypeError), ((1, 2, 3), TypeError)]
)
def test_refused_temperatures(ends, error):
    with pytest.raises(error, match="temperature must be"):
        Annealing(ends)


@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
def test_gates_and_overlap(gate):
    """By hand: two layers, three tasks, one of them packed."""
    model = torch.nn.Sequential(mm.nn.MaskedLinear(2, 2, gate=gate), mm.nn.MaskedLinear(2, 1, bias=False, gate=gate))
    mm.add_task(model, "b")
    mm.add_task(model, "c")
    on = {"default": [1, 1, 0, 0, 1, 0, 0, 1], "b": [1, 0, 0, 0, 1, 1, 0, 1], "c": [0, 0, 1, 0, 0, 0, 0, 0]}
    with torch.no_grad():
        for task, bits in on.items():
            logits = torch.tensor(bits) * 4.0 - 2
            model[0].masks[task].copy_(logits[:4].view(2, 2))
            model[0].bias_masks[task].copy_(logits[4:6])
            model[1].masks[task].copy_(logits[6:].view(1, 2))
    mm.MaskBank(model).pack("c")
    low, high = (0.0, 1.0) if gate == "hard" else (1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2)))
    assert gates(model[0], "b").tolist() == pytest.approx([high, low, low, low, high, high])
    assert gates(model[0], "c").tolist() == [0, 0, 1, 0, 0, 0]
    names, overlap = mask_overlap(model)
    assert names == ["default", "b", "c"]
    # default & b: 3 of 5; c shares nothing.
    torch.testing.assert_close(overlap, torch.tensor([[1, 0.6, 0], [0.6, 1, 0], [0, 0, 1]], dtype=torch.float64))
    axes = overlap_figure(names, overlap).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.60", "0.00", "0.60", "1.00", "0.00", "0.00", "0.00", "1.00"]


def test_overlap_of_empty_masks():
    model = mm.nn.MaskedLinear(2, 2, mask_init=-4.0)
    mm.add_task(model, "b")
    assert mask_overlap(model)[1].tolist() == [[1, 1], [1, 1]]
