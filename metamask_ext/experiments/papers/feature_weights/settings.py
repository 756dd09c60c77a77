"""The settings of ``feature-weights``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...engine.settings import RunSettings


@dataclass(frozen=True)
class PartSettings:
    """A part of the homework that learns weights.

    Attributes:
        labels: whether the sign of the noisy signal is learned, or the signal.
        solver: of the inner problem.
    """

    labels: bool
    solver: str


@dataclass(frozen=True)
class StepsSettings(PartSettings):
    """A part whose solver takes gradient steps.

    Attributes:
        inner_steps, inner_lr: their number and their rate.
    """

    inner_steps: int
    inner_lr: float

    @property
    def steps_text(self) -> str:
        """The number of steps."""
        return f"{self.inner_steps} step{'s' if self.inner_steps > 1 else ''}"


def _parts() -> Mapping[str, PartSettings]:
    return {
        "e": PartSettings(labels=False, solver="min norm"),
        "f, 5 steps": StepsSettings(labels=False, solver="gradient descent", inner_steps=5, inner_lr=0.01),
        "f, 1 step": StepsSettings(labels=False, solver="gradient descent", inner_steps=1, inner_lr=0.01),
        "g": PartSettings(labels=True, solver="min norm"),
        "h": StepsSettings(labels=True, solver="logistic, gradient descent", inner_steps=5, inner_lr=0.3),
    }


@dataclass(frozen=True)
class TestSettings:
    """The tests.

    Attributes:
        tasks: new ones.
        points: of each task.
    """

    tasks: int = 10
    points: int = 1000


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        tasks: of a meta-update.
        steps, lr: of the meta-updates.
        features: the weighted features.
        true_features: those that the signals use: the constant and five frequencies.
        support_points, query_points: of a task.
        noise: the deviation of the noise.
        sizes: numbers of training points in the tests: 20 on a log scale from 1 to three times the features, and those of interest.
        parts: of the homework.
        logistic_C: the inverse of the regularisation, as scikit-learn has it.
        evolution_every: the weights are looked at after so many meta-updates.
        test: of the tests.
    """

    tasks: int = 5
    steps: int = 100
    lr: float = 1e-2
    features: int = 501
    true_features: int = 11
    support_points: int = 32
    query_points: int = 64
    noise: float = 0.1
    sizes: tuple[int, ...] = (1, 2, 3, 5, 7, 10, 11, 12, 15, 22, 31, 32, 33, 47, 69, 102, 149, 219, 322, 474, 696, 1023, 1503)
    parts: Mapping[str, PartSettings] = field(default_factory=_parts)
    logistic_C: float = 1e6
    evolution_every: int = 5
    test: TestSettings = TestSettings()

    @property
    def shown_sizes(self) -> tuple[int, int, int]:
        """Numbers of training points in the tables: that of meta-training, and its neighbours."""
        return self.support_points - 1, self.support_points, self.support_points + 1
