"""The settings of the common study: what is tried, how long, and with which configurations of each method."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar


@dataclass(frozen=True)
class PlainConfig:
    """Of ``shared``, ``independent`` and ``sequence``.

    Attributes:
        lr: of W.
    """

    lr: float


@dataclass(frozen=True)
class MaskedConfig(PlainConfig):
    """Of ``masked`` and ``hard``.

    Attributes:
        mask_lr: of the logits.
    """

    mask_lr: float


@dataclass(frozen=True)
class PenalisedConfig(MaskedConfig):
    """Of ``masked`` with an L2 term on the logits.

    Attributes:
        mask_weight_decay: its factor.
    """

    mask_weight_decay: float


@dataclass(frozen=True)
class AnchoredConfig(PlainConfig):
    """Of ``sequence+ewc`` and ``sequence+l2``.

    Attributes:
        strength: the factor of the penalty on leaving what earlier tasks need.
        samples: of each task, for the Fisher information.
    """

    strength: float
    samples: int = 500


@dataclass(frozen=True)
class MaskedAnchoredConfig(MaskedConfig):
    """Of ``masked+ewc``.

    Attributes:
        strength, samples: as of :class:`AnchoredConfig`, of W.
    """

    strength: float
    samples: int = 500


@dataclass(frozen=True)
class FrozenConfig:
    """Of ``lottery``.

    Attributes:
        mask_lr: of the logits.
        scale: a factor of the frozen weights.
    """

    mask_lr: float
    scale: float


@dataclass(frozen=True)
class MetaConfig(PlainConfig):
    """Of ``maml``.

    Attributes:
        inner_lr: the rate of the inner steps.
    """

    inner_lr: float


Config = PlainConfig | FrozenConfig
"""The configuration of a method."""
Grid = Mapping[str, tuple[Config, ...]]
"""For each method the configurations tried, as many for each. A run without tuning takes the first."""
Made = TypeVar("Made", bound=Config)


def grid(kind: Callable[..., Made], **values: Sequence[float]) -> tuple[Made, ...]:
    """All combinations of these values, the first of each first."""
    return tuple(kind(**dict(zip(values, chosen))) for chosen in itertools.product(*values.values()))


def even_grid(**configs: tuple[Config, ...]) -> Grid:
    """The configurations by method. ValueError unless there are as many for each."""
    counts = {name: len(each) for name, each in configs.items()}
    if len({*counts.values()}) != 1:
        raise ValueError(f"grid must have as many configurations for each method, got {counts}")
    return configs


def _rates() -> Mapping[str, tuple[float, ...]]:
    return {
        "superposition": (0.1, 0.03, 0.01, 0.3),
        "mask only": (0.3, 0.1, 0.03, 1.0),
        "everything": (0.1, 0.03, 0.01, 0.003),
        "from scratch": (0.1, 0.03, 0.01, 0.003),
        "inner steps": (1.0, 0.5, 0.2, 0.1),
    }


def image_rates() -> Mapping[str, tuple[float, ...]]:
    """Rates for images: of new tasks, by the way to learn them."""
    return {
        "superposition": (0.1, 0.03, 0.3),
        "mask only": (0.1, 0.03, 0.3),
        "everything": (0.003, 0.001, 0.01),
        "from scratch": (0.003, 0.001, 0.01),
        "inner steps": (1.0, 0.3, 0.1),
    }


@dataclass(frozen=True)
class MetaSettings:
    """The meta-training of ``maml``.

    Attributes:
        tasks: of a meta-step.
        inner_steps: on each task.
        samples: from which trained tasks are learned in tests.
        first_order: whether gradients of the inner steps are taken as constants.
    """

    tasks: int = 5
    inner_steps: int = 3
    samples: int = 100
    first_order: bool = False


@dataclass(frozen=True)
class NewTaskSettings:
    """The learning of new tasks (question 2).

    Attributes:
        samples: the numbers of samples from which they are learned, ascending.
        steps, batch: of Adam.
        rates: those tried, by the way to learn; a run without tuning takes the first.
    """

    samples: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    steps: int = 500
    batch: int = 32
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=_rates)


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The table ``study`` of an experiment's settings.

    Attributes:
        tuning: whether configurations and rates are chosen on a further seed.
        optimizer: of the training loop, ``"adam"`` or ``"sgd"``.
        round_steps: of a round of the loop, which is on one task.
        batch: samples of a step.
        weight_decay: the L2 factor on W.
        cost_rounds: how often each method is timed.
        maml, new: of meta-training and of new tasks.
        grid: the configurations of the methods.
    """

    tuning: bool = True
    optimizer: str = "adam"
    round_steps: int = 10
    batch: int = 32
    weight_decay: float = 0.0
    cost_rounds: int = 20
    maml: MetaSettings = MetaSettings()
    new: NewTaskSettings = field(default_factory=NewTaskSettings)
    grid: Grid


class ComparedSettings(Protocol):
    """The settings that the study reads of an experiment's.

    Attributes:
        tasks: the number of trained tasks.
        steps: gradient steps, of all tasks together.
        study: the study's own.
    """

    @property
    def tasks(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def study(self) -> StudySettings: ...


class SampledSettings(ComparedSettings, Protocol):
    """Settings of tasks whose samples are drawn.

    Attributes:
        train_samples, test_samples: of each task.
    """

    @property
    def train_samples(self) -> int: ...
    @property
    def test_samples(self) -> int: ...
