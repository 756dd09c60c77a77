"""Few-shot classification of characters: Finn, Abbeel and Levine, arXiv:1703.03400, section 5.2, with masked and plain nets."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.data import Characters, few_shot_tasks, load_characters
from metamask_ext.nn import MaskedConv2d, MaskedLinear

from ..engine.claims import Claim, Metrics, Numbers, by_method, mean
from ..engine.data import characters
from ..engine.figures import Figures, bands, label_lines, new_figure, plot_seeds
from ..engine.jobs import Job, Json, Key
from ..engine.run_folder import RunFolder, Scores
from ..engine.settings import Changes, OptionError, RunSettings
from ..engine.statistics import interval_over_tasks
from ..engine.tables import Tables
from ..engine.training import descend, seeded
from .meta_learning import AdaptSettings, Support, predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = dict[str, list[float]]
"""``accuracy`` in percent after each number of steps, and ``interval``, half the width of its 95 % interval."""
LABELS = {
    "masks": "masked net, masks adapted (ours)",
    "weights": "masked net, weights adapted",
    "plain": "plain net (the paper's MAML)",
    "masks, first order": "masked net, masks adapted (ours), first order",
    "weights, first order": "masked net, weights adapted, first order",
    "plain, first order": "plain net (the paper's MAML), first order",
    "pixels": "nearest neighbour, by pixels",
}
BASELINES = ["plain", "plain, first order", "pixels"]


@dataclass(frozen=True)
class KindSettings:
    """A kind of tasks. Fewer tasks where there are more images, so that all take about as long.

    Attributes:
        ways: the number of classes.
        shots, queries: images of each class.
        tasks: of a step; a step has ``tasks * ways * (shots + queries)`` images.
        steps: of meta-training.
        test_tasks: of the test.
    """

    ways: int
    shots: int
    queries: int
    tasks: int
    steps: int
    test_tasks: int


@dataclass(frozen=True)
class TestSettings:
    """The test.

    Attributes:
        queries: images of each class.
        steps: gradient steps on a test task.
    """

    queries: int = 5
    steps: int = 3


def _sizes() -> Mapping[str, KindSettings]:
    return {
        "5-way 1-shot": KindSettings(ways=5, shots=1, queries=2, tasks=8, steps=400, test_tasks=300),
        "5-way 5-shot": KindSettings(ways=5, shots=5, queries=3, tasks=4, steps=300, test_tasks=300),
        "20-way 1-shot": KindSettings(ways=20, shots=1, queries=1, tasks=4, steps=300, test_tasks=100),
        "20-way 5-shot": KindSettings(ways=20, shots=5, queries=1, tasks=2, steps=200, test_tasks=100),
    }


def _methods() -> Mapping[str, AdaptSettings]:
    # The gradient of a mask is that of theta times W * s * (1 - s), which is small: hence its larger rate, chosen among 5 to
    # 10,000 on 100 to 150 steps of 5-way and 20-way 1-shot tasks. 0.4 is the paper's.
    return {
        "masks": AdaptSettings(masked=True, adapt="masks", inner_lr=1000.0),
        "weights": AdaptSettings(masked=True, adapt="weights", inner_lr=0.4),
        "plain": AdaptSettings(masked=False, adapt="weights", inner_lr=0.4),
    }


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        lr: of meta-training.
        inner_steps: of meta-training.
        filters: of a convolution.
        kinds: of tasks, each a key of ``sizes``.
        sizes: of the kinds of tasks.
        methods: the nets, and what is adapted of them.
        test: of the test.
    """

    seeds: int = 1
    lr: float = 3e-3
    inner_steps: int = 1
    filters: int = 32
    kinds: tuple[str, ...] = ("5-way 1-shot", "5-way 5-shot", "20-way 1-shot", "20-way 5-shot")
    sizes: Mapping[str, KindSettings] = field(default_factory=_sizes)
    methods: Mapping[str, AdaptSettings] = field(default_factory=_methods)
    test: TestSettings = TestSettings()


QUICK: Changes = {
    "kinds": ["5-way 1-shot"],
    "filters": 16,
    "sizes": {"5-way 1-shot": {"steps": 120, "test_tasks": 60}},
}
PAPER = {"5-way 1-shot": 98.7, "5-way 5-shot": 99.9, "20-way 1-shot": 95.8, "20-way 5-shot": 98.9}
"""MAML on Omniglot, arXiv:1703.03400, table 1: test accuracy in percent, 64 filters, 60,000 steps on 32 (5-way) or 16 tasks."""

QUESTION = """Does what holds for sine waves hold for images: can a net tell new characters apart after one to three gradient
steps that move only its masks? The proposal (section 1) names MAML as the method to compare with; this is section 5.2 of Finn,
Abbeel and Levine (arXiv:1703.03400). Where there is no Omniglot the characters are glyphs of a font, printed and not
handwritten, with a fraction of the paper's training: then the numbers are not comparable with the paper's."""


def column(kind: str) -> str:
    """The name of the accuracy in the metrics."""
    return f"{kind}: test accuracy (%)"


def _accuracies(metrics: Metrics, kind: str = "5-way 1-shot") -> Numbers:
    """By method, in names that a format string can have."""
    found = {method.replace(", ", "_").replace(" ", "_"): mean(metrics, method, column(kind)) for method in LABELS}
    return {**found, "paper": PAPER[kind]}


def _leads(metrics: Metrics, methods: Sequence[str], others: Sequence[str]) -> Numbers:
    """The points by which each of ``methods`` is ahead of ``others``, in pairs, over all kinds of tasks: the least and the most."""
    kinds = metrics["settings"]["kinds"]
    leads = [
        mean(metrics, method, column(kind)) - mean(metrics, other, column(kind))
        for kind in kinds
        for method, other in zip(methods, others)
    ]
    return {"least": min(leads), "most": max(leads), "kinds": len(kinds)}


_SECOND = ("masks", "weights", "plain")
_FIRST = tuple(f"{method}, first order" for method in _SECOND)
CLAIMS = [
    Claim(
        "5-way 1-shot, three steps: the accuracy on new characters is {masks:.1f} % with masks adapted, {weights:.1f} % with the "
        "masked net's weights, {plain:.1f} % with the paper's MAML (the paper, on Omniglot: {paper} %); masks are within "
        "five points of the others.",
        _accuracies,
        lambda numbers: numbers["masks"] > max(numbers["weights"], numbers["plain"]) - 5,
    ),
    Claim(
        "With second derivatives all three are better than the nearest image by pixels, by {least:.1f} to {most:.1f} points (kinds "
        "of task: {kinds}).",
        lambda metrics: _leads(metrics, _SECOND, ("pixels",) * 3),
        lambda numbers: numbers["least"] > 0,
    ),
    Claim(
        "To first order all three are better than the nearest image by pixels too: they lead by {least:.1f} to {most:.1f} points "
        "(kinds of task: {kinds}).",
        lambda metrics: _leads(metrics, _FIRST, ("pixels",) * 3),
        lambda numbers: numbers["least"] > 0,
    ),
    Claim(
        "Taking the inner gradients as constants costs {least:.1f} to {most:.1f} points of accuracy at so few steps (masks, "
        "weights and the plain net; kinds of task: {kinds}).",
        lambda metrics: _leads(metrics, _SECOND, _FIRST),
        lambda numbers: numbers["least"] > 0,
    ),
    Claim(
        "Adapting masks is {least:.1f} to {most:.1f} points behind adapting the masked net's weights, by kind of task "
        "(of {kinds}).",
        lambda metrics: _leads(metrics, ["weights"], ["masks"]),
        lambda numbers: numbers["most"] < 10,
    ),
]


def network(masked: bool, ways: int, filters: int) -> nn.Sequential:
    """The paper's net for Omniglot: four blocks of a 3x3 convolution of stride 2, batch norm and ReLU; ``[n, 1, 28, 28]`` to logits
    ``[n, ways]``."""
    conv = MaskedConv2d if masked else nn.Conv2d
    linear = MaskedLinear if masked else nn.Linear
    layers: list[nn.Module] = []
    for channels in (1, filters, filters, filters):
        # A bias would be taken away again by the batch norm.
        layers += [conv(channels, filters, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), linear(4 * filters, ways))


def run(folder: RunFolder, settings: Settings) -> Json:
    """Meta-training with one inner step, for each number of classes and images of each. Measured: the accuracy on tasks of new
    characters after 0 to 3 steps; against the nearest image by pixels."""
    for kind in settings.kinds:
        if kind not in settings.sizes:
            raise OptionError(f"experiment 'fewshot': 'kinds' must be among {', '.join(settings.sizes)}, got {kind!r}")
    data = load_characters()
    turned = f"{len(data.train)} for training, {len(data.test)} for the test; turned by 90 degrees, others"
    finished = folder.begin(f"{data.source}: {turned}", data.note)
    if finished is not None:
        return finished

    names = {(kind, method): f"{kind}, {method}" for kind in settings.kinds for method in LABELS}
    jobs: dict[Key, Job] = {
        (seed, name): partial(_measured, kind, method, seed, settings)
        for seed in folder.seeds
        for (kind, method), name in names.items()
    }
    made = folder.compute(jobs)
    found: dict[str, dict[str, list[Json]]] = {method: {} for method in LABELS}
    for (kind, method), name in names.items():
        found[method][kind] = [made[seed, name] for seed in folder.seeds]
    scores: Scores = {}
    intervals: dict[str, dict[str, float]] = {}
    for method, its in found.items():
        scores[method] = {column(kind): [run["accuracy"][-1] for run in runs] for kind, runs in its.items()}
        intervals[method] = {column(kind): sum(run["interval"][-1] for run in runs) / len(runs) for kind, runs in its.items()}
    budget = f"{settings.test.steps} gradient steps on a test task; for training " + "; ".join(
        f"{kind}: {n.steps} steps on {n.tasks} tasks of {n.ways} x ({n.shots} + {n.queries}) images"
        for kind, n in ((kind, settings.sizes[kind]) for kind in settings.kinds)
    )
    more = {
        "interval_95_over_tasks": intervals,
        "curves": found,
        "drawings": {"training": _drawings(data.train), "test": _drawings(data.test)},
        "paper": {column(kind): PAPER[kind] for kind in settings.kinds if kind in PAPER},
        "paper_data": "Omniglot, 64 filters, 60,000 steps on 32 (5-way) or 16 (20-way) tasks",
    }
    return folder.finish(scores, BASELINES, budget, figures, more)


def tables(metrics: Metrics) -> Tables:
    """The accuracy with its interval over the test tasks, and the paper's."""
    kinds = [kind for kind in metrics["settings"]["kinds"] if kind in PAPER]
    head = ["test accuracy (%) ± 95 % interval over test tasks", *kinds]
    methods = by_method(metrics)
    rows = [
        [
            LABELS[method],
            *(f"{numbers[column(k)]['mean']:.1f} ± {metrics['interval_95_over_tasks'][method][column(k)]:.1f}" for k in kinds),
        ]
        for method, numbers in methods.items()
    ]
    return [("", [head, *rows, ["paper: MAML, " + metrics["paper_data"], *(f"{PAPER[kind]}" for kind in kinds)]])]


def _measured(kind: str, method: str, seed: int, settings: Settings) -> Curve:
    """Train a method and test it."""
    data, sizes, test = characters(), settings.sizes[kind], settings.test
    if method == "pixels":
        return _tested(data, sizes, test, seed, _nearest)
    base = method.removesuffix(", first order")
    chosen = settings.methods[base]
    model = seeded(seed, lambda: network(chosen.masked, sizes.ways, settings.filters))
    maml = chosen.maml(model, settings.inner_steps, first_order=method != base)
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return maml(F.cross_entropy, *few_shot_tasks(data.train, sizes.tasks, sizes.ways, sizes.shots, sizes.queries, generator))

    descend(model.parameters(), settings.lr, sizes.steps, drawn)

    def logits(support: Support, x: Tensor) -> list[Tensor]:
        return predictions(maml, F.cross_entropy, support, x, range(test.steps + 1))

    return _tested(data, sizes, test, seed, logits)


def _nearest(support: Support, x: Tensor) -> list[Tensor]:
    """Minus the distance to the nearest image of each class."""
    images, labels = support
    distance = torch.cdist(x.flatten(2), images.flatten(2))
    ways = int(labels.max()) + 1
    return [torch.stack([-distance[:, :, labels[0] == label].amin(2) for label in range(ways)], 2)]


@torch.no_grad()
def _tested(
    data: Characters, sizes: KindSettings, test: TestSettings, seed: int, logits: Callable[[Support, Tensor], list[Tensor]]
) -> Curve:
    """The accuracy on tasks of new characters; ``logits`` after each number of steps."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    right: list[Tensor] = []
    together = 100 // sizes.ways  # so that a batch has a few hundred images
    for begin in range(0, sizes.test_tasks, together):
        tasks = min(together, sizes.test_tasks - begin)
        support, (x, y) = few_shot_tasks(data.test, tasks, sizes.ways, sizes.shots, test.queries, generator)
        right.append(torch.stack([(made.argmax(2) == y).double().mean(1) for made in logits(support, x)], 1))
    accuracy = 100 * torch.cat(right)  # [tasks, steps]
    return {"accuracy": accuracy.mean(0).tolist(), "interval": interval_over_tasks(accuracy).tolist()}


def _drawings(images: Tensor) -> str:
    """Five drawings each of eight characters, as a PNG in base64."""
    from matplotlib.image import imsave

    some = images[:8, :5].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    file = io.BytesIO()
    imsave(file, some.numpy(), cmap="gray_r", format="png")
    return base64.b64encode(file.getvalue()).decode()


def figures(metrics: Metrics) -> Figures:
    """The accuracy over gradient steps for each kind of tasks, second order above first order; and some of the drawings."""
    kinds, found = metrics["settings"]["kinds"], metrics["curves"]
    figure, axes = new_figure(len(kinds), rows=2)
    figure.set_size_inches(5.2 * len(kinds), 7)
    steps = list(range(metrics["settings"]["test"]["steps"] + 1))
    for row, (methods, title) in enumerate(((_SECOND, "second derivatives"), (_FIRST, "first order"))):
        for axis, kind in zip(axes[row * len(kinds) :], kinds):
            _plot_kind(axis, {method: found[method][kind] for method in (*methods, "pixels")}, steps)
            axis.set_title(f"{kind}, {title}", fontsize=10)
    figure.suptitle(f"{bands(len(metrics['seeds']))}; bars at points: 95 % interval over tasks", fontsize=9)
    return {"": figure, "characters": _characters_figure(metrics["drawings"])}


def _characters_figure(drawings: Mapping[str, str]) -> Figure:
    from matplotlib.image import imread

    figure, axes = new_figure(len(drawings))
    for panel, (title, image) in zip(axes, drawings.items()):
        panel.imshow(imread(io.BytesIO(base64.b64decode(image))))
        panel.set_title(f"{title}: 5 drawings each of 8 characters", fontsize=10)
        panel.set_axis_off()
    return figure


_NAMES = {
    "masks": "masked net: masks",
    "weights": "masked net: weights",
    "plain": "plain net (MAML)",
    "pixels": "nearest by pixels",
}


def _plot_kind(axes: Axes, curves: Mapping[str, list[Curve]], steps: list[int]) -> None:
    """The accuracy of each method over gradient steps."""
    ends = []
    for method, its in curves.items():
        runs = [run["accuracy"] if len(run["accuracy"]) > 1 else run["accuracy"] * len(steps) for run in its]
        plot_seeds(axes, method, LABELS[method], steps, runs)
        ends.append([run[-1] for run in runs])
    lines = list(axes.lines)
    for line, its in zip(lines, curves.values()):
        if len(its[0]["accuracy"]) > 1:
            spread = [fmean(run["interval"][step] for run in its) for step in steps]
            axes.errorbar(steps, line.get_ydata(), spread, fmt="none", color=line.get_color(), capsize=2, linewidth=1)
    axes.set(xlabel="gradient steps on the support set", ylabel="test accuracy (%)", xticks=steps, ylim=(0, 102))
    label_lines(axes, [_NAMES[method.partition(",")[0]] for method in curves], ends, lines=lines)
