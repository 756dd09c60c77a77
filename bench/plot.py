"""The plot of a suite's ratios."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from metamask_ext.files.atomic import write_atomic

from .problem import METAMASK
from .results_json import Results, Row

if TYPE_CHECKING:  # a suite is measured before matplotlib is loaded
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, apart also in grey; the marker says the same again.
STYLES = {"eager": ("#D55E00", "s"), "compiled": ("#0072B2", "o"), "compiled-ours": ("#56B4E9", "o"), "dense": ("#000000", "^")}
OTHER_STYLES = (("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#F0E442", "X"))

LEGEND_WIDTH = 2.4
"""The width of a column of the legend, in inches."""

Styles = dict[str, tuple[str, str]]
"""Colour and marker by contender."""


def plot(results: Results, path: Path) -> None:
    """Plots how many times as long as metamask each contender takes: a panel for each measure, by shape, on a logarithmic axis."""
    from matplotlib.figure import Figure

    measures: dict[str, list[Row]] = {}
    for row in results["rows"]:
        if "quantities" not in row:
            measures.setdefault(row["measure"], []).append(row)
    if not measures:
        return  # quantities alone
    styles = _styles(results)
    wide = min(3, len(measures))
    high = math.ceil(len(measures) / wide)
    figure = Figure(figsize=(4.2 * wide, 3.4 * high + 0.6), layout="constrained", dpi=150)
    axes = iter(figure.subplots(high, wide, squeeze=False, sharey=True).flat)
    for (measure, rows), axis in zip(measures.items(), axes):
        _draw_times(axis, rows, styles)
        _label(axis, measure, rows)
    for axis in axes:  # those that are left
        axis.set_visible(False)
    _draw_legend(figure, styles, list({row["allocator"]: None for row in results["rows"]}))
    figure.suptitle("Above the line metamask is faster", fontsize=11)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix("."))
    write_atomic(path, image.getbuffer())


def _styles(results: Results) -> Styles:
    contenders = {name: None for row in results["rows"] for name in row.get("contenders", {}) if name != METAMASK}
    unstyled = iter(OTHER_STYLES * len(contenders))
    return {name: STYLES.get(name) or next(unstyled) for name in contenders}


def _shapes(rows: list[Row]) -> list[str]:
    return list({row["shape"]: None for row in rows})


def _fill(allocator: str) -> str:
    return "full" if allocator == "default" else "none"


def _draw_times(axis: Axes, rows: list[Row], styles: Styles) -> None:
    """Draws a marker for each contender and allocator: filled and to the left for the default one."""
    shapes = _shapes(rows)
    for row in rows:
        times = row.get("contenders", {})
        at = shapes.index(row["shape"]) + (-0.12 if row["allocator"] == "default" else 0.12)
        for name in times.keys() - {METAMASK}:
            color, marker = styles[name]
            ratio = times[name]["median"] / times[METAMASK]["median"]
            axis.plot(at, ratio, marker, color=color, fillstyle=_fill(row["allocator"]), markersize=6)


def _label(axis: Axes, measure: str, rows: list[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shapes = _shapes(rows)
    axis.axhline(1.0, color="black", linewidth=1)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", color="0.85", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xticks(range(len(shapes)), shapes, rotation=45, ha="right")
    axis.set_xlim(-0.5, len(shapes) - 0.5)
    axis.set_title(measure, fontsize=11)
    axis.set_xlabel("batch x width" if measure.startswith(("masked_linear", "bfloat16")) else "shape")
    axis.set_ylabel("time / time of metamask")


def _draw_legend(figure: Figure, styles: Styles, allocators: list[str]) -> None:
    handles = []
    for name, (color, marker) in styles.items():
        for allocator in allocators:
            label = f"{name}, {allocator} allocator"
            handles += figure.axes[0].plot([], [], marker, color=color, fillstyle=_fill(allocator), label=label)
    fitting = max(1, int(figure.get_figwidth() / LEGEND_WIDTH))
    # Columns of equal height: the allocators of a contender stay together.
    columns = math.ceil(len(styles) / math.ceil(len(styles) / fitting)) if styles else 1
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
