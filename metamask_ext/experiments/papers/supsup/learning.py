"""Learns the tasks of ``supsup``: masks in a bank, and one net without masks; both resume after a kill."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.bank import MaskBank
from metamask_ext.bank.index import INDEX
from metamask_ext.data import Digits, PermutedImages, RotatedImages
from metamask_ext.files.atomic import write_atomic
from metamask_ext.files.checkpoint import load_checkpoint, not_ours, save_checkpoint, take_over_state_dict
from metamask_ext.files.errors import OutputError
from metamask_ext.nn import MaskedLinear
from metamask_ext.nn.names import DEFAULT_TASK
from metamask_ext.nn.using_task import using_task

from ...engine.data import digits
from ...engine.jobs import Json, checked_bytes, read_results, without_checksum
from ...engine.tracking import track
from ...engine.training import seeded
from .settings import Settings, TestSettings

ACCURACY, RIGHT = "test accuracy (%)", "task right (%)"
LABELS = {
    "named": "task named",
    "one image": "task inferred from one image",
    "batch": "task inferred from a batch",
    "sequence": "one net without masks, in sequence",
}
Point = dict[str, dict[str, float]]
"""By method and name, the numbers at one number of tasks."""


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


def points_of(count: int) -> list[int]:
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
        """The method that infers the task of a batch of images."""
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


def learn_masks(folder: Path, seed: int, settings: Settings) -> Json:
    """Fill the bank with all tasks: for each of the points (numbers of tasks) what was measured, what packing did, and the size."""
    data, points = Data.of(seed, settings), points_of(settings.tasks)
    saved, path = folder / "bank", folder / "progress.json"
    folder.mkdir(parents=True, exist_ok=True)
    model = seeded(seed, partial(network, True, settings.widths))
    if (saved / INDEX).exists():
        bank = MaskBank.load(saved, model)
        learned, progress = len(bank.tasks), _read_progress(path)
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
            write_atomic(path, checked_bytes(progress))
            bank.save(saved)
            learned = stop
        if stop == learned and stop in points and str(stop) not in progress["points"]:
            measured = _measure(bank, data, settings.test, seed)
            progress["points"][str(stop)] = measured
            write_atomic(path, checked_bytes(progress))
            _track(stop, measured)
            _say(stop, {method: numbers[ACCURACY] for method, numbers in measured.items()})
    missing = {*map(str, points)} - progress["points"].keys() or set(bank.tasks) - progress["packing"].keys()
    if missing:
        raise OutputError(f"{str(path)!r} lacks {sorted(missing)}, and the bank beside it is further: use another folder")
    return {"points": progress["points"], **_packing(bank, progress["packing"], saved)}


def _read_progress(path: Path) -> Json:
    """The numbers that were measured so far. OutputError if that is not what was written."""
    progress = without_checksum(read_results(path))
    if progress.keys() != {"packing", "points"} or not all(isinstance(part, dict) for part in progress.values()):
        raise OutputError(f"{str(path)!r} must have 'packing' and 'points', got {list(progress)}: use another folder")
    return progress


def _packing(bank: MaskBank, measured: dict[str, list[float]], saved: Path) -> Json:
    """The effects of packing, and the size of a task in memory and on disk."""
    before, after, changed = (torch.tensor(numbers, dtype=torch.float64) for numbers in zip(*measured.values()))
    return {
        "packing": {
            "mean test accuracy before (%)": float(before.mean()),
            "mean test accuracy after (%)": float(after.mean()),
            "test digits given another class": int(changed.sum()),
        },
        "bytes per task": {
            "memory": max(map(bank.bytes_per_task, bank.tasks)),
            "disk": sum(path.stat().st_size for path in [saved / INDEX, *(saved / "tasks").iterdir()]) / len(bank.tasks),
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


def learn_sequence(folder: Path, seed: int, settings: Settings) -> Json:
    """One net without masks that learns the tasks one after another: at each of the points, its accuracy on all tasks so far."""
    data, points = Data.of(seed, settings), points_of(settings.tasks)
    path = folder / "sequence.pt"
    folder.mkdir(parents=True, exist_ok=True)
    model = seeded(seed, partial(network, False, settings.widths))
    learned, curve = 0, list[float]()
    if path.exists():
        learned, curve = _take_over(path, model, points)
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


def _take_over(path: Path, model: nn.Module, points: Sequence[int]) -> tuple[int, list[float]]:
    """Fill ``model`` from a checkpoint; the number of tasks it has learned, and the accuracies so far. CheckpointError, and nothing
    has changed, if they are not of this run."""
    state = load_checkpoint(path)
    learned, curve, given = (state.get(name) for name in ("learned", "curve", "model"))
    if not isinstance(curve, list) or not all(isinstance(value, float) and 0 <= value <= 100 for value in curve):
        raise not_ours(path, "curve must be a list of accuracies in percent")
    if not 0 < len(curve) <= len(points) or learned != points[len(curve) - 1]:
        raise not_ours(path, f"{len(curve)} accuracies cannot be of {learned!r:.60} tasks")
    take_over_state_dict(path, given, model)
    return points[len(curve) - 1], curve


def _classes(model: nn.Module, x: Tensor, task: str | Sequence[str] | None = None) -> Tensor:
    with torch.no_grad():
        if task is None:
            return model(x).argmax(1)
        with using_task(model, task):
            return model(x).argmax(1)


def _percent(*right: Tensor) -> float:
    return 100 * float(torch.cat(right).double().mean())
