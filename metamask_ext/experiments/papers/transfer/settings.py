"""The settings of ``transfer``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...engine.settings import RunSettings

METHODS = ("scratch", "classifier", "last block", "all", "masks")


def _rates() -> Mapping[str, tuple[float, ...]]:
    return {
        "scratch": (3e-3, 1e-3, 1e-2),
        "classifier": (1e-2, 3e-3, 3e-2),
        "last block": (3e-3, 1e-3, 1e-2),
        "all": (1e-3, 3e-4, 3e-3),
        "masks": (3e-3, 1e-3, 1e-2),
    }


@dataclass(frozen=True)
class SourceSettings:
    """The pretraining on characters.

    Attributes:
        steps, batch, lr: of Adam.
        drawings: of each character, for training; the others are for the test.
    """

    steps: int = 1500
    batch: int = 128
    lr: float = 3e-3
    drawings: int = 16


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        filters: of each of the four blocks.
        source: of the pretraining.
        counts: numbers of labelled digits, ascending.
        steps, batch: of the training on digits.
        tuning: whether each method's rate is chosen for each number of digits on a further seed.
        rates: those tried; without tuning the first.
    """

    filters: int = 32
    source: SourceSettings = SourceSettings()
    counts: tuple[int, ...] = (10, 30, 100, 300, 1000, 4000)
    steps: int = 300
    batch: int = 64
    tuning: bool = True
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=_rates)
