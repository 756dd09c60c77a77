"""The sine of a masked linear function, and what its tasks share: Blum and Law, EE5239 project proposal (2020), section 3.2."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.continual import LoopConfig, TaskLoop
from metamask_ext.data import sine_of_linear_tasks
from metamask_ext.nn import MaskedConv2d, MaskedLinear
from metamask_ext.nn.task_masks import MaskInit

from ..engine.claims import Claim, Metrics, Numbers, mean
from ..engine.figures import STYLES, Figures, bands, new_figure
from ..engine.jobs import Job, Json, Key
from ..engine.run_folder import RunFolder
from ..engine.settings import Changes, OptionError, of_run
from ..engine.statistics import cell
from ..engine.tables import Tables
from ..engine.training import seeded
from ..study import comparison, findings, report
from ..study.networks import Nets, Parameters, gates, shared_parameters
from ..study.problem import Layer, Problem, Score
from ..study.settings import (
    FrozenConfig,
    MaskedConfig,
    MetaConfig,
    PenalisedConfig,
    PlainConfig,
    StudySettings,
    even_grid,
    grid,
)
from .sinusoid import SineSettings, split

STUDY = StudySettings(
    grid=even_grid(
        masked=grid(PenalisedConfig, lr=[0.003], mask_lr=[0.1, 0.03], mask_weight_decay=[1e-4, 0.0]),
        hard=grid(MaskedConfig, lr=[0.003, 0.001], mask_lr=[0.01, 0.03]),
        lottery=grid(FrozenConfig, mask_lr=[0.03, 0.01], scale=[2.0, 4.0]),
        shared=grid(PlainConfig, lr=[0.003, 0.001, 0.0003, 0.01]),
        independent=grid(PlainConfig, lr=[0.01, 0.03, 0.003, 0.001]),
        maml=grid(MetaConfig, lr=[0.003, 0.001], inner_lr=[0.1, 0.03]),
        sequence=grid(PlainConfig, lr=[0.003, 0.01, 0.001, 0.0003]),
    )
)


@dataclass(frozen=True)
class SharingSettings:
    """The trainings that show how alike the tasks' masks are.

    Attributes:
        lr, mask_lr, batch: of the training.
        begin: what the logits begin with, each a key of ``BEGIN``.
        mask_weight_decay: L2 factors on M.
    """

    lr: float = 0.003
    mask_lr: float = 0.1
    batch: int = 64
    begin: tuple[str, ...] = ("alike", "random")
    mask_weight_decay: tuple[float, ...] = (0.0, 1e-3)


@dataclass(frozen=True)
class Settings(SineSettings):
    """The settings of the experiment.

    Attributes:
        sharing: beside the study, how alike the tasks' masks are.
        study: of the common study.
    """

    tasks: int = 20
    steps: int = 8000
    hidden: int = 32
    train_samples: int = 200
    sharing: SharingSettings = SharingSettings()
    study: StudySettings = STUDY


QUICK: Changes = {
    "seeds": 1,
    "tasks": 6,
    "steps": 2400,
    "new_tasks": 2,
    "sharing": {"begin": ["random"]},
    "study": {"tuning": False, "cost_rounds": 1, "new": {"samples": [100, 1000], "steps": 100}},
}
SCORE = Score("test MSE", "units of y squared", higher_is_better=False, margin=0.02)
QUESTION = """\
Section 3.2: $y = \\sin((w \\odot m)^T x + b m_b)$, with $w$, $b$ and the masks as in section 3.1 (smaller weights: two periods of
the sine). The net is the linear layer of 3.1, of one output, and three further layers that have to make a sine of it, with masks on
every layer. Does the method find the first layer of 3.1, and does it find out that the later layers can be shared by all tasks? To
see that, the trained net computes each task with the later layers' masks of another, and with the first layer's."""

BEGIN: dict[str, MaskInit] = {"alike": 0.0, "random": "normal"}
"""The first logits, by their name in the settings."""
OWN, LATER, FIRST = "own masks: test MSE", "later masks of another task: test MSE", "first mask of another task: test MSE"
DIRECTION, SUPPORT = "first layer and true weights: cosine", "support recovered (%)"
LAYERS = 4
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#555555")


def network(variables: int, hidden: int, linear: Layer, conv: Layer) -> nn.Sequential:
    """The linear layer of section 3.1, and a net that makes a number of its output."""
    return nn.Sequential(linear(variables, 1), linear(1, hidden), nn.Tanh(), linear(hidden, hidden), nn.Tanh(), linear(hidden, 1))


def problem(seed: int, settings: Settings) -> Problem:
    return _problem(seed, settings)[0]


def _problem(seed: int, settings: Settings) -> tuple[Problem, Tensor, Tensor]:
    """Also the true weights of the trained tasks, and which of them and of the biases are on."""
    generator = torch.Generator().manual_seed(seed)
    known, variables = settings.tasks, settings.variables
    count, sizes = known + settings.new_tasks, settings.magnitudes
    drawn, support = sine_of_linear_tasks(count, generator, variables=variables, magnitudes=sizes)
    net = partial(network, variables, settings.hidden)
    return Problem(*split(drawn, settings, generator), net, F.mse_loss, F.mse_loss), drawn.weight[:known], support[:known]


def run(folder: RunFolder, settings: Settings) -> Json:
    """The common study, and how alike the masks of the tasks are in each layer. See :func:`metamask_ext.experiments.run`."""
    for begin in settings.sharing.begin:
        if begin not in BEGIN:
            raise OptionError(f"sharing.begin must be one of {', '.join(BEGIN)}, got {begin!r}")
    for key in ("begin", "mask_weight_decay"):
        if not getattr(settings.sharing, key):
            raise OptionError(f"sharing.{key} must have at least one item, got none")
    finished = folder.begin(
        f"drawn: x ~ N(0, I), |w|, |b| uniform in {list(settings.magnitudes)}, each on with probability 1/2, no noise"
    )
    if finished is not None:
        return finished
    conditions = {
        condition_name(begin, decay): (begin, decay)
        for begin, decay in itertools.product(settings.sharing.begin, settings.sharing.mask_weight_decay)
    }
    jobs: dict[Key, Job] = {
        (seed, name): partial(share, seed, settings, *each) for seed in folder.seeds for name, each in conditions.items()
    }
    found = comparison.run(folder, settings, problem, SCORE, later=len(jobs))
    made = folder.compute(jobs)
    numbers = [*(OWN, LATER, FIRST, DIRECTION, SUPPORT), *(difference_name(layer) for layer in range(LAYERS))]
    shared = {name: {number: [made[seed, name][number] for seed in folder.seeds] for number in numbers} for name in conditions}
    return folder.finish({**found.scores, **shared}, found.baselines, found.budget, figures, found.more)


def condition_name(begin: str, decay: float) -> str:
    """The name of a row of the results on sharing."""
    return f"masks {begin} at first, L2 {decay:g} on M"


def difference_name(layer: int) -> str:
    return f"difference of two tasks' gates, layer {layer + 1}"


def share(seed: int, settings: Settings, begin: str, decay: float) -> Numbers:
    """Train masks on every layer; then compute each task with masks of each other."""
    made, weight, support = _problem(seed, settings)
    options = settings.sharing
    masked = partial(MaskedLinear, mask_init=BEGIN[begin])
    model = seeded(seed, partial(made.network, masked, MaskedConv2d))
    data = {name: (x, y) for name, x, y in zip(made.names, made.train.x, made.train.y)}
    TaskLoop(
        model,
        data,
        F.mse_loss,
        LoopConfig(
            steps=settings.study.round_steps,
            lr=options.lr,
            mask_lr=options.mask_lr,
            mask_weight_decay=decay,
            optimizer="adam",
            batch_size=options.batch,
            seed=seed,
        ),
    ).run(settings.steps // settings.study.round_steps)
    shared, open_ = shared_parameters(model), gates(model, made.names)
    first = torch.cat([open_["0.weight"].flatten(1), open_["0.bias"].flatten(1)], 1)
    found = shared["0.weight"] * open_["0.weight"]
    return {
        **_swapped(made, shared, open_, support),
        **{difference_name(place): value for place, value in enumerate(_differences(shared, open_))},
        DIRECTION: abs(float(F.cosine_similarity(found.flatten(), weight.flatten(), dim=0))),
        SUPPORT: 100 * float(((first > 0.5) == support).double().mean()),
    }


@torch.no_grad()
def _swapped(made: Problem, shared: Parameters, open_: Parameters, support: Tensor) -> Numbers:
    """The mean test MSE of a task with its own masks, and over all other tasks, with their masks in the later layers, or in the
    first (where these tasks differ there)."""
    nets = Nets(made)

    def errors(first: Parameters, later: Parameters) -> Tensor:
        """Of each task, with the first layer's gates and the later ones' from these."""
        theta = {name: shared[name] * (first if name.startswith("0.") else later)[name] for name in shared}
        return (nets(theta, made.test.x) - made.test.y).square().mean((1, 2))

    with_later, with_first = [], []
    for shift in range(1, len(made.names)):
        other = {name: gate.roll(-shift, 0) for name, gate in open_.items()}
        with_later.append(errors(open_, other))
        with_first.append(errors(other, open_)[(support != support.roll(-shift, 0)).any(1)])
    return {
        OWN: float(errors(open_, open_).mean()),
        LATER: float(torch.cat(with_later).mean()),
        FIRST: float(torch.cat(with_first).mean()),
    }


def _differences(shared: Parameters, open_: Parameters) -> list[float]:
    """For each layer the mean of ``|g_a - g_b|`` over pairs of tasks a, b and over the entries, weighted with ``|W|``: a gate of a
    weight that is 0 does not matter."""
    layers: dict[str, tuple[float, float]] = {}
    for name, gate in open_.items():
        tasks = len(gate)
        each = (gate[:, None] - gate).abs().sum((0, 1)) / (tasks * (tasks - 1))
        size = shared[name].abs()
        layer = name.rpartition(".")[0]
        weighted, total = layers.get(layer, (0.0, 0.0))
        layers[layer] = weighted + float((each * size).sum()), total + float(size.sum())
    return [weighted / total for weighted, total in layers.values()]


def _condition(metrics: Metrics, decay: int) -> str:
    """Of the rows on sharing, that with the last of the first masks and the L2 factor of this place in the settings."""
    sharing = of_run(Settings(), metrics).sharing
    return condition_name(sharing.begin[-1], sharing.mask_weight_decay[decay])


def _learned(metrics: Metrics) -> Numbers:
    return {method: findings.trained(metrics, method) for method in ("masked", "hard", "shared", "independent")}


def _first_layer(metrics: Metrics) -> Numbers:
    name = _condition(metrics, -1)
    return {"cosine": mean(metrics, name, DIRECTION), "support": mean(metrics, name, SUPPORT)}


def _sharing(decay: int, metrics: Metrics) -> Numbers:
    name = _condition(metrics, decay)
    found = {"own": mean(metrics, name, OWN), "later": mean(metrics, name, LATER), "first": mean(metrics, name, FIRST)}
    return {**found, "factor": of_run(Settings(), metrics).sharing.mask_weight_decay[decay]}


def _alike(metrics: Metrics) -> Numbers:
    plain, penalised = (
        [mean(metrics, _condition(metrics, place), difference_name(layer)) for layer in range(LAYERS)] for place in (0, -1)
    )
    return {
        "first": plain[0],
        "later": statistics.fmean(plain[1:]),
        "first_l2": penalised[0],
        "later_l2": statistics.fmean(penalised[1:]),
    }


def _new(metrics: Metrics) -> Numbers:
    samples = metrics["study"]["samples"]
    return findings.masks_beside_scratch(metrics, samples[(len(samples) - 1) // 2])


CLAIMS = [
    Claim(
        "Shared weights with masks on every layer learn the tasks: test MSE {masked:.3g} (hard gates {hard:.3g}); a net for each "
        "task with the same steps in all {independent:.3g}, one shared net {shared:.3g}.",
        _learned,
        lambda n: n["masked"] < 0.2 * n["shared"],
    ),
    Claim(
        "The first layer is that of section 3.1: the cosine between its masked weights and the true ones, over all tasks, is "
        "{cosine:.3f}, and {support:.3g} % of its gates are on the true side of 1/2 (L2 on M).",
        _first_layer,
        lambda n: n["cosine"] > 0.95 and n["support"] > 75,
    ),
    Claim(
        "As proposed, without an L2 term on M, the method does not find out that the later layers can be shared: with the later "
        "layers' masks of another task the test MSE of a task goes from {own:.3g} to {later:.3g}; with the first layer's mask of "
        "another to {first:.3g}.",
        partial(_sharing, 0),
        lambda n: n["later"] > 5 * n["own"],
    ),
    Claim(
        "With an L2 term on M of {factor:g} it largely does: the later layers' masks of another task give {later:.3g}, the task's "
        "own {own:.3g}, the first layer's mask of another {first:.3g}.",
        partial(_sharing, -1),
        lambda n: n["later"] < 0.25 * n["first"],
    ),
    Claim(
        "The gates say the same: those of two tasks differ by {first:.3f} in the first layer and by {later:.3f} in the later ones "
        "without the L2 term, by {first_l2:.3f} and {later_l2:.3f} with it (mean over pairs and entries, weighted with |W|).",
        _alike,
        lambda n: n["later_l2"] < 0.25 * n["first_l2"] and n["later"] > 0.4 * n["first"],
    ),
    Claim(
        "A new task that has {few:,} samples learns by its masks alone to a test MSE of {masks_few:.3g}, a net from scratch to "
        "{scratch_few:.3g}; with {many:,} they are at {masks_many:.3g} and {scratch_many:.3g}.",
        _new,
        lambda n: n["masks_few"] < 0.5 * n["scratch_few"],
    ),
    report.forgetting_claim(),
]


def tables(metrics: Metrics) -> Tables:
    """The study's, and one on what the tasks' masks share."""
    numbers = [OWN, LATER, FIRST, DIRECTION, SUPPORT, *(difference_name(layer) for layer in range(LAYERS))]
    rows = [
        ["masks", *numbers],
        *([name, *(cell(found[number]) for number in numbers)] for name, found in _shared(metrics).items()),
    ]
    return [*report.tables(metrics), ("Masks of other tasks", rows)]


def _shared(metrics: Metrics) -> Metrics:
    return {name: found for name, found in metrics["results"].items() if OWN in found}


def figures(metrics: Metrics) -> Figures:
    figure, (left, right) = new_figure(2)
    shared = _shared(metrics)
    styles = {OWN: ("masked", "o"), LATER: ("independent", "s"), FIRST: ("shared", "^")}
    for number, (method, marker) in styles.items():
        found = [each[number] for each in shared.values()]
        left.errorbar(
            range(len(found)),
            [each["mean"] for each in found],
            [each.get("interval", 0.0) for each in found],
            label=number.partition(":")[0],
            color=STYLES[method]["color"],
            marker=marker,
            linestyle="none",
            capsize=3,
        )
    left.set(ylabel="test MSE (units of y squared)", yscale="log")
    left.set_xticks(range(len(shared)), [name.replace(", ", "\n").replace("masks ", "") for name in shared], fontsize=7)
    title = bands(len(metrics["seeds"]), "bars")
    left.legend(fontsize=8, title=title, title_fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    for (name, each), color, line in zip(shared.items(), itertools.cycle(COLORS), itertools.cycle(("-", "--", ":"))):
        found = [each[difference_name(layer)] for layer in range(LAYERS)]
        right.errorbar(
            range(1, LAYERS + 1),
            [each["mean"] for each in found],
            [each.get("interval", 0.0) for each in found],
            label=name,
            color=color,
            linestyle=line,
            marker="o",
            markersize=4,
            capsize=3,
        )
    right.set(xlabel="layer (number)", ylabel="difference of two tasks' gates,\nweighted with |W| (no unit)", ylim=(0, None))
    right.set_xticks(range(1, LAYERS + 1))
    right.legend(fontsize=7)
    return {"": report.figure(metrics), "sharing": figure}
