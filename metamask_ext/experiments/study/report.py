"""The common study's claim on cost, its tables and its figure, from a run's metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..engine.claims import Claim, Metrics
from ..engine.figures import STYLES, bands, label_lines, new_figure, plot_seeds
from ..engine.statistics import cell, interval, summarized
from ..engine.tables import Rows, Tables, cells
from .findings import AT_THE_END, JUST_LEARNED, cost_ratio, in_order, needed
from .new_tasks import FROM_SCRATCH, INNER_STEPS, LOOK_UP, MASK_ONLY, SUPERPOSITION, WAYS

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
"""Errors below this are drawn as this, in a band that says so: they are rounding."""
ROUNDING = f"grey: below {SMALLEST:g}, rounding"


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


def forgetting_claim() -> Claim:
    """Question 3, of the experiments whose score is an error, where masks do not protect what W forgets."""
    return Claim(
        "Tasks one after another: the masked net forgets as one net that is fine-tuned does. Its error goes from "
        "{masked_learned:.2g} on a task just learned to {masked:.2g} on all at the end, that net's from {sequence_learned:.2g} to "
        "{sequence:.2g}; of masks on a frozen W it stays {lottery:.2g}.",
        lambda metrics: in_order(metrics, "masked", "sequence", "lottery"),
        lambda n: (
            n["masked"] > max(2 * n["masked_learned"], 0.5 * n["sequence"]) and abs(n["lottery"] - n["lottery_learned"]) < 1e-9
        ),
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


class _Line(NamedTuple):
    """A line of :data:`STYLES` ``style`` with a curve for each seed."""

    style: str
    label: str
    values: Sequence[Sequence[float]]


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

    def curves(self, axes: Axes, steps: Sequence[float], lines: Sequence[_Line]) -> None:
        """Draw lines that end at one place, and name them there."""
        for line in lines:
            plot_seeds(axes, line.style, line.label, steps, self._shown(line), geometric=not self.higher, band=False)
        axes.set_yscale(self.scale)
        self.set_limits(axes)
        ends = [[seed[-1] for seed in self._shown(line)] for line in lines]
        label_lines(axes, [line.label for line in lines], ends, geometric=not self.higher)

    def _shown(self, line: _Line) -> list[list[float]]:
        return [[value if self.higher else max(value, SMALLEST) for value in seed] for seed in line.values]

    def interval(self, values: Sequence[float]) -> tuple[float, float, float]:
        """The lower end, the mean and the upper end of the interval of the mean."""
        return interval(values if self.higher else [max(value, SMALLEST) for value in values], geometric=not self.higher)

    def set_limits(self, axes: Axes) -> None:
        """Limits that show the means; errors that are rounding lie in a band that says so."""
        values = [float(value) for line in axes.lines for value in np.asarray(line.get_ydata())]
        low, high = min(values), max(values)
        axes.set_ylim(*((low - 0.1 * (high - low), high + 0.1 * (high - low)) if self.higher else (low / 3, high * 3)))
        if not self.higher and low <= SMALLEST:
            axes.axhspan(low / 3, 2 * SMALLEST, color="0.9", linewidth=0, zorder=0)
            axes.annotate(ROUNDING, (0.02, low / 2.5), xycoords=("axes fraction", "data"), fontsize=7, color="0.4")


def figure(metrics: Metrics) -> Figure:
    """A panel for each question; where there is one task, none for forgetting."""
    score, order = metrics["study"]["score"], metrics["study"]["order"]
    name, unit, higher = score["name"], score["unit"], score["higher_is_better"]
    axis = _ScoreAxis(name if unit in name else f"{name} ({unit})", higher)
    made, panels = new_figure(2, rows=2) if order else new_figure(3)
    made.set_size_inches(*((12, 8) if order else (15, 4)))
    first, second, third, *fourth = panels
    _plot_trained(first, metrics, axis)
    _plot_new_tasks(second, metrics, axis)
    _plot_cost(third, metrics)
    for axes in (first, third):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    for axes in fourth:
        _plot_forgetting(axes, metrics, axis)
    kind = "" if higher else "geometric means; "
    made.suptitle(kind + bands(len(metrics["seeds"]), "bars"), fontsize=9)
    return made


def _plot_trained(axes: Axes, metrics: Metrics, axis: _ScoreAxis) -> None:
    """Question 1: a point and an interval for each method."""
    study = metrics["study"]
    for place, method in enumerate(study["methods"]):
        low, middle, high = axis.interval(study["trained"][method])
        color = STYLES[method]["color"]
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", capsize=3, color=color)
    axes.set(xlabel=axis.label, xscale=axis.scale)
    if not axis.higher and min(map(min, (axis.interval(study["trained"][method]) for method in study["methods"]))) <= SMALLEST:
        low = axes.get_xlim()[0]
        axes.axvspan(low, 2 * SMALLEST, color="0.9", linewidth=0, zorder=0)
        axes.set_xlim(left=low)
        axes.annotate(
            ROUNDING,
            (2 * SMALLEST, 0.03),
            (4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=7,
            color="0.4",
        )
    axes.set_yticks(range(len(study["methods"])), [LABELS[method] for method in study["methods"]])
    axes.set_title("trained tasks, in random order", fontsize=10)


_SHOWN = (("masked", MASK_ONLY), ("masked", LOOK_UP), ("masked", SUPERPOSITION), ("maml", INNER_STEPS))
_BASELINES = ("shared", "independent")


def _plot_new_tasks(axes: Axes, metrics: Metrics, axis: _ScoreAxis) -> None:
    """Question 2: a curve for each way to learn a new task; those of the hard gate and of W trained too are in the table."""
    study = metrics["study"]
    new, samples = study["new"], study["samples"]
    lines = []
    for method, way in (*_SHOWN, *((method, way) for method in _BASELINES for way in WAYS)):
        if way in new.get(method, ()):
            style = way if method == "masked" else "independent" if way == FROM_SCRATCH else method
            label = f"masked: {way}" if method == "masked" else f"{LABELS[method]}: {way}"
            lines.append(_Line(style, label, new[method][way]))
    axes.set(xlabel="samples of a new task (number)", ylabel=axis.label, xscale="log")
    axes.set_title("new tasks", fontsize=10)
    axis.curves(axes, samples, lines)


def _plot_cost(axes: Axes, metrics: Metrics) -> None:
    """Question 4: the time of a step of each method."""
    times = metrics["study"]["cost"]["milliseconds"]
    for place, method in enumerate(times):
        ratio = cost_ratio(metrics, method)
        axes.plot(ratio, place, "o", color=STYLES[method]["color"])
        axes.annotate(f"{ratio:.2f}", (ratio, place), (8, -3), textcoords="offset points", fontsize=8)
    axes.set(xlabel="time of a step over the shared net's (ratio)", xscale="log")
    axes.margins(x=0.2)
    low, high = axes.get_xlim()
    # The labels that matplotlib gives less than a decade overlap.
    axes.minorticks_off()
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks(range(len(times)), [LABELS[method] for method in times])
    axes.set_title("cost", fontsize=10)


def _plot_forgetting(axes: Axes, metrics: Metrics, axis: _ScoreAxis) -> None:
    """Question 3: the score of earlier tasks over the number of tasks learned."""
    order = metrics["study"]["order"]
    lines = [_Line(method, LABELS[method], kept["earlier"]) for method, kept in order.items()]
    steps = range(1, 1 + len(lines[0].values[0]))
    axes.set(xlabel="tasks learned before the latest one (number)", ylabel=f"mean of these tasks: {axis.label}")
    axes.locator_params(axis="x", integer=True)
    axes.set_title("forgetting: tasks one after another", fontsize=10)
    axis.curves(axes, steps, lines)
