"""The settings of ``ewc``."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.settings import RunSettings


@dataclass(frozen=True)
class CurveSettings:
    """Part A: three permutations one after another, measured in between.

    Attributes:
        tasks: permutations.
        width: of the two hidden layers (the paper: 400).
    """

    tasks: int = 3
    width: int = 200


@dataclass(frozen=True)
class ManySettings:
    """Part B: many permutations.

    Attributes:
        tasks: permutations.
        width: of the two hidden layers (the paper: 400 to 2,000).
        dropout: of the inputs and of the hidden layers, in the plain net beside EWC (the paper: 0.2 and 0.5).
    """

    tasks: int = 10
    width: int = 200
    dropout: tuple[float, float] = (0.2, 0.5)


@dataclass(frozen=True)
class OverlapSettings:
    """Part C: two tasks, of which the second permutes a square in the middle of the image.

    Attributes:
        width, depth: of the hidden layers, and their number (the paper: 100 and 6).
        squares: sides of the square in pixels.
        steps: of each task; a deep net of this rate needs more of them.
    """

    width: int = 100
    depth: int = 6
    squares: tuple[int, ...] = (8, 26)
    steps: int = 1000


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        steps, batch: of a task.
        lr: of Adam for W, in all methods.
        mask_lr: of Adam for the masks.
        strengths: of the penalties, tried on one further seed; a run with one of them takes that.
        samples: of each task for the Fisher information.
        points: measurements within a task in part A.
        curve, many, overlap: parts A, B and C.
    """

    seeds: int = 3
    steps: int = 600
    batch: int = 64
    lr: float = 1e-3
    mask_lr: float = 1e-2
    strengths: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0, 10000.0)
    samples: int = 500
    points: int = 6
    curve: CurveSettings = CurveSettings()
    many: ManySettings = ManySettings()
    overlap: OverlapSettings = OverlapSettings()
