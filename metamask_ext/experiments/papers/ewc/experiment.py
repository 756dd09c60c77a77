"""Elastic weight consolidation beside masks on permuted digits: Kirkpatrick et al., arXiv:1612.00796, sections 2 and 2.1."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from metamask_ext.data import load_digits

from ...engine.claims import Claim, Metrics, Numbers, mean
from ...engine.figures import Figures, Style, bands, label_lines, legend_above, new_figure, plot_seeds
from ...engine.jobs import Job, Json, Key
from ...engine.run_folder import RunFolder, Scores
from ...engine.settings import Changes, OptionError
from ...engine.statistics import cell, summarized
from ...engine.tables import Rows, Tables, table_of
from .settings import Settings
from .training import curve, end_of, logistic, many, overlap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE = ("sequence", "sequence+l2", "sequence+ewc")
"""The methods of part A."""
MANY = ("sequence", "sequence+ewc", "lottery", "masked", "masked+ewc")
"""The methods of part B."""
TUNED = ("sequence+l2", "sequence+ewc", "masked+ewc")
LABELS = {
    "sequence": "plain training",
    "sequence+l2": "L2 penalty",
    "sequence+ewc": "EWC",
    "lottery": "masks on frozen W",
    "masked": "masks, W trained",
    "masked+ewc": "masks, EWC on W",
}
LINES: dict[str, Style] = {
    "sequence": {"color": "#0072B2", "linestyle": "-."},
    "sequence+l2": {"color": "#009E73", "linestyle": "--"},
    "sequence+ewc": {"color": "#D55E00", "linestyle": "-"},
    "lottery": {"color": "#E69F00", "linestyle": (0, (5, 1))},
    "masked": {"color": "#56B4E9", "linestyle": ":"},
    "masked+ewc": {"color": "#000000", "linestyle": "-"},
}
BASELINES = ["sequence", "sequence+l2"]
QUICK: Changes = {
    "seeds": 1,
    "steps": 120,
    "strengths": [100.0],
    "samples": 100,
    "points": 3,
    "curve": {"width": 50},
    "many": {"tasks": 4, "width": 50},
    "overlap": {"steps": 100, "depth": 2, "width": 50},
}
PAPER = {
    "EWC on 10 permutations": "94 % (the paper, figure 2B, 60,000 digits)",
    "the same, 2 x 1,000 units, lambda 1": "83 % (Avalanche's target)",
}

QUESTION = """Can a net learn a task after another and keep the earlier ones, if it holds the parameters that these need? Elastic
weight consolidation (Kirkpatrick et al., arXiv:1612.00796) does so by the diagonal of the Fisher information: the experiment on
permuted MNIST of the paper's figure 2, beside masks. The proposal's loop trains W with every task, and so forgets: EWC on W beside
trained masks is the remedy, masks over a frozen W forget nothing at all."""


def after(part: str, when: str) -> str:
    """The name of an accuracy in the metrics."""
    return f"{part}: test accuracy {when} (%)"


FIRST, LAST, ALL, LEARNED = "of the first task at the end", "of the last task at the end", "of all tasks at the end", "just learned"
A, B = "3 tasks", "10 tasks"


def _three(metrics: Metrics) -> Numbers:
    found = {}
    for method in CURVE:
        key = method.replace("sequence+", "").replace("sequence", "plain")
        found[f"{key}_first"] = mean(metrics, method, after(A, FIRST))
        found[f"{key}_last"] = mean(metrics, method, after(A, LAST))
    return {**found, "tasks": metrics["settings"]["curve"]["tasks"]}


def _ten(metrics: Metrics) -> Numbers:
    names = {"sequence": "plain", "sequence+ewc": "ewc", "lottery": "frozen", "masked": "masked", "masked+ewc": "both"}
    found = {}
    for method, key in names.items():
        found[key], found[f"{key}_learned"] = (mean(metrics, method, after(B, when)) for when in (ALL, LEARNED))
    forgot = (abs(a - b) for run in metrics["many"]["lottery"] for a, b in zip(run["accuracy"][-1], _just_learned(run)))
    return {**found, "forgot": max(forgot), "tasks": metrics["settings"]["many"]["tasks"]}


def _just_learned(run: Json) -> list[float]:
    return [accuracies[-1] for accuracies in run["accuracy"]]


def _by_layer(metrics: Metrics, square: int, kind: str) -> list[float]:
    """The mean overlap over seeds, by layer from the input on."""
    return [fmean(values) for values in zip(*(run[kind] for run in metrics["overlap"][str(square)]))]


def _overlaps(metrics: Metrics) -> Numbers:
    small, large = metrics["settings"]["overlap"]["squares"]
    found = {}
    for kind in ("fisher", "masks"):
        layers = {"small": _by_layer(metrics, small, kind), "large": _by_layer(metrics, large, kind)}
        for key, values in layers.items():
            found[f"{kind}_{key}_first"], found[f"{kind}_{key}_last"] = values[0], values[-1]
    return {**found, "small": small, "large": large}


def _logistic(metrics: Metrics) -> Numbers:
    runs = metrics["logistic"]
    return {key.replace(" ", "_"): fmean(run[key] for run in runs) for key in runs[0]}


def _is_full(metrics: Metrics) -> bool:
    """In the few steps of a quick run there is little that plain training could forget."""
    return not metrics["quick"]


CLAIMS = [
    Claim(
        "A: after {tasks} tasks EWC is right on {ewc_first:.1f} % of the first one, plain training on {plain_first:.1f} % "
        "(five points "
        "or more below), the L2 penalty on {l2_first:.1f} % (two or more below).",
        _three,
        lambda n: n["ewc_first"] >= max(n["plain_first"] + 5, n["l2_first"] + 2),
        _is_full,
    ),
    Claim(
        "A: it still learns the last task within three points of plain training: {ewc_last:.1f} % and {plain_last:.1f} % (the L2 "
        "penalty {l2_last:.1f} %).",
        _three,
        lambda n: n["ewc_last"] >= n["plain_last"] - 3,
    ),
    Claim(
        "B: after {tasks} tasks EWC is right on {ewc:.1f} % of all test digits, at least 85 %; plain training with dropout on "
        "{plain:.1f} %, eight points or more below.",
        _ten,
        lambda n: n["ewc"] >= 85 and n["plain"] <= n["ewc"] - 8,
        _is_full,
    ),
    Claim(
        "B: masks over a frozen W forget exactly nothing: {frozen_learned:.2f} % when just learned, {frozen:.2f} % after "
        "{tasks} tasks.",
        _ten,
        lambda n: n["forgot"] == 0,
    ),
    Claim(
        "B: the proposal's masks with a trained W go from {masked_learned:.1f} % when just learned to {masked:.1f} % at "
        "the end; with "
        "EWC on W they keep more, from {both_learned:.1f} % to {both:.1f} %.",
        _ten,
        lambda n: n["both_learned"] - n["both"] < n["masked_learned"] - n["masked"] and n["both"] > n["masked"],
    ),
    Claim(
        "C: the Fisher information of two tasks overlaps less in the first layer the more pixels are permuted: "
        "{fisher_large_first:.2f} "
        "for {large}x{large} pixels, {fisher_small_first:.2f} for {small}x{small}, at least 0.1 more.",
        _overlaps,
        lambda n: n["fisher_large_first"] <= n["fisher_small_first"] - 0.1,
    ),
    Claim(
        "C: for {large}x{large} pixels it rises with depth, from {fisher_large_first:.2f} in the first layer to "
        "{fisher_large_last:.2f} in the last.",
        _overlaps,
        lambda n: n["fisher_large_first"] < n["fisher_large_last"],
    ),
    Claim(
        "C, ours: so do the masks of the two tasks over a frozen W, which begin alike: they overlap by "
        "{masks_large_first:.2f} in the "
        "first layer ({small}x{small} pixels: {masks_small_first:.2f}) and by {masks_large_last:.2f} in the last.",
        _overlaps,
        lambda n: n["masks_large_first"] < min(n["masks_small_first"], n["masks_large_last"]),
    ),
    Claim(
        "For logistic regression ({parameters:.0f} parameters) the Fisher information is the Hessian of the loss: they differ by "
        "{exact:.1e} of it; from one draw a sample by {one_draw_a_sample:.3f}. Squares of batch gradients are another number, "
        "{squared_batch_gradients:.2f} off.",
        _logistic,
        lambda n: n["exact"] < 0.05 and n["squared_batch_gradients"] > 0.5,
    ),
]


def run(folder: RunFolder, settings: Settings) -> Json:
    """Choose the strength of each penalty on a further seed; then parts A, B and C, and logistic regression.

    Raises:
        OptionError: fewer than two tasks, or points that do not divide a task's steps.
    """
    if min(settings.curve.tasks, settings.many.tasks) < 2 or len(settings.overlap.squares) != 2:
        raise OptionError("experiment 'ewc': 'curve.tasks' and 'many.tasks' must be at least 2, 'overlap.squares' two")
    if settings.points < 1 or settings.steps % settings.points or settings.steps % 10 or settings.overlap.steps % 10:
        raise OptionError(f"experiment 'ewc': 'steps' must be a multiple of 10 and of 'points', got {settings.steps}")
    found = load_digits()
    finished = folder.begin(f"{found.source}: a permutation of the pixels for each task", found.note)
    if finished is not None:
        return finished

    strengths = _chosen(folder, settings)
    jobs: dict[Key, Job] = {}
    for seed in folder.seeds:
        for name in CURVE:
            jobs[seed, f"A, {name}"] = partial(curve, name, strengths["A"].get(name, 0.0), seed, settings)
        for name in MANY:
            jobs[seed, f"B, {name}"] = partial(many, name, strengths["B"].get(name, 0.0), seed, settings)
        for square in settings.overlap.squares:
            jobs[seed, f"C, {square}"] = partial(overlap, square, strengths["A"]["sequence+ewc"], seed, settings)
        jobs[seed, "logistic"] = partial(logistic, seed, settings)
    made = folder.compute(jobs)

    curves = {name: [made[seed, f"A, {name}"] for seed in folder.seeds] for name in CURVE}
    of_many = {name: [made[seed, f"B, {name}"] for seed in folder.seeds] for name in MANY}
    scores: Scores = {method: {} for method in LABELS}
    for name, runs in curves.items():
        scores[name][after(A, FIRST)] = [run["accuracy"][-1][0] for run in runs]
        scores[name][after(A, LAST)] = [run["accuracy"][-1][-1] for run in runs]
        scores[name][after(A, ALL)] = [end_of(run) for run in runs]
    for name, runs in of_many.items():
        scores[name][after(B, LEARNED)] = [fmean(_just_learned(run)) for run in runs]
        scores[name][after(B, ALL)] = [end_of(run) for run in runs]
    more: Json = {
        "strengths": strengths,
        "curves": curves,
        "many": of_many,
        "overlap": {str(square): [made[seed, f"C, {square}"] for seed in folder.seeds] for square in settings.overlap.squares},
        "logistic": [made[seed, "logistic"] for seed in folder.seeds],
        "paper": PAPER,
    }
    return folder.finish(scores, BASELINES, _budget(settings), figures, more)


def _chosen(folder: RunFolder, settings: Settings) -> dict[str, dict[str, float]]:
    """For part A and part B, the best strength of each penalty on a further seed, by the accuracy on all tasks at the end."""
    parts = {"A": (curve, CURVE), "B": (many, MANY)}
    wanted = [(part, name) for part, (_, names) in parts.items() for name in names if name in TUNED]
    if len(settings.strengths) == 1:
        return {part: {name: settings.strengths[0] for of, name in wanted if of == part} for part in parts}
    seed = folder.seeds[-1] + 1
    jobs: dict[Key, Job] = {
        (seed, f"tuning, {part}, {name}, {strength:g}"): partial(parts[part][0], name, strength, seed, settings)
        for part, name in wanted
        for strength in settings.strengths
    }
    found = folder.compute(jobs, len(folder.seeds) * (len(CURVE) + len(MANY) + 3))

    def best(part: str, name: str) -> float:
        return max(settings.strengths, key=lambda strength: end_of(found[seed, f"tuning, {part}, {name}, {strength:g}"]))

    return {part: {name: best(part, name) for of, name in wanted if of == part} for part in parts}


def _budget(settings: Settings) -> str:
    tried = len(settings.strengths)
    tuning = f"each penalty at the best of {tried} strengths on one further seed" if tried > 1 else "strengths without a search"
    return (
        f"{settings.steps} steps of {settings.batch} a task, by Adam; {tuning}; the Fisher information from "
        f"{settings.samples} digits "
        f"of each task, one draw each; part C: {settings.overlap.steps} steps a task."
    )


def tables(metrics: Metrics) -> Tables:
    """The accuracies, the overlap by layer, and numbers of others."""
    head, rows = table_of(metrics)
    named: Rows = [head, *([LABELS[method], *cells] for method, *cells in rows)]
    squares = metrics["settings"]["overlap"]["squares"]
    layers = range(metrics["settings"]["overlap"]["depth"] + 1)
    by_layer: Rows = [["of", "pixels permuted", *(f"layer {place + 1}" for place in layers)]]
    for kind, label in (("fisher", "Fisher information"), ("masks", "masks on frozen W (ours)")):
        for square in squares:
            runs = metrics["overlap"][str(square)]
            by_layer.append([label, f"{square}x{square}", *(cell(summarized([run[kind][at] for run in runs])) for at in layers)])
    chosen = [[part, LABELS[name], f"{value:g}"] for part, its in metrics["strengths"].items() for name, value in its.items()]
    return [
        ("", named),
        ("Overlap of two tasks (1: the same, 0: nothing in common), by layer from the input on", by_layer),
        ("Strengths of the penalties", [["part", "method", "lambda"], *chosen]),
        ("Accuracies of others, for comparison", [["of", "test accuracy"], *([name, value] for name, value in PAPER.items())]),
    ]


def figures(metrics: Metrics) -> Figures:
    """The paper's figure 2: curves of three tasks, the accuracy over the number of tasks, and overlap over depth."""
    tasks = metrics["settings"]["curve"]["tasks"]
    curves, axes = new_figure(tasks)
    points, steps = metrics["settings"]["points"], metrics["settings"]["steps"]
    for task, panel in enumerate(axes):
        for method, runs in metrics["curves"].items():
            # A task is shown from when it is learned on.
            values = [[accuracies[task] for accuracies in run["accuracy"][task * points :]] for run in runs]
            shown = [steps // points * (place + 1) for place in range(task * points, tasks * points)]
            plot_seeds(panel, "plain", LABELS[method], shown, values, style=LINES[method])
        for border in range(1, tasks):
            panel.axvline(border * steps, color="#cccccc", linewidth=0.8)
        panel.set(xlabel="steps of training (number)", ylabel="test accuracy (%)", xlim=(0, tasks * steps), ylim=(0, 100))
        panel.set_title(f"task {'ABCDEFGH'[task]}; grey: the next task begins", fontsize=10)
    legend_above(curves, axes[0], bands(len(metrics["seeds"])))
    main, (left, right) = new_figure(2)
    _plot_many(left, metrics["many"])
    _plot_overlap(right, metrics)
    title = bands(len(metrics["seeds"]))
    main.suptitle(title, fontsize=9)
    return {"": main, "curves": curves}


def _plot_many(axes: Axes, found: Mapping[str, list[Json]]) -> None:
    """The mean accuracy of the tasks so far, with direct labels."""
    ends: list[list[float]] = []
    for method, runs in found.items():
        values = [[fmean(accuracies) for accuracies in run["accuracy"]] for run in runs]
        plot_seeds(axes, "plain", LABELS[method], range(1, len(values[0]) + 1), values, style=LINES[method])
        ends.append([seed[-1] for seed in values])
    lines = list(axes.lines)
    single = fmean(run["accuracy"][0][0] for run in found["sequence+ewc"])
    count = len(found["sequence"][0]["accuracy"])
    axes.axhline(single, color="#555555", linestyle=(0, (6, 3)), linewidth=1.0)
    axes.annotate("a net on one task only", (1, single), (0, 4), textcoords="offset points", fontsize=8, color="#555555")
    axes.set(xlabel="tasks learned (number)", ylabel="test accuracy, tasks so far (%)", ylim=(0, 104))
    label_lines(axes, [LABELS[method] for method in found], ends, lines=lines)
    axes.set_xticks(range(1, count + 1))


def _plot_overlap(axes: Axes, metrics: Metrics) -> None:
    """Overlap over depth, of the Fisher information and of the masks."""
    names: list[str] = []
    ends: list[list[float]] = []
    styles = (("fisher", "Fisher", "-", ("#999999", "#000000")), ("masks", "masks", "--", ("#56B4E9", "#0072B2")))
    depth = metrics["settings"]["overlap"]["depth"] + 1
    for kind, label, line, colors in styles:
        for place, square in enumerate(metrics["settings"]["overlap"]["squares"]):
            values = [run[kind] for run in metrics["overlap"][str(square)]]
            name = f"{label}, {square}x{square}"
            style = {"color": colors[place], "linestyle": line, "marker": "o", "markersize": 3}
            plot_seeds(axes, "plain", name, range(1, depth + 1), values, style=style)
            names.append(name)
            ends.append([seed[-1] for seed in values])
    axes.set(xlabel="layer, from the input on (number)", ylabel="overlap of two tasks (1: the same)", ylim=(0, 1.04))
    label_lines(axes, names, ends)
    axes.set_xticks(range(1, depth + 1))
    axes.set_title("by the pixels that the second task permutes", fontsize=10)
