"""The vanishing gradient of the sigmoid, and its remedies: Blum and Law, EE5239 project proposal (2020), section 2.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.continual import LoopConfig, TaskLoop
from metamask_ext.data import linear_tasks
from metamask_ext.nn import MaskedLinear
from metamask_ext.nn.names import DEFAULT_TASK
from metamask_ext.nn.tasks import add_task, remove_task
from metamask_ext.nn.using_task import using_task

from ..engine.claims import Claim, Metrics, Numbers, by_method, mean
from ..engine.figures import STYLES, Figures, bands, legend_above, new_figure
from ..engine.jobs import Job, Json, Key
from ..engine.run_folder import RunFolder, Scores
from ..engine.settings import Changes, OptionError, RunSettings, of_run
from ..engine.statistics import cell, interval
from ..engine.tables import Tables
from ..engine.tracking import track
from ..engine.training import seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        tasks: the number of tasks.
        steps: of all tasks together.
        variables: of the linear functions.
        train_samples, test_samples: of each task.
        steps_per_round: of the training loop.
        lr, mask_lr: of W and of the logits.
        weight_decay: L2 factors on W; there is also a training without.
        mask_weight_decay: on M.
        temperatures: the first and the last of each schedule, which is geometric.
        mask_spreads: standard deviations of the logits at the beginning.
        points: at which the temperature changes and the gates are looked at.
    """

    tasks: int = 20
    steps: int = 10_000
    variables: int = 5
    train_samples: int = 100
    test_samples: int = 1000
    steps_per_round: int = 10
    lr: float = 0.01
    mask_lr: float = 1.0
    weight_decay: tuple[float, ...] = (0.001, 0.01, 0.1)
    mask_weight_decay: tuple[float, ...] = (0.001, 0.01)
    temperatures: tuple[tuple[float, ...], ...] = ((1.0, 1.0), (1.0, 0.1), (8.0, 0.1))
    mask_spreads: tuple[float, ...] = (1.0, 6.0)
    points: int = 40


QUICK: Changes = {"seeds": 1, "tasks": 8, "steps": 4000, "weight_decay": [0.1], "mask_weight_decay": [0.01], "points": 20}

QUESTION = (
    "Section 2.1: the gradient of a gate, g (1 - g), vanishes near 0 and 1, where the gates should end. An L2 term on W is said to "
    "rectify this largely, at the risk of keeping the gates at 1/2. What do L2 terms on W and on M do to gates and error, on the "
    "tasks of section 3.1, and does it help to cool the gates during training, g = sigmoid(M / temperature)?"
)
NEAR, BINS = 0.05, 20
MSE, NEAR_END, RIGHT = "test MSE", f"gates within {NEAR} of 0 or 1 (%)", "gates on the true side of 1/2 (%)"
ON, SLOPE = "mean gate of what is on in the true model", "mean slope of the gates"
WRONG, TURNED = f"gates that begin within {NEAR} of the wrong end (number)", "of these, gates that end on the true side (number)"
NUMBERS = (MSE, NEAR_END, RIGHT, ON, SLOPE, WRONG, TURNED)

Penalty = tuple[str, float]
"""The penalised tensor, ``"W"`` or ``"M"``, and its L2 factor; ``("", 0.0)`` without a penalty."""


def run(folder: RunFolder, settings: Settings) -> Json:
    """The loop of the proposal on the tasks of 'linear', for each L2 term, temperature schedule and spread of the first masks."""
    for key in ("weight_decay", "mask_weight_decay", "temperatures", "mask_spreads"):
        if not getattr(settings, key):
            raise OptionError(f"{key} must have at least one item, got none")
    for schedule in settings.temperatures:
        if len(schedule) != 2 or min(schedule) <= 0:
            raise OptionError(f"temperatures must be pairs of positive numbers, the first and the last, got {list(schedule)}")
    data = "drawn: x ~ N(0, I), |w| and |b| uniform in [1, 3], each on with probability 1/2, no noise"
    if (finished := folder.begin(data, "as in 'linear'")) is not None:
        return finished
    conditions = {
        condition_name(*condition): condition
        for condition in product(penalties(settings), settings.temperatures, settings.mask_spreads)
    }
    jobs: dict[Key, Job] = {
        (seed, name): partial(measure, seed, settings, *condition)
        for seed in folder.seeds
        for name, condition in conditions.items()
    }
    made = folder.compute(jobs)
    scores: Scores = {
        name: {number: [made[seed, name]["numbers"][number] for seed in folder.seeds] for number in NUMBERS} for name in conditions
    }
    histograms = {
        name: torch.tensor([made[seed, name]["gates"] for seed in folder.seeds], dtype=torch.float64).mean(0).tolist()
        for name in _shown(settings)
    }
    return folder.finish(
        scores,
        [name for name, (penalty, _, _) in conditions.items() if not penalty[0]],
        f"{settings.train_samples} samples of each task and {settings.steps} steps for each; no rate was searched",
        figures,
        {"steps": made[folder.seeds[0], next(iter(conditions))]["steps"], "gates": histograms},
    )


def measure(seed: int, settings: Settings, penalty: Penalty, schedule: Sequence[float], spread: float) -> Json:
    """Train one model; its numbers, and the share of gates in each of ``BINS`` equal parts of [0, 1] after each part of the
    training, in which the temperature is constant. Where gates begin is told by their logits, at a temperature of 1."""
    data = linear_tasks(settings.tasks, settings.train_samples, settings.test_samples, variables=settings.variables, seed=seed)
    names = list(data.train)
    model = seeded(seed, partial(_model, settings.variables, spread, names))
    where, factor = penalty
    loop = TaskLoop(
        model,
        data.train,
        F.mse_loss,
        LoopConfig(
            steps=settings.steps_per_round,
            lr=settings.lr,
            mask_lr=settings.mask_lr,
            weight_decay=factor if where == "W" else 0.0,
            mask_weight_decay=factor if where == "M" else 0.0,
            seed=seed,
        ),
    )
    (first, last), points = schedule, settings.points
    rounds = settings.steps // settings.steps_per_round
    begin = gates = _gates(model, names)
    steps, histograms = [0], []
    for point in range(points):
        model.temperature = first * (last / first) ** (point / max(points - 1, 1))
        loop.run(rounds * (point + 1) // points)
        steps.append(loop.step)
        gates = _gates(model, names)
        histograms.append(_histogram(gates))
        track(loop.step, near_0_or_1=_percent(_near(gates)), temperature=model.temperature)
    on = data.support
    wrong = torch.where(on, begin < NEAR, begin > 1 - NEAR)
    right = (gates > 0.5) == on
    errors = []
    for name in names:
        x, y = data.test[name]
        with torch.no_grad(), using_task(model, name):
            errors.append(float(F.mse_loss(model(x), y)))
    numbers = {
        MSE: sum(errors) / len(errors),
        NEAR_END: _percent(_near(gates)),
        RIGHT: _percent(right),
        ON: float(gates[on].mean()),
        SLOPE: float((gates * (1 - gates)).mean() / model.temperature),
        WRONG: int(wrong.sum()),
        TURNED: int((wrong & right).sum()),
    }
    return {"numbers": numbers, "steps": steps, "gates": histograms}


def condition_name(penalty: Penalty, schedule: Sequence[float], spread: float) -> str:
    """The name of a row of the results."""
    return f"{_penalty_name(penalty)}, {_schedule_name(schedule)}, spread {spread:g}"


def penalties(settings: Settings) -> list[Penalty]:
    """No L2 term, then those on W, then those on M."""
    return [
        ("", 0.0),
        *(("W", each) for each in settings.weight_decay),
        *(("M", each) for each in settings.mask_weight_decay),
    ]


def _penalty_name(penalty: Penalty) -> str:
    where, factor = penalty
    return f"L2 {factor:g} on {where}" if where else "no L2"


def _schedule_name(schedule: Sequence[float]) -> str:
    first, last = schedule
    return f"temperature {first:g}" if first == last else f"temperature {first:g} to {last:g}"


def _model(variables: int, spread: float, names: list[str]) -> MaskedLinear:
    model = MaskedLinear(variables, 1, mask_init=partial(nn.init.normal_, std=spread))
    for name in names:  # before the training, so that their first gates are known
        add_task(model, name)
    remove_task(model, DEFAULT_TASK)
    return model


def _gates(model: MaskedLinear, names: list[str]) -> Tensor:
    """``sigmoid(M / temperature)`` of weights and bias, ``[tasks, variables + 1]``."""
    assert model.bias_masks is not None
    logits = torch.stack([torch.cat([model.masks[name][0], model.bias_masks[name]]) for name in names]).detach()
    return (logits / model.temperature).sigmoid()


def _histogram(gates: Tensor) -> list[float]:
    return (gates.histc(BINS, 0, 1) / gates.numel()).tolist()


def _near(gates: Tensor) -> Tensor:
    return (gates < NEAR) | (gates > 1 - NEAR)


def _percent(chosen: Tensor) -> float:
    return 100 * float(chosen.double().mean())


@dataclass(frozen=True)
class Place:
    """A condition by its place in the settings.

    Attributes:
        penalty: what is penalised, with the largest factor; nothing if empty.
        schedule, spread: indices into ``temperatures`` and ``mask_spreads``.
    """

    penalty: str = ""
    schedule: int = 0
    spread: int = 0

    def factor(self, settings: Settings) -> float:
        """The L2 factor."""
        return {"": (0.0,), "W": settings.weight_decay, "M": settings.mask_weight_decay}[self.penalty][-1]

    def name(self, settings: Settings) -> str:
        """The condition's name in the metrics."""
        penalty = self.penalty, self.factor(settings)
        return condition_name(penalty, settings.temperatures[self.schedule], settings.mask_spreads[self.spread])


SPREAD = Place(spread=-1)
SHOWN = (Place(), Place("W"), Place("M"), Place(schedule=1), SPREAD, Place(schedule=-1, spread=-1))
"""Conditions whose gates are drawn over training."""


def _settings(metrics: Metrics) -> Settings:
    return of_run(Settings(), metrics)


def _shown(settings: Settings) -> list[str]:
    return list(dict.fromkeys(place.name(settings) for place in SHOWN))


def _compare(metrics: Metrics, number: str, **places: Place) -> Numbers:
    """The means of a number under conditions, by name."""
    settings = _settings(metrics)
    return {key: mean(metrics, place.name(settings), number) for key, place in places.items()}


def _turned(metrics: Metrics, place: Place) -> float:
    """Of the gates that begin within ``NEAR`` of the wrong end, those that end on the true side, in percent, over all seeds."""
    numbers = by_method(metrics)[place.name(_settings(metrics))]
    return 100 * sum(numbers[TURNED]["values"]) / sum(numbers[WRONG]["values"])


def _vanishing(metrics: Metrics) -> Numbers:
    return {
        "spread": _settings(metrics).mask_spreads[-1],
        "turned": _turned(metrics, SPREAD),
        **_compare(metrics, MSE, mse=Place(), saturated=SPREAD),
    }


def _best_on_weights(metrics: Metrics) -> Numbers:
    settings = _settings(metrics)
    spread, constant = settings.mask_spreads[-1], settings.temperatures[0]
    names = [condition_name(("W", factor), constant, spread) for factor in settings.weight_decay]
    return {
        **_compare(metrics, MSE, without=SPREAD, masks=Place("M", spread=-1)),
        "best": min(mean(metrics, name, MSE) for name in names),
    }


def _toward_one(metrics: Metrics) -> Numbers:
    return {
        "factor": Place("W").factor(_settings(metrics)),
        **_compare(metrics, ON, without=Place(), weights=Place("W")),
        **_compare(metrics, NEAR_END, near=Place(), near_weights=Place("W")),
    }


def _factors(metrics: Metrics) -> Numbers:
    settings = _settings(metrics)
    tried = [each for each in penalties(settings) if each[0] != "M"]
    (_, smallest), (_, largest) = tried[0], tried[-1]
    names = [condition_name(each, settings.temperatures[0], settings.mask_spreads[0]) for each in (tried[0], tried[-1])]
    small, large = (mean(metrics, name, MSE) for name in names)
    return {"smallest": smallest, "largest": largest, "small": small, "large": large}


def _toward_half(metrics: Metrics) -> Numbers:
    return {
        "factor": Place("M").factor(_settings(metrics)),
        **_compare(metrics, NEAR_END, near=Place(), masks=Place("M")),
        **_compare(metrics, MSE, mse=Place(), mse_masks=Place("M")),
    }


def _annealed(metrics: Metrics) -> Numbers:
    return {
        **_compare(metrics, MSE, constant=Place(), cooled=Place(schedule=1)),
        **_compare(metrics, NEAR_END, near=Place(), near_cooled=Place(schedule=1)),
    }


def _warm(metrics: Metrics) -> Numbers:
    warm = Place(schedule=-1, spread=-1)
    return {
        "first": _settings(metrics).temperatures[-1][0],
        **_compare(metrics, MSE, constant=SPREAD, cold=Place(schedule=1, spread=-1), warm=warm),
        "turned": _turned(metrics, warm),
        "turned_constant": _turned(metrics, SPREAD),
    }


CLAIMS = [
    Claim(
        "The gradient does vanish: with logits that begin with a standard deviation of {spread:g}, {turned:.3g} % of the gates "
        f"that begin within {NEAR} of the wrong end ever reach the true side of 1/2, and the test MSE is {{saturated:.3g}}; it is "
        "{mse:.3g} where they begin with one of 1.",
        _vanishing,
        lambda n: n["saturated"] > 10 * n["mse"] and n["turned"] < 90,
    ),
    Claim(
        "An L2 term on W does not rectify that: from there the best factor gives a test MSE of {best:.3g}, without it is "
        "{without:.3g}; a term on M does more ({masks:.3g}).",
        _best_on_weights,
        lambda n: n["best"] > 0.5 * n["without"] and n["masks"] < 0.5 * n["best"],
    ),
    Claim(
        "Nor does an L2 term on W hold the gates where the gradient flows: W shrinks, and the gates open against it. With a factor "
        "of {factor:g} the mean gate of what is on rises from {without:.3f} to {weights:.3f}, and the share of gates within "
        f"{NEAR} of 0 or 1 from {{near:.3g}} % to {{near_weights:.3g}} %.",
        _toward_one,
        lambda n: n["weights"] > n["without"] and n["near_weights"] >= n["near"],
    ),
    Claim(
        "The factor has to be tuned: {smallest:g} on W gives a test MSE of {small:.3g}, {largest:g} one of {large:.3g}.",
        _factors,
        lambda n: n["large"] > 3 * n["small"],
    ),
    Claim(
        "It is an L2 term on M that pulls the gates to 1/2, and costs accuracy: with a factor of {factor:g}, the share of gates "
        f"within {NEAR} of 0 or 1 falls from {{near:.3g}} % to {{masks:.3g}} %, the test MSE rises from {{mse:.3g}} to "
        "{mse_masks:.3g}.",
        _toward_half,
        lambda n: n["masks"] < n["near"] and n["mse_masks"] > 3 * n["mse"],
    ),
    Claim(
        f"Cooling the gates makes them binary without that cost: the share within {NEAR} of 0 or 1 goes from {{near:.3g}} % to "
        "{near_cooled:.3g} %, the test MSE from {constant:.3g} to {cooled:.3g}.",
        _annealed,
        lambda n: n["near_cooled"] > 99 and n["cooled"] < 0.1 * n["constant"],
    ),
    Claim(
        "Cooling also leads out of saturation if it begins warm enough: where the logits begin far out, a first temperature of "
        "{first:g} sets {turned:.3g} % of the wrong gates right and gives a test MSE of {warm:.3g}; a constant one of 1 sets "
        "{turned_constant:.3g} % right and gives {constant:.3g}, one that falls from 1 gives {cold:.3g}.",
        _warm,
        lambda n: n["warm"] < 0.6 * min(n["cold"], n["constant"]) and n["turned"] > n["turned_constant"],
    ),
]


def tables(metrics: Metrics) -> Tables:
    """The error and the share of binary gates, a row for each L2 term, a pair of columns for each schedule."""
    settings, numbers = _settings(metrics), by_method(metrics)
    made = []
    for spread in settings.mask_spreads:
        head = ["L2 term"]
        for schedule in settings.temperatures:
            head += [f"{_schedule_name(schedule)}: {number}" for number in (MSE, NEAR_END)]
        rows = [head]
        for penalty in penalties(settings):
            names = [condition_name(penalty, schedule, spread) for schedule in settings.temperatures]
            rows.append([_penalty_name(penalty), *(cell(numbers[name][number]) for name in names for number in (MSE, NEAR_END))])
        made.append((f"Logits that begin with a standard deviation of {spread:g}", rows))
    return made


def figures(metrics: Metrics) -> Figures:
    """``gates``: their distribution over training; ``l2``: error and share of binary gates against the L2 factor."""
    return {"gates": _gates_figure(metrics), "l2": _factors_figure(metrics)}


def _gates_figure(metrics: Metrics) -> Figure:
    figure, panels = new_figure(2, 3)
    edges = [each / BINS for each in range(BINS + 1)]
    steps = metrics["steps"]
    # Each column of the picture is a stretch of training, with the gates at its end.
    for panel, each in zip(panels, SHOWN):
        name = each.name(_settings(metrics))
        shares = 100 * torch.tensor(metrics["gates"][name]).T
        image = panel.pcolormesh(steps, edges, shares.tolist(), cmap="cividis", norm="symlog", vmin=0, vmax=100)
        panel.set(xlabel="gradient steps, all tasks together", ylabel="gate (no unit)")
        panel.set_title(name, fontsize=9)
    figure.colorbar(image, ax=panels, label=f"share of gates in each interval of {1 / BINS:g} (%)", shrink=0.5)
    return figure


def _factors_figure(metrics: Metrics) -> Figure:
    settings, methods = _settings(metrics), by_method(metrics)
    figure, panels = new_figure(2, len(settings.mask_spreads))
    styles = [STYLES["shared"]["color"], STYLES["masked"]["color"], STYLES["independent"]["color"]]
    factors = sorted({0.0, *settings.weight_decay, *settings.mask_weight_decay})
    for place, panel in enumerate(panels):
        spread, number = settings.mask_spreads[place // 2], (MSE, NEAR_END)[place % 2]
        for schedule, color in zip(settings.temperatures, styles):
            for where, line, marker in (("W", "-", "o"), ("M", "--", "s")):
                chosen = [each for each in penalties(settings) if each[0] in ("", where)]
                found = [methods[condition_name(penalty, schedule, spread)][number]["values"] for penalty in chosen]
                low, middle, high = zip(*(interval(values, geometric=number == MSE) for values in found))
                panel.errorbar(
                    [factors.index(factor) for _, factor in chosen],
                    middle,
                    [[m - each for m, each in zip(middle, low)], [each - m for m, each in zip(middle, high)]],
                    label=f"L2 on {where}, {_schedule_name(schedule)}",
                    color=color,
                    linestyle=line,
                    marker=marker,
                    markersize=4,
                    capsize=2,
                )
        panel.set_xticks(range(len(factors)), [f"{factor:g}" for factor in factors])
        unit = " (units of y squared)" if number == MSE else ""
        panel.set(xlabel="L2 factor", ylabel=number + unit)
        panel.set_title(f"logits begin with standard deviation {spread:g}", fontsize=9)
    for panel in panels[::2]:
        panel.set_yscale("log")
    legend_above(figure, panels[0], f"errors: geometric means; {bands(len(metrics['seeds']), 'bars')}")
    return figure
