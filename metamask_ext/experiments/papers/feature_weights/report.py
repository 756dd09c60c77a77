"""The tables and figures of ``feature-weights``."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from ...engine.claims import Metrics, by_method
from ...engine.figures import STYLES, Figures, bands, label_lines, legend_above, new_figure, plot_seeds
from ...engine.settings import of_run
from ...engine.statistics import cell
from ...engine.tables import Tables
from .findings import GROUPS, members_of
from .settings import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def tables(metrics: Metrics) -> Tables:
    """One table for regression and one for classification, whose numbers have other units."""
    made = []
    for unit, title in (("test MSE", "Regression"), ("wrong labels (%)", "Classification")):
        head = [f"{unit}, n = {size}" for size in of_run(Settings(), metrics).shown_sizes]
        rows = [[method, *(cell(its[key]) for key in head)] for method, its in by_method(metrics).items() if head[0] in its]
        made.append((title, [["method", *head], *rows]))
    return made


def figures(metrics: Metrics) -> Figures:
    """A figure for each part, by its letter."""
    made = {"d": _toy_figure(metrics["toy"])}
    for letter in "efgh":
        parts = [part for part in metrics["settings"]["parts"] if part.startswith(letter)]
        figure, axes = new_figure(3, rows=len(parts))
        figure.set_size_inches(19, 3.9 * len(parts))
        for row, part in enumerate(parts):
            loss, evolution, weights = axes[3 * row : 3 * row + 3]
            _plot_loss(loss, part, metrics)
            _plot_weights(evolution, weights, part, metrics)
        made[letter] = figure
    return made


def _toy_figure(toy: Metrics) -> Figure:
    figure, axes = new_figure(2)
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    for path, color in zip(toy["paths"], colors):
        norm = path["norm of the start"]
        label = f"start ({path['c0'][0]:g}, {path['c1'][0]:g}), norm {norm:.3f}; end ({path['c0'][-1]:.3f}, {path['c1'][-1]:.4f})"
        axes[0].plot(path["iteration"], [value / norm for value in path["c0"]], color=color, label=label)
        axes[0].plot(path["iteration"], [value / norm for value in path["c1"]], color=color, linestyle="--")
        axes[1].plot(path["c0"], path["c1"], color=color, marker=".", markersize=3)
        axes[1].plot(norm, 0, "*", color=color, markersize=10)
    axes[0].set(xscale="symlog", xlabel=f"iterations of gradient descent (rate {toy['rate']:g})", ylim=(-1.1, 1.15))
    axes[0].set_ylabel(r"$c_0$ (solid), $c_1$ (dashed), over the norm of the start")
    legend_above(figure, axes[0], "weights of a true feature and its alias under gradient descent", columns=2)
    axes[1].set(xlabel=r"$c_0$, weight of the true feature", ylabel=r"$c_1$, weight of the alias", aspect="equal")
    axes[1].set_title(r"paths; star: ($\|c^{(0)}\|$, 0)", fontsize=10)
    return figure


def _plot_loss(axes: Axes, part: str, metrics: Metrics) -> None:
    settings, curves = of_run(Settings(), metrics), metrics["curves"]
    labels = settings.parts[part].labels
    sizes, base = settings.sizes, curves["classification" if labels else "regression"]
    lines = []
    for solver in curves[part][0]:
        steps = "step" in solver
        suffix = f", {solver}" if part.startswith("f") else ""
        lines += [
            ("both" if steps else "masked", f"meta-learned{suffix}", [run[solver] for run in curves[part]]),
            ("weights" if steps else "shared", f"weights of one{suffix}", [run[f"ones, {solver}"] for run in base]),
        ]
        if not steps:
            lines.append(("oracle", "oracle: true\nfeatures only", [run[f"oracle, {solver}"] for run in base]))
    for style, label, values in lines:
        plot_seeds(axes, style, label, sizes, values)
    axes.set(xscale="log", yscale="log", xlabel=f"training points n (bar: {settings.support_points}, as in meta-training)")
    if labels:
        _level(axes, 50, "chance")
        axes.set(ylabel="wrong labels of new tasks (%)")
    else:
        _level(axes, statistics.fmean(run["zero"][0] for run in base), "zero predictor")
        _level(axes, settings.noise**2, "noise variance")
        axes.set(ylabel="test MSE of new tasks (signal variance: 1)", ylim=(5e-5, 10))
    axes.axvline(settings.support_points, color="#CCCCCC", linewidth=4, zorder=0)
    axes.set_title(f"part {part}: {settings.parts[part].solver}\n{bands(len(base))}", fontsize=9)
    ends = [[run[-1] for run in values] for *_, values in lines]
    label_lines(axes, [label for _, label, _ in lines], ends, lines=axes.lines[: len(lines)])


def _level(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color="#999999", linewidth=1, linestyle=":")
    axes.annotate(
        label, (0.01, value), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=7, color="0.4"
    )


def _plot_weights(evolution: Axes, weights: Axes, part: str, metrics: Metrics) -> None:
    """The mean weight of each group during meta-training; each weight at its end, in the same colours."""
    settings = of_run(Settings(), metrics)
    ends = []
    for group, (style, label) in GROUPS.items():
        values = [run[group] for run in metrics["weights"][part]]
        updates = [settings.evolution_every * point for point in range(len(values[0]))]
        plot_seeds(evolution, style, label, updates, values)
        ends.append([run[-1] for run in values])
    evolution.set(xlabel="meta-updates", ylabel="mean |c| of the group", yscale="log")
    evolution.set_title("weights during meta-training", fontsize=10)
    label_lines(evolution, [label for _, label in GROUPS.values()], ends)
    final = [abs(value) for value in metrics["weights of the first seed"][part]]
    for group, (style, _) in GROUPS.items():
        members = members_of(group, settings)
        frequencies = [(index + 1) // 2 for index in members]
        heights = [final[index] for index in members]
        weights.plot(frequencies, heights, ".", markersize=4, color=STYLES[style]["color"], linestyle="none")
    weights.set(xlabel="frequency of the feature (periods in [-1, 1))", ylabel=f"|c| at the end, seed {metrics['seeds'][0]}")
    weights.set_title("weights at the end, in the colours of the groups", fontsize=10)
