"""The figure of ``universality``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...engine.claims import Metrics
from ...engine.figures import Figures, bands, label_lines, new_figure, plot_seeds
from ...engine.settings import of_run
from .learners import LABELS
from .settings import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = {"maml": "weights", "masks": "masks", "lstm": "shared", "pretrained": "pretrained", "random": "independent"}


_NAMES = {
    "maml": "MAML",
    "masks": "MAML on masks",
    "lstm": "LSTM",
    "pretrained": "pretrained",
    "random": "random weights",
}


def figures(metrics: Metrics) -> Figures:
    """Errors over gradient steps, amplitude, phase and depth, and what one step of the construction computes."""
    settings, found = of_run(Settings(), metrics), metrics["curves"]
    figure, axes = new_figure(3, rows=2)
    figure.set_size_inches(18, 8)
    for panel, curve in zip(axes, ("mse", "outside")):
        _plot_steps(panel, curve, found, settings)
    axes[0].set(ylabel="mean MSE (units of y squared)")
    axes[0].set_title(f"new tasks of the training distribution, K = {settings.shots}", fontsize=10)
    axes[1].set(ylabel="median of MSE / mean square of y")
    axes[1].set_title("tasks outside of it: a in [5, 10], p in [pi, 2 pi]", fontsize=10)
    _plot_generalisation(axes[2], "by amplitude", settings.test.amplitudes, 5, found, settings)
    _plot_generalisation(axes[3], "by phase", settings.test.phases, math.pi, found, settings)
    axes[2].set(xlabel="amplitude a (grey: in training)")
    axes[3].set(xlabel="phase p, radians (grey: in training)")
    _plot_depths(axes[4], found, settings)
    name, built = next(iter(metrics["construction"].items()))
    image = axes[5].imshow(built["at the largest y"], cmap="cividis", origin="lower", extent=(0, 1, 0, 1))
    axes[5].set(xlabel="x*, query", ylabel=f"x, support (y = {settings.construction.values[-1]:g})")
    axes[5].set_title(f"one gradient step computes {name}:\nlargest error {built['largest error']:.0e}", fontsize=9)
    figure.colorbar(image, ax=axes[5], label="output after the step (no unit)", location="bottom", shrink=0.7)
    figure.suptitle(f"geometric {bands(len(metrics['seeds']))}", fontsize=9)
    return {"": figure}


def _named(axes: Axes, lines: Sequence[tuple[str, str, Sequence[Sequence[float]]]], places: Sequence[float]) -> None:
    """Draw lines (style, label, a curve for each seed) on a logarithmic axis, and name them at their ends."""
    for style, label, runs in lines:
        plot_seeds(axes, style, label, places, runs, geometric=True)
    axes.set(yscale="log")
    label_lines(axes, [label for _, label, _ in lines], [[run[-1] for run in runs] for *_, runs in lines], geometric=True)


def _plot_steps(axes: Axes, curve: str, found: Metrics, settings: Settings) -> None:
    """Errors of each method over gradient steps."""
    steps = settings.test.steps
    axes.set(xlabel=f"gradient steps (in training: {settings.inner_steps})", xscale="symlog", xticks=steps)
    axes.set_xticklabels([f"{step}" for step in steps])
    _named(axes, [(LINES[method], _NAMES[method], [run[curve] for run in found[method]]) for method in LABELS], steps)


def _plot_generalisation(
    axes: Axes, curve: str, values: tuple[float, ...], limit: float, found: Metrics, settings: Settings
) -> None:
    """Errors over amplitude or phase; up to ``limit`` they are those of training tasks."""
    test, trained = settings.test, settings.inner_steps
    lines, faint = [], []
    for method in ("maml", "masks", "lstm"):
        for steps in (trained, test.steps[-1]):
            if method == "lstm" and steps != trained:
                continue
            name = _NAMES[method]
            label = name if method == "lstm" else f"{name}, {steps} step{'s' if steps > 1 else ''}"
            runs = [[errors[test.steps.index(steps)] for errors in run[curve]] for run in found[method]]
            lines.append((LINES[method], label, runs))
            faint.append(steps == trained and method != "lstm")
    axes.axvspan(values[0], limit, color="#DDDDDD", zorder=0, linewidth=0)
    axes.set(ylabel="median of MSE / mean square of y")
    _named(axes, lines, values)
    for line, is_faint in zip(axes.lines, faint):
        line.set_alpha(0.5 if is_faint else 1.0)


def _plot_depths(axes: Axes, found: Metrics, settings: Settings) -> None:
    """Errors over the number of hidden layers."""
    trained = settings.inner_steps
    depths = [int(depth) for depth in settings.depths.widths]
    by_seed = list(zip(*(found[f"depth {depth}"] for depth in depths)))
    after = f"MAML, rates learned,\nafter {trained} step{'s' if trained > 1 else ''}"
    drawn = (("before", "pretrained", "MAML, before"), ("after", "weights", after), ("told", "oracle", "told amplitude\nand phase"))
    axes.set(xlabel="hidden layers, about 1,750 parameters each", ylabel="mean MSE (units of y squared)")
    axes.set_xticks(depths)
    _named(axes, [(style, label, [[run[key] for run in runs] for runs in by_seed]) for key, style, label in drawn], depths)
