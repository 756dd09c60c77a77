"""Sine with an occasional cosine: Blum and Law, EE5239 project proposal (2020), section 3.4."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.data import sinusoid_tasks

from ..engine.claims import Claim, Metrics, Numbers, by_method, mean
from ..engine.figures import STYLES, Figures, new_figure
from ..engine.jobs import Job, Json, Key
from ..engine.run_folder import RunFolder
from ..engine.settings import Changes, OptionError, RunSettings
from ..engine.tables import Tables, cells
from ..study import comparison, findings, report
from ..study.methods import method
from ..study.networks import gates, shared_parameters
from ..study.problem import Layer, Problem, Score
from ..study.settings import Config, FrozenConfig, MaskedConfig, MetaConfig, PlainConfig, StudySettings, even_grid, grid
from .sinusoid import split

STUDY = StudySettings(
    grid=even_grid(
        masked=grid(MaskedConfig, lr=[0.1, 0.03], mask_lr=[0.03, 0.01]),
        hard=grid(MaskedConfig, lr=[0.03, 0.01], mask_lr=[0.01, 0.03]),
        lottery=grid(FrozenConfig, mask_lr=[0.03, 0.01], scale=[2.0, 4.0]),
        shared=grid(PlainConfig, lr=[0.003, 0.001, 0.01, 0.03]),
        independent=grid(PlainConfig, lr=[0.03, 0.01, 0.1, 0.003]),
        maml=grid(MetaConfig, lr=[0.03, 0.01], inner_lr=[0.3, 0.1]),
        sequence=grid(PlainConfig, lr=[0.03, 0.01, 0.1, 0.003]),
    )
)


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        tasks: the number of trained tasks.
        steps: of all tasks together.
        variables: of the linear functions.
        magnitudes: the smallest and the largest of their weights.
        cosine: the probability of a cosine.
        train_samples, test_samples: of each task.
        new_tasks: the number of tasks not seen in training.
        study: of the common study.
    """

    tasks: int = 20
    steps: int = 10_000
    variables: int = 5
    magnitudes: tuple[float, float] = (0.3, 0.9)
    cosine: float = 0.3
    train_samples: int = 100
    test_samples: int = 1000
    new_tasks: int = 10
    study: StudySettings = STUDY


QUICK: Changes = {
    "seeds": 1,
    "tasks": 8,
    "steps": 3000,
    "new_tasks": 2,
    "study": {"tuning": False, "cost_rounds": 1, "new": {"samples": [10, 1000], "steps": 100}},
}
SCORE = Score("test MSE", "units of y squared", higher_is_better=False, margin=0.02)
QUESTION = """\
Section 3.4: the sine is sometimes replaced with a cosine, a bias of $\\pi/2$ in it. With one $w$ for all tasks and a net
$\\sin(\\theta^T x + b)$, is the bias $\\pi/2$ in the tasks with a cosine, behind a gate near 1 there and near 0 elsewhere? And
with $w$, $b_1$ and $b_2$ of each task alone, as in section 3.3 ("unrelated")?
There no method can tell the two kinds of task apart: with
$b_1$ uniform over a period, sine and cosine are the same distribution of tasks."""
MSE = SCORE.name
PHASE, COSINE, SINE, RIGHT = (
    "bias in cosine tasks, modulo 2 pi (radians)",
    "bias gate in cosine tasks",
    "bias gate in sine tasks",
    "bias gate on the right side of 1/2 (%)",
)
NUMBERS = (PHASE, COSINE, SINE, RIGHT)
GATED = ("masked", "hard")
UNRELATED = ("masked", "hard", "shared", "independent")


class Sine(nn.Module):
    """The sine of each number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def problem(seed: int, settings: Settings) -> Problem:
    """Tasks with the same ``w``."""
    return _problem(True, seed, settings)


def _problem(related: bool, seed: int, settings: Settings) -> Problem:
    """``y = sin(theta^T x + bias)``, of one unit; where the tasks are not related, scaled and with an offset."""
    generator = torch.Generator().manual_seed(seed)
    variables = settings.variables
    drawn = sinusoid_tasks(
        settings.tasks + settings.new_tasks,
        generator,
        variables=variables,
        magnitudes=settings.magnitudes,
        related=related,
        cosine=settings.cosine,
    )

    def network(linear: Layer, conv: Layer) -> nn.Module:
        return nn.Sequential(linear(variables, 1), Sine(), *([] if related else [linear(1, 1)]))

    def examine(method: str, model: nn.Module) -> Json:
        if method not in GATED:
            return {}
        found = gates(model, made.names)["0.bias"].flatten()
        return {"gates": found.tolist(), "bias": float(shared_parameters(model)["0.bias"]), "cosine": cosine.tolist()}

    cosine = drawn.cosine[: settings.tasks]
    if cosine.all() or not cosine.any():
        cosines = f"{int(cosine.sum())} of {settings.tasks} are cosines (seed {seed})"
        raise OptionError(f"tasks must be enough for sines and cosines, got {settings.tasks}: {cosines}")
    made = Problem(*split(drawn, settings, generator), network, F.mse_loss, F.mse_loss, examine)
    return made


def run(folder: RunFolder, settings: Settings) -> Json:
    """The common study on tasks with one ``w``; errors and gates on unrelated ones. See :func:`metamask_ext.experiments.run`."""
    finished = folder.begin(
        f"drawn: x ~ N(0, I), |w| uniform in {list(settings.magnitudes)}, the same for all tasks; sin or, with probability "
        f"{settings.cosine:g}, cos of w^T x, no noise; unrelated: w, b1 and b2 as for 'sinusoid'"
    )
    if finished is not None:
        return finished
    found = comparison.run(folder, settings, problem, SCORE, later=len(folder.seeds) * len(UNRELATED))
    for name in GATED:
        measured = [_measured(examined) for examined in found.examined[name]]
        found.scores[name] |= {number: [each[number] for each in measured] for number in NUMBERS}
    jobs: dict[Key, Job] = {
        (seed, f"unrelated, {name}"): partial(_unrelated, seed, settings, name, found.configs[name])
        for seed in folder.seeds
        for name in UNRELATED
    }
    unrelated = folder.compute(jobs)
    for name in UNRELATED:
        of_seeds = [unrelated[seed, f"unrelated, {name}"] for seed in folder.seeds]
        found.scores[f"unrelated: {name}"] = {number: [each[number] for each in of_seeds] for number in of_seeds[0]}
    baselines = [*found.baselines, *(f"unrelated: {name}" for name in UNRELATED if name not in GATED)]
    more = {**found.more, "examined": found.examined["masked"]}
    return folder.finish(found.scores, baselines, found.budget, figures, more)


def _measured(examined: Metrics) -> Numbers:
    """``NUMBERS`` of one trained model."""
    found, cosine = torch.tensor(examined["gates"]), torch.tensor(examined["cosine"])
    # Distance on the circle: the mean of the angles' cosines and sines.
    phases = examined["bias"] * found[cosine]
    phase = math.atan2(float(phases.sin().sum()), float(phases.cos().sum())) % (2 * math.pi)
    right = 100 * float(((found > 0.5) == cosine).double().mean())
    return {PHASE: phase, COSINE: float(found[cosine].mean()), SINE: float(found[~cosine].mean()), RIGHT: right}


def _unrelated(seed: int, settings: Settings, name: str, config: Config) -> Numbers:
    """The mean test MSE of one method on unrelated tasks, and of a masked one whether the bias's gate tells the cosine."""
    made = _problem(False, seed, settings)
    trained = method(name, made, settings, config, seed)
    trained.train()
    numbers = {MSE: statistics.fmean(trained.scores(range(len(made.names))))}
    if name in GATED:
        assert made.examine is not None and trained.model is not None
        numbers[RIGHT] = _measured(made.examine(name, trained.model))[RIGHT]
    return numbers


def _learned(metrics: Metrics) -> Numbers:
    return {name: findings.trained(metrics, name) for name in ("masked", "hard", "shared", "independent")}


def _gates(metrics: Metrics) -> Numbers:
    phase, cosine, sine, right = (mean(metrics, "masked", number) for number in NUMBERS)
    return {"phase": phase, "half_pi": math.pi / 2, "cosine": cosine, "sine": sine, "right": right}


def _hard(metrics: Metrics) -> Numbers:
    return {
        **{name: mean(metrics, name, RIGHT) for name in GATED},
        "hard_error": findings.trained(metrics, "hard"),
        "error": findings.trained(metrics, "masked"),
    }


def _apart(metrics: Metrics) -> Numbers:
    rate = metrics["settings"]["cosine"]
    return {
        **{name: mean(metrics, f"unrelated: {name}", MSE) for name in UNRELATED},
        "right": mean(metrics, "unrelated: masked", RIGHT),
        "guess": 100 * max(rate, 1 - rate),
        "related": findings.trained(metrics, "masked"),
    }


CLAIMS = [
    Claim(
        "A masked net of one unit learns both kinds of task: test MSE {masked:.3g} (hard gates {hard:.3g}); a net for each task "
        "with the same steps in all {independent:.3g}, one shared net {shared:.3g}.",
        _learned,
        lambda n: n["masked"] < 0.2 * n["shared"],
    ),
    Claim(
        "The bias is pi/2 = {half_pi:.4g} in the cosine tasks: {phase:.4g} behind the gate, which is {cosine:.2f} there and "
        "{sine:.2f} in the sine tasks (means), on the right side of 1/2 in {right:.3g} % of the tasks.",
        _gates,
        lambda n: abs(n["phase"] - n["half_pi"]) < 0.2 and n["cosine"] > 0.7 and n["sine"] < 0.2 and n["right"] > 95,
    ),
    Claim(
        "Gates of the sigmoid stop short of 1, for W can be larger instead. Hard gates are 0 or 1, more often the wrong one: on "
        "the right side in {hard:.3g} % of the tasks, the sigmoid's in {masked:.3g} %; test MSE {hard_error:.3g} and {error:.3g}.",
        _hard,
        lambda n: n["hard"] <= n["masked"],
    ),
    Claim(
        "With w, b1 and b2 of each task alone it does not work: the masked unit's test MSE is {masked:.3g} ({related:.3g} with one "
        "w), that of a unit for each task {independent:.3g}, of one shared unit {shared:.3g}; the bias's gate says cosine or sine "
        "rightly in {right:.3g} % of the tasks, to say always the more frequent one is right in {guess:.3g} %.",
        _apart,
        lambda n: n["masked"] > 3 * n["related"] and n["right"] < 85,
    ),
    report.forgetting_claim(),
]


def tables(metrics: Metrics) -> Tables:
    """The study's, and one of the bias, its gates, and the unrelated tasks."""
    methods, columns = by_method(metrics), (MSE, *NUMBERS)
    rows = [["method", *columns]]
    for name in [*GATED, *(f"unrelated: {each}" for each in UNRELATED)]:
        rows.append([name, *cells(methods[name], columns)])
    return [*report.tables(metrics), ("The bias behind its gate", rows)]


def figures(metrics: Metrics) -> Figures:
    """The study's; and the gate of the bias, and the bias behind it, of each task."""
    figure, (left, right) = new_figure(2)
    for cosine, name, method_name, marker in ((False, "sine tasks", "masked", "o"), (True, "cosine tasks", "shared", "^")):
        color = STYLES[method_name]["color"]
        found = [
            (seed, gate, examined["bias"] * gate)
            for seed, examined in zip(metrics["seeds"], metrics["examined"])
            for gate, each in zip(examined["gates"], examined["cosine"])
            if each == cosine
        ]
        for panel, values in ((left, [gate for _, gate, _ in found]), (right, [phase for _, _, phase in found])):
            seeds = [seed for seed, _, _ in found]
            panel.plot(seeds, values, marker, color=color, label=name, markersize=5, markerfacecolor="none")
    left.set(xlabel="seed (number)", ylabel="gate of the bias, sigmoid(M) (no unit)", ylim=(-0.05, 1.05))
    right.axhline(math.pi / 2, color="#555555", linestyle=":", label="pi / 2")
    right.set(xlabel="seed (number)", ylabel="bias behind its gate (radians)")
    for panel in (left, right):
        panel.set_xticks(metrics["seeds"])
        panel.legend(fontsize=8, title="a point a task", title_fontsize=8)
    return {"": report.figure(metrics), "bias": figure}
