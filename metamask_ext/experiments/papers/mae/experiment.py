"""Masked autoencoders on digits and crops of photographs, and masks over the frozen encoder.

Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377; EECS 182, Deep Neural Networks (Berkeley,
2022), homework 9, problem 1.
"""

from __future__ import annotations

import base64
import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from metamask_ext.data import load_digits

from ...engine import photographs
from ...engine.claims import Claim, Metrics, Numbers, mean
from ...engine.figures import Figures, Style, bands, new_figure, plot_seeds
from ...engine.jobs import Job, Json, Key
from ...engine.run_folder import RunFolder, Scores
from ...engine.settings import Changes, OptionError
from ...engine.tables import Rows, Tables, table_of
from .images import TEST_CROPS, TRAIN_CROPS
from .settings import Settings
from .training import fine_tune, masks, pretrain, probe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUICK: Changes = {
    "seeds": 1,
    "data": ["digits"],
    "net": {"patch": 7, "width": 32, "depth": 2, "decoder_width": 16, "decoder_depth": 1},
    "pretraining": {"steps": 60, "batch": 64},
    "tuning": {"steps": 40, "batch": 32},
    "probe": {"steps": 100},
    "masks": {"steps": 60, "batch": 32},
    "labels": [100, 4000],
}
LABELS = {
    "fine-tuned": "pretrained, fine-tuned",
    "scratch": "from scratch",
    "probe": "pretrained, linear probe",
    "random probe": "random encoder, linear probe",
    "masks": "masks over the frozen encoder (ours)",
}
BASELINES = ["scratch", "random probe"]
STARTS = {"fine-tuned": "pretrained", "scratch": "random", "probe": "pretrained", "random probe": "random"}
LINES: dict[str, Style] = {
    "fine-tuned": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "scratch": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "probe": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    "random probe": {"color": "#999999", "linestyle": ":", "marker": "x"},
}
PAPER = {"from scratch": 65, "pretrained, linear probe": 30, "pretrained, fine-tuned": 70}
"""The least test accuracies in percent that the homework takes for right; CIFAR-10, encoder 256 x 4, 20 epochs of pretraining."""

QUESTION = """Does an encoder that learned to fill in three quarters of an image, without a label, need few labels afterwards? The
first problem of homework 9 (EECS 182, Berkeley, 2022) sets a masked autoencoder (He et al., arXiv:2111.06377), a linear probe and
fine-tuning beside a net from scratch, on CIFAR-10. Here are digits, and crops of photographs as a stand-in for CIFAR: these test
textures, not objects. Ours: a mask for each of several tasks over the one frozen encoder, attention included, in the place of a
fine-tuned encoder for each."""


def column(name: str, count: int) -> str:
    """The name of an accuracy in the metrics, by data and number of labels."""
    return f"{name}, {count:,} labels: test accuracy (%)"


def _errors(metrics: Metrics, name: str) -> Numbers:
    runs = metrics["pretraining"][name]
    found = {key: sum(run[of] for run in runs) / len(runs) for key, of in (("mae", "error"), ("mean", "error of the mean image"))}
    return {**found, "ratio": found["mae"] / found["mean"]}


def _accuracies(metrics: Metrics, name: str) -> Numbers:
    labels = metrics["settings"]["labels"]
    counts = {"few": labels[0], "many": labels[-1]}
    found = {
        f"{method.replace(' ', '_').replace('-', '_')}_{key}": mean(metrics, method, column(name, count))
        for method in STARTS
        for key, count in counts.items()
    }
    return {**found, **counts}


def _tasks(metrics: Metrics) -> Numbers:
    tasks, ours = metrics["settings"]["further"], metrics["ours"]
    columns = [column(task, metrics["settings"]["labels"][-1]) for task in tasks]
    found = {method: [mean(metrics, method, each) for each in columns] for method in ("masks", "fine-tuned")}
    behind = max(tuned - masked for masked, tuned in zip(found["masks"], found["fine-tuned"]))
    kept, tuned = ours["bytes of a task"], ours["bytes of a fine-tuned encoder"]
    lowest = {"masks": min(found["masks"]), "tuned": min(found["fine-tuned"])}
    return {
        **lowest,
        "differ": ours["images of another class"],
        "behind": behind,
        "tasks": len(tasks),
        "bytes": kept,
        "tuned_bytes": tuned,
        "times": tuned / kept,
    }


def _is_full(metrics: Metrics) -> bool:
    """The few steps of a quick run teach the encoder next to nothing."""
    return not metrics["quick"]


def _of_data(name: str) -> list[Claim]:
    def applies(metrics: Metrics) -> bool:
        return _is_full(metrics) and name in metrics["settings"]["data"]

    return [
        Claim(
            f"{name}: the error on masked patches is {{mae:.4f}}, {{ratio:.2f}} of that of the mean image, {{mean:.4f}}.",
            partial(_errors, name=name),
            lambda n: n["ratio"] < 0.6,
            applies,
        ),
        Claim(
            f"{name}: a linear probe on the pretrained encoder reaches {{probe_many:.1f}} % from {{many:,}} labels, ten points or "
            "more above one on a random encoder, {random_probe_many:.1f} %.",
            partial(_accuracies, name=name),
            lambda n: n["probe_many"] >= n["random_probe_many"] + 10,
            applies,
        ),
        Claim(
            f"{name}: from {{few:,}} labels the fine-tuned encoder reaches {{fine_tuned_few:.1f}} %, five points or more "
            f"above a net "
            "from scratch, {scratch_few:.1f} %.",
            partial(_accuracies, name=name),
            lambda n: n["fine_tuned_few"] >= n["scratch_few"] + 5,
            applies,
        ),
        Claim(
            f"{name}: from {{many:,}} labels the two are within one point: fine-tuned {{fine_tuned_many:.1f}} %, from scratch "
            "{scratch_many:.1f} %.",
            partial(_accuracies, name=name),
            lambda n: abs(n["fine_tuned_many"] - n["scratch_many"]) <= 1,
            applies,
        ),
    ]


CLAIMS = [
    *_of_data("digits"),
    *_of_data("crops"),
    Claim(
        "A mask for each task over the one frozen encoder is within three points of an encoder fine-tuned for it: "
        "{masks:.1f} % and "
        "{tuned:.1f} % (the lowest of {tasks} tasks, digits turned by 90 degrees and inverted; at most {behind:.1f} points "
        "behind).",
        _tasks,
        lambda n: n["behind"] <= 3,
        lambda metrics: _is_full(metrics) and "digits" in metrics["settings"]["data"],
    ),
    Claim(
        "Such a mask takes {bytes:,} bytes, one bit a weight; a fine-tuned encoder takes {tuned_bytes:,}, {times:.1f} "
        "times as many. "
        "Served together from these bits, in mixed-task batches, {differ:.0f} of the test images get another class than "
        "one task at a "
        "time, from the logits.",
        _tasks,
        lambda n: n["times"] > 31 and n["differ"] <= 2,
        lambda metrics: "digits" in metrics["settings"]["data"],
    ),
]


def run(folder: RunFolder, settings: Settings) -> Json:
    """Pretrain an autoencoder for each data set and seed; then the accuracy by the number of labels, and masks for further tasks.

    Raises:
        OptionError: unknown data or tasks, or labels that do not ascend.
        ImportError: scikit-image is not installed, and crops are wanted.
    """
    for key, known, given in (("data", ("digits", "crops"), settings.data), ("further", ("turned", "inverted"), settings.further)):
        if not given or not {*given} <= {*known}:
            raise OptionError(f"experiment 'mae': {key!r} must be among {', '.join(known)}, got {list(given)}")
    if sorted({*settings.labels}) != list(settings.labels):
        raise OptionError(f"experiment 'mae': 'labels' must ascend, got {list(settings.labels)}")
    if "crops" in settings.data:
        photographs.check_installed()
    digits = load_digits()
    kinds = {"digits": digits.source, "crops": f"{photographs.SOURCE}, {TRAIN_CROPS:,} for training, {TEST_CROPS:,} for the test"}
    finished = folder.begin("; ".join(kinds[name] for name in settings.data), digits.note)
    if finished is not None:
        return finished

    places = {seed: folder.path / f"seed-{seed}" for seed in folder.seeds}
    first = {(seed, f"pretraining, {name}"): (seed, name) for seed in folder.seeds for name in settings.data}
    rest = {key: job for seed, place in places.items() for key, job in _jobs(seed, place, settings).items()}
    pretrained = folder.compute(
        {key: partial(pretrain, places[seed], seed, name, settings) for key, (seed, name) in first.items()}, len(rest)
    )
    made = folder.compute(rest)
    scores: Scores = {method: {} for method in LABELS}
    for name, count, task in _conditions(settings):
        for method in STARTS if not task else ("fine-tuned",):
            found = [made[seed, f"{method}, {task or name}, {count}"]["accuracy"] for seed in folder.seeds]
            scores[method][column(task or name, count)] = found
    for task in settings.further if "digits" in settings.data else ():
        scores["masks"][column(task, settings.labels[-1])] = [made[seed, "masks"]["accuracy"][task] for seed in folder.seeds]
    more: Json = {
        "pretraining": {name: [pretrained[seed, f"pretraining, {name}"] for seed in folder.seeds] for name in settings.data}
    }
    if "digits" in settings.data:
        more["ours"] = {
            key: made[folder.seeds[0], "masks"][key]
            for key in ("bytes of a task", "bytes of a fine-tuned encoder", "images of another class")
        }
    else:
        del scores["masks"]
    more["paper"] = {"least test accuracy (%)": PAPER, "condition": "CIFAR-10, encoder 256 x 4, decoder 128 x 2, 20 epochs"}
    return folder.finish(scores, BASELINES, _budget(settings), figures, more)


def _conditions(settings: Settings) -> list[tuple[str, int, str]]:
    """Data, number of labels and task (none: the data as they are) of each accuracy without masks."""
    found = [(name, count, "") for name in settings.data for count in settings.labels]
    return found + [("digits", settings.labels[-1], task) for task in settings.further if "digits" in settings.data]


def _jobs(seed: int, place: Path, settings: Settings) -> dict[Key, Job]:
    """The jobs that follow the pretraining of the encoders."""
    jobs: dict[Key, Job] = {}
    for name, count, task in _conditions(settings):
        for method in ("fine-tuned", "scratch") if not task else ("fine-tuned",):
            jobs[seed, f"{method}, {task or name}, {count}"] = partial(
                fine_tune, place, seed, name, task, STARTS[method], count, settings
            )
        for method in ("probe", "random probe") if not task else ():
            jobs[seed, f"{method}, {name}, {count}"] = partial(probe, place, seed, name, STARTS[method], count, settings)
    if "digits" in settings.data:
        jobs[seed, "masks"] = partial(masks, place, seed, settings)
    return jobs


def _budget(settings: Settings) -> str:
    first, tuning, mask = settings.pretraining, settings.tuning, settings.masks
    return (
        f"pretraining: {first.steps} steps of {first.batch} images without labels; fine-tuning and from scratch: "
        f"{tuning.steps} steps "
        f"of {tuning.batch}; masks: {mask.steps} steps of {mask.batch}; probes: {settings.probe.steps} steps of "
        f"{settings.probe.batch}."
    )


def tables(metrics: Metrics) -> Tables:
    """The accuracies, and the source's."""
    head, rows = table_of(metrics)
    named: Rows = [head, *([LABELS[method], *cells] for method, *cells in rows)]
    paper: Rows = [["homework 9, CIFAR-10", "least test accuracy (%)"], *([name, str(value)] for name, value in PAPER.items())]
    return [("", named), ("The homework's pass marks, for comparison", paper)]


def figures(metrics: Metrics) -> Figures:
    """The accuracy over labels, with the tasks of the masks; original, masked and reconstructed images."""
    from matplotlib.image import imread

    names, labels = metrics["settings"]["data"], metrics["settings"]["labels"]
    methods = {**metrics["results"], **metrics["baselines"]}
    ours = "digits" in names
    figure, axes = new_figure(len(names) + ours)
    for panel, name in zip(axes, names):
        for method, style in LINES.items():
            values = [methods[method][column(name, count)]["values"] for count in labels]
            plot_seeds(panel, "plain", LABELS[method], labels, [list(seed) for seed in zip(*values)], style=style)
        panel.set(xscale="log", xlabel="labelled training images (number)", ylabel="test accuracy (%)")
        panel.set_xticks(labels, [f"{count:,}" for count in labels])
        panel.minorticks_off()
        panel.set_title(name, fontsize=10)
    handles, names_of = axes[0].get_legend_handles_labels()
    title = bands(len(metrics["seeds"]))
    figure.legend(handles, names_of, fontsize=8, loc="outside upper center", ncols=2, title=title, title_fontsize=8)
    if ours:
        _plot_tasks(axes[-1], metrics)
    pictures, panels = new_figure(1, rows=len(names))
    pictures.set_size_inches(7, 3 * len(names))
    for panel, name in zip(panels, names):
        panel.imshow(imread(io.BytesIO(base64.b64decode(metrics["pretraining"][name][0]["pictures"]))))
        high = panel.get_ylim()[0] / 3
        panel.set_yticks([high * (place + 0.5) for place in range(3)], ["original", "masked", "reconstructed"])
        panel.set_xticks([])
        share = metrics["settings"]["share"]
        panel.set_title(f"{name}: test images, {share:.0%} of the patches masked (grey)", fontsize=10)
    return {"": figure, "images": pictures}


def _plot_tasks(axes: Axes, metrics: Metrics) -> None:
    """The accuracy of masks and of fine-tuned encoders on further tasks, a point for each seed."""
    tasks, count = metrics["settings"]["further"], metrics["settings"]["labels"][-1]
    for shift, (method, label, style) in enumerate(
        (
            ("fine-tuned", "an encoder each", LINES["fine-tuned"]),
            ("masks", "a mask each (ours)", {"color": "#CC79A7", "marker": "D"}),
        )
    ):
        for place, task in enumerate(tasks):
            values = metrics["results"][method][column(task, count)]["values"]
            spots = [place + 0.2 * shift - 0.1] * len(values)
            axes.plot(
                spots, values, linestyle="none", color=style["color"], marker=style["marker"], label=label if not place else None
            )
    axes.set_xticks(range(len(tasks)), [f"digits, {task}" for task in tasks])
    axes.set(xlim=(-0.5, len(tasks) - 0.5), ylabel="test accuracy (%)")
    axes.set_title(f"further tasks, {count:,} labels; a point: a seed", fontsize=10)
    axes.legend(fontsize=8, loc="best")
