"""Sine with an occasional cosine: Blum and Law, EE5239 project proposal (2020), section 3.4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tasks import sinusoid_tasks
from . import study
from .sinusoid import split
from .study import Problem
from .study_problem import Layer

SETTINGS: dict[str, Any] = {
    "seeds": 5,
    "tasks": 20,
    "steps": 10_000,  # of all tasks together
    "variables": 5,
    "cosine": 0.3,  # the probability of a cosine
    "train_samples": 100,
    "test_samples": 1000,
    "new_tasks": 10,
    "study": study.settings(
        {
            "masked": [{"lr": 0.01, "mask_lr": 0.3}, {"lr": 0.003, "mask_lr": 0.3}, {"lr": 0.01, "mask_lr": 0.1}],
            "hard": [{"lr": 0.001, "mask_lr": 0.01}, {"lr": 0.001, "mask_lr": 0.003}, {"lr": 0.003, "mask_lr": 0.01}],
            "lottery": [{"mask_lr": 0.01, "scale": 2.0}, {"mask_lr": 0.03, "scale": 2.0}, {"mask_lr": 0.01, "scale": 4.0}],
            "shared": [{"lr": 0.003}, {"lr": 0.001}, {"lr": 0.0003}],
            "independent": [{"lr": 0.01}, {"lr": 0.003}, {"lr": 0.03}],
            "maml": [{"lr": 0.003, "inner_lr": 0.1}, {"lr": 0.003, "inner_lr": 0.03}, {"lr": 0.001, "inner_lr": 0.1}],
            "sequence": [{"lr": 0.003}, {"lr": 0.01}, {"lr": 0.001}],
        },
        weight_decay=1e-3,
    ),
}


class Sine(nn.Module):
    """The sine of each number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def problem(seed: int, settings: Mapping[str, Any], related: bool = True) -> Problem:
    """``y = sin(theta^T x + bias)``, of one unit; where the tasks are not related, scaled and with an offset."""
    generator = torch.Generator().manual_seed(seed)
    variables = settings["variables"]
    drawn = sinusoid_tasks(
        settings["tasks"] + settings["new_tasks"], generator, variables=variables, related=related, cosine=settings["cosine"]
    )

    def network(linear: Layer, conv: Layer) -> nn.Module:
        return nn.Sequential(linear(variables, 1), Sine(), *([] if related else [linear(1, 1)]))

    return Problem(*split(drawn, settings, generator), network, F.mse_loss, F.mse_loss)
