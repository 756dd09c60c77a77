"""Supermasks in superposition: hundreds of permutations, or 36 rotations, of the digits in one bank, with and without their names.

Source: Wortsman et al., Supermasks in Superposition, arXiv:2006.14769, sections 3.2 to 3.4 and 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank import MaskBank
from ..bank.index import INDEX
from ..continual.files import OutputError, load_checkpoint, save_checkpoint, write_atomic
from ..nn import MaskedLinear
from ..nn.active import using_task
from ..nn.masked_layer import DEFAULT_TASK
from ..tasks import Digits, PermutedImages, RotatedImages, load_digits
from . import OptionError
from .methods import seeded
from .output import Output, Scores, json_bytes, new_figure, one_thread, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# 500 outputs for 10 classes: the entropy of a single image then tells whose mask it is (the paper, section 4.2).
WIDTHS, CLASSES = (784, 300, 100, 500), 10
# Of rates that learn about as well, a low one: most bits of the first layer stay as they were drawn, and entropy tells the tasks
# apart. docs/results/README.md has the search.
OPTIONS: dict[str, Any] = {"steps": 500, "lr": 1e-3, "batch_size": 64}
TASKS, ROTATIONS, SAVE_EVERY = 250, 36, 25
SAMPLES, BATCH, BATCHES = 5000, 128, 250
QUICK: dict[str, Any] = {"tasks": 5, "steps": 200, "samples": 500}

ACCURACY, RIGHT = "test accuracy (%)", "task right (%)"
PAPER_ACCURACY = 94.91
PAPER = f"paper: {PAPER_ACCURACY} %, task not named, 60,000 training digits"
LABELS = {
    "named": "task named",
    "one image": "task inferred from one image",
    "batch": f"task inferred from {BATCH} images",
    "sequence": "one net without masks, in sequence",
}
# Okabe and Ito's colours. The first three lie on each other: hollow markers of three sizes show all of them.
LINES: dict[str, dict[str, Any]] = {
    "named": {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 10},
    "one image": {"color": "#E69F00", "linestyle": "--", "marker": "s", "markersize": 6},
    "batch": {"color": "#009E73", "linestyle": "-.", "marker": "^", "markersize": 3},
    "sequence": {"color": "#D55E00", "linestyle": ":", "marker": "x", "markersize": 5},
}
Point = dict[str, dict[str, float]]


def network(masked: bool) -> nn.Sequential:
    """LeNet-300-100 without biases, ``[n, 1, 28, 28]`` to ``[n, 500]``.

    Masked: hard gates over a frozen W of ``+-sqrt(2 / in)``, the signs drawn (Ramanujan et al., arXiv:1911.13299, section 4); new
    logits are uniform in ``+-1 / sqrt(in)``.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(WIDTHS):
        if masked:
            layer: nn.Linear = MaskedLinear(inputs, outputs, bias=False, gate="hard", mask_init=_kaiming_uniform)
            layer.weight.requires_grad_(False).copy_(layer.weight.sign() * math.sqrt(2 / inputs))
        else:
            layer = nn.Linear(inputs, outputs, bias=False)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _kaiming_uniform(logits: Tensor) -> None:
    nn.init.kaiming_uniform_(logits, a=math.sqrt(5))


@one_thread()
def run(out: Path, seed: int, quick: bool, *, tasks: int | None = None, rotated: bool = False) -> dict[str, Any]:
    """Learn the tasks one after another, a mask each, and pack each when it is learned. Measured on held-out digits, at ten numbers
    of tasks: the accuracy with the tasks named, served as mixed batches; with each image's task inferred from it alone (one shot);
    and with a task inferred from 128 of its images: in one shot for permutations; for rotations, of which neighbours are alike, by
    halving, as the paper does. Beside it: one net without masks that learns the tasks in sequence, with the same steps.

    One seed, unlike the other experiments. The bank grows in ``out/bank``; ``progress.json`` and ``sequence.pt`` hold the rest of
    what a killed run needs. See :func:`metamask_ext.experiments.run`.

    Args:
        tasks: how many; 250 permutations or 36 rotations unless given, 5 if quick.
        rotated: rotations by multiples of 10 degrees in the place of permutations.

    Raises:
        OptionError: ``tasks`` is less than 1, or more than 36 rotations.
    """
    options = {**OPTIONS, "samples": SAMPLES, "tasks": ROTATIONS if rotated else TASKS, **(QUICK if quick else {})}
    if tasks is not None:
        options["tasks"] = tasks
    count = options["tasks"]
    if count < 1 or (rotated and count > ROTATIONS):
        raise OptionError(f"tasks must be at least 1{f' and at most {ROTATIONS} if rotated' if rotated else ''}, got {count}")
    output = Output("supsup", out, seed, quick)
    data = Data.of(load_digits(), RotatedImages(count) if rotated else PermutedImages(count, seed=seed))
    settings = {
        "seeds": [seed],
        "rotated": rotated,
        "train_samples": len(data.digits.train[0]),
        "test_samples": len(data.digits.test[0]),
        "network": f"{'-'.join(map(str, WIDTHS))}, no bias, ReLU, hard gate, W = +-sqrt(2 / inputs) and frozen",
        "optimizer": "adam, cosine",
        **options,
    }
    finished = output.begin(settings, data.digits.source, data.digits.note)
    if finished is not None:
        return finished

    every = math.ceil(count / 10)
    points = [*range(every, count, every), count]
    bank, progress = _learn(out, data, points, options, seed, output.say)
    curve = _learn_in_sequence(out, data, points, options, seed, output.say)
    measured: list[Point] = [
        {**progress["points"][str(point)], "sequence": {ACCURACY: accuracy}} for point, accuracy in zip(points, curve)
    ]
    scores: Scores = {method: {key: [value] for key, value in of_method.items()} for method, of_method in measured[-1].items()}
    scores["chance"] = {ACCURACY: [100 / CLASSES], RIGHT: [100 / count]}
    before, after, changed = (torch.tensor(numbers, dtype=torch.float64) for numbers in zip(*progress["packing"].values()))
    folder = out / "bank"
    more = {
        "packing": {
            "mean test accuracy before (%)": float(before.mean()),
            "mean test accuracy after (%)": float(after.mean()),
            "test digits given another class": int(changed.sum()),
        },
        "bytes per task": {
            "memory": max(map(bank.bytes_per_task, bank.tasks)),
            "disk": sum(path.stat().st_size for path in [folder / INDEX, *(folder / "tasks").iterdir()]) / count,
        },
        "points": [{"tasks": point, **numbers} for point, numbers in zip(points, measured)],
    }
    if not rotated:
        more["paper"] = {
            ACCURACY: PAPER_ACCURACY,
            "condition": "arXiv:2006.14769, permuted MNIST, LeNet-300-100, task not named, 60,000 training digits",
        }
    budget = (
        f"{len(data.digits.train[0])} training digits (the paper: 60,000); {options['steps']} steps of {options['batch_size']} a "
        f"task, for its mask and for the net in sequence; {options['samples']} test images of all tasks at each point. "
        f"Inference: one image by one_shot, {BATCH} images by {data.method}."
    )
    return output.finish(scores, ["sequence", "chance"], budget, _figure(points, measured, rotated), more)


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
    def of(cls, digits: Digits, tasks: PermutedImages | RotatedImages) -> Data:
        return cls(digits, tasks, digits.train[0].mean(), digits.train[0].std())

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

    def mixed(self, tasks: int, samples: int, seed: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Batches ``(x, y, task)`` of test digits of the first ``tasks`` tasks, about as many of each, in random order."""
        generator = torch.Generator().manual_seed(seed)
        task = (torch.arange(samples) % tasks)[torch.randperm(samples, generator=generator)]
        rows = torch.randint(len(self.digits.test[0]), (samples,), generator=generator)
        for some, of_them in zip(task.split(BATCH), rows.split(BATCH)):
            yield (*self.test(some, of_them), some)


def _fit(model: nn.Module, parameters: Iterable[Tensor], data: tuple[Tensor, Tensor], options: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=options["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options["steps"])
    x, y = data
    model.train()
    for _ in range(options["steps"]):
        rows = torch.randint(len(x), (options["batch_size"],), generator=generator)
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def _seeds(seed: int, tasks: int) -> list[int]:
    return torch.randint(2**62, (tasks,), generator=torch.Generator().manual_seed(seed)).tolist()


def _learn(
    out: Path, data: Data, points: list[int], options: dict[str, Any], seed: int, say: Callable[[str], None]
) -> tuple[MaskBank, dict[str, Any]]:
    """The bank of all tasks; and for each task what packing did, for each of ``points`` (numbers of tasks) what was measured."""
    folder, path = out / "bank", out / "progress.json"
    model = seeded(seed, partial(network, masked=True))
    if (folder / INDEX).exists():
        bank = MaskBank.load(folder, model)
        learned, progress = len(bank.tasks), read_json(path)
    else:
        bank = MaskBank(model)
        learned, progress = 0, {"packing": {}, "points": {}}
    seeds, names = _seeds(seed, points[-1]), data.tasks.names
    for stop in sorted({*points, *range(SAVE_EVERY, points[-1], SAVE_EVERY)}):
        if stop > learned:
            for task in range(learned, stop):
                progress["packing"][names[task]] = _learn_one(bank, names[task], data, task, options, seeds[task])
            # Before the bank: after a kill between the two, what is here too much is learned and written again.
            write_atomic(path, json_bytes(progress))
            bank.save(folder)
            learned = stop
        if stop == learned and stop in points and str(stop) not in progress["points"]:
            point = _measure(bank, data, options["samples"], seed)
            progress["points"][str(stop)] = point
            write_atomic(path, json_bytes(progress))
            shown = ", ".join(f"{LABELS[method]} {numbers[ACCURACY]:.1f} %" for method, numbers in point.items())
            say(f"{stop} tasks: {shown}")
    missing = {*map(str, points)} - progress["points"].keys() or set(bank.tasks) - progress["packing"].keys()
    if missing:
        raise OutputError(f"{str(path)!r} lacks {sorted(missing)}, which the bank beside it is past: use another folder")
    return bank, progress


def _learn_one(bank: MaskBank, name: str, data: Data, task: int, options: dict[str, Any], seed: int) -> tuple[float, float, int]:
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
        _fit(bank.model, [layer.masks[name] for layer in layers], data.train(task), options, seed)
        before = _classes(bank.model, x)
        bank.pack(name)
        after = _classes(bank.model, x)
    return _percent(before == y), _percent(after == y), int((before != after).sum())


def _measure(bank: MaskBank, data: Data, samples: int, seed: int) -> Point:
    """What the bank's tasks reach, with their names and without."""
    known, model, names = len(bank.tasks), bank.model, data.tasks.names
    named, one_image, right = [], [], []
    for x, y, task in data.mixed(known, samples, seed):
        given = [names[index] for index in task.tolist()]
        found = list(bank.infer_task(x))
        named.append(_classes(model, x, given) == y)
        one_image.append(_classes(model, x, found) == y)
        right.append(torch.tensor([a == b for a, b in zip(found, given, strict=True)]))

    generator = torch.Generator().manual_seed(seed)
    batch, batch_right = [], []
    for index in torch.randperm(known, generator=generator)[:BATCHES].tolist():
        x, y = data.test(index, torch.randint(len(data.digits.test[0]), (BATCH,), generator=generator))
        name = bank.infer_task(x, data.method, per_sample=False)
        batch.append(_classes(model, x, name) == y)
        batch_right.append(torch.tensor([name == names[index]]))
    return {
        "named": {ACCURACY: _percent(*named)},
        "one image": {ACCURACY: _percent(*one_image), RIGHT: _percent(*right)},
        "batch": {ACCURACY: _percent(*batch), RIGHT: _percent(*batch_right)},
    }


def _learn_in_sequence(
    out: Path, data: Data, points: list[int], options: dict[str, Any], seed: int, say: Callable[[str], None]
) -> list[float]:
    """One net without masks that learns the tasks one after another: at each of ``points``, its accuracy on all tasks so far."""
    path = out / "sequence.pt"
    model = seeded(seed, partial(network, masked=False))
    learned, curve = 0, []
    if path.exists():
        state = load_checkpoint(path)
        learned, curve = state["learned"], state["curve"]
        model.load_state_dict(state["model"])
    seeds = _seeds(seed, points[-1])
    for stop in points[len(curve) :]:
        for task in range(learned, stop):
            _fit(model, model.parameters(), data.train(task), options, seeds[task])
        learned = stop
        curve.append(_percent(*(_classes(model, x) == y for x, y, _ in data.mixed(stop, options["samples"], seed))))
        save_checkpoint(path, {"learned": learned, "curve": curve, "model": model.state_dict()})
        say(f"{stop} tasks: {LABELS['sequence']} {curve[-1]:.1f} %")
    return curve


def _classes(model: nn.Module, x: Tensor, task: Any = None) -> Tensor:
    with torch.no_grad():
        if task is None:
            return model(x).argmax(1)
        with using_task(model, task):
            return model(x).argmax(1)


def _percent(*right: Tensor) -> float:
    return 100 * float(torch.cat(right).double().mean())


def _figure(points: list[int], measured: list[Point], rotated: bool) -> Figure:
    figure, axes = new_figure(2)
    for axis, key in zip(axes, (ACCURACY, RIGHT)):
        for method, label in LABELS.items():
            if key in measured[0][method]:
                values = [point[method][key] for point in measured]
                axis.plot(points, values, label=label, linewidth=1.4, markerfacecolor="none", **LINES[method])
        kind = "rotations" if rotated else "permutations"
        axis.set(xlabel=f"tasks learned ({kind}, number)", xlim=(0, None), ylim=(0, 103))
    left, right = axes
    if not rotated:
        left.axhline(PAPER_ACCURACY, label=PAPER, color="#555555", linestyle=(0, (6, 3)), linewidth=1.0)
    chance: dict[str, Any] = {"label": "chance", "color": "#999999", "linewidth": 1.0}
    left.axhline(100 / CLASSES, **chance)
    right.plot(points, [100 / point for point in points], **chance)
    left.set_ylabel("test accuracy, tasks so far (%)")
    right.set_ylabel("task right (% of images, batches)")
    # Below the axes: curves may run anywhere in them. Those on the right are all on the left too.
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure
