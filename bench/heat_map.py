"""The heat maps of the suite ``grid``: a panel for each measure, a row for each weight, a column for each batch."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from metamask_ext.files.atomic import write_atomic

from . import grid
from .grid_tables import OURS_TO_DENSE, PLAIN_TO_OURS, Point, Points
from .results_json import Results

if TYPE_CHECKING:  # a suite is measured before matplotlib is loaded
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

Ratio = Callable[[Point], "float | None"]

ALLOCATOR = "tuned"
TITLES = {
    "forward": "forward",
    "backward": "forward and backward",
    "fused-step": "step: FusedMaskedSGD, against torch.optim.SGD",
}
WORST = 2.0
"""The ratio at which the colours end, on either side of 1."""
END = math.log2(WORST)

WIDTH, ROW_HEIGHT, PANEL_MARGIN, OUTER_MARGIN = 6.5, 0.3, 0.5, 1.1
"""In inches: it is printed in a column of text as it is."""

# Blue is better on both maps, orange worse: apart also to those who cannot tell red from green.
COLORS = ("#B35806", "#F1A340", "#F7F7F7", "#92C5DE", "#2166AC")
ABSENT = "#D9D9D9"


def draw(results: Results, dense: Path, plain: Path) -> None:
    """Writes the two maps of float32 with the tuned allocator, as PNG."""
    points = Points(results)
    where = f"{results['machine']['processor']}, {results['machine']['threads']} threads, float32, {ALLOCATOR} allocator"
    _draw(points, points.dense, f"{OURS_TO_DENSE}\n{where}; blue: metamask is faster", True, dense)
    _draw(points, points.plain, f"{PLAIN_TO_OURS}\n{where}; blue: metamask is faster", False, plain)


def _draw(points: Points, value: Ratio, title: str, small_is_good: bool, path: Path) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    colors = LinearSegmentedColormap.from_list("ratios", COLORS[::-1] if small_is_good else COLORS).with_extremes(bad=ABSENT)
    scale = ScalarMappable(Normalize(-END, END), colors)
    weights = max(len(points.weights(mode, ALLOCATOR)) for mode in grid.MODES)
    high = len(grid.MODES) * (ROW_HEIGHT * weights + PANEL_MARGIN) + OUTER_MARGIN
    figure = Figure(figsize=(WIDTH, high), layout="constrained", dpi=200)
    panels = figure.subplots(len(grid.MODES), 1, squeeze=False)[:, 0]
    for mode, axis in zip(grid.MODES, panels):
        _panel(axis, points, mode, value, colors)
    panels[-1].set_xlabel("batch", fontsize=8)
    figure.supylabel("inputs x outputs", fontsize=8)
    bar = figure.colorbar(scale, ax=list(panels), location="bottom", shrink=0.6, aspect=40, pad=0.02, extend="both")
    ticks = (1 / WORST, 0.8, 1.0, 1.25, WORST)
    bar.set_ticks([math.log2(tick) for tick in ticks], labels=[f"{tick:g}" for tick in ticks], fontsize=8)
    figure.suptitle(title, fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(path, image.getbuffer())


def _panel(axis: Axes, points: Points, mode: str, value: Ratio, colors: Colormap) -> None:
    weights, batches = points.weights(mode, ALLOCATOR), points.batches(mode, ALLOCATOR)
    ratios = [[value(Point(mode, ALLOCATOR, weight, batch)) for batch in batches] for weight in weights]
    logs = [[math.nan if ratio is None else math.log2(ratio) for ratio in row] for row in ratios]
    axis.set_title(TITLES[mode], fontsize=9, loc="left")
    if not logs:
        return
    axis.imshow(logs, aspect="auto", cmap=colors, vmin=-END, vmax=END)
    axis.set_xticks(range(len(batches)), [f"{batch:,}" for batch in batches], fontsize=8)
    axis.set_yticks(range(len(weights)), [" x ".join(map(str, weight)) for weight in weights], fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for row, its in enumerate(ratios):
        for column, ratio in enumerate(its):
            if ratio is not None:
                far = abs(math.log2(ratio)) > 0.7 * END
                text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if far else "black")
