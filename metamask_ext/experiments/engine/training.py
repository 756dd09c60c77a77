"""The parts that trainings of the experiments share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .tracking import track

Model = TypeVar("Model", bound=nn.Module)


def descend(
    parameters: Iterable[Tensor],
    lr: float,
    iterations: int,
    loss: Callable[[], Tensor],
    label: str = "loss",
    constant: bool = False,
) -> None:
    """Minimise ``loss()``, which draws its own data, by Adam with a cosine schedule from ``lr`` to 0, or at a ``constant`` rate;
    tracked as ``label``."""
    optimizer = torch.optim.Adam(parameters, lr)
    schedulers = torch.optim.lr_scheduler
    schedule = schedulers.ConstantLR(optimizer, 1.0) if constant else schedulers.CosineAnnealingLR(optimizer, iterations)
    for step in range(1, iterations + 1):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
        track(step, **{label: value.detach()})


def seeded(seed: int, make: Callable[[], Model]) -> Model:
    """The model that ``make`` draws from ``seed``; the global random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
