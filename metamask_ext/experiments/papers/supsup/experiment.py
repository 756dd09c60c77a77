"""Supermasks in superposition: hundreds of permutations, or 36 rotations, of the digits in one bank, with and without their names.

Source: Wortsman et al., Supermasks in Superposition, arXiv:2006.14769, sections 3.2 to 3.4 and 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from metamask_ext.data import load_digits

from ...engine.claims import Claim, Metrics, Numbers, mean
from ...engine.figures import Figures, Style, bands, label_lines, new_figure, plot_seeds
from ...engine.jobs import Json
from ...engine.run_folder import RunFolder, Scores
from ...engine.settings import Changes, OptionError
from ...engine.statistics import cell, summarized
from ...engine.tables import Tables, table_of
from .learning import ACCURACY, LABELS, RIGHT, learn_masks, learn_sequence, points_of
from .settings import ROTATIONS, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLASSES = 10


ROTATED: Changes = {"rotated": True, "tasks": ROTATIONS}
QUICK: Changes = {"tasks": 5, "steps": 200, "test": {"samples": 500}}

PAPER_ACCURACY = 94.91
"""arXiv:2006.14769: permuted MNIST, 250 tasks, LeNet-300-100, task not named, 60,000 training digits."""
SEQUENCE = "sequence"
# Okabe and Ito's colours. The first three lie on each other: hollow markers of three sizes show all of them.
LINES: dict[str, Style] = {
    "named": {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 10},
    "one image": {"color": "#E69F00", "linestyle": "--", "marker": "s", "markersize": 6},
    "batch": {"color": "#009E73", "linestyle": "-.", "marker": "^", "markersize": 3},
    SEQUENCE: {"color": "#D55E00", "linestyle": ":", "marker": "x", "markersize": 5},
}
Curves = dict[str, dict[str, list[list[float]]]]
"""By method and name, a curve over the points for each seed."""

QUESTION = """Do masks over one W hold hundreds of tasks without forgetting, at one bit a weight, and can the mask of a task
that nobody names be found? The proposal looks masks up by their task and mixes them for unseen ones "as is done in [4]"
(section 2.1): this is [4], Wortsman et al., Supermasks in Superposition (arXiv:2006.14769, sections 3.2 to 3.4 and 4.2): masks
only, on a frozen random W, as in the proposal's reading of the lottery ticket hypothesis (section 2)."""


def _accuracies(metrics: Metrics) -> Numbers:
    found = {method.replace(" ", "_"): mean(metrics, method, ACCURACY) for method in LABELS}
    return {**found, "tasks": metrics["settings"]["tasks"], "paper": PAPER_ACCURACY}


def _inferred(metrics: Metrics) -> Numbers:
    settings = metrics["settings"]
    found = {key: mean(metrics, method, RIGHT) for key, method in (("one", "one image"), ("many", "batch"), ("chance", "chance"))}
    return {**found, "tasks": settings["tasks"], "batch": settings["test"]["batch"]}


def _packing(metrics: Metrics) -> Numbers:
    packing = metrics["packing"]
    changed, digits = packing["test digits given another class"], packing["test digits"]
    return {"changed": changed, "digits": digits, "tasks": metrics["settings"]["tasks"]}


def _bytes(metrics: Metrics) -> Numbers:
    sizes = list(pairwise(metrics["settings"]["widths"]))
    bits = sum(outputs * -(-inputs // 8) for inputs, outputs in sizes)
    floats = 4 * sum(inputs * outputs for inputs, outputs in sizes)
    return {**metrics["bytes per task"], "bits": bits, "floats": floats, "times": floats / metrics["bytes per task"]["memory"]}


def _rotated(metrics: Metrics) -> bool:
    return metrics["settings"]["rotated"]


def _permuted(metrics: Metrics) -> bool:
    return not _rotated(metrics)


CLAIMS = [
    Claim(
        "After {tasks} tasks in one bank every task has what it learned: {named:.1f} % with the tasks named; one net that "
        "learned them in "
        "sequence is down to {sequence:.1f} %.",
        _accuracies,
        lambda numbers: numbers["sequence"] < numbers["named"] - 5,
    ),
    Claim(
        "A single image is enough to find its mask among {tasks}: the right one for {one:.1f} % of the images (guessing: "
        "{chance:.2g} %), "
        "and for {many:.1f} % of the batches of {batch}.",
        _inferred,
        lambda numbers: numbers["one"] > 95 and numbers["many"] > 99,
        _permuted,
    ),
    Claim(
        "So the accuracy without names is that with them: {one_image:.1f} % from one image, {batch:.1f} % from a batch (the "
        "paper, with "
        "60,000 training digits: {paper} %).",
        _accuracies,
        lambda numbers: abs(numbers["one_image"] - numbers["named"]) < 6 and abs(numbers["batch"] - numbers["named"]) < 6,
        _permuted,
    ),
    Claim(
        "Rotations by 10 degrees are alike, and harder to tell apart: the right one of {tasks} for {one:.1f} % of the images "
        "(guessing: "
        "{chance:.2g} %), for {many:.1f} % of the batches of {batch}.",
        _inferred,
        lambda numbers: numbers["chance"] < numbers["one"] < 95 and numbers["one"] <= numbers["many"],
        _rotated,
    ),
    Claim(
        "A neighbour's mask often does: without names the accuracy is {one_image:.1f} % from one image, {batch:.1f} % from a "
        "batch. The "
        "paper takes a larger net for rotations (1024-1024, 200 outputs).",
        _accuracies,
        lambda numbers: numbers["one_image"] <= numbers["batch"] <= numbers["named"],
        _rotated,
    ),
    Claim(
        "Packing a finished mask to bits changed the class of {changed:.0f} of {digits:,.0f} test digits, over all {tasks} tasks.",
        _packing,
        lambda numbers: numbers["changed"] <= 1e-3 * numbers["digits"],
    ),
    Claim(
        "A packed task takes {memory:,.0f} bytes in memory, one bit a weight, and {disk:,.0f} on disk; float32 masks would take "
        "{floats:,.0f}, {times:.1f} times as much.",
        _bytes,
        lambda numbers: numbers["memory"] == numbers["bits"] and numbers["disk"] < 1.1 * numbers["bits"],
    ),
]


def run(folder: RunFolder, settings: Settings) -> Json:
    """Learn the tasks one after another, a mask each, and pack each when it is learned. Measured on held-out digits, at ten numbers
    of tasks: the accuracy with the tasks named, served as mixed-task batches; with each image's task inferred from it alone (one
    shot); and with a task inferred from 128 of its images: in one shot for permutations; for rotations, of which neighbours are
    alike, by halving, as the paper does. Beside it: one net without masks that learns the tasks in sequence, with the same steps.

    Both take long: ``seed-<seed>/bank`` and ``progress.json``, or ``sequence.pt``, hold what a killed run needs within its job.

    Raises:
        OptionError: there are fewer tasks than 1, or more than 36 rotations.
    """
    count, rotated = settings.tasks, settings.rotated
    if count < 1 or (rotated and count > ROTATIONS):
        raise OptionError(f"tasks must be at least 1{f' and at most {ROTATIONS} if rotated' if rotated else ''}, got {count}")
    found = load_digits()
    sizes = f"{len(found.train[0]):,} for training, {len(found.test[0]):,} for the test"
    finished = folder.begin(f"{found.source}: {sizes}", found.note)
    if finished is not None:
        return finished

    work = {"masks": learn_masks, "sequence": learn_sequence}
    made = folder.compute(
        {
            (seed, name): partial(measure, folder.path / f"seed-{seed}", seed, settings)
            for seed in folder.seeds
            for name, measure in work.items()
        }
    )
    masks = [made[seed, "masks"] for seed in folder.seeds]
    curves = _curves(count, masks, [made[seed, "sequence"] for seed in folder.seeds])
    scores: Scores = {method: {key: [c[-1] for c in of_seeds] for key, of_seeds in its.items()} for method, its in curves.items()}
    scores["chance"] = {ACCURACY: [100 / CLASSES] * len(masks), RIGHT: [100 / count] * len(masks)}
    more = {**_packing_of(masks, count * len(found.test[0])), "points": points_of(count), "curves": curves}
    if not rotated:
        more["paper"] = {
            ACCURACY: PAPER_ACCURACY,
            "condition": "arXiv:2006.14769, permuted MNIST, LeNet-300-100, task not named, 60,000 training digits",
        }
    return folder.finish(scores, ["sequence", "chance"], _budget(settings, len(found.train[0])), figures, more)


def _curves(count: int, masks: list[Json], sequence: list[Json]) -> Curves:
    """Every number at each of the points, for each seed."""
    points = [str(point) for point in points_of(count)]
    curves: Curves = {
        method: {
            key: [[run["points"][point][method][key] for point in points] for run in masks]
            for key in masks[0]["points"][str(count)][method]
        }
        for method in ("named", "one image", "batch")
    }
    curves["sequence"] = {ACCURACY: [run["curve"] for run in sequence]}
    return curves


def _packing_of(masks: list[Json], digits: int) -> Json:
    """The effects of packing, means over seeds, and the largest sizes of a task."""
    return {
        "packing": {
            **{key: fmean(run["packing"][key] for run in masks) for key in masks[0]["packing"]},
            "test digits": digits,
        },
        "bytes per task": {key: max(run["bytes per task"][key] for run in masks) for key in masks[0]["bytes per task"]},
    }


def _budget(settings: Settings, digits: int) -> str:
    test = settings.test
    return (
        f"{digits:,} training digits (the paper: 60,000); {settings.steps} steps of {settings.batch_size} a task, "
        f"for its mask and for the net in sequence; {test.samples} test images of all tasks at each point. Inference: one image "
        f"by one_shot, {test.batch} images by {'binary' if settings.rotated else 'one_shot'}."
    )


def tables(metrics: Metrics) -> Tables:
    """The common table, and the accuracy by the number of tasks."""
    head, rows = table_of(metrics)
    by_tasks = [
        [str(point), *(cell(summarized([run[at] for run in its[ACCURACY]])) for its in metrics["curves"].values())]
        for at, point in enumerate(metrics["points"])
    ]
    named = [[LABELS.get(method, method), *cells] for method, *cells in rows]
    return [("", [head, *named]), (f"{ACCURACY} by the number of tasks learned", [["tasks", *LABELS.values()], *by_tasks])]


def figures(metrics: Metrics) -> Figures:
    """Accuracy beside one net without masks, the same from near, and how often the task is right, over the number of tasks."""
    kind = "rotations" if metrics["settings"]["rotated"] else "permutations"
    points, batch, found = metrics["points"], metrics["settings"]["test"]["batch"], metrics["curves"]
    masked = [method for method in found if method != SEQUENCE]
    figure, (left, middle, right) = new_figure(3)
    _lines(
        left,
        metrics,
        ACCURACY,
        {masked[0]: "a mask for each task,\nnamed or inferred", SEQUENCE: "one net without masks,\nin sequence"},
    )
    _chance(left, [100 / CLASSES] * len(points), points)
    named = {method: LABELS[method].replace("a batch", f"{batch} images") for method in masked}
    values = [value for method in masked for run in found[method][ACCURACY] for value in run]
    _lines(middle, metrics, ACCURACY, named, (min(values) - 1, max(values) + 1))
    _lines(right, metrics, RIGHT, {method: label for method, label in named.items() if RIGHT in found[method]})
    _chance(right, [100 / point for point in points], points)
    left.set_ylabel("test accuracy, tasks so far (%)")
    middle.set_ylabel("the same from near (%)")
    right.set_ylabel("task right (% of images, batches)")
    for axes in (left, middle, right):
        axes.set(xlabel=f"tasks learned ({kind}, number)")
    figure.suptitle(bands(len(metrics["seeds"])), fontsize=9)
    return {"": figure}


def _lines(axes: Axes, metrics: Metrics, key: str, labels: dict[str, str], limits: tuple[float, float] = (0, 103)) -> None:
    found = metrics["curves"]
    for method, label in labels.items():
        style = {"linewidth": 1.4, "markerfacecolor": "none", **LINES[method]}
        plot_seeds(axes, "plain", label, metrics["points"], found[method][key], style=style)
    axes.set(xlim=(0, None), ylim=limits)
    label_lines(axes, list(labels.values()), [[run[-1] for run in found[method][key]] for method in labels])


def _chance(axes: Axes, values: Sequence[float], points: Sequence[int]) -> None:
    axes.plot(points, values, color="#999999", linewidth=1.0)
    axes.annotate("chance", (points[0], values[0]), (0, 3), textcoords="offset points", fontsize=8, color="#777777")
