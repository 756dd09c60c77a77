"""Numbers of the masks of a bank's folder: densities, overlaps, weights used by k tasks, pictures of masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops.geometry import packed_shape
from .export import BITS, LOGITS
from .index import INDEX, BankError
from .metrics import Metrics
from .per_task import full_name
from .settings import LayerSettings, layer_settings
from .store import Store

Floats: TypeAlias = NDArray[numpy.float32]
Bytes: TypeAlias = NDArray[numpy.uint8]
Bools: TypeAlias = NDArray[numpy.bool_]

SAMPLE = 4096
"""The weights that overlaps are estimated from, at most: the standard error of a share is at most 0.8 %."""


@dataclass(frozen=True)
class Layer:
    """The weight of a masked layer, or its largest masked parameter, as a matrix with a row for each output."""

    path: str
    shape: tuple[int, ...]
    parameter: str = "weight"

    @property
    def rows(self) -> int:
        """The outputs."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """The weights of one output."""
        return int(numpy.prod(self.shape[1:], dtype=numpy.int64)) if len(self.shape) > 1 else 1

    @property
    def size(self) -> int:
        """All weights."""
        return self.rows * self.columns


class Masks:
    """The masks of a bank's folder, read one task after another: weights alone, biases are few.

    Raises:
        BankError: ``bank.json`` does not describe the layers, or has none.
    """

    def __init__(self, store: Store):
        self.store = store
        self._settings = layer_settings(store.directory / INDEX, store.meta)
        self.layers = [_largest(path, layer) for path, layer in self._settings.items()]
        self.names = [name for name in store.tasks if name is not None]
        if not self.layers or not self.names:
            raise BankError(f"{store.directory / INDEX}: the bank has no masked layer, or no task")

    def of(self, task: str) -> list[Bools]:
        """Return a task's masks, a matrix ``[rows, columns]`` for each layer: where the gate is on, for logits more than half.

        Raises:
            KeyError: the bank has no such task.
            BankError: its file is damaged, or a mask is missing or of another shape.
        """
        tensors = self.store.task(task)
        return [self._mask(task, layer, tensors) for layer in self.layers]

    def _mask(self, task: str, layer: Layer, tensors: Mapping[str, Tensor]) -> Bools:
        name = full_name(layer.path, layer.parameter)
        bits, logits = tensors.get(BITS + name), tensors.get(LOGITS + name)
        shape = list(packed_shape(torch.Size(layer.shape)))
        if bits is not None and list(bits.shape) == shape and bits.dtype == torch.uint8:
            rows, count = bits.numpy().reshape(-1, shape[-1]), layer.rows if len(layer.shape) == 1 else layer.columns
            unpacked = numpy.unpackbits(rows, axis=1, count=count, bitorder="little").view(numpy.bool_)
            return unpacked.reshape(layer.rows, layer.columns)
        if logits is not None and list(logits.shape) == list(layer.shape):
            settings = self._settings[layer.path]
            on: Bools = (logits.float().numpy() > _threshold(settings)).reshape(layer.rows, layer.columns)
            return on
        raise BankError(f"{self.store.path(task)}: task {task!r} has no mask of the shape {list(layer.shape)} for {name!r}")

    def metrics(self, task: str) -> Metrics:
        """Return what was recorded of a task. BankError if that cannot be."""
        try:
            return Metrics.read(self.store.info(task))
        except ValueError as error:
            raise BankError(f"{self.store.directory / INDEX}: task {task!r}: {error}") from error


def _largest(path: str, settings: LayerSettings) -> Layer:
    name = max(settings.shapes, key=lambda name: (name == "weight", numpy.prod(settings.shapes[name], dtype=numpy.int64)))
    return Layer(path, tuple(settings.shapes[name]), name)


def _threshold(settings: LayerSettings) -> float:
    return settings.threshold if settings.gate == "hard" else 0.0


@dataclass(frozen=True)
class Statistics:
    """The numbers that are shown of a bank.

    Attributes:
        density: ``[tasks, layers]``, the share of weights that are on.
        overlap: ``[tasks, tasks]``, the weights that two tasks have both, as a share of those that one of them has (Jaccard),
            estimated from :attr:`sampled` weights.
        sampled: how many weights the overlaps are estimated from.
        used: for each layer ``[tasks + 1]``, the weights that exactly k tasks have.
        pictures: for each layer that is shown ``[tasks, rows, columns]``, shares of blocks in 255ths.
        shown: the positions of those layers.
    """

    density: Floats
    overlap: Floats
    sampled: int
    used: list[NDArray[numpy.int64]]
    pictures: list[Bytes]
    shown: list[int]


def statistics(masks: Masks, picture_bytes: int) -> Statistics:
    """Read every task once, and return what is shown of the bank; its pictures have at most so many bytes, if one fits at all."""
    layers, tasks = masks.layers, len(masks.names)
    places = _sample(layers)
    density = numpy.zeros((tasks, len(layers)), numpy.float32)
    counts = [numpy.zeros((layer.rows, layer.columns), numpy.int32) for layer in layers]
    sample = numpy.zeros((tasks, sum(map(len, places))), numpy.float32)
    shown, sides = _sides(layers, tasks, picture_bytes)
    pictures = [numpy.zeros((tasks, *side), numpy.uint8) for side in sides]
    for row, task in enumerate(masks.names):
        its = masks.of(task)
        for number, mask in enumerate(its):
            density[row, number] = _density(mask)
            counts[number] += mask
        sample[row] = numpy.concatenate([mask.reshape(-1)[chosen] for mask, chosen in zip(its, places)])
        for picture, number in zip(pictures, shown):
            picture[row] = _reduced(its[number], *picture.shape[1:])
    used = [numpy.bincount(count.reshape(-1), minlength=tasks + 1) for count in counts]
    return Statistics(density, _overlaps(sample), sample.shape[1], used, pictures, shown)


def _density(mask: Bools) -> float:
    return numpy.count_nonzero(mask) / max(1, mask.size)


def _sample(layers: Sequence[Layer]) -> list[NDArray[numpy.int64]]:
    """Choose weights at random, of each layer its share."""
    chance, total = numpy.random.default_rng(0), sum(layer.size for layer in layers)
    counts = [min(layer.size, -(-SAMPLE * layer.size // max(1, total))) for layer in layers]
    return [numpy.sort(chance.choice(layer.size, count, replace=False)) for layer, count in zip(layers, counts)]


def _overlaps(sample: Floats) -> Floats:
    both = (torch.from_numpy(sample) @ torch.from_numpy(sample).T).numpy()
    own = both.diagonal()
    either = own[:, None] + own[None, :] - both
    found: Floats = numpy.divide(both, either, out=numpy.ones_like(both), where=either > 0)
    return found


def order(overlap: Floats) -> list[int]:
    """Order tasks so that those that share weights stand together: the leaves of an average-linkage tree."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(overlap) < 3:
        return list(range(len(overlap)))
    distance = numpy.clip(1 - (overlap + overlap.T) / 2, 0, None)
    numpy.fill_diagonal(distance, 0)
    return [int(leaf) for leaf in leaves_list(linkage(squareform(distance, checks=False), "average"))]


def nearest(overlap: Floats, row: int, count: int) -> list[int]:
    """Return the tasks that share most with one, those that share more first."""
    others = numpy.argsort(-overlap[row], kind="stable")
    return [int(other) for other in others if other != row][:count]


def _sides(layers: Sequence[Layer], tasks: int, budget: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Choose the sizes of the pictures, the largest that fit; of many layers some, evenly among them."""
    for side in (96, 64, 48, 32, 24, 16, 12, 8):
        sides = [(min(layer.rows, side), min(layer.columns, side)) for layer in layers]
        if tasks * sum(height * width for height, width in sides) <= budget:
            return list(range(len(layers))), sides
    count = max(1, min(len(layers), budget // max(1, tasks * 64)))
    shown = sorted({round(place) for place in numpy.linspace(0, len(layers) - 1, count).tolist()})
    return shown, [(min(layers[number].rows, 8), min(layers[number].columns, 8)) for number in shown]


def _reduced(mask: Bools, height: int, width: int) -> Bytes:
    """Return the shares of ``height`` by ``width`` blocks that are as equal as can be, in 255ths."""
    shares: Floats = mask.astype(numpy.float32)
    for axis, size in ((0, height), (1, width)):
        if shares.shape[axis] != size:
            edges = numpy.linspace(0, shares.shape[axis], size + 1).astype(numpy.int64)
            lengths = numpy.diff(edges).reshape((-1, 1) if axis == 0 else (1, -1)).astype(numpy.float32)
            shares = (numpy.add.reduceat(shares, edges[:-1], axis=axis) / lengths).astype(numpy.float32)
    found: Bytes = numpy.rint(shares * 255).astype(numpy.uint8)
    return found


def described(masks: Masks, task: str, close: int = 5) -> dict[str, Any]:
    """Return what is known of one task, as JSON has it: its entry, metrics, layers, and the tasks that share most with it.

    Raises:
        KeyError: the bank has no such task.
        BankError: a file is damaged.
    """
    own = masks.of(task)
    places = _sample(masks.layers)
    mine = numpy.concatenate([mask.reshape(-1)[chosen] for mask, chosen in zip(own, places)])
    entry, metrics = masks.store.entry(task), masks.metrics(task)
    found = sorted(_overlaps_with(masks, task, mine, places), key=lambda pair: -pair[1])[:close]
    return {
        "task": task,
        "slot": masks.store.tasks.index(task),
        "masks": "bits" if entry.get("packed") else "logits",
        "file": entry["file"],
        "bytes": entry["bytes"],
        "metrics": dict(metrics.now),
        "metrics_before_packing": dict(metrics.before_packing),
        "layers": [
            {"layer": layer.path, "shape": list(layer.shape), "weights": layer.size, "density": _density(mask)}
            for layer, mask in zip(masks.layers, own)
        ],
        "nearest": [{"task": name, "overlap": overlap} for name, overlap in found],
        "overlap_sampled_weights": len(mine),
    }


def _overlaps_with(masks: Masks, task: str, mine: Bools, places: Sequence[NDArray[numpy.int64]]) -> Iterator[tuple[str, float]]:
    for name in masks.names:
        if name != task:
            theirs = numpy.concatenate([mask.reshape(-1)[chosen] for mask, chosen in zip(masks.of(name), places)])
            either = numpy.count_nonzero(mine | theirs)
            yield name, float(numpy.count_nonzero(mine & theirs) / either) if either else 1.0
