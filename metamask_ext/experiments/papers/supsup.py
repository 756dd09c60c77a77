"""Supermasks in superposition: hundreds of permutations, or 36 rotations, of the digits in one bank, with and without their names.

Source: Wortsman et al., Supermasks in Superposition, arXiv:2006.14769, sections 3.2 to 3.4 and 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.bank import MaskBank
from metamask_ext.bank.index import INDEX
from metamask_ext.data import Digits, PermutedImages, RotatedImages, load_digits
from metamask_ext.files.atomic import write_atomic
from metamask_ext.files.checkpoint import load_checkpoint, save_checkpoint
from metamask_ext.files.errors import OutputError
from metamask_ext.nn import MaskedLinear
from metamask_ext.nn.names import DEFAULT_TASK
from metamask_ext.nn.using_task import using_task

from ..engine.claims import Claim, Metrics, Numbers, mean
from ..engine.data import digits
from ..engine.figures import Figures, Style, bands, new_figure, plot_seeds
from ..engine.jobs import Json, json_bytes, read_json
from ..engine.run_folder import RunFolder, Scores
from ..engine.settings import Changes, OptionError, RunSettings
from ..engine.statistics import cell, summarized
from ..engine.tables import Tables, table_of
from ..engine.tracking import track
from ..engine.training import seeded

CLASSES, ROTATIONS = 10, 36


@dataclass(frozen=True)
class TestSettings:
    """The tests.

    Attributes:
        samples: images of all tasks at each point.
        batch: images from which a task is inferred together.
        batches: the most tasks of which a batch is taken.
    """

    samples: int = 5000
    batch: int = 128
    batches: int = 250


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        tasks: their number.
        rotated: whether tasks are rotations, not permutations.
        steps: of each task.
        lr: of rates that learn about as well, a low one: most bits of the first layer stay as they were drawn, and entropy tells
            the tasks apart. Found by a small search on 2 to 4 permutations (accuracy) and 20 to 80 (inference): momentum SGD with
            5 learns fastest, but then few images are given the right one of 20 tasks.
        batch_size: of a step.
        widths: of the layers. 500 outputs for 10 classes: the entropy of a single image then tells whose mask it is (the paper,
            section 4.2).
        test: of the tests.
        save_every: the bank is saved after so many tasks.
    """

    seeds: int = 1
    tasks: int = 250
    rotated: bool = False
    steps: int = 500
    lr: float = 1e-3
    batch_size: int = 64
    widths: tuple[int, ...] = (784, 300, 100, 500)
    test: TestSettings = TestSettings()
    save_every: int = 25


ROTATED: Changes = {"rotated": True, "tasks": ROTATIONS}
QUICK: Changes = {"tasks": 5, "steps": 200, "test": {"samples": 500}}

ACCURACY, RIGHT = "test accuracy (%)", "task right (%)"
PAPER_ACCURACY = 94.91
"""arXiv:2006.14769: permuted MNIST, 250 tasks, LeNet-300-100, task not named, 60,000 training digits."""
PAPER = f"paper: {PAPER_ACCURACY} %, task not named, 60,000 training digits"
LABELS = {
    "named": "task named",
    "one image": "task inferred from one image",
    "batch": "task inferred from a batch",
    "sequence": "one net without masks, in sequence",
}
# Okabe and Ito's colours. The first three lie on each other: hollow markers of three sizes show all of them.
LINES: dict[str, Style] = {
    "named": {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 10},
    "one image": {"color": "#E69F00", "linestyle": "--", "marker": "s", "markersize": 6},
    "batch": {"color": "#009E73", "linestyle": "-.", "marker": "^", "markersize": 3},
    "sequence": {"color": "#D55E00", "linestyle": ":", "marker": "x", "markersize": 5},
}
Point = dict[str, dict[str, float]]
"""By method and name, the numbers at one number of tasks."""
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
    return {**found, "tasks": settings.tasks, "batch": settings.test.batch}


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


def network(masked: bool, widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths without biases, with ReLU between them, ``[n, ...]`` to ``[n, widths[-1]]``.

    Masked: hard gates over a frozen W of ``+-sqrt(2 / in)``, the signs drawn (Ramanujan et al., arXiv:1911.13299, section 4); new
    logits are uniform in ``+-1 / sqrt(in)``.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        if masked:
            layer: nn.Linear = MaskedLinear(inputs, outputs, bias=False, gate="hard", mask_init=_kaiming_uniform)
            layer.weight.requires_grad_(False).copy_(layer.weight.sign() * math.sqrt(2 / inputs))
        else:
            layer = nn.Linear(inputs, outputs, bias=False)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _kaiming_uniform(logits: Tensor) -> None:
    nn.init.kaiming_uniform_(logits, a=math.sqrt(5))


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

    work = {"masks": _masks, "sequence": _sequence}
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
    more = {**_packing_of(masks, count * len(found.test[0])), "points": _points(count), "curves": curves}
    if not rotated:
        more["paper"] = {
            ACCURACY: PAPER_ACCURACY,
            "condition": "arXiv:2006.14769, permuted MNIST, LeNet-300-100, task not named, 60,000 training digits",
        }
    return folder.finish(scores, ["sequence", "chance"], _budget(settings, len(found.train[0])), figures, more)


def _curves(count: int, masks: list[Json], sequence: list[Json]) -> Curves:
    """Every number at each of the points, for each seed."""
    points = [str(point) for point in _points(count)]
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


def _points(count: int) -> list[int]:
    """The numbers of tasks at which there are measurements: ten."""
    every = math.ceil(count / 10)
    return [*range(every, count, every), count]


@dataclass(frozen=True)
class Data:
    """The digits, and the tasks made of them. What a network gets has mean 0 and variance 1 over the training digits."""

    digits: Digits
    tasks: PermutedImages | RotatedImages
    mean: Tensor
    std: Tensor

    @property
    def method(self) -> str:
        """How the task of a batch of images is inferred."""
        return "binary" if isinstance(self.tasks, RotatedImages) else "one_shot"

    @classmethod
    def of(cls, seed: int, settings: Settings) -> Data:
        found, count = digits(), settings.tasks
        tasks = RotatedImages(count) if settings.rotated else PermutedImages(count, seed=seed)
        return cls(found, tasks, found.train[0].mean(), found.train[0].std())

    def shown(self, images: Tensor, task: int | Tensor) -> Tensor:
        """Images as the task, or each one's task, shows them."""
        return (self.tasks(images, task) - self.mean) / self.std

    def train(self, task: int) -> tuple[Tensor, Tensor]:
        images, labels = self.digits.train
        return self.shown(images, task), labels

    def test(self, task: int | Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The test digits, or some of them."""
        images, labels = self.digits.test
        return (self.shown(images, task), labels) if rows is None else (self.shown(images[rows], task), labels[rows])

    def mixed(self, tasks: int, test: TestSettings, seed: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Batches ``(x, y, task)`` of test digits of the first ``tasks`` tasks, about as many of each, in random order."""
        generator = torch.Generator().manual_seed(seed)
        task = (torch.arange(test.samples) % tasks)[torch.randperm(test.samples, generator=generator)]
        rows = torch.randint(len(self.digits.test[0]), (test.samples,), generator=generator)
        for some, of_them in zip(task.split(test.batch), rows.split(test.batch)):
            yield (*self.test(some, of_them), some)


def _fit(model: nn.Module, parameters: Iterable[Tensor], data: tuple[Tensor, Tensor], settings: Settings, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    x, y = data
    model.train()
    for _ in range(settings.steps):
        rows = torch.randint(len(x), (settings.batch_size,), generator=generator)
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def _seeds(seed: int, tasks: int) -> list[int]:
    return torch.randint(2**62, (tasks,), generator=torch.Generator().manual_seed(seed)).tolist()


def _masks(folder: Path, seed: int, settings: Settings) -> Json:
    """Fill the bank with all tasks: for each of the points (numbers of tasks) what was measured, what packing did, and the size."""
    data, points = Data.of(seed, settings), _points(settings.tasks)
    saved, path = folder / "bank", folder / "progress.json"
    folder.mkdir(parents=True, exist_ok=True)
    model = seeded(seed, partial(network, True, settings.widths))
    if (saved / INDEX).exists():
        bank = MaskBank.load(saved, model)
        learned, progress = len(bank.tasks), read_json(path)
    else:
        bank = MaskBank(model)
        learned, progress = 0, {"packing": {}, "points": {}}
    for point, measured in progress["points"].items():
        _track(int(point), measured)
    seeds, names = _seeds(seed, points[-1]), data.tasks.names
    for stop in sorted({*points, *range(settings.save_every, points[-1], settings.save_every)}):
        if stop > learned:
            for task in range(learned, stop):
                progress["packing"][names[task]] = _learn_one(bank, names[task], data, task, settings, seeds[task])
            # Before the bank: after a kill between the two, what is here too much is learned and written again.
            write_atomic(path, json_bytes(progress))
            bank.save(saved)
            learned = stop
        if stop == learned and stop in points and str(stop) not in progress["points"]:
            measured = _measure(bank, data, settings.test, seed)
            progress["points"][str(stop)] = measured
            write_atomic(path, json_bytes(progress))
            _track(stop, measured)
            _say(stop, {method: numbers[ACCURACY] for method, numbers in measured.items()})
    missing = {*map(str, points)} - progress["points"].keys() or set(bank.tasks) - progress["packing"].keys()
    if missing:
        raise OutputError(f"{str(path)!r} lacks {sorted(missing)}, which the bank beside it is past: use another folder")
    before, after, changed = (torch.tensor(numbers, dtype=torch.float64) for numbers in zip(*progress["packing"].values()))
    return {
        "points": progress["points"],
        "packing": {
            "mean test accuracy before (%)": float(before.mean()),
            "mean test accuracy after (%)": float(after.mean()),
            "test digits given another class": int(changed.sum()),
        },
        "bytes per task": {
            "memory": max(map(bank.bytes_per_task, bank.tasks)),
            "disk": sum(path.stat().st_size for path in [saved / INDEX, *(saved / "tasks").iterdir()]) / points[-1],
        },
    }


def _track(tasks: int, measured: Point) -> None:
    track(tasks, **{f"{method}/{key.removesuffix(' (%)')}": value for method, of in measured.items() for key, value in of.items()})


def _say(tasks: int, accuracies: dict[str, float]) -> None:
    print(f"{tasks} tasks: " + ", ".join(f"{LABELS[method]} {value:.1f} %" for method, value in accuracies.items()), flush=True)


def _learn_one(bank: MaskBank, name: str, data: Data, task: int, settings: Settings, seed: int) -> tuple[float, float, int]:
    """Add a task to the bank, train its mask alone and pack it: its test accuracy before and after that, and the digits that got
    another class by it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bank.add_task(name)
    if DEFAULT_TASK in bank.tasks:  # a new model's
        bank.remove_task(DEFAULT_TASK)
    layers = [layer for layer in bank.model.modules() if isinstance(layer, MaskedLinear)]
    x, y = data.test(task)
    with using_task(bank.model, name):
        _fit(bank.model, [layer.masks[name] for layer in layers], data.train(task), settings, seed)
        before = _classes(bank.model, x)
        bank.pack(name)
        after = _classes(bank.model, x)
    return _percent(before == y), _percent(after == y), int((before != after).sum())


def _measure(bank: MaskBank, data: Data, test: TestSettings, seed: int) -> Point:
    """The numbers of the bank's tasks, with their names and without."""
    known, model, names = len(bank.tasks), bank.model, data.tasks.names
    named, one_image, right = [], [], []
    for x, y, task in data.mixed(known, test, seed):
        given = [names[index] for index in task.tolist()]
        found = list(bank.infer_task(x))
        named.append(_classes(model, x, given) == y)
        one_image.append(_classes(model, x, found) == y)
        right.append(torch.tensor([a == b for a, b in zip(found, given, strict=True)]))

    generator = torch.Generator().manual_seed(seed)
    batch, batch_right = [], []
    for index in torch.randperm(known, generator=generator)[: test.batches].tolist():
        x, y = data.test(index, torch.randint(len(data.digits.test[0]), (test.batch,), generator=generator))
        name = bank.infer_task(x, data.method, per_sample=False)
        batch.append(_classes(model, x, name) == y)
        batch_right.append(torch.tensor([name == names[index]]))
    return {
        "named": {ACCURACY: _percent(*named)},
        "one image": {ACCURACY: _percent(*one_image), RIGHT: _percent(*right)},
        "batch": {ACCURACY: _percent(*batch), RIGHT: _percent(*batch_right)},
    }


def _sequence(folder: Path, seed: int, settings: Settings) -> Json:
    """One net without masks that learns the tasks one after another: at each of the points, its accuracy on all tasks so far."""
    data, points = Data.of(seed, settings), _points(settings.tasks)
    path = folder / "sequence.pt"
    folder.mkdir(parents=True, exist_ok=True)
    model = seeded(seed, partial(network, False, settings.widths))
    learned, curve = 0, []
    if path.exists():
        state = load_checkpoint(path)
        learned, curve = state["learned"], state["curve"]
        model.load_state_dict(state["model"])
    for point, accuracy in zip(points, curve):
        _track(point, {"sequence": {ACCURACY: accuracy}})
    seeds = _seeds(seed, points[-1])
    for stop in points[len(curve) :]:
        for task in range(learned, stop):
            _fit(model, model.parameters(), data.train(task), settings, seeds[task])
        learned = stop
        curve.append(_percent(*(_classes(model, x) == y for x, y, _ in data.mixed(stop, settings.test, seed))))
        save_checkpoint(path, {"learned": learned, "curve": curve, "model": model.state_dict()})
        _track(stop, {"sequence": {ACCURACY: curve[-1]}})
        _say(stop, {"sequence": curve[-1]})
    return {"curve": curve}


def _classes(model: nn.Module, x: Tensor, task: str | Sequence[str] | None = None) -> Tensor:
    with torch.no_grad():
        if task is None:
            return model(x).argmax(1)
        with using_task(model, task):
            return model(x).argmax(1)


def _percent(*right: Tensor) -> float:
    return 100 * float(torch.cat(right).double().mean())


def figures(metrics: Metrics) -> Figures:
    """Accuracy, and how often the task is right, over the number of tasks."""
    rotated, points, batch = metrics["settings"]["rotated"], metrics["points"], metrics["settings"]["test"]["batch"]
    figure, axes = new_figure(2)
    for axis, key in zip(axes, (ACCURACY, RIGHT)):
        for method, its in metrics["curves"].items():
            if key in its:
                label = LABELS[method].replace("a batch", f"{batch} images")
                style = {"linewidth": 1.4, "markerfacecolor": "none", **LINES[method]}
                plot_seeds(axis, "plain", label, points, its[key], style=style)
        kind = "rotations" if rotated else "permutations"
        axis.set(xlabel=f"tasks learned ({kind}, number)", xlim=(0, None), ylim=(0, 103))
    left, right = axes
    if not rotated:
        left.axhline(PAPER_ACCURACY, label=PAPER, color="#555555", linestyle=(0, (6, 3)), linewidth=1.0)
    chance: Style = {"label": "chance", "color": "#999999", "linewidth": 1.0}
    left.axhline(100 / CLASSES, **chance)
    right.plot(points, [100 / point for point in points], **chance)
    left.set_ylabel("test accuracy, tasks so far (%)")
    right.set_ylabel("task right (% of images, batches)")
    # Below the axes: curves may run anywhere in them. Those on the right are all on the left too.
    title = bands(len(metrics["seeds"]))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, title=title, title_fontsize=8)
    return {"": figure}
