"""The learners of ``universality``: MAML, a recurrent one, and nets of several depths; their training and tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.data import SineTasks, sine_tasks
from metamask_ext.meta import MAML

from ...engine.jobs import Json
from ...engine.statistics import interval_over_tasks
from ...engine.training import seeded
from ..meta_learning import TEST_POINTS, Support, predictions, relu_net, told, train_on_waves
from .settings import Settings

LABELS = {
    "maml": "MAML",
    "masks": "MAML on the masks of a masked net (ours)",
    "lstm": "LSTM that reads the support set",
    "pretrained": "net pretrained on all tasks, fine-tuned",
    "random": "net with random weights, trained",
}
DIVERGED = 1000.0
"""Times what predicting 0 costs: a task with a larger error has diverged, and counts with this one."""


class RecurrentLearner(nn.Module):
    """An LSTM that reads the support set; its last state and ``x*`` go through two hidden layers to the prediction."""

    def __init__(self, hidden: int):
        super().__init__()
        self.lstm = nn.LSTM(2, hidden, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(hidden + 1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, support: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """``[T, n, 1]`` for a support set of ``[T, K, 1]`` and ``x`` ``[T, n, 1]``."""
        _, (state, _) = self.lstm(torch.cat(support, -1))
        return self.head(torch.cat([state[0][:, None].expand(-1, x.shape[1], -1), x], -1))


Loss = Callable[[SineTasks, Support, Support], Tensor]
Learner = Callable[[SineTasks, Support, Tensor], list[Tensor]]
"""For tasks and their support sets the predictions at ``x`` after each number of test steps."""


def _train(model: nn.Module, loss: Loss, seed: int, settings: Settings, *, lr: float, steps: int) -> None:
    generator, shots = torch.Generator().manual_seed(seed), settings.shots

    def halves(tasks: SineTasks, x: Tensor, y: Tensor) -> Tensor:
        return loss(tasks, (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:]))

    train_on_waves(model, halves, generator, settings, lr=lr, steps=steps)


def learn(method: str, seed: int, settings: Settings) -> Json:
    """Train one of ``LABELS`` and test it."""
    if method == "lstm":
        its = settings.lstm
        recurrent = seeded(seed, lambda: RecurrentLearner(its.hidden))
        train = partial(_train, recurrent, seed=seed, settings=settings, lr=its.lr, steps=its.steps)
        train(lambda tasks, s, q: F.mse_loss(recurrent(s, q[0]), q[1]))
        return _test(seed, lambda tasks, support, x: [recurrent(support, x)] * len(settings.test.steps), settings)
    chosen = settings.methods.get(method, settings.methods["maml"])
    model = seeded(seed, lambda: relu_net(2, settings.hidden, chosen.masked))
    maml = chosen.maml(model, settings.inner_steps)
    train = partial(_train, model, seed=seed, settings=settings, lr=settings.lr, steps=settings.steps)
    if method == "pretrained":
        train(lambda tasks, s, q: F.mse_loss(model(torch.cat([s[0], q[0]])), torch.cat([s[1], q[1]])))
    elif method != "random":
        train(lambda tasks, s, q: maml(F.mse_loss, s, q))
    return _test(seed, _adapting(maml, settings.test.steps), settings)


def _adapting(maml: MAML, steps: Sequence[int]) -> Learner:
    return lambda tasks, support, x: predictions(maml, F.mse_loss, support, x, steps)


@torch.no_grad()
def _test(seed: int, learner: Learner, settings: Settings) -> Json:
    """Errors on new tasks of the training distribution, of one outside of it, and by amplitude and phase."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    test, shots = settings.test, settings.shots
    inside, outside = (sine_tasks(test.tasks, generator) for _ in range(2))
    outside = SineTasks(5 + outside.amplitude, math.pi + outside.phase)
    errors = _errors(inside, learner, generator, shots)
    relative = [error / _power(outside) for error in _errors(outside, learner, generator, shots)]
    measured: Json = {
        "mse": [float(error.mean()) for error in errors],
        "interval": [float(interval_over_tasks(error)) for error in errors],
        "outside": [float(error.median()) for error in relative],
        "outside, diverged (%)": [float(100 * (error >= DIVERGED).double().mean()) for error in relative],
        "by amplitude": [],
        "by phase": [],
    }
    for name, values in (("by amplitude", test.amplitudes), ("by phase", test.phases)):
        for value in values:
            tasks = sine_tasks(test.curve_tasks, generator)
            fixed = torch.full_like(tasks.phase, value)
            tasks = SineTasks(fixed, tasks.phase) if name == "by amplitude" else SineTasks(tasks.amplitude, fixed)
            errors = _errors(tasks, learner, generator, shots)
            measured[name].append([float((error / _power(tasks)).median()) for error in errors])
    return measured


def _power(tasks: SineTasks) -> Tensor:
    """The mean square of each signal over a period, ``[T]``: what predicting 0 costs."""
    return 0.5 * tasks.amplitude.flatten().double().square()


def _errors(tasks: SineTasks, learner: Learner, generator: torch.Generator, shots: int) -> list[Tensor]:
    """Each task's mean squared error for each of the learner's predictions; ``DIVERGED`` times the power where descent diverged."""
    support = tasks.samples(shots, generator)
    x = torch.linspace(-5, 5, TEST_POINTS)[None, :, None].expand(len(tasks.phase), -1, -1)
    errors = [(prediction - tasks(x)).square().mean((1, 2)).double() for prediction in learner(tasks, support, x)]
    most = DIVERGED * _power(tasks)
    return [torch.where(error < most, error, most) for error in errors]


def learn_with_depth(depth: int, seed: int, settings: Settings) -> Json:
    """MAML with so many hidden layers, and the same net told amplitude and phase: the errors of new tasks."""
    its, inner_steps, shots = settings.depths, settings.inner_steps, settings.shots
    width = its.widths[str(depth)]
    train = partial(_train, seed=seed, settings=settings, lr=settings.lr, steps=its.steps)
    model = seeded(seed, lambda: relu_net(depth, width))
    # Wide layers need smaller steps than deep nets: every net learns its rates.
    maml = MAML(model, its.inner_lr, inner_steps, "weights", learn_inner_lr=True)
    train(maml, lambda tasks, s, q: maml(F.mse_loss, s, q))
    informed = seeded(seed, lambda: relu_net(depth, width, inputs=3))
    train(informed, lambda tasks, s, q: F.mse_loss(informed(told(tasks, q[0])), q[1]))
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    tasks = sine_tasks(settings.test.tasks, generator)
    with torch.no_grad():
        before, after = _errors(tasks, _adapting(maml, [0, inner_steps]), generator, shots)
        (known,) = _errors(tasks, lambda tasks, support, x: [informed(told(tasks, x))], generator, shots)
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "told": float(known.mean()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
