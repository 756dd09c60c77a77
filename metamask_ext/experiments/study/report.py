"""The common study's numbers, tables and figure, from what metrics.json holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ..engine.claims import Claim
from ..engine.run_folder import STYLES, bands, cell, half_width, new_figure, plot_seeds, summarized
from .new_tasks import FROM_SCRATCH, WAYS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "masked": "masked, sigmoid gate",
    "hard": "masked, hard gate",
    "lottery": "masks on frozen W",
    "shared": "one shared net",
    "independent": "a net a task",
    "maml": "MAML",
    "sequence": "one net, in sequence",
}
JUST_LEARNED, AT_THE_END = "in order: just learned", "in order: at the end"
SMALLEST = 1e-8
"""Errors below this are drawn as this: they are rounding."""
Metrics = Mapping[str, Any]


def trained(metrics: Metrics, method: str) -> float:
    """Question 1: the score on the trained tasks."""
    return statistics.fmean(metrics["study"]["trained"][method])


def new_tasks(metrics: Metrics, method: str, way: str, samples: int) -> float:
    """Question 2: the score on new tasks, learned by this way from so many samples."""
    study = metrics["study"]
    place = study["samples"].index(samples)
    return statistics.fmean(seed[place] for seed in study["new"][method][way])


def needed(metrics: Metrics, method: str, way: str) -> float:
    """Question 2: the fewest samples from which new tasks are learned as well, within the score's margin, as by a fresh plain net
    from the most; infinity if none of the numbers tried is enough."""
    study = metrics["study"]
    fresh = "independent" if "independent" in study["methods"] else "shared"
    score, higher = new_tasks(metrics, fresh, FROM_SCRATCH, study["samples"][-1]), study["score"]["higher_is_better"]
    score -= study["score"]["margin"] if higher else -study["score"]["margin"]
    for samples in study["samples"]:
        found = new_tasks(metrics, method, way, samples)
        if found >= score if higher else found <= score:
            return samples
    return math.inf


def after_learning(metrics: Metrics, method: str) -> float:
    """Question 3: the score of a task when it was just learned, the tasks in order."""
    return statistics.fmean(value for seed in metrics["study"]["order"][method]["after"] for value in seed)


def at_the_end(metrics: Metrics, method: str) -> float:
    """Question 3: the score of the tasks when all were learned, one after another."""
    return statistics.fmean(value for seed in metrics["study"]["order"][method]["end"] for value in seed)


def cost_ratio(metrics: Metrics, method: str) -> float:
    """Question 4: the time of a training step over that of the shared net. ``maml``: of a meta-step on several tasks."""
    times = metrics["study"]["cost"]["milliseconds"]
    return times[method] / times["shared"]


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


def tables(metrics: Metrics) -> list[tuple[str, list[list[str]]]]:
    """The common study's tables: by method, and by way to learn a new task."""
    study = metrics["study"]
    name, order = study["score"]["name"], study["order"]
    head = ["method", f"trained tasks: {name}"]
    if order:
        head += [JUST_LEARNED, AT_THE_END]
    methods = {method: numbers for kind in ("results", "baselines") for method, numbers in metrics[kind].items() if name in numbers}
    further = dict.fromkeys(key for numbers in methods.values() for key in numbers if key not in (name, JUST_LEARNED, AT_THE_END))
    rows = [[*head, *further, f"step over the shared net's {study['cost']['milliseconds']['shared']:.3g} ms"]]
    for method, numbers in methods.items():
        row = [LABELS.get(method, method), cell(numbers[name])]
        if order:
            row += [_in_order(method, numbers, key) for key in (JUST_LEARNED, AT_THE_END)]
        row += [cell(numbers[key]) if key in numbers else "-" for key in further]
        if method in study["cost"]["milliseconds"]:
            row.append(f"{cost_ratio(metrics, method):.2f}")
        else:
            row.append("the same step" if method in study["methods"] else "-")
        rows.append(row)
    most = study["samples"][-1]
    within = f"n to be within {study['score']['margin']:g} of a fresh net with {most:,}"
    new = [["method", "way", *(f"n = {count:,}" for count in study["samples"]), within]]
    for method in study["methods"]:
        for way in WAYS:
            if way in study["new"][method]:
                enough = needed(metrics, method, way)
                cells = [_cell(values) for values in zip(*study["new"][method][way])]
                new.append([LABELS[method], way, *cells, f"{enough:,}" if enough < math.inf else f"over {most:,}"])
    return [("Methods", rows), (f"New tasks: {name}, learned from n samples", new)]


def _in_order(method: str, numbers: Mapping[str, Any], key: str) -> str:
    if key in numbers:
        return cell(numbers[key])
    return {"shared": f"see {LABELS['sequence']}", "independent": "as trained"}.get(method, "-")


def figure(metrics: Metrics) -> Any:
    """Four panels, one for each question; the two with legends on the right."""
    study = metrics["study"]
    made, (first, second, third, fourth) = new_figure(2, rows=2)
    made.set_size_inches(12, 8)
    name, unit, higher = study["score"]["name"], study["score"]["unit"], study["score"]["higher_is_better"]
    axis, scale = name if unit in name else f"{name} ({unit})", "linear" if higher else "log"
    methods = study["methods"]

    def curve(axes: Axes, style: str, label: str, steps: Sequence[float], values: Sequence[Sequence[float]]) -> None:
        shown = values if higher else [[max(value, SMALLEST) for value in seed] for seed in values]
        plot_seeds(axes, style, label, steps, shown, geometric=not higher)

    for place, method in enumerate(methods):
        values = study["trained"][method] if higher else [math.log(max(value, SMALLEST)) for value in study["trained"][method]]
        mean, width = statistics.fmean(values), half_width(values) if len(values) > 1 else 0.0
        low, middle, high = (value if higher else math.exp(value) for value in (mean - width, mean, mean + width))
        color = STYLES[method]["color"]
        first.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", capsize=3, color=color)
    first.set(xlabel=axis, xscale=scale)
    first.set_yticks(range(len(methods)), [LABELS[method] for method in methods])
    first.set_title("trained tasks, in random order", fontsize=10)

    for way in WAYS:
        if way in study["new"]["masked"]:
            curve(second, way, f"masked: {way}", study["samples"], study["new"]["masked"][way])
    for method in ("shared", "independent", "maml"):
        for way in WAYS:
            if way in study["new"].get(method, ()) and (method, way) != ("maml", "everything"):
                style = "independent" if way == FROM_SCRATCH else method
                curve(second, style, f"{LABELS[method]}: {way}", study["samples"], study["new"][method][way])
    second.set(xlabel="samples of a new task (number)", ylabel=axis, xscale="log", yscale=scale)
    second.set_title("new tasks", fontsize=10)

    times = study["cost"]["milliseconds"]
    for place, method in enumerate(times):
        ratio = cost_ratio(metrics, method)
        third.plot(ratio, place, "o", color=STYLES[method]["color"])
        third.annotate(f"{ratio:.2f}", (ratio, place), (8, -3), textcoords="offset points", fontsize=8)
    third.set(xlabel="time of a step over the shared net's (ratio)", xscale="log")
    third.margins(x=0.15)
    low, high = third.get_xlim()
    # The labels that matplotlib gives less than a decade overlap.
    third.minorticks_off()
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    third.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    third.set_yticks(range(len(times)), [LABELS[method] for method in times])
    third.set_title("cost", fontsize=10)
    for axes in (first, third):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)

    for method, kept in study["order"].items():
        curve(fourth, method, LABELS[method], range(1, 1 + len(kept["earlier"][0])), kept["earlier"])
    fourth.set(xlabel="tasks learned before the latest (number)", ylabel=f"these: {axis}", yscale=scale)
    fourth.locator_params(axis="x", integer=True)
    fourth.set_title("forgetting: tasks one after another", fontsize=10)
    for axes in (second, fourth):
        if axes.lines:
            values = [float(value) for line in axes.lines for value in cast(Any, line.get_ydata())]
            low, high = min(values), max(values)
            # A band on few seeds can be wider than all there is to see.
            axes.set_ylim(*((low / 5, high * 5) if scale == "log" else (low - 0.1 * (high - low), high + 0.1 * (high - low))))
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "one task: nothing to forget", ha="center", va="center", transform=axes.transAxes)
    kind = "" if higher else f"geometric means, {SMALLEST:g} for smaller errors; "
    made.suptitle(kind + bands(len(metrics["seeds"])), fontsize=9)
    return made


def _cell(values: Sequence[float]) -> str:
    return cell(summarized(values))
