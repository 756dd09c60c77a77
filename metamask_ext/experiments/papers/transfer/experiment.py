"""Transfer learning by the size of the data, and masks instead of retrained layers.

Source: Gur-Ari, A few meta learning papers (Machine Learning Journal Club, September 2017), "Transfer Learning with CNNs".
"""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from metamask_ext.data import load_characters, load_digits

from ...engine.claims import Claim, Metrics, Numbers, mean
from ...engine.figures import Figures, Style, bands, label_lines, new_figure, plot_seeds
from ...engine.jobs import Job, Json, Key
from ...engine.run_folder import RunFolder, Scores
from ...engine.settings import Changes, OptionError
from ...engine.tables import Rows, Tables, table_of
from .settings import METHODS, Settings
from .training import pretrain, transfer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "scratch": "from scratch",
    "classifier": "classifier only",
    "last block": "last block",
    "all": "all layers",
    "masks": "masks (ours)",
}
LINES: dict[str, Style] = {
    "scratch": {"color": "#999999", "linestyle": ":", "marker": "x"},
    "classifier": {"color": "#E69F00", "linestyle": "--", "marker": "s"},
    "last block": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    "all": {"color": "#D55E00", "linestyle": "-", "marker": "D"},
    "masks": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
}
BASELINES = ["scratch"]
QUICK: Changes = {
    "seeds": 1,
    "filters": 12,
    "source": {"steps": 300, "batch": 64},
    "counts": [100, 4000],
    "steps": 80,
    "batch": 32,
    "tuning": False,
}

QUESTION = """Which layers of a pretrained net are to be trained anew, if there is little data for the new task, and if there is
more? Gur-Ari's slides on transfer learning (2017) say: with a small data set only the classifier, with a larger one more of the
net, or all of it; they give no numbers. Here a net that tells characters apart learns digits. Ours: a mask for the digits over
the pretrained weights, which stay as they are, and so does what the net could do before."""


def column(count: int) -> str:
    """The name of an accuracy in the metrics, by the number of digits."""
    return f"{count:,} digits: test accuracy (%)"


def _at(metrics: Metrics, count: int) -> Numbers:
    found = {method.replace(" ", "_"): mean(metrics, method, column(count)) for method in METHODS}
    return {**found, "count": count}


def _small(metrics: Metrics) -> Numbers:
    return _at(metrics, 100)


def _large(metrics: Metrics) -> Numbers:
    counts = metrics["settings"]["counts"]
    gaps = [mean(metrics, "classifier", column(count)) - mean(metrics, "all", column(count)) for count in counts]
    before = [count for count, gap in zip(counts, gaps) if gap >= 0]
    return {**_at(metrics, counts[-1]), "crossover": max(before, default=0), "crosses": float(bool(before) and gaps[-1] < 0)}


def _masks(metrics: Metrics) -> Numbers:
    counts = metrics["settings"]["counts"]
    behind = {count: mean(metrics, "all", column(count)) - mean(metrics, "masks", column(count)) for count in counts}
    worst = max(behind, key=lambda count: behind[count])
    sizes = metrics["bytes"]
    return {
        "behind": behind[worst],
        "worst": worst,
        "last": behind[counts[-1]],
        "count": counts[-1],
        "bytes": sizes["masks"],
        "all_bytes": sizes["weights under masks"],
        "times": sizes["weights under masks"] / sizes["masks"],
    }


def _kept(metrics: Metrics) -> Numbers:
    runs = metrics["source"]
    before = fmean(metrics["source before"])
    changed = max(abs(value - then) for of in runs["masks"] for value, then in zip(of, metrics["source before"]))
    after = {
        key: min(fmean(of) for of in runs[method]) for method, key in (("masks", "masks"), ("all", "all"), ("last block", "last"))
    }
    return {"before": before, "changed": changed, **after}


def _is_full(metrics: Metrics) -> bool:
    """In the few steps of a quick run more layers are not yet better, and rates are not tuned."""
    return not metrics["quick"]


CLAIMS = [
    Claim(
        "Small data set, {count} digits: training the classifier only reaches {classifier:.1f} %, five points or more "
        "above a net from "
        "scratch, {scratch:.1f} %.",
        _small,
        lambda n: n["classifier"] >= n["scratch"] + 5,
    ),
    Claim(
        "Larger data set, {count:,} digits: training all layers reaches {all:.1f} %, a point or more above the classifier only, "
        "{classifier:.1f} %.",
        _large,
        lambda n: n["all"] >= n["classifier"] + 1,
        _is_full,
    ),
    Claim(
        "In between lies a crossover: up to {crossover:,} digits the classifier only is at least as good as all layers (0: "
        "at no number).",
        _large,
        lambda n: n["crosses"] == 1,
        _is_full,
    ),
    Claim(
        "Masks over the pretrained weights are within two points of training all layers: {last:.1f} points behind with "
        "{count:,} digits, "
        "at most {behind:.1f} ({worst:,} digits). They take {bytes:,} bytes, the weights under them {all_bytes:,}, "
        "{times:.0f} times as "
        "many.",
        _masks,
        lambda n: n["behind"] <= 2 and n["times"] > 31,
        _is_full,
    ),
    Claim(
        "With masks the accuracy on the characters stays exactly what it was, {before:.1f} %; training all layers takes it down to "
        "{all:.1f} %, the last block to {last:.1f} % (the lowest over numbers of digits).",
        _kept,
        lambda n: n["changed"] == 0 and n["all"] < n["before"] - 5,
    ),
]


def run(folder: RunFolder, settings: Settings) -> Json:
    """Pretrain a net on characters for each seed; then learn digits in each way from each number of them.

    Raises:
        OptionError: numbers of digits that do not ascend, or have no 100 among them.
    """
    if sorted({*settings.counts}) != list(settings.counts) or 100 not in settings.counts:
        raise OptionError(f"experiment 'transfer': 'counts' must ascend and have 100 among them, got {list(settings.counts)}")
    target, source = load_digits(), load_characters()
    data = f"source: {source.source}, {len(source.train)} characters; target: {target.source}"
    finished = folder.begin(data, "; ".join(note for note in (source.note, target.note) if note))
    if finished is not None:
        return finished

    seeds = [*folder.seeds, *([folder.seeds[-1] + 1] if settings.tuning else [])]
    conditions = [(method, count) for method in METHODS for count in settings.counts]
    later = len(conditions) * len(folder.seeds)
    first = folder.compute(
        {(seed, "pretraining"): partial(pretrain, folder.path / f"seed-{seed}", seed, settings) for seed in seeds},
        later + len(conditions) * settings.tuning,
    )
    rates = _rates(folder, settings, conditions, later)
    jobs: dict[Key, Job] = {
        (seed, f"{method}, {count}"): partial(
            transfer, folder.path / f"seed-{seed}", seed, method, count, [rates[method, count]], settings
        )
        for seed in folder.seeds
        for method, count in conditions
    }
    made = folder.compute(jobs)

    def values(method: str, count: int, key: str) -> list[float]:
        return [made[seed, f"{method}, {count}"][key][0] for seed in folder.seeds]

    scores: Scores = {method: {column(count): values(method, count, "accuracy") for count in settings.counts} for method in METHODS}
    kept = [method for method in METHODS if method != "scratch"]
    of_masks = values("masks", settings.counts[-1], "bytes of the masks")[0]
    more: Json = {
        "source": {method: [values(method, count, "source") for count in settings.counts] for method in kept},
        "source before": [first[seed, "pretraining"]["accuracy"] for seed in folder.seeds],
        "bytes": {
            **{f"{method}, all told": values(method, settings.counts[-1], "bytes")[0] for method in kept},
            "masks": of_masks,
            "weights under masks": 4.0 * _weights(settings.filters),
        },
        "rates": {method: [rates[method, count] for count in settings.counts] for method in METHODS},
    }
    return folder.finish(scores, BASELINES, _budget(settings), figures, more)


def _weights(filters: int) -> int:
    """Weights of the convolutions."""
    return 9 * filters + 3 * 9 * filters * filters


def _rates(folder: RunFolder, settings: Settings, conditions: list[tuple[str, int]], later: int) -> dict[tuple[str, int], float]:
    """The rate of each method for each number of digits: the best on a further seed, or the first."""
    if not settings.tuning:
        return {(method, count): settings.rates[method][0] for method, count in conditions}
    seed = folder.seeds[-1] + 1
    place = folder.path / f"seed-{seed}"
    jobs: dict[Key, Job] = {
        (seed, f"tuning, {method}, {count}"): partial(transfer, place, seed, method, count, settings.rates[method], settings)
        for method, count in conditions
    }
    tried = folder.compute(jobs, later)
    found = {}
    for method, count in conditions:
        accuracy = tried[seed, f"tuning, {method}, {count}"]["accuracy"]
        found[method, count] = settings.rates[method][accuracy.index(max(accuracy))]
    return found


def _budget(settings: Settings) -> str:
    tuning = "each rate the best of three on one further seed" if settings.tuning else "rates without a search"
    source = settings.source
    return (
        f"{source.steps} steps of {source.batch} drawings of characters for pretraining; {settings.steps} steps of "
        f"{settings.batch} "
        f"digits for each way, by Adam; {tuning}."
    )


def tables(metrics: Metrics) -> Tables:
    """The accuracies, and what a task takes."""
    head, rows = table_of(metrics)
    named: Rows = [head, *([LABELS[method], *cells] for method, *cells in rows)]
    sizes = metrics["bytes"]
    kept: Rows = [["way", "bytes of what is trained, classifier included"]]
    kept += [[LABELS[method], f"{sizes[f'{method}, all told']:,.0f}"] for method in METHODS if f"{method}, all told" in sizes]
    return [("", named), ("Bytes that the digits take beside the pretrained net", kept)]


def figures(metrics: Metrics) -> Figures:
    """The accuracy on digits and on the characters of the source, over the number of digits."""
    counts = metrics["settings"]["counts"]
    figure, (left, right) = new_figure(2)
    methods = {**metrics["results"], **metrics["baselines"]}
    accuracies = {
        method: [list(seed) for seed in zip(*(methods[method][column(count)]["values"] for count in counts))] for method in METHODS
    }
    left.set_ylim(min(0.95 * value for runs in accuracies.values() for run in runs for value in run), 100)
    _plot(left, counts, accuracies)
    left.set_ylabel("test accuracy on digits (%)")
    source = {method: [list(seed) for seed in zip(*runs)] for method, runs in metrics["source"].items()}
    before = fmean(metrics["source before"])
    right.set_ylim(0, 104)
    _plot(right, counts, {method: source[method] for method in ("all", "last block", "masks")})
    right.axhline(before, color="#555555", linestyle=(0, (6, 3)), linewidth=1.0)
    right.annotate("before any digit", (counts[0], before), (0, 4), textcoords="offset points", fontsize=8, color="#555555")
    right.set_ylabel("test accuracy on characters, afterwards (%)")
    figure.suptitle(bands(len(metrics["seeds"])), fontsize=9)
    return {"": figure}


def _plot(axes: Axes, counts: list[int], values: dict[str, list[list[float]]]) -> None:
    """A line for each method, with its name at its end."""
    for method, runs in values.items():
        plot_seeds(axes, "plain", LABELS[method], counts, runs, style={"markersize": 4, **LINES[method]})
    axes.set(xlabel="labelled digits (number)", xscale="log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    label_lines(axes, [LABELS[name] for name in values], [[run[-1] for run in runs] for runs in values.values()])
