"""The settings of ``magnet``."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.settings import RunSettings


@dataclass(frozen=True)
class LossSettings:
    """The magnet loss and its batches, in the paper's letters.

    Attributes:
        k: clusters of a class.
        m: clusters of a batch: a seed, and the nearest ones of other classes.
        d: samples of each of them.
        alpha: the margin.
        refresh: steps between two clusterings of all samples.
    """

    k: int = 5
    m: int = 6
    d: int = 8
    alpha: float = 1.0
    refresh: int = 100


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        embedding: numbers of the embedding.
        filters: of the first of two convolutions; the second has twice as many.
        steps, lr: of Adam, in every method; batches are those of ``loss``.
        neighbours: of the k-nearest-neighbour classification of digits.
        loss: of even and odd.
        tasks: rotations that are told apart (ours), spread over the full turn.
        task_loss: of these.
        task_steps: of these.
        task_samples: digits of each rotation that are clustered.
    """

    seeds: int = 3
    embedding: int = 16
    filters: int = 16
    steps: int = 1500
    lr: float = 1e-3
    neighbours: int = 5
    loss: LossSettings = LossSettings()
    tasks: int = 36
    task_loss: LossSettings = LossSettings(k=8, m=12, d=6, refresh=200)
    task_steps: int = 3000
    task_samples: int = 200
