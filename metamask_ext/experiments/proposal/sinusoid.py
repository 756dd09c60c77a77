"""Sinusoids that share nothing: Blum and Law, EE5239 project proposal (2020), section 3.3."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from metamask_ext.data import SinusoidTasks, sinusoid_tasks

from ..engine.claims import Claim, Metrics, Numbers
from ..engine.figures import Figures, bands, label_lines, new_figure, plot_seeds
from ..engine.jobs import Job, Json, Key
from ..engine.run_folder import RunFolder
from ..engine.settings import Changes, RunSettings
from ..study import comparison, findings, report
from ..study.methods import method
from ..study.problem import Layer, Problem, Score, TaskData
from ..study.settings import (
    Config,
    FrozenConfig,
    MaskedConfig,
    MetaConfig,
    PlainConfig,
    SampledSettings,
    StudySettings,
    even_grid,
    grid,
)

STUDY = StudySettings(
    grid=even_grid(
        masked=grid(MaskedConfig, lr=[0.003, 0.01], mask_lr=[0.03, 0.1]),
        hard=grid(MaskedConfig, lr=[0.003, 0.001], mask_lr=[0.01, 0.03]),
        lottery=grid(FrozenConfig, mask_lr=[0.03, 0.01], scale=[2.0, 4.0]),
        shared=grid(PlainConfig, lr=[0.003, 0.001, 0.0003, 0.01]),
        independent=grid(PlainConfig, lr=[0.01, 0.003, 0.03, 0.001]),
        maml=grid(MetaConfig, lr=[0.003, 0.001], inner_lr=[0.1, 0.03]),
        sequence=grid(PlainConfig, lr=[0.003, 0.01, 0.001, 0.0003]),
    )
)


@dataclass(frozen=True)
class SineSettings(RunSettings):
    """Of experiments in which a net learns sines of linear functions.

    Attributes:
        tasks: the number of trained tasks.
        steps: of all tasks together.
        variables: of the linear functions.
        magnitudes: the smallest and the largest of their weights.
        hidden: units of a layer.
        train_samples, test_samples: of each task.
        new_tasks: the number of tasks not seen in training.
    """

    tasks: int = 10
    steps: int = 10_000
    variables: int = 5
    magnitudes: tuple[float, float] = (0.4, 1.2)
    hidden: int = 64
    train_samples: int = 1000
    test_samples: int = 1000
    new_tasks: int = 10


@dataclass(frozen=True)
class Settings(SineSettings):
    """The settings of the experiment.

    Attributes:
        numbers_of_tasks: beside the study, masked, shared and independent nets for other numbers of tasks, with as many steps for
            each task.
        study: of the common study.
    """

    numbers_of_tasks: tuple[int, ...] = (1, 2, 5, 20)
    study: StudySettings = STUDY


QUICK: Changes = {
    "seeds": 1,
    "tasks": 3,
    "steps": 1800,
    "hidden": 32,
    "new_tasks": 2,
    "numbers_of_tasks": [1],
    "study": {"tuning": False, "cost_rounds": 1, "new": {"samples": [100, 1000], "steps": 100}},
}
SCORE = Score("test MSE", "units of y squared", higher_is_better=False, margin=0.02)
QUESTION = """\
Section 3.3: $y = \\sin(w^T x + b_1) + b_2$ with $w$, $b_1$ and $b_2$ drawn anew for each task: can a mask on shared weights stand
for values that have no relation between tasks? A net with masks on every layer beside a net for each task, for several numbers of
tasks, with the same steps for each task. To predict the mean of each task gives an MSE of about 1/2."""
tables = report.tables
METHODS = ("masked", "shared", "independent")
FourParts = tuple[TaskData, TaskData, TaskData, TaskData]


def network(sizes: list[int], linear: Layer, conv: Layer) -> nn.Module:
    """Layers of these sizes with tanh between them."""
    layers = [layer for size, after in itertools.pairwise(sizes[:-1]) for layer in (linear(size, after), nn.Tanh())]
    return nn.Sequential(*layers, linear(*sizes[-2:]))


def split(drawn: SinusoidTasks, settings: SampledSettings, generator: torch.Generator) -> FourParts:
    """Training and test data of the first ``tasks`` tasks, then those of the others, which are new."""
    known, train, new = settings.tasks, settings.train_samples, settings.study.new.samples[-1]
    x, y = drawn.samples(max(train, new) + settings.test_samples, generator)
    test = slice(max(train, new), None)
    return (
        TaskData(x[:known, :train], y[:known, :train]),
        TaskData(x[:known, test], y[:known, test]),
        TaskData(x[known:, :new], y[known:, :new]),
        TaskData(x[known:, test], y[known:, test]),
    )


def problem(seed: int, settings: Settings) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    drawn = sinusoid_tasks(
        settings.tasks + settings.new_tasks, generator, variables=settings.variables, magnitudes=settings.magnitudes
    )
    sizes = [settings.variables, settings.hidden, settings.hidden, 1]
    return Problem(*split(drawn, settings, generator), partial(network, sizes), F.mse_loss, F.mse_loss)


def run(folder: RunFolder, settings: Settings) -> Json:
    """The common study, and the error against the number of tasks. See :func:`metamask_ext.experiments.run`."""
    finished = folder.begin(
        f"drawn: x ~ N(0, I), |w| uniform in {list(settings.magnitudes)}, b1 in [-pi, pi], b2 in [-1, 1], all for each task, "
        "no noise"
    )
    if finished is not None:
        return finished
    numbers = sorted({*settings.numbers_of_tasks, settings.tasks})
    later = len(folder.seeds) * len(METHODS) * (len(numbers) - 1)
    found = comparison.run(folder, settings, problem, SCORE, later=later)
    each = settings.steps // settings.tasks
    jobs: dict[Key, Job] = {
        (seed, f"{name}, {tasks} tasks"): partial(
            _error, seed, replace(settings, tasks=tasks, steps=tasks * each), name, found.configs[name]
        )
        for seed, name, tasks in itertools.product(folder.seeds, METHODS, numbers)
        if tasks != settings.tasks
    }
    others = folder.compute(jobs)
    errors = {
        name: [
            [others[seed, f"{name}, {tasks} tasks"]["error"] if tasks != settings.tasks else of_study for tasks in numbers]
            for seed, of_study in zip(folder.seeds, found.scores[name][SCORE.name])
        ]
        for name in METHODS
    }
    more = {**found.more, "by number of tasks": {"tasks": numbers, "errors": errors}}
    return folder.finish(found.scores, found.baselines, found.budget, figures, more)


def _error(seed: int, settings: Settings, name: str, config: Config) -> Json:
    """The mean test MSE of one method."""
    made = problem(seed, settings)
    trained = method(name, made, settings, config, seed)
    trained.train()
    return {"error": statistics.fmean(trained.scores(range(len(made.names))))}


def _by_number(metrics: Metrics, name: str, place: int) -> float:
    return statistics.fmean(seed[place] for seed in metrics["by number of tasks"]["errors"][name])


def _numbers(metrics: Metrics) -> Numbers:
    tasks = metrics["by number of tasks"]["tasks"]
    found = {f"{name}_{key}": _by_number(metrics, name, place) for name in METHODS for key, place in (("few", 0), ("many", -1))}
    return {"few": tasks[0], "many": tasks[-1], **found}


def _beside_own(metrics: Metrics) -> Numbers:
    one = {name: _by_number(metrics, name, 0) for name in METHODS}
    ratios = {f"{name}_one": one[name] / one["independent"] for name in ("masked", "shared")}
    return {**_trained(metrics), **ratios}


def _with_one_task(metrics: Metrics) -> bool:
    return metrics["by number of tasks"]["tasks"][0] == 1


def _trained(metrics: Metrics) -> Numbers:
    found = {name: findings.trained(metrics, name) for name in ("masked", "hard", "lottery", "shared", "independent")}
    return {**found, "ratio": found["masked"] / found["independent"]}


def _new(metrics: Metrics) -> Numbers:
    samples = metrics["study"]["samples"]
    return findings.masks_beside_scratch(metrics, samples[-3:][0])


CLAIMS = [
    Claim(
        "Masks on shared weights do stand for unrelated values: test MSE {masked:.3g} (hard gates {hard:.3g}, masks on frozen "
        "random W {lottery:.3g}), where one shared net has {shared:.3g}.",
        _trained,
        lambda n: n["masked"] < 0.2 * n["shared"],
    ),
    Claim(
        "The masked net's error is {ratio:.3g} times that of nets of their own with as many steps, {independent:.3g}; with one "
        "task only it is {masked_one:.3g} times, and {shared_one:.3g} times for the loop without masks (the rates are "
        "those chosen for all tasks). A mask has as many numbers as a net: nothing is saved, but for what a hard gate saves.",
        _beside_own,
        lambda n: n["ratio"] > 1,
        _with_one_task,
    ),
    Claim(
        "From {few:.0f} task(s) to {many:.0f}, each with as many steps, the masked net's error goes from {masked_few:.3g} to "
        "{masked_many:.3g}, that of one shared net from {shared_few:.3g} to {shared_many:.3g}.",
        _numbers,
        lambda n: n["masked_many"] < 3 * n["masked_few"] and n["shared_many"] > 5 * n["shared_few"],
    ),
    Claim(
        "A new task has no relation to the known ones. From {few:,} samples its masks alone reach {masks_few:.3g}, a net from "
        "scratch {scratch_few:.3g}; from {many:,}, {masks_many:.3g} and {scratch_many:.3g}: the known weights are little better "
        "to begin with than random ones.",
        _new,
        lambda n: n["masks_few"] < 1.2 * n["scratch_few"],
    ),
    report.forgetting_claim(),
]


def figures(metrics: Metrics) -> Figures:
    """The study's, and the error against the number of tasks."""
    figure, (axes,) = new_figure(1)
    found = metrics["by number of tasks"]
    lines = {"masked": "masked", "shared": "one shared net", "independent": "a net a task"}
    for name, label in lines.items():
        plot_seeds(axes, name, label, found["tasks"], found["errors"][name], geometric=True)
    axes.set(xlabel="tasks (number)", ylabel="test MSE (units of y squared)", xscale="log", yscale="log")
    axes.set_xticks(found["tasks"], [str(tasks) for tasks in found["tasks"]])
    axes.minorticks_off()
    axes.set_title(f"geometric {bands(len(metrics['seeds']))}", fontsize=9)
    label_lines(axes, list(lines.values()), [[seed[-1] for seed in found["errors"][name]] for name in lines], geometric=True)
    return {"": report.figure(metrics), "tasks": figure}
