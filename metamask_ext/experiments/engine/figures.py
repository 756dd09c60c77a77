"""Figures for print: the styles of the methods, curves with their intervals, and the files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metamask_ext.files.atomic import write_atomic

from .statistics import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Figures = Mapping[str, "Figure"]
"""Figures by name; the name of an experiment's main figure is empty."""
Style = dict[str, Any]
"""Options of :meth:`matplotlib.axes.Axes.plot`."""

# Okabe and Ito's colours, told apart with any colour vision; line styles differ too, for print without colour.
STYLES: dict[str, Style] = {
    "masked": {"color": "#0072B2", "linestyle": "-"},
    "shared": {"color": "#D55E00", "linestyle": "--"},
    "independent": {"color": "#009E73", "linestyle": "-."},
    "plain": {"color": "#D55E00", "linestyle": "--"},
    "masks": {"color": "#0072B2", "linestyle": "-"},
    "weights": {"color": "#56B4E9", "linestyle": (0, (5, 1))},
    "both": {"color": "#CC79A7", "linestyle": "-."},
    "pretrained": {"color": "#555555", "linestyle": "--"},
    "oracle": {"color": "#000000", "linestyle": ":"},
    "masks, first order": {"color": "#0072B2", "linestyle": (0, (1, 1)), "marker": "."},
    "weights, first order": {"color": "#56B4E9", "linestyle": (0, (1, 1)), "marker": "."},
    "plain, first order": {"color": "#D55E00", "linestyle": (0, (1, 1)), "marker": "."},
    # Of the common study, and of it the ways to learn a new task by masks
    "masked+ewc": {"color": "#0072B2", "linestyle": (0, (1, 1)), "marker": "o", "markersize": 4},
    "hard": {"color": "#CC79A7", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    "lottery": {"color": "#E69F00", "linestyle": (0, (5, 1))},
    "maml": {"color": "#000000", "linestyle": ":"},
    "sequence": {"color": "#999999", "linestyle": "-"},
    "look-up": {"color": "#56B4E9", "linestyle": ":", "marker": "s", "markersize": 4},
    "superposition": {"color": "#56B4E9", "linestyle": "-.", "marker": "^", "markersize": 4},
    "mask only": {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 4},
    "everything": {"color": "#0072B2", "linestyle": "--", "marker": "D", "markersize": 4},
    "pixels": {"color": "#555555", "linestyle": "-."},
}


def new_figure(panels: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with ``rows`` rows of ``panels`` axes each, for print; not registered with pyplot, which would keep it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * panels, 3.8 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, panels, squeeze=False).flatten())


def write_figures(folder: Path, name: str, figures: Figures) -> list[str]:
    """Write figures as ``<name>-<key>.png`` by key, ``<name>.png`` where the key is empty; the names of the files."""
    files = {f"{name}-{key}.png" if key else f"{name}.png": figure for key, figure in figures.items()}
    for file, figure in files.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=200)
        write_atomic(folder / file, image.getbuffer())
    return list(files)


def plot_seeds(
    axes: Axes,
    method: str,
    label: str,
    steps: Sequence[float],
    values: Sequence[Sequence[float]],
    geometric: bool = False,
    style: Style | None = None,
    band: bool = True,
) -> None:
    """Plot the mean of ``values`` (a curve for each seed); with several also a band, the 95 % interval of the mean at each step.

    Args:
        axes: to draw on.
        method: one of ``STYLES``.
        label: for the legend.
        steps: the horizontal places of a curve.
        values: the curves.
        geometric: take mean and interval of the logarithms, for a logarithmic axis; the values must be positive.
        style: what differs from the method's style.
        band: draw it; for lines that lie close :func:`label_lines` has the intervals at their ends.
    """
    low, means, high = zip(*(interval(of_seeds, geometric) for of_seeds in zip(*values)))
    options: Style = {"linewidth": 1.8, **STYLES[method], **(style or {})}
    axes.plot(steps, means, label=label, **options)
    if band and len(values) > 1:
        axes.fill_between(steps, low, high, color=options["color"], alpha=0.2, linewidth=0)


def label_lines(
    axes: Axes,
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    geometric: bool = False,
    lines: Sequence[Line2D] | None = None,
) -> None:
    """Name lines at their right ends, in their colours; with several seeds beside each the interval at its end.

    Args:
        axes: with its scales and limits set; lines end at the same horizontal place.
        labels: of the lines, in order.
        values: of each line, the value of every seed at its end.
        geometric: intervals of the logarithms, as of :func:`plot_seeds`.
        lines: by default the last ones of ``axes``.
    """
    lines = axes.lines[-len(labels) :] if lines is None else lines
    low, high = axes.get_ylim()
    place = axes.transScale.transform
    bottom, top = place((1, low))[1], place((1, high))[1]
    last = [float(np.asarray(line.get_ydata())[-1]) for line in lines]
    ends = [(place((1, value))[1] - bottom) / (top - bottom) for value in last]
    order = sorted(range(len(lines)), key=ends.__getitem__)
    height = 0.062
    free = max(0.0, 1 - height * len(lines))
    places: dict[int, float] = {}
    for rank, index in enumerate(order):
        least = height * rank if rank == 0 else places[order[rank - 1]] + height
        # Room must be left for those above.
        places[index] = max(least, min(ends[index], height * rank + free))
    for rank, index in enumerate(order):
        color = lines[index].get_color()
        axes.annotate(
            labels[index],
            (1.0, min(max(ends[index], 0), 1)),
            (1.09, places[index]),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=color,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0},
            annotation_clip=False,
        )
        its = values[index]
        if len(its) > 1:
            lowest, _, highest = interval(its, geometric)
            # Beside each other, or they hide each other.
            x = axes.transData.inverted().transform(axes.transAxes.transform((1.012 + 0.01 * rank, 0)))[0]
            axes.plot([x, x], [lowest, highest], color=color, linewidth=1.6, clip_on=False, solid_capstyle="butt")


def bands(seeds: int, drawn: str = "bands") -> str:
    """The title of a legend for the lines of :func:`plot_seeds`; ``drawn`` names what shows the intervals."""
    return f"mean over seeds; {drawn}: its 95 % interval" if seeds > 1 else "one seed"


def legend_above(figure: Figure, axes: Axes, title: str, columns: int = 3) -> None:
    """One legend above all panels, with the lines of ``axes``."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=columns, title=title, title_fontsize=8)
