"""Digits on backgrounds of many colours, a mask for each: Blum and Law, EE5239 project proposal (2020), section 3.7."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.data import ColoredImages, load_digits

from ..engine import data
from ..engine.claims import Claim, Metrics, Numbers
from ..engine.figures import Figures
from ..engine.jobs import Json
from ..engine.run_folder import RunFolder
from ..engine.settings import Changes, RunSettings
from ..study import comparison, findings, report
from ..study.problem import Layer, Problem, Score, TaskData
from ..study.settings import (
    FrozenConfig,
    MaskedConfig,
    MetaConfig,
    MetaSettings,
    NewTaskSettings,
    PlainConfig,
    StudySettings,
    even_grid,
    grid,
    image_rates,
)
from .mnist import ACCURACY, accuracy

STUDY = StudySettings(
    batch=64,
    cost_rounds=10,
    maml=MetaSettings(tasks=4, inner_steps=1),
    new=NewTaskSettings(samples=(1, 10, 100, 1000), steps=300, rates=image_rates()),
    grid=even_grid(
        masked=grid(MaskedConfig, lr=[3e-3, 1e-3], mask_lr=[3e-2, 3e-3]),
        hard=grid(MaskedConfig, lr=[3e-3, 1e-3], mask_lr=[3e-3, 3e-2]),
        lottery=grid(FrozenConfig, mask_lr=[3e-2, 1e-1], scale=[2.0, 1.0]),
        shared=grid(PlainConfig, lr=[3e-3, 1e-3, 3e-4, 1e-2]),
        independent=grid(PlainConfig, lr=[3e-3, 1e-3, 1e-2, 3e-4]),
        maml=grid(MetaConfig, lr=[3e-3, 1e-3], inner_lr=[0.1, 0.01]),
        sequence=grid(PlainConfig, lr=[3e-3, 1e-3, 3e-4, 1e-2]),
    ),
)


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        tasks: the number of trained colours.
        steps: of all tasks together.
        train_samples, test_samples: of each task.
        new_tasks: the number of colours not seen in training.
        study: of the common study; new colours get as many steps as a net for each colour has.
    """

    tasks: int = 16
    steps: int = 4800
    train_samples: int = 1000
    test_samples: int = 1000
    new_tasks: int = 4
    study: StudySettings = STUDY


QUICK: Changes = {
    "seeds": 1,
    "tasks": 3,
    "steps": 450,
    "test_samples": 500,
    "new_tasks": 1,
    "study": {"tuning": False, "cost_rounds": 1, "new": {"samples": [10, 1000], "steps": 20}},
}
tables = report.tables
SCORE = Score(ACCURACY, "%", higher_is_better=True, margin=2.0)
QUESTION = """\
Section 3.7: digits whose black background has a random colour in each task, here at 14x14 pixels: does the algorithm scale to a
domain that is not trivial? A masked CNN beside one shared CNN, a CNN for each colour, and MAML."""


def network(linear: Layer, conv: Layer) -> nn.Sequential:
    """Two 3x3 convolutions with 2x2 max pooling and a linear layer; ``[n, 3, 14, 14]`` to ``[n, 10]``."""
    return nn.Sequential(
        conv(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), conv(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear(128, 10)
    )


def problem(seed: int, settings: Settings) -> Problem:
    """Each task has images of its own draw, in its colour."""
    digits, generator = data.digits(), torch.Generator().manual_seed(seed)
    known, new = settings.tasks, settings.new_tasks
    colors = ColoredImages(known + new, seed=seed)
    most = settings.study.new.samples[-1]

    def drawn(images: Tensor, labels: Tensor, tasks: range, count: int) -> TaskData:
        chosen = torch.rand(len(tasks), len(labels), generator=generator).topk(min(count, len(labels))).indices
        color = torch.tensor(tasks).repeat_interleave(chosen.shape[1])
        shown = colors(F.avg_pool2d(images[chosen.flatten()], 2), color)
        return TaskData(shown.unflatten(0, chosen.shape), labels[chosen])

    return Problem(
        drawn(*digits.train, range(known), settings.train_samples),
        drawn(*digits.test, range(known), settings.test_samples),
        drawn(*digits.train, range(known, known + new), most),
        drawn(*digits.test, range(known, known + new), settings.test_samples),
        network,
        F.cross_entropy,
        accuracy,
    )


def run(folder: RunFolder, settings: Settings) -> Json:
    """The common study on digits of many colours. See :func:`metamask_ext.experiments.run`."""
    digits = load_digits()
    finished = folder.begin(f"{digits.source}, at 14x14 pixels, the background of a colour drawn for each task", digits.note)
    if finished is not None:
        return finished
    found = comparison.run(folder, settings, problem, SCORE)
    return folder.finish(found.scores, found.baselines, found.budget, figures, found.more)


def _learned(metrics: Metrics) -> Numbers:
    return {name: findings.trained(metrics, name) for name in metrics["study"]["methods"]}


def _new(metrics: Metrics) -> Numbers:
    few = metrics["study"]["samples"][-2]
    ways = {"look_up": ("masked", "look-up"), "masks": ("masked", "mask only"), "shared": ("shared", "everything")}
    found = {key: findings.new_tasks(metrics, *way, few) for key, way in ways.items()}
    scratch = findings.new_tasks(metrics, "independent", "from scratch", few)
    return {"samples": few, "steps": metrics["settings"]["study"]["new"]["steps"], **found, "scratch": scratch}


CLAIMS = [
    Claim(
        "The algorithm scales to it: a masked CNN is right on {masked:.1f} % of the test digits, more than a CNN for each colour "
        "with the same steps in all, {independent:.1f} % (hard gates {hard:.1f} %, MAML {maml:.1f} %).",
        _learned,
        lambda n: n["masked"] > n["independent"],
    ),
    Claim(
        "Masks are not needed for it: one shared CNN, which sees all colours, is right on {shared:.1f} %, the masked one on "
        "{masked:.1f} %.",
        _learned,
        lambda n: n["shared"] > n["masked"] - 2,
    ),
    Claim(
        "Colours one after another: the masked CNN forgets, from {masked_learned:.1f} % when each was just learned to "
        "{masked:.1f} % at the end; the shared CNN in sequence does not, {sequence_learned:.1f} % and {sequence:.1f} %, nor do "
        "masks on frozen W, {lottery:.1f} %.",
        lambda metrics: findings.in_order(metrics, "masked", "sequence", "lottery"),
        lambda n: (
            n["masked"] < n["masked_learned"]
            and n["sequence"] > n["sequence_learned"] - 0.5
            and abs(n["lottery"] - n["lottery_learned"]) < 1e-6
        ),
    ),
    Claim(
        "A new colour, from {samples:,} digits in {steps:,} steps: the best known mask {look_up:.1f} %, its mask alone trained "
        "{masks:.1f} %, the shared CNN tuned {shared:.1f} %, a CNN from scratch {scratch:.1f} %.",
        _new,
        lambda n: max(n["look_up"], n["masks"]) > n["scratch"],
    ),
]


def figures(metrics: Metrics) -> Figures:
    return {"": report.figure(metrics)}
