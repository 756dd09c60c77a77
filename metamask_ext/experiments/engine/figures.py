"""Figures for print: the styles of the methods, curves with their intervals, and the files."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metamask_ext.files.atomic import write_atomic

from .statistics import half_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    """
    forth, back = (math.log, math.exp) if geometric else (float, float)
    points = [[forth(value) for value in of_seeds] for of_seeds in zip(*values)]
    means = [statistics.fmean(of_seeds) for of_seeds in points]
    options: Style = {"linewidth": 1.8, **STYLES[method], **(style or {})}
    axes.plot(steps, [back(mean) for mean in means], label=label, **options)
    if len(values) > 1:
        widths = [half_width(of_seeds) for of_seeds in points]
        low, high = ([back(mean + sign * width) for mean, width in zip(means, widths)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=options["color"], alpha=0.2, linewidth=0)


def bands(seeds: int, drawn: str = "bands") -> str:
    """The title of a legend for the lines of :func:`plot_seeds`; ``drawn`` names what shows the intervals."""
    return f"mean over seeds; {drawn}: its 95 % interval" if seeds > 1 else "one seed"


def legend_above(figure: Figure, axes: Axes, title: str) -> None:
    """One legend above all panels, with the lines of ``axes``."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=3, title=title, title_fontsize=8)


def label_ends(axes: Axes, place: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name beside its end, names moved apart where they would overlap; call it when the limits are set.

    Args:
        axes: to draw on.
        place: of the ends on the horizontal axis.
        ends: of each line the value there, its name and its colour.
    """
    to_share = axes.transAxes.inverted()
    apart, spots, ends = 0.055, list[float](), sorted(ends)
    points = [to_share.transform(axes.transData.transform((place, value))) for value, _, _ in ends]
    for _, height in points:
        spots.append(max(float(height), spots[-1] + apart if spots else -math.inf))
    highest = 1 - apart / 2
    for index in reversed(range(len(spots))):
        spots[index] = min(spots[index], highest)
        highest = spots[index] - apart
    for (right, _), spot, (_, name, color) in zip(points, spots, ends):
        axes.text(float(right) + 0.02, spot, name, fontsize=8, color=color, va="center", transform=axes.transAxes)
