"""The settings of ``supsup``."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.settings import RunSettings

ROTATIONS = 36
"""Rotations by 10 degrees that there are."""


@dataclass(frozen=True)
class TestSettings:
    """The tests.

    Attributes:
        samples: images of all tasks at each point.
        batch: images from which a task is inferred together.
        batches: the most tasks of which a batch is taken.
    """

    samples: int = 5000
    batch: int = 128
    batches: int = 250


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        tasks: their number.
        rotated: whether tasks are rotations, not permutations.
        steps: of each task.
        lr: of rates that learn about as well, a low one: most bits of the first layer stay as they were drawn, and entropy tells
            the tasks apart. Found by a small search on 2 to 4 permutations (accuracy) and 20 to 80 (inference): momentum SGD with
            5 learns fastest, but then few images are given the right one of 20 tasks.
        batch_size: of a step.
        widths: of the layers. 500 outputs for 10 classes: the entropy of a single image then tells whose mask it is (the paper,
            section 4.2).
        test: of the tests.
        save_every: the bank is saved after so many tasks.
    """

    seeds: int = 1
    tasks: int = 250
    rotated: bool = False
    steps: int = 500
    lr: float = 1e-3
    batch_size: int = 64
    widths: tuple[int, ...] = (784, 300, 100, 500)
    test: TestSettings = TestSettings()
    save_every: int = 25
