"""The common study's tables and figure, from what metrics.json holds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .output import STYLES, bands, cell, half_width, new_figure, plot_seeds, summarized

LABELS = {
    "masked": "masked, sigmoid gate",
    "hard": "masked, hard gate",
    "lottery": "masks on frozen W",
    "shared": "one shared net",
    "independent": "a net a task",
    "maml": "MAML",
    "sequence": "one net, in sequence",
}
WAYS = ("look-up", "superposition", "mask only", "inner steps", "everything")
ORDER = ("after", "end")
Metrics = Mapping[str, Any]


def tables(metrics: Metrics) -> list[tuple[str, list[list[str]]]]:
    """The common study's tables: by method, and by way to learn a new task."""
    study = metrics["study"]
    name, order, cost = study["score"]["name"], study["order"], study["cost"]["milliseconds"]
    head = ["method", f"trained tasks: {name}"]
    if order:
        head += ["in order: just learned", "in order: at the end"]
    rows = [head + ["step, times the shared net's"]]
    for method in study["methods"]:
        row = [LABELS[method], _cell(study["trained"][method])]
        if order:
            kept = order.get(method)
            row += (
                ["-", "-"] if kept is None else [_cell([statistics.fmean(seed) for seed in kept[key]]) for key in ("after", "end")]
            )
        rows.append([*row, f"{cost[method] / cost['shared']:.2f}" if method in cost else "-"])
    new = [["method", "way", *(f"{count:,} sample{'s' if count > 1 else ''}" for count in study["samples"])]]
    for method in study["methods"]:
        for way in WAYS:
            if way in study["new"][method]:
                new.append([LABELS[method], way, *(_cell(values) for values in zip(*study["new"][method][way]))])
    return [("Methods", rows), (f"New tasks: {name} after so many samples", new)]


def figure(metrics: Metrics) -> Any:
    """Four panels, one for each question."""
    study = metrics["study"]
    name = study["score"]["name"]
    unit = "" if study["score"]["unit"] in name else f" ({study['score']['unit']})"
    scale = "linear" if study["score"]["higher_is_better"] else "log"
    made, (trained, new, order, cost) = new_figure(2, rows=2)
    methods = study["methods"]
    places = range(len(methods))

    for place, method in enumerate(methods):
        values = study["trained"][method]
        width = half_width(values) if len(values) > 1 else 0
        style = {key: value for key, value in STYLES[method].items() if key == "color"}
        trained.errorbar(statistics.fmean(values), place, xerr=width, fmt="o", capsize=3, **style)
        if method in study["cost"]["milliseconds"]:
            times = study["cost"]["milliseconds"]
            cost.barh(place, times[method] / times["shared"], **style)
            cost.text(times[method] / times["shared"], place, f" {times[method] / times['shared']:.2f}", va="center", fontsize=8)
    for axes in (trained, cost):
        axes.set_yticks(places, [LABELS[method] for method in methods])
        axes.invert_yaxis()
    trained.set(xlabel=f"{name}{unit}", xscale=scale)
    trained.set_title("1. trained tasks, in random order", fontsize=10)

    for way in WAYS:
        if way in study["new"]["masked"]:
            plot_seeds(new, way, f"masked: {way}", study["samples"], study["new"]["masked"][way])
    for method, way in (("shared", "everything"), ("independent", "everything"), ("maml", "inner steps")):
        if method in methods:
            plot_seeds(new, method, f"{LABELS[method]}: {way}", study["samples"], study["new"][method][way])
    new.set(xlabel="samples of a new task (number)", ylabel=f"{name}{unit}", xscale="log", yscale=scale)
    new.set_title("2. new tasks", fontsize=10)
    new.legend(fontsize=7)

    for method, kept in study["order"].items():
        learned = range(2, 2 + len(kept["earlier"][0]))
        plot_seeds(order, method, LABELS[method], learned, kept["earlier"])
    order.set(xlabel="tasks learned, one after another (number)", ylabel=f"{name} of the earlier ones{unit}", yscale=scale)
    order.set_title("3. forgetting", fontsize=10)
    if study["order"]:
        order.legend(fontsize=7)
    else:
        order.text(0.5, 0.5, "one task: nothing to forget", ha="center", va="center", transform=order.transAxes)

    cost.set(xlabel="time of a training step, times the shared net's (ratio)")
    cost.set_title("4. cost", fontsize=10)
    seeds = len(next(iter(study["trained"].values())))
    made.suptitle(bands(seeds), fontsize=8)
    return made


def _cell(values: Sequence[float]) -> str:
    return cell(summarized(values))
