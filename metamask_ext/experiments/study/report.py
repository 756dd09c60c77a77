"""The common study's claim on cost, its tables and its figure, from a run's metrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..engine.claims import Claim, Metrics
from ..engine.figures import STYLES, bands, new_figure, plot_seeds
from ..engine.statistics import cell, half_width, summarized
from ..engine.tables import Rows, Tables, cells
from .findings import AT_THE_END, JUST_LEARNED, cost_ratio, needed
from .new_tasks import FROM_SCRATCH, WAYS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "masked": "masked, sigmoid gate",
    "masked+ewc": "masked, EWC on W, in sequence",
    "hard": "masked, hard gate",
    "lottery": "masks on frozen W",
    "shared": "one shared net",
    "independent": "a net a task",
    "maml": "MAML",
    "sequence": "one net, in sequence",
}
SMALLEST = 1e-8
"""Errors below this are drawn as this: they are rounding."""


def cost_claim() -> Claim:
    """Section 2.1 on question 4."""
    return Claim(
        "An update of W and one mask is a step of ordinary backpropagation (section 2.1): it takes {masked:.2f} times the plain "
        "net's; MAML, which goes through second derivatives, takes {maml:.1f} times as long for a meta-step on {tasks:.0f} tasks.",
        lambda metrics: {
            "masked": cost_ratio(metrics, "masked"),
            "maml": cost_ratio(metrics, "maml"),
            "tasks": metrics["settings"]["study"]["maml"]["tasks"],
        },
        lambda numbers: numbers["masked"] < numbers["maml"],
    )


def tables(metrics: Metrics) -> Tables:
    """The common study's tables: by method, and by way to learn a new task."""
    name = metrics["study"]["score"]["name"]
    return [("Methods", _by_method(metrics)), (f"New tasks: {name}, learned from n samples", _by_way(metrics))]


def _by_method(metrics: Metrics) -> Rows:
    study = metrics["study"]
    name, order = study["score"]["name"], study["order"]
    head = ["method", f"trained tasks: {name}"]
    if order:
        head += [JUST_LEARNED, AT_THE_END]
    methods = {method: numbers for kind in ("results", "baselines") for method, numbers in metrics[kind].items() if name in numbers}
    known = (name, JUST_LEARNED, AT_THE_END)
    further = list(dict.fromkeys(key for numbers in methods.values() for key in numbers if key not in known))
    rows = [[*head, *further, f"step over the shared net's {study['cost']['milliseconds']['shared']:.3g} ms"]]
    for method, numbers in methods.items():
        row = [LABELS.get(method, method), cell(numbers[name])]
        if order:
            row += [_in_order(method, numbers, key) for key in (JUST_LEARNED, AT_THE_END)]
        rows.append([*row, *cells(numbers, further), _cost(metrics, method)])
    return rows


def _in_order(method: str, numbers: Metrics, key: str) -> str:
    if key in numbers:
        return cell(numbers[key])
    return {"shared": f"see {LABELS['sequence']}", "independent": "as trained"}.get(method, "-")


def _cost(metrics: Metrics, method: str) -> str:
    if method in metrics["study"]["cost"]["milliseconds"]:
        return f"{cost_ratio(metrics, method):.2f}"
    if method == "masked+ewc":
        return "masked's, and the penalty"
    return "the same step" if method in metrics["study"]["methods"] else "-"


def _by_way(metrics: Metrics) -> Rows:
    study = metrics["study"]
    most = study["samples"][-1]
    within = f"n to be within {study['score']['margin']:g} of a fresh net with {most:,}"
    rows = [["method", "way", *(f"n = {count:,}" for count in study["samples"]), within]]
    for method in study["methods"]:
        for way in WAYS:
            if way in study["new"][method]:
                enough = needed(metrics, method, way)
                found = [cell(summarized(values)) for values in zip(*study["new"][method][way])]
                rows.append([LABELS[method], way, *found, f"{enough:,}" if enough < math.inf else f"over {most:,}"])
    return rows


@dataclass(frozen=True)
class _ScoreAxis:
    """An axis of scores: logarithmic for errors.

    Attributes:
        label: of the axis.
        higher: whether higher scores are better.
    """

    label: str
    higher: bool

    @property
    def scale(self) -> str:
        return "linear" if self.higher else "log"

    def curve(self, axes: Axes, style: str, label: str, steps: Sequence[float], values: Sequence[Sequence[float]]) -> None:
        shown = values if self.higher else [[max(value, SMALLEST) for value in seed] for seed in values]
        plot_seeds(axes, style, label, steps, shown, geometric=not self.higher)

    def interval(self, values: Sequence[float]) -> Iterator[float]:
        """The lower end, the mean and the upper end of the interval of the mean."""
        known = values if self.higher else [math.log(max(value, SMALLEST)) for value in values]
        mean, width = statistics.fmean(known), half_width(known) if len(known) > 1 else 0.0
        return (value if self.higher else math.exp(value) for value in (mean - width, mean, mean + width))

    def set_limits(self, axes: Axes) -> None:
        """Limits that show the means: a band on few seeds can be wider than all there is to see."""
        values = [float(value) for line in axes.lines for value in np.asarray(line.get_ydata())]
        low, high = min(values), max(values)
        axes.set_ylim(*((low - 0.1 * (high - low), high + 0.1 * (high - low)) if self.higher else (low / 5, high * 5)))


def figure(metrics: Metrics) -> Figure:
    """Four panels, one for each question; the two with legends on the right."""
    score = metrics["study"]["score"]
    name, unit, higher = score["name"], score["unit"], score["higher_is_better"]
    axis = _ScoreAxis(name if unit in name else f"{name} ({unit})", higher)
    made, (first, second, third, fourth) = new_figure(2, rows=2)
    made.set_size_inches(12, 8)
    _plot_trained(first, metrics, axis)
    _plot_new_tasks(second, metrics, axis)
    _plot_cost(third, metrics)
    for axes in (first, third):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    _plot_forgetting(fourth, metrics, axis)
    for axes in (second, fourth):
        if axes.lines:
            axis.set_limits(axes)
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "one task: nothing to forget", ha="center", va="center", transform=axes.transAxes)
    kind = "" if higher else f"geometric means, {SMALLEST:g} for smaller errors; "
    made.suptitle(kind + bands(len(metrics["seeds"])), fontsize=9)
    return made


def _plot_trained(axes: Axes, metrics: Metrics, axis: _ScoreAxis) -> None:
    """Question 1: a point and an interval for each method."""
    study = metrics["study"]
    for place, method in enumerate(study["methods"]):
        low, middle, high = axis.interval(study["trained"][method])
        color = STYLES[method]["color"]
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", capsize=3, color=color)
    axes.set(xlabel=axis.label, xscale=axis.scale)
    axes.set_yticks(range(len(study["methods"])), [LABELS[method] for method in study["methods"]])
    axes.set_title("trained tasks, in random order", fontsize=10)


def _plot_new_tasks(axes: Axes, metrics: Metrics, axis: _ScoreAxis) -> None:
    """Question 2: a curve for each way to learn a new task."""
    study = metrics["study"]
    new, samples = study["new"], study["samples"]
    for way in WAYS:
        if way in new["masked"]:
            axis.curve(axes, way, f"masked: {way}", samples, new["masked"][way])
    for method in ("shared", "independent", "maml"):
        for way in WAYS:
            if way in new.get(method, ()) and (method, way) != ("maml", "everything"):
                style = "independent" if way == FROM_SCRATCH else method
                axis.curve(axes, style, f"{LABELS[method]}: {way}", samples, new[method][way])
    axes.set(xlabel="samples of a new task (number)", ylabel=axis.label, xscale="log", yscale=axis.scale)
    axes.set_title("new tasks", fontsize=10)


def _plot_cost(axes: Axes, metrics: Metrics) -> None:
    """Question 4: the time of a step of each method."""
    times = metrics["study"]["cost"]["milliseconds"]
    for place, method in enumerate(times):
        ratio = cost_ratio(metrics, method)
        axes.plot(ratio, place, "o", color=STYLES[method]["color"])
        axes.annotate(f"{ratio:.2f}", (ratio, place), (8, -3), textcoords="offset points", fontsize=8)
    axes.set(xlabel="time of a step over the shared net's (ratio)", xscale="log")
    axes.margins(x=0.15)
    low, high = axes.get_xlim()
    # The labels that matplotlib gives less than a decade overlap.
    axes.minorticks_off()
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks(range(len(times)), [LABELS[method] for method in times])
    axes.set_title("cost", fontsize=10)


def _plot_forgetting(axes: Axes, metrics: Metrics, axis: _ScoreAxis) -> None:
    """Question 3: the score of earlier tasks over the number of tasks learned."""
    for method, kept in metrics["study"]["order"].items():
        axis.curve(axes, method, LABELS[method], range(1, 1 + len(kept["earlier"][0])), kept["earlier"])
    axes.set(xlabel="tasks learned before the latest (number)", ylabel=f"these: {axis.label}", yscale=axis.scale)
    axes.locator_params(axis="x", integer=True)
    axes.set_title("forgetting: tasks one after another", fontsize=10)
