"""Linear regression whose weights are on or off in each task: Blum and Law, EE5239 project proposal (2020), section 3.1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from metamask_ext.data import LinearTasks, linear_tasks

from ..engine.claims import Claim, Metrics, mean
from ..engine.figures import Figures, new_figure
from ..engine.jobs import Json
from ..engine.run_folder import RunFolder
from ..engine.settings import Changes, RunSettings
from ..study import comparison, findings, report
from ..study.networks import gates
from ..study.problem import Problem, Score, TaskData
from ..study.settings import FrozenConfig, MaskedConfig, MetaConfig, PlainConfig, StudySettings, even_grid, grid

STUDY = StudySettings(
    optimizer="sgd",
    grid=even_grid(
        masked=grid(MaskedConfig, lr=[0.01, 0.03, 0.003], mask_lr=[1.0, 0.3]),
        hard=grid(MaskedConfig, lr=[0.01, 0.03, 0.003], mask_lr=[0.1, 0.03]),
        lottery=grid(FrozenConfig, mask_lr=[0.1, 0.01, 1.0], scale=[4.0, 8.0]),
        shared=grid(PlainConfig, lr=[0.01, 0.003, 0.001, 0.0003, 0.03, 0.1]),
        independent=grid(PlainConfig, lr=[0.1, 0.03, 0.01, 0.003, 0.3, 1.0]),
        maml=grid(MetaConfig, lr=[0.01, 0.03, 0.003], inner_lr=[0.3, 0.1]),
        sequence=grid(PlainConfig, lr=[0.01, 0.003, 0.001, 0.0003, 0.03, 0.1]),
    ),
)


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        tasks: the number of trained tasks.
        steps: of all tasks together.
        variables: of the linear functions.
        train_samples, test_samples: of each task.
        new_tasks: the number of tasks not seen in training.
        study: of the common study.
    """

    tasks: int = 20
    steps: int = 10_000
    variables: int = 5
    train_samples: int = 100
    test_samples: int = 1000
    new_tasks: int = 10
    study: StudySettings = STUDY


QUICK: Changes = {"seeds": 1, "steps": 6000, "study": {"tuning": False, "cost_rounds": 5, "new": {"steps": 200}}}
SCORE = Score("test MSE", "units of y squared", higher_is_better=False, margin=0.01)
SUPPORT = "support recovered (%)"
QUESTION = """\
Section 3.1: if the true model of each task is $y = (w \\odot m)^T x + b m_b$, with shared $w$, $b$ of 5 variables and each entry
on or off, does the method find it?"""
tables = report.tables
CLAIMS = [
    Claim(
        "The method finds the model (section 3.1: it can capture the system perfectly): test MSE {masked:.2g}, and {support:.4g} % "
        "of the entries of the true masks recovered; one shared net reaches {shared:.2g}, a net for each task {independent:.2g}.",
        lambda metrics: {
            "masked": findings.trained(metrics, "masked"),
            "support": mean(metrics, "masked", SUPPORT),
            "shared": findings.trained(metrics, "shared"),
            "independent": findings.trained(metrics, "independent"),
        },
        lambda numbers: numbers["masked"] <= 0.01 and numbers["support"] >= 99 and numbers["shared"] > 1,
    ),
    Claim(
        "A sigmoid is never quite 0 or 1: what is left, {masked:.2g}, is gone with a hard gate, {hard:.2g} (tasks in random "
        "order).",
        lambda metrics: {"masked": findings.trained(metrics, "masked"), "hard": findings.trained(metrics, "hard")},
        lambda numbers: numbers["hard"] < 0.1 * numbers["masked"],
    ),
    Claim(
        "Masks alone, on random weights that are never trained (section 2: some mask of them should do), do not fit: test MSE "
        "{lottery:.2g}. A linear model of 5 variables has too few subnetworks.",
        lambda metrics: {"lottery": findings.trained(metrics, "lottery")},
        lambda numbers: numbers["lottery"] > 1,
    ),
    Claim(
        "A new task has 6 unknowns. From 3 samples, mask only reaches {mask:.2g} and a fresh net {fresh:.2g}; from 10, "
        "superposition {superposed:.2g}, mask only {mask_10:.2g}, a fresh net {fresh_10:.2g}: where every method has samples "
        "enough, masks save none. Looking up the best of the trained masks gets no further than {look_up:.2g}.",
        lambda metrics: {
            "mask": findings.new_tasks(metrics, "masked", "mask only", 3),
            "fresh": findings.new_tasks(metrics, "independent", "from scratch", 3),
            "superposed": findings.new_tasks(metrics, "masked", "superposition", 10),
            "mask_10": findings.new_tasks(metrics, "masked", "mask only", 10),
            "fresh_10": findings.new_tasks(metrics, "independent", "from scratch", 10),
            "look_up": findings.new_tasks(metrics, "masked", "look-up", metrics["study"]["samples"][-1]),
        },
        lambda numbers: (
            numbers["mask"] < numbers["fresh"]
            and max(numbers["superposed"], numbers["mask_10"], numbers["fresh_10"]) < 0.1 < numbers["look_up"]
        ),
    ),
    Claim(
        "Tasks one after another: one net fine-tuned goes from {sequence_after:.2g} on a task just learned to {sequence:.2g} on "
        "all at the end, the masked net from {masked_after:.2g} to {masked:.2g}: masks keep most, not all, since W goes on moving.",
        lambda metrics: {
            "sequence_after": findings.after_learning(metrics, "sequence"),
            "sequence": findings.at_the_end(metrics, "sequence"),
            "masked_after": findings.after_learning(metrics, "masked"),
            "masked": findings.at_the_end(metrics, "masked"),
        },
        lambda numbers: numbers["masked"] < 0.2 * numbers["sequence"] and numbers["masked_after"] < numbers["masked"],
    ),
    report.cost_claim(),
]


def tasks_of(seed: int, settings: Settings, labels: str = "score") -> LinearTasks:
    """The trained tasks, then the new ones, with as many samples as the most that either has."""
    new = settings.study.new.samples[-1]
    count = settings.tasks + settings.new_tasks
    most = max(settings.train_samples, new)
    return linear_tasks(count, most, settings.test_samples, variables=settings.variables, labels=labels, seed=seed)


def split(drawn: LinearTasks, settings: Settings) -> tuple[TaskData, TaskData, TaskData, TaskData]:
    """Training and test data of the trained tasks, then those of the new ones."""
    known, samples = settings.tasks, settings.train_samples
    train, test = (TaskData(*map(torch.stack, zip(*data.values()))) for data in (drawn.train, drawn.test))
    return (
        TaskData(train.x[:known, :samples], train.y[:known, :samples]),
        TaskData(test.x[:known], test.y[:known]),
        TaskData(train.x[known:], train.y[known:]),
        TaskData(test.x[known:], test.y[known:]),
    )


def problem(seed: int, settings: Settings) -> Problem:
    drawn = tasks_of(seed, settings)
    known, variables = settings.tasks, settings.variables

    def examine(method: str, model: nn.Module) -> Json:
        if method not in ("masked", "hard"):
            return {}
        found = torch.cat([stack.flatten(1) for stack in gates(model, made.names).values()], 1)
        right = ((found > 0.5) == drawn.support[:known]).double().mean()
        return {SUPPORT: 100 * float(right), "gates": found.tolist(), "support": drawn.support[:known].tolist()}

    made = Problem(*split(drawn, settings), lambda linear, conv: linear(variables, 1), F.mse_loss, F.mse_loss, examine, "gaussian")
    return made


def run(folder: RunFolder, settings: Settings) -> Json:
    """20 tasks of 5 variables and a bias. Measured beside the common study: in how many of the 20 x 6 entries the gate, above or
    below 1/2, agrees with the true mask. See :func:`metamask_ext.experiments.run`."""
    finished = folder.begin("drawn: x ~ N(0, I), |w| and |b| uniform in [1, 3], each on with probability 1/2, no noise")
    if finished is not None:
        return finished
    found = comparison.run(folder, settings, problem, SCORE)
    for method in ("masked", "hard"):
        found.scores[method][SUPPORT] = [examined[SUPPORT] for examined in found.examined[method]]
    first = found.examined["masked"][0]
    more = {**found.more, "gates": first["gates"], "support": first["support"]}
    return folder.finish(found.scores, found.baselines, found.budget, figures, more)


def figures(metrics: Metrics) -> Figures:
    figure, (axes,) = new_figure(1)
    found, support = torch.tensor(metrics["gates"]), torch.tensor(metrics["support"])
    image = axes.imshow(found.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    rows, columns = support.nonzero(as_tuple=True)
    axes.plot(columns, rows, "o", markersize=4, markerfacecolor="none", markeredgecolor="#D55E00", linestyle="none")
    axes.set(xlabel=f"parameter (circle: on in the true model), seed {metrics['seed']}", ylabel="task (number)")
    variables = found.shape[1] - 1
    axes.set_xticks(range(variables + 1), [f"$w_{k + 1}$" for k in range(variables)] + ["$b$"])
    axes.set_yticks(range(0, len(found), 5))
    figure.colorbar(image, ax=axes, label="gate, sigmoid(M) (no unit)")
    return {"": report.figure(metrics), "support": figure}
