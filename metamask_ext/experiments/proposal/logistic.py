"""Logistic regression whose weights are on or off in each task: Blum and Law, EE5239 project proposal (2020), section 3.5."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..engine.claims import Claim, Metrics, mean
from ..engine.figures import Figures
from ..engine.jobs import Json
from ..engine.run_folder import RunFolder
from ..study import comparison, findings, report
from ..study.problem import Problem, Score
from ..study.settings import FrozenConfig, MaskedConfig, MetaConfig, PlainConfig, StudySettings, even_grid, grid
from . import linear

STUDY = StudySettings(
    optimizer="sgd",
    weight_decay=1e-3,
    grid=even_grid(
        masked=grid(MaskedConfig, lr=[0.1, 0.3, 0.03], mask_lr=[1.0, 3.0]),
        hard=grid(MaskedConfig, lr=[0.1, 0.03, 0.3], mask_lr=[0.1, 0.03]),
        lottery=grid(FrozenConfig, mask_lr=[0.1, 0.01, 1.0], scale=[4.0, 8.0]),
        shared=grid(PlainConfig, lr=[0.01, 0.003, 0.001, 0.03, 0.1, 0.3]),
        independent=grid(PlainConfig, lr=[0.1, 0.03, 0.01, 0.003, 0.3, 1.0]),
        maml=grid(MetaConfig, lr=[0.01, 0.03, 0.003], inner_lr=[1.0, 3.0]),
        sequence=grid(PlainConfig, lr=[0.1, 0.03, 0.01, 0.3, 1.0, 3.0]),
    ),
)


@dataclass(frozen=True)
class Settings(linear.Settings):
    """The settings of ``linear``, with more samples and other rates."""

    train_samples: int = 200
    test_samples: int = 2000
    study: StudySettings = STUDY


QUICK = linear.QUICK
ACCURACY = "test accuracy (%)"
SCORE = Score(ACCURACY, "%", higher_is_better=True, margin=1.0)
QUESTION = """\
Section 3.5: the tasks of section 3.1 with labels that are 1 with probability $\\mathrm{sigmoid}((w \\odot m)^T x + b m_b)$: is
the method compatible with classification as well as regression? The rule $1[z > 0]$ with the true parameters is the best that any
classifier can do on average."""
tables = report.tables
CLAIMS = [
    Claim(
        "The method is compatible with classification (section 3.5): test accuracy {masked:.1f} %, a net for each task "
        "{independent:.1f} %, one shared net {shared:.1f} %; the true parameters {true:.1f} %.",
        lambda metrics: {
            "masked": findings.trained(metrics, "masked"),
            "independent": findings.trained(metrics, "independent"),
            "shared": findings.trained(metrics, "shared"),
            "true": mean(metrics, "true parameters", ACCURACY),
        },
        # 40,000 labels: standard deviation of an accuracy 0.2
        lambda numbers: (
            numbers["masked"] >= numbers["independent"] - 1
            and numbers["masked"] > numbers["shared"] + 5
            and max(numbers["masked"], numbers["independent"]) < numbers["true"] + 0.5
        ),
    ),
    Claim(
        "A new task from 3 samples: mask only {mask:.1f} %, a fresh net {fresh:.1f} %; from 1,000: {mask_1000:.1f} % and "
        "{fresh_1000:.1f} %, looking up the best of the trained masks {look_up:.1f} %.",
        lambda metrics: {
            "mask": findings.new_tasks(metrics, "masked", "mask only", 3),
            "fresh": findings.new_tasks(metrics, "independent", "from scratch", 3),
            "mask_1000": findings.new_tasks(metrics, "masked", "mask only", 1000),
            "fresh_1000": findings.new_tasks(metrics, "independent", "from scratch", 1000),
            "look_up": findings.new_tasks(metrics, "masked", "look-up", 1000),
        },
        lambda numbers: (
            numbers["mask"] > numbers["fresh"]
            and abs(numbers["mask_1000"] - numbers["fresh_1000"]) < 1
            and numbers["look_up"] < numbers["mask_1000"]
        ),
    ),
    Claim(
        "Tasks one after another: one net fine-tuned goes from {sequence_after:.1f} % on a task just learned to {sequence:.1f} % "
        "on all at the end, the masked net from {masked_after:.1f} % to {masked:.1f} %.",
        lambda metrics: {
            "sequence_after": findings.after_learning(metrics, "sequence"),
            "sequence": findings.at_the_end(metrics, "sequence"),
            "masked_after": findings.after_learning(metrics, "masked"),
            "masked": findings.at_the_end(metrics, "masked"),
        },
        lambda numbers: numbers["masked"] > numbers["sequence"] + 5,
    ),
    report.cost_claim(),
]


def problem(seed: int, settings: Settings) -> Problem:
    data = linear.split(linear.tasks_of(seed, settings, "binary"), settings)
    return Problem(
        *data,
        lambda layer, conv: layer(settings.variables, 1),
        F.binary_cross_entropy_with_logits,
        accuracy,
        likelihood="bernoulli",
    )


def run(folder: RunFolder, settings: Settings) -> Json:
    """The tasks of ``linear`` with labels that are 1 with probability ``sigmoid(z)``; beside the common study the accuracy of the
    rule ``1[z > 0]`` with the true ``z``. See :func:`metamask_ext.experiments.run`."""
    finished = folder.begin(
        "drawn: as for 'linear' (x ~ N(0, I), each weight on with probability 1/2), y = 1 with probability sigmoid(z)"
    )
    if finished is not None:
        return finished
    found = comparison.run(folder, settings, problem, SCORE)
    found.scores["true parameters"] = {ACCURACY: [_of_true_parameters(seed, settings) for seed in folder.seeds]}
    return folder.finish(found.scores, [*found.baselines, "true parameters"], found.budget, figures, found.more)


def figures(metrics: Metrics) -> Figures:
    return {"": report.figure(metrics)}


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return 100 * ((logits > 0) == (labels > 0.5)).double().mean()


def _of_true_parameters(seed: int, settings: Settings) -> float:
    drawn = linear.tasks_of(seed, settings, "binary")
    trained = list(drawn.test.values())[: settings.tasks]
    return sum(float(accuracy(drawn.score(task, x), y)) for task, (x, y) in enumerate(trained)) / len(trained)
