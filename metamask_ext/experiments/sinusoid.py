"""Sinusoids that share nothing: Blum and Law, EE5239 project proposal (2020), section 3.3."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..tasks import SinusoidTasks, sinusoid_tasks
from . import study
from .study import Problem, Score, TaskData
from .study_problem import Layer

SETTINGS: dict[str, Any] = {
    "seeds": 5,
    "tasks": 20,
    "steps": 20_000,  # of all tasks together
    "variables": 5,
    "hidden": 64,
    "train_samples": 1000,
    "test_samples": 1000,
    "new_tasks": 10,
    "study": study.settings(
        {
            "masked": [{"lr": 0.003, "mask_lr": 0.1}, {"lr": 0.003, "mask_lr": 0.03}, {"lr": 0.001, "mask_lr": 0.1}],
            "hard": [{"lr": 0.001, "mask_lr": 0.01}, {"lr": 0.001, "mask_lr": 0.003}, {"lr": 0.003, "mask_lr": 0.01}],
            "lottery": [{"mask_lr": 0.01, "scale": 2.0}, {"mask_lr": 0.03, "scale": 2.0}, {"mask_lr": 0.01, "scale": 4.0}],
            "shared": [{"lr": 0.003}, {"lr": 0.001}, {"lr": 0.0003}],
            "independent": [{"lr": 0.01}, {"lr": 0.003}, {"lr": 0.03}],
            "maml": [{"lr": 0.003, "inner_lr": 0.1}, {"lr": 0.003, "inner_lr": 0.03}, {"lr": 0.001, "inner_lr": 0.1}],
            "sequence": [{"lr": 0.003}, {"lr": 0.01}, {"lr": 0.001}],
        }
    ),
}


def network(sizes: list[int], linear: Layer, conv: Layer) -> nn.Module:
    """Layers of these sizes with tanh between them."""
    layers = [layer for size, after in zip(sizes[:-2], sizes[1:-1]) for layer in (linear(size, after), nn.Tanh())]
    return nn.Sequential(*layers, linear(*sizes[-2:]))


def split(drawn: SinusoidTasks, settings: Mapping[str, Any], generator: torch.Generator) -> list[TaskData]:
    """Training and test data of the first ``tasks`` tasks, then those of the others, which are new."""
    known, train, new = settings["tasks"], settings["train_samples"], settings["study"]["new"]["samples"][-1]
    x, y = drawn.samples(max(train, new) + settings["test_samples"], generator)
    test = slice(max(train, new), None)
    return [
        TaskData(x[:known, :train], y[:known, :train]),
        TaskData(x[:known, test], y[:known, test]),
        TaskData(x[known:, :new], y[known:, :new]),
        TaskData(x[known:, test], y[known:, test]),
    ]


def problem(seed: int, settings: Mapping[str, Any]) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    drawn = sinusoid_tasks(settings["tasks"] + settings["new_tasks"], generator, variables=settings["variables"])
    sizes = [settings["variables"], settings["hidden"], settings["hidden"], 1]
    return Problem(*split(drawn, settings, generator), partial(network, sizes), F.mse_loss, F.mse_loss)
