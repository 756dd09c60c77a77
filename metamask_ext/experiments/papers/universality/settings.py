"""The settings of ``universality``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..meta_learning import AdaptSettings, WaveSettings


def _methods() -> Mapping[str, AdaptSettings]:
    return {
        "maml": AdaptSettings(masked=False, adapt="weights", inner_lr=0.01),
        "masks": AdaptSettings(masked=True, adapt="masks", inner_lr=0.5),
    }


@dataclass(frozen=True)
class RecurrentSettings:
    """The recurrent learner.

    Attributes:
        steps, lr: of its training.
        hidden: units of its layers.
    """

    steps: int = 4000
    lr: float = 3e-3
    hidden: int = 64


def _widths() -> Mapping[str, int]:
    return {"1": 586, "2": 40, "3": 29, "4": 23, "5": 20}


@dataclass(frozen=True)
class DepthSettings:
    """Nets of several depths.

    Attributes:
        steps: of meta-training.
        inner_lr: the first rate of the inner steps, which is learned.
        widths: of the hidden layers, by their number: about 1,750 parameters each.
    """

    steps: int = 800
    inner_lr: float = 0.003
    widths: Mapping[str, int] = field(default_factory=_widths)


@dataclass(frozen=True)
class TestSettings:
    """The tests.

    Attributes:
        tasks: new ones.
        curve_tasks: for each amplitude and phase.
        steps: numbers of gradient steps after which the prediction is tested, ascending.
        amplitudes, phases: also beyond those of training tasks, [0.1, 5] and [0, pi].
    """

    tasks: int = 600
    curve_tasks: int = 200
    steps: tuple[int, ...] = (0, 1, 2, 3, 5, 10, 20, 50, 100)
    amplitudes: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
    phases: tuple[float, ...] = (0.0, 0.785398, 1.570796, 2.356194, 3.141593, 3.926991, 4.712389, 5.497787, 6.283185)


@dataclass(frozen=True)
class ConstructionSettings:
    """The construction of the proof.

    Attributes:
        bins: of the inputs.
        values: of y.
        inner_lr: of the step.
    """

    bins: int = 6
    values: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    inner_lr: float = 0.1


@dataclass(frozen=True)
class Settings(WaveSettings):
    """The settings of the experiment.

    Attributes:
        methods: the nets, and what is adapted of them.
        hidden: units of a layer.
        lstm: of the recurrent learner.
        depths: of nets of several depths.
        test: of the tests.
        construction: of the proof's construction.
    """

    steps: int = 2000
    methods: Mapping[str, AdaptSettings] = field(default_factory=_methods)
    hidden: int = 40
    lstm: RecurrentSettings = RecurrentSettings()
    depths: DepthSettings = field(default_factory=DepthSettings)
    test: TestSettings = TestSettings()
    construction: ConstructionSettings = ConstructionSettings()
