"""Parts that the experiments on meta-learning share: settings, nets, predictions after gradient steps, sine waves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from metamask_ext.data import SineTasks, sine_tasks
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedLinear

from ..engine.settings import RunSettings
from ..engine.training import descend

Support = tuple[Tensor, Tensor]
"""Samples of the tasks, ``x`` and ``y``, to adapt to."""
TEST_POINTS = 100
"""Points in [-5, 5] at which predictions of sine waves are compared with the true ones."""


@dataclass(frozen=True)
class AdaptSettings:
    """A net and its inner steps.

    Attributes:
        masked: whether the net has masks.
        adapt: the parameters that the inner steps move, as :class:`metamask_ext.meta.MAML` names them.
        inner_lr: the rate of these steps.
    """

    masked: bool
    adapt: str
    inner_lr: float

    def maml(self, model: nn.Module, inner_steps: int, first_order: bool = False) -> MAML:
        """The meta-learner of a model."""
        return MAML(model, self.inner_lr, inner_steps, self.adapt, first_order=first_order)


@dataclass(frozen=True)
class WaveSettings(RunSettings):
    """Of experiments with meta-training on sine waves.

    Attributes:
        tasks: of a step of meta-training.
        steps, lr: of meta-training.
        shots: samples of a task, and as many queries.
        inner_steps: of meta-training.
    """

    tasks: int = 25
    steps: int = 5000
    lr: float = 1e-2
    shots: int = 10
    inner_steps: int = 1


def train_on_waves(
    model: nn.Module,
    loss: Callable[[SineTasks, Tensor, Tensor], Tensor],
    generator: torch.Generator,
    settings: WaveSettings,
    *,
    lr: float,
    steps: int,
) -> None:
    """Minimise ``loss(tasks, x, y)`` of tasks that are drawn in each step, on samples and queries ``[T, 2 * shots, 1]``."""

    def drawn() -> Tensor:
        tasks = sine_tasks(settings.tasks, generator)
        return loss(tasks, *tasks.samples(2 * settings.shots, generator))

    descend(model.parameters(), lr, steps, drawn)


def relu_net(depth: int, width: int, masked: bool = False, inputs: int = 1) -> nn.Sequential:
    """``depth`` hidden layers with ReLU; ``[n, inputs]`` to ``[n, 1]``."""
    linear = MaskedLinear if masked else nn.Linear
    sizes = [inputs] + depth * [width]
    hidden = [module for size in pairwise(sizes) for module in (linear(*size), nn.ReLU())]
    return nn.Sequential(*hidden, linear(width, 1))


def predictions(
    maml: MAML, loss: Callable[[Tensor, Tensor], Tensor], support: Support, x: Tensor, steps: Sequence[int]
) -> list[Tensor]:
    """Predictions at ``x`` after each of ``steps``, numbers of inner steps that ascend from 0."""
    parameters = maml.adapt(loss, support, steps=0)
    made = [maml.predict(parameters, x)]
    for before, after in pairwise(steps):
        parameters = maml.adapt(loss, support, steps=after - before, parameters=parameters)
        made.append(maml.predict(parameters, x))
    return made


def told(tasks: SineTasks, x: Tensor) -> Tensor:
    """``x`` with the amplitude and the phase of each wave, ``[T, n, 3]``."""
    shape = len(tasks.phase), x.shape[-2], 1
    return torch.cat([tensor.expand(shape) for tensor in (x, tasks.amplitude, tasks.phase)], -1)
