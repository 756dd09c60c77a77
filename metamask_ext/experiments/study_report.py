"""The common study's numbers, tables and figure, from what metrics.json holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .output import STYLES, bands, cell, half_width, new_figure, plot_seeds, summarized
from .study_new import FROM_SCRATCH, WAYS

LABELS = {
    "masked": "masked, sigmoid gate",
    "hard": "masked, hard gate",
    "lottery": "masks on frozen W",
    "shared": "one shared net",
    "independent": "a net a task",
    "maml": "MAML",
    "sequence": "one net, in sequence",
}
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


def tables(metrics: Metrics) -> list[tuple[str, list[list[str]]]]:
    """The common study's tables: by method, and by way to learn a new task."""
    study = metrics["study"]
    name, order = study["score"]["name"], study["order"]
    head = ["method", f"trained tasks: {name}"]
    if order:
        head += ["in order: just learned", "in order: at the end"]
    rows = [[*head, f"step over the shared net's {study['cost']['milliseconds']['shared']:.3g} ms"]]
    for method in study["methods"]:
        row = [LABELS[method], _cell(study["trained"][method])]
        if order:
            row += [_in_order(metrics, method, key) for key in ("after", "end")]
        timed = method in study["cost"]["milliseconds"]
        rows.append([*row, f"{cost_ratio(metrics, method):.2f}" if timed else "the same step"])
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


def _in_order(metrics: Metrics, method: str, key: str) -> str:
    study = metrics["study"]
    if method in study["order"]:
        return _cell([statistics.fmean(seed) for seed in study["order"][method][key]])
    return "see in sequence" if method == "shared" else "as trained"


def figure(metrics: Metrics) -> Any:
    """Four panels, one for each question; the two with legends on the right."""
    study = metrics["study"]
    made, (first, second, fourth, third) = new_figure(2, rows=2)
    made.set_size_inches(12, 8)
    name, unit = study["score"]["name"], study["score"]["unit"]
    axis = name if unit in name else f"{name} ({unit})"
    scale = "linear" if study["score"]["higher_is_better"] else "log"
    methods, times = study["methods"], study["cost"]["milliseconds"]

    for place, method in enumerate(methods):
        values, color = study["trained"][method], STYLES[method]["color"]
        width = half_width(values) if len(values) > 1 else 0
        first.errorbar(statistics.fmean(values), place, xerr=width, fmt="o", capsize=3, color=color)
        if method in times:
            ratio = cost_ratio(metrics, method)
            fourth.plot(ratio, place, "o", color=color)
            fourth.annotate(f"{ratio:.2f}", (ratio, place), (6, -3), textcoords="offset points", fontsize=8)
    for axes, shown in ((first, methods), (fourth, [method for method in methods if method in times])):
        axes.set_yticks([methods.index(method) for method in shown], [LABELS[method] for method in shown])
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    first.set(xlabel=axis, xscale=scale)
    first.set_title("trained tasks, in random order", fontsize=10)

    for way in WAYS:
        if way in study["new"]["masked"]:
            plot_seeds(second, way, f"masked: {way}", study["samples"], study["new"]["masked"][way])
    for method in ("shared", "independent", "maml"):
        for way in WAYS:
            if way in study["new"].get(method, ()) and (method, way) != ("maml", "everything"):
                style = "independent" if way == FROM_SCRATCH else method
                plot_seeds(second, style, f"{LABELS[method]}: {way}", study["samples"], study["new"][method][way])
    second.set(xlabel="samples of a new task (number)", ylabel=axis, xscale="log", yscale=scale)
    second.set_title("new tasks", fontsize=10)

    for method, kept in study["order"].items():
        learned = range(2, 2 + len(kept["earlier"][0]))
        plot_seeds(third, method, LABELS[method], learned, kept["earlier"])
    third.set(xlabel="tasks learned, one after another (number)", ylabel=f"earlier tasks: {axis}", yscale=scale)
    third.set_title("forgetting: tasks one after another", fontsize=10)
    for axes in (second, third):
        if axes.lines:
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            axes.text(0.5, 0.5, "one task: nothing to forget", ha="center", va="center", transform=axes.transAxes)

    fourth.set(xlabel="time of a step over the shared net's (ratio)", xscale="log")
    fourth.margins(x=0.15)
    fourth.set_title("cost", fontsize=10)
    made.suptitle(bands(len(metrics["seeds"])), fontsize=9)
    return made


def _cell(values: Sequence[float]) -> str:
    return cell(summarized(values))
