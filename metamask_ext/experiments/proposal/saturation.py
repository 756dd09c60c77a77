"""Where the sigmoid's gradient vanishes, and what helps: Blum and Law, EE5239 project proposal (2020), section 2.1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.continual import LoopConfig, TaskLoop
from metamask_ext.data import linear_tasks
from metamask_ext.nn import MaskedLinear
from metamask_ext.nn.names import DEFAULT_TASK
from metamask_ext.nn.tasks import add_task, remove_task
from metamask_ext.nn.using_task import using_task

from ..engine.claims import Claim, Metrics, mean
from ..engine.run_folder import STYLES, Output, Scores, bands, cell, new_figure
from ..engine.settings import OptionError
from ..engine.tracking import track
from ..engine.training import seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS: dict[str, Any] = {
    "seeds": 5,
    "tasks": 20,
    "steps": 10_000,  # of all tasks together
    "variables": 5,
    "train_samples": 100,
    "test_samples": 1000,
    "steps_per_round": 10,
    "lr": 0.01,
    "mask_lr": 1.0,
    "weight_decay": [0.001, 0.01, 0.1],  # L2 factors on W; also without
    "mask_weight_decay": [0.001, 0.01],  # on M
    "temperatures": [[1.0, 1.0], [1.0, 0.1], [8.0, 0.1]],  # first and last of each schedule, which is geometric
    "mask_spreads": [1.0, 6.0],  # standard deviations of the logits at the beginning
    "points": 40,  # at which the temperature changes and the gates are looked at
}
QUICK: dict[str, Any] = {"seeds": 1, "tasks": 8, "steps": 4000, "weight_decay": [0.1], "mask_weight_decay": [0.01], "points": 20}

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
"""What is penalised, ``"W"`` or ``"M"``, and the L2 factor; ``("", 0.0)`` where nothing is."""


def run(output: Output, settings: dict[str, Any]) -> dict[str, Any]:
    """The loop of the proposal on the tasks of 'linear', for each L2 term, temperature schedule and spread of the first masks."""
    for key in ("weight_decay", "mask_weight_decay", "temperatures", "mask_spreads"):
        if not settings[key]:
            raise OptionError(f"{key} must have an item at least, got none")
    for schedule in settings["temperatures"]:
        if len(schedule) != 2 or min(schedule) <= 0:
            raise OptionError(f"temperatures must be pairs of positive numbers, the first and the last, got {schedule}")
    data = "drawn: x ~ N(0, I), |w| and |b| uniform in [1, 3], each on with probability 1/2, no noise"
    if (finished := output.begin(data, "as in 'linear'")) is not None:
        return finished
    conditions = {
        condition_name(*condition): condition
        for condition in product(penalties(settings), settings["temperatures"], settings["mask_spreads"])
    }
    jobs = {
        (seed, name): partial(measure, seed, settings, *condition)
        for seed in output.seeds
        for name, condition in conditions.items()
    }
    pieces = output.pieces(jobs)
    scores: Scores = {
        name: {number: [pieces[seed, name]["numbers"][number] for seed in output.seeds] for number in NUMBERS}
        for name in conditions
    }
    histograms = {
        name: torch.tensor([pieces[seed, name]["gates"] for seed in output.seeds], dtype=torch.float64).mean(0).tolist()
        for name in _shown(settings)
    }
    return output.finish(
        scores,
        [name for name, (penalty, _, _) in conditions.items() if not penalty[0]],
        f"{settings['train_samples']} samples of each task and {settings['steps']} steps for each; no rate was searched",
        figures,
        {"steps": pieces[output.seeds[0], next(iter(conditions))]["steps"], "gates": histograms},
    )


def measure(seed: int, settings: dict[str, Any], penalty: Penalty, schedule: Sequence[float], spread: float) -> dict[str, Any]:
    """Train one model; its numbers, and the share of gates in each of ``BINS`` equal parts of [0, 1] after each part of the
    training, in which the temperature is constant. Where gates begin is told by their logits, at a temperature of 1."""
    data = linear_tasks(
        settings["tasks"], settings["train_samples"], settings["test_samples"], variables=settings["variables"], seed=seed
    )
    names = list(data.train)
    model = seeded(seed, partial(_model, settings["variables"], spread, names))
    where, factor = penalty
    loop = TaskLoop(
        model,
        data.train,
        F.mse_loss,
        LoopConfig(
            steps=settings["steps_per_round"],
            lr=settings["lr"],
            mask_lr=settings["mask_lr"],
            weight_decay=factor if where == "W" else 0.0,
            mask_weight_decay=factor if where == "M" else 0.0,
            seed=seed,
        ),
    )
    (first, last), points = schedule, settings["points"]
    rounds = settings["steps"] // settings["steps_per_round"]
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
    """What a row of the results is called."""
    return f"{_penalty_name(penalty)}, {_schedule_name(schedule)}, spread {spread:g}"


def penalties(settings: Mapping[str, Any]) -> list[Penalty]:
    """No L2 term, then those on W, then those on M."""
    return [
        ("", 0.0),
        *(("W", each) for each in settings["weight_decay"]),
        *(("M", each) for each in settings["mask_weight_decay"]),
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


def _condition(settings: Mapping[str, Any], penalty: str = "", schedule: int = 0, spread: int = 0) -> str:
    """The name of one condition: of the factors the one that is shown, the others by their place in the settings."""
    where = (penalty, _factor(settings, penalty))
    return condition_name(where, settings["temperatures"][schedule], settings["mask_spreads"][spread])


def _factor(settings: Mapping[str, Any], penalty: str) -> float:
    """The factor that is shown: the largest."""
    return {"": [0.0], "W": settings["weight_decay"], "M": settings["mask_weight_decay"]}[penalty][-1]


SHOWN: tuple[dict[str, Any], ...] = (
    {},
    {"penalty": "W"},
    {"penalty": "M"},
    {"schedule": 1},
    {"spread": -1},
    {"schedule": -1, "spread": -1},
)
"""Conditions whose gates are drawn over training."""


def _shown(settings: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(_condition(settings, **each) for each in SHOWN))


def _compare(number: str, **conditions: Mapping[str, Any]) -> Callable[[Metrics], dict[str, float]]:
    """The means of a number under conditions, by name."""
    return lambda metrics: {key: mean(metrics, _condition(metrics["settings"], **each), number) for key, each in conditions.items()}


def _turned(metrics: Metrics, **condition: Any) -> float:
    """Of the gates that begin within ``NEAR`` of the wrong end, those that end on the true side, in percent, over all seeds."""
    numbers = {**metrics["results"], **metrics["baselines"]}[_condition(metrics["settings"], **condition)]
    return 100 * sum(numbers[TURNED]["values"]) / sum(numbers[WRONG]["values"])


def _vanishing(metrics: Metrics) -> dict[str, float]:
    return {
        "spread": metrics["settings"]["mask_spreads"][-1],
        "turned": _turned(metrics, spread=-1),
        **_compare(MSE, mse={}, saturated={"spread": -1})(metrics),
    }


def _best_on_weights(metrics: Metrics) -> dict[str, float]:
    spread, constant = metrics["settings"]["mask_spreads"][-1], metrics["settings"]["temperatures"][0]
    tried = [("W", factor) for factor in metrics["settings"]["weight_decay"]]
    return {
        "without": mean(metrics, _condition(metrics["settings"], spread=-1), MSE),
        "best": min(mean(metrics, condition_name(penalty, constant, spread), MSE) for penalty in tried),
        "masks": mean(metrics, _condition(metrics["settings"], "M", spread=-1), MSE),
    }


def _toward_one(metrics: Metrics) -> dict[str, float]:
    return {
        "factor": _factor(metrics["settings"], "W"),
        **_compare(ON, without={}, weights={"penalty": "W"})(metrics),
        **_compare(NEAR_END, near={}, near_weights={"penalty": "W"})(metrics),
    }


def _factors(metrics: Metrics) -> dict[str, float]:
    settings = metrics["settings"]
    tried = [each for each in penalties(settings) if each[0] != "M"]
    (_, smallest), (_, largest) = tried[0], tried[-1]
    names = [condition_name(each, settings["temperatures"][0], settings["mask_spreads"][0]) for each in (tried[0], tried[-1])]
    small, large = (mean(metrics, name, MSE) for name in names)
    return {"smallest": smallest, "largest": largest, "small": small, "large": large}


def _toward_half(metrics: Metrics) -> dict[str, float]:
    return {
        "factor": _factor(metrics["settings"], "M"),
        **_compare(NEAR_END, near={}, masks={"penalty": "M"})(metrics),
        **_compare(MSE, mse={}, mse_masks={"penalty": "M"})(metrics),
    }


def _annealed(metrics: Metrics) -> dict[str, float]:
    return {
        **_compare(MSE, constant={}, cooled={"schedule": 1})(metrics),
        **_compare(NEAR_END, near={}, near_cooled={"schedule": 1})(metrics),
    }


def _warm(metrics: Metrics) -> dict[str, float]:
    return {
        "first": metrics["settings"]["temperatures"][-1][0],
        **_compare(MSE, constant={"spread": -1}, cold={"schedule": 1, "spread": -1}, warm={"schedule": -1, "spread": -1})(metrics),
        "turned": _turned(metrics, schedule=-1, spread=-1),
        "turned_constant": _turned(metrics, spread=-1),
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


def tables(metrics: Metrics) -> list[tuple[str, list[list[str]]]]:
    """The error and the share of binary gates, a row for each L2 term, a pair of columns for each schedule."""
    settings, numbers = metrics["settings"], {**metrics["results"], **metrics["baselines"]}
    made = []
    for spread in settings["mask_spreads"]:
        head = ["L2 term"]
        for schedule in settings["temperatures"]:
            head += [f"{_schedule_name(schedule)}: {number}" for number in (MSE, NEAR_END)]
        rows = [head]
        for penalty in penalties(settings):
            names = [condition_name(penalty, schedule, spread) for schedule in settings["temperatures"]]
            rows.append([_penalty_name(penalty), *(cell(numbers[name][number]) for name in names for number in (MSE, NEAR_END))])
        made.append((f"Logits that begin with a standard deviation of {spread:g}", rows))
    return made


def figures(metrics: Metrics) -> dict[str, Figure]:
    """``gates``: their distribution over training; ``l2``: error and share of binary gates against the L2 factor."""
    return {"gates": _gates_figure(metrics), "l2": _factors_figure(metrics)}


def _gates_figure(metrics: Metrics) -> Figure:
    figure, panels = new_figure(2, 3)
    edges = [each / BINS for each in range(BINS + 1)]
    steps = metrics["steps"]
    # Each column of the picture is a stretch of training, with the gates at its end.
    for panel, each in zip(panels, SHOWN):
        name = _condition(metrics["settings"], **each)
        shares = 100 * torch.tensor(metrics["gates"][name]).T
        image = panel.pcolormesh(steps, edges, shares.tolist(), cmap="cividis", norm="symlog", vmin=0, vmax=100)
        panel.set(xlabel="gradient steps, all tasks together", ylabel="gate (no unit)")
        panel.set_title(name, fontsize=9)
        figure.colorbar(image, ax=panel, label=f"share of gates in each interval of {1 / BINS:g} (%)")
    return figure


def _factors_figure(metrics: Metrics) -> Figure:
    settings, methods = metrics["settings"], {**metrics["results"], **metrics["baselines"]}
    figure, panels = new_figure(2, len(settings["mask_spreads"]))
    styles = [STYLES["shared"]["color"], STYLES["masked"]["color"], STYLES["independent"]["color"]]
    factors = sorted({0.0, *settings["weight_decay"], *settings["mask_weight_decay"]})
    for place, panel in enumerate(panels):
        spread, number = settings["mask_spreads"][place // 2], (MSE, NEAR_END)[place % 2]
        for schedule, color in zip(settings["temperatures"], styles):
            for where, line, marker in (("W", "-", "o"), ("M", "--", "s")):
                chosen = [each for each in penalties(settings) if each[0] in ("", where)]
                found = [methods[condition_name(penalty, schedule, spread)][number] for penalty in chosen]
                panel.errorbar(
                    [factors.index(factor) for _, factor in chosen],
                    [each["mean"] for each in found],
                    [each.get("interval", 0.0) for each in found],
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
    panels[0].legend(fontsize=7, title=bands(len(metrics["seeds"]), "bars"), title_fontsize=7)
    return figure
