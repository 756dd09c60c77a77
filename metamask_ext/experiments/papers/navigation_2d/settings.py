"""The settings of ``navigation-2d``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...engine.settings import RunSettings
from ..meta_learning import AdaptSettings

SHOWN_EPISODES = 3
"""Episodes whose paths are shown."""


def _methods() -> Mapping[str, AdaptSettings]:
    # The gradient of a mask is that of theta times W * s * (1 - s), which is small: hence its larger rate. 5 learns more slowly.
    return {
        "maml": AdaptSettings(masked=False, adapt="weights", inner_lr=0.1),
        "masks": AdaptSettings(masked=True, adapt="masks", inner_lr=20.0),
    }


@dataclass(frozen=True)
class AdvantageSettings:
    """Generalised advantages.

    Attributes:
        discount: of a later reward, for each step.
        gae_lambda: of a later error of the baseline, for each step, beside the discount.
    """

    discount: float = 0.99
    gae_lambda: float = 0.97


@dataclass(frozen=True)
class TestSettings:
    """The test.

    Attributes:
        tasks: new goals.
        updates: the most updates.
        goal: of the paths that are shown.
    """

    tasks: int = 60
    updates: int = 3
    goal: tuple[float, float] = (0.4, -0.3)


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        tasks: goals of a step of meta-training.
        steps, lr: of meta-training.
        episodes: of each goal, before and after an update.
        hidden: units of a layer.
        inner_steps: of meta-training.
        methods: the nets, and what is adapted of them.
        rates: those tried for the pretrained policy, whose rate the paper tunes too, and for the random one, on goals of their
            own.
        advantages: of the episodes.
        test: of the test.
    """

    tasks: int = 20
    steps: int = 60
    lr: float = 1e-2
    episodes: int = 20
    hidden: int = 64
    inner_steps: int = 1
    methods: Mapping[str, AdaptSettings] = field(default_factory=_methods)
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    advantages: AdvantageSettings = AdvantageSettings()
    test: TestSettings = TestSettings()
