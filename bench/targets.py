"""The targets of each suite, and the table that says which its results meet."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from . import floors, grid
from .cases import (
    ADAMW,
    ADAPT,
    BANK_TASKS,
    BATCH_1,
    BOTH,
    FEW_TASKS,
    FEWSHOT,
    FORWARD,
    INFERENCE,
    MIXED_TASK,
    PACKED,
    SERVED_TASKS,
    SINE,
    SMALL,
    TRAINING,
)
from .problem import COMPILED_OURS, METAMASK
from .results_json import Results, Row

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """One target for the ratios, or for a quantity, of some cases.

    Attributes:
        title: of its line in the table.
        measure, shapes: the cases.
        ratio: ``"metamask/dense"``, at most ``limits``; another contender ``"<name>/metamask"``, or
            ``"metamask/compiled-ours"``, at least ``limits``, or the
            fastest of several, ``"<name> or <name>/metamask"``; or a quantity's name, at most ``limits``.
        limits: by allocator.
        each: whether each case must meet it, or their geometric mean.
        default_shapes: the cases of the default allocator, where they are others.
        where: what the table calls the shapes, instead of a list of them.
    """

    title: str
    measure: str
    shapes: tuple[str, ...]
    ratio: str
    limits: dict[str, float]
    each: bool = False
    default_shapes: tuple[str, ...] | None = None
    where: str = ""

    def found(self, results: Results, allocator: str) -> list[float | None]:
        """Returns its value in each of its cases; None where it was not measured."""
        rows = {(row["measure"], row["shape"], row["allocator"]): row for row in results["rows"]}
        keys = [(self.measure, shape, allocator) for shape in self._shapes(allocator)]
        return [self.value(rows[key]) if key in rows else None for key in keys]

    def _shapes(self, allocator: str) -> tuple[str, ...]:
        return self.shapes if allocator == "tuned" or self.default_shapes is None else self.default_shapes

    @property
    def at_most(self) -> bool:
        return not self.ratio.endswith((f"/{METAMASK}", f"/{COMPILED_OURS}"))

    def value(self, row: Row) -> float | None:
        """Returns its value in one row of the results; None if it was not measured."""
        if self.ratio in row.get("quantities", {}):
            return row["quantities"][self.ratio]
        names, _, below = self.ratio.partition("/")
        ratios = [row.get("ratios", {}).get(f"{name}/{below}") for name in names.split(" or ")]
        found = [ratio["of_medians"] for ratio in ratios if ratio is not None]
        return min(found) if len(found) == len(ratios) else None

    def shown(self, found: list[float | None], limit: float) -> tuple[str, str]:
        """Returns the text of the value in some rows, with the limit, and of whether it is met."""
        values = [value for value in found if value is not None]
        if len(values) < len(found):
            return f"{len(values)} of {len(found)} measured", NOT_MEASURED
        value = self._statistic(values)
        # As far as the digits show that are printed.
        met = round(value, 2) <= limit if self.at_most else round(value, 2) >= limit
        return f"{number(value)} ({'at most' if self.at_most else 'at least'} {limit:,g})", "yes" if met else "**no**"

    def _statistic(self, values: list[float]) -> float:
        if not self.each:
            return statistics.geometric_mean(values)
        return max(values) if self.at_most else min(values)


@dataclass(frozen=True)
class FloorTarget(Target):
    """For each ratio as a share of what is allowed: the larger of ``fixed``, and ``share`` times the ratio of the floors."""

    fixed: float = 1.15
    share: float = 1.1

    def found(self, results: Results, allocator: str) -> list[float | None]:
        ratios = floors.ratios(results)
        least = [ratios.get((self.measure, shape, allocator)) for shape in self._shapes(allocator)]
        return [
            None if value is None or floor is None else value / max(self.fixed, self.share * floor)
            for value, floor in zip(super().found(results, allocator), least)
        ]


@dataclass(frozen=True)
class GrowthTarget(Target):
    """A target for how much larger each ratio is than that of the same weight at another batch."""

    batch: int = 256

    def found(self, results: Results, allocator: str) -> list[float | None]:
        at = [grid.shape_name(self.batch, *grid.sizes_of(shape)[1:]) for shape in self.shapes]
        before = Target(self.title, self.measure, tuple(at), self.ratio, self.limits).found(results, allocator)
        return [
            None if large is None or small is None else large - small
            for large, small in zip(super().found(results, allocator), before)
        ]


def _both(limit: float) -> dict[str, float]:
    return {"default": limit, "tuned": limit}


def _default(limit: float) -> dict[str, float]:
    """Sets no limit for the tuned allocator: on a GPU the host's allocator has no part in it."""
    return {"default": limit}


def _shapes(sizes: tuple[tuple[int, ...], ...]) -> tuple[str, ...]:
    return tuple("x".join(map(str, shape)) for shape in sizes)


_FORWARD, _STEP = "forward, no gradient", "step: FusedMaskedSGD, against torch.optim.SGD"
_ADAMW_STEP = "step: FusedMaskedAdamW, against torch.optim.AdamW(fused=True)"
_BACKWARD, _RESNET = "forward and backward, gradients written", "ResNet-18 training step, batch 16, 64x64"
_BFLOAT16, _SHARE = "bfloat16", "forward, share of copy bandwidth"
_SQUARE, _SMALL, _MIXED = ("4096x4096", "8192x8192"), ("1x4096", "8x4096", "16x4096"), ("64x4096x64",)

_PACKED, _FLOAT = "packed masks, every sample its own task", "mixed-task batch, float masks"
_FEW, _FIRST = _shapes(PACKED[:3]), _shapes(MIXED_TASK[:2])
_BYTES = ("task-bytes", (str(FEW_TASKS),))
_BANK = ("bank", (str(BANK_TASKS),))
_FEWSHOT = "MAML step of a convolutional net, 5-way 1-shot, masks adapted, second order"
_SINE = "MAML step on sine waves, masks adapted, second order", "sine-step", _shapes((SINE,))

# A weight of fewer elements is small: there the call counts.
_LARGE, _MANY = 1 << 16, 32


def _points(large: bool | None = None, batches: tuple[int, ...] = grid.BATCHES) -> tuple[str, ...]:
    """Returns the grid's shapes at some batches, of the large weights, the small ones, or all."""
    weights = [(i, o) for i, o in grid.WEIGHTS if large is None or large == (i * o >= _LARGE)]
    return tuple(grid.shape_name(batch, *weight) for weight in weights for batch in batches)


def _grid_measure(mode: str, title: str, dense: float, dtype: torch.dtype) -> list[Target]:
    """Lists the targets of one measure of the grid; of bfloat16 they are for the batches that are measured without ``--full``."""
    name, whole = grid.measure_name(mode, dtype), dtype == torch.float32
    title = title if whole else f"{_BFLOAT16}, {title}"
    few, batches = grid.FEW_BATCHES, grid.BATCHES if whole else grid.FEW_BATCHES
    many, few_many = (tuple(batch for batch in its if batch >= _MANY) for its in (batches, few))

    def limits(limit: float) -> dict[str, float]:
        return _both(limit) if whole else {"tuned": limit}

    found = [
        Target(title, name, _points(large, batches), ratio, limits(limit), True, _points(large, few), f"weights of {size} elements")
        for large, ratio, limit, size in (
            (True, f"eager or compiled/{METAMASK}", 0.97, f"{_LARGE:,} and more"),
            (False, f"eager/{METAMASK}", 1.0, f"less than {_LARGE:,}"),
        )
    ]
    shapes, where = (_points(None, many), f"{METAMASK}/dense"), f"batches {_MANY} and up"
    found.append(Target(title, name, *shapes, limits(dense), False, _points(None, few_many), where))
    found.append(
        FloorTarget(f"{title}: share of what its floors allow", name, *shapes, limits(1.0), True, _points(None, few_many), where)
    )
    if whole:
        last = max(grid.BATCHES)
        growth = f"batch {last:,}, less that at batch {GrowthTarget.batch}"
        found.append(GrowthTarget(title, name, _points(None, (last,)), f"{METAMASK}/dense", {"tuned": 0.05}, True, None, growth))
    return found


def _grid() -> list[Target]:
    limits = (("forward", "forward", 1.0), ("backward", "forward and backward", 1.05), ("fused-step", "fused step", 0.98))
    return [target for dtype in grid.DTYPES for measure in limits for target in _grid_measure(*measure, dtype)]


TARGETS: dict[str, list[Target]] = {
    "grid": _grid(),
    "bank": [
        Target(title, "served", (str(SERVED_TASKS),), quantity, _default(limit))
        for title, quantity, limit in (
            ("opening a bank", "load, ms", 150.0),
            ("64 tasks that were not used before", "cold batch, ms", 5.0),
            ("64 tasks that were", "warm batch / merged dense", 2.0),
            ("using_task", "entering 32 layers, us", 20.0),
            ("using_task", "entering 200 layers, us", 20.0),
            ("refresh where nobody has saved", "refresh, ms", 10.0),
            ("inferring the tasks of 64 samples", "infer_task, s", 0.3),
        )
    ],
    "cpu": [
        Target(_FORWARD, "masked_linear-forward", _shapes(FORWARD), "metamask/dense", _both(1.0)),
        Target(_FORWARD, "masked_linear-forward", _shapes(FORWARD), "metamask/dense", _both(1.25), each=True),
        Target(_FORWARD, "masked_linear-forward", _shapes(FORWARD), "compiled/metamask", {"default": 2.0, "tuned": 1.4}),
        Target(_STEP, "masked_linear-fused-step", _shapes(TRAINING), "metamask/dense", _both(0.8)),
        Target(_STEP, "masked_linear-fused-step", _shapes(TRAINING), "metamask/dense", _both(1.1), each=True),
        Target(_STEP, "masked_linear-fused-step", _shapes(TRAINING), "compiled/metamask", {"default": 2.0, "tuned": 1.5}),
        # The bytes of a weight: 56, twice W, M and their four means; of a dense one 40, W twice, its gradient, and AdamW's seven.
        Target(_ADAMW_STEP, "masked_linear-fused-adamw-step", _shapes(ADAMW), "metamask/dense", _both(1.15)),
        Target(_ADAMW_STEP, "masked_linear-fused-adamw-step", _shapes(ADAMW), "metamask/dense", _both(1.54), each=True),
        Target(_BACKWARD, "masked_linear-backward", _shapes(TRAINING), "metamask/dense", _both(1.35)),
        Target(_BACKWARD, "masked_linear-backward", _shapes(TRAINING), "compiled/metamask", {"default": 1.3, "tuned": 1.2}),
        Target("batch 1, forward", "masked_linear-forward", _shapes(BATCH_1), "metamask/dense", _both(2.4), each=True),
        Target(
            "small layers, forward and backward", "masked_linear-backward", _shapes(SMALL), "eager/metamask", _both(1.0), each=True
        ),
        Target(f"{_RESNET}: torch.optim.SGD", "resnet18-step", ("16x64x64",), "metamask/dense", _both(1.45)),
        Target(f"{_RESNET}: FusedMaskedSGD", "resnet18-fused-step", ("16x64x64",), "metamask/dense", _both(1.2)),
        *(
            Target(f"{model} training step, batch 32: FusedMaskedSGD", measure, (shape,), "metamask/dense", {"tuned": 1.08})
            for model, measure, shape in (
                ("ResNet-18, 64x64,", "resnet18-fused-step", "32x64x64"),
                ("ViT-tiny, 128x128,", "vit-tiny-fused-step", "32x128x128"),
                ("BERT-mini, 128 tokens,", "bert-mini-fused-step", "32x128"),
            )
        ),
        Target(f"{_BFLOAT16}, forward", "bfloat16-forward", _shapes(FORWARD), "metamask/dense", _both(1.3)),
        Target(f"{_BFLOAT16}, forward and backward", "bfloat16-backward", _shapes(FORWARD), "metamask/dense", _both(1.3)),
    ],
    "tasks": [
        Target(_PACKED, "packed-forward", _FEW, "metamask/dense", _both(1.15), each=True),
        Target(_PACKED, "packed-forward", _shapes(PACKED[3:]), "metamask/dense", _both(1.5), each=True),
        Target(_PACKED, "packed-forward", _FEW, "loop or gather/metamask", _both(25), each=True),
        Target(f"{_FLOAT}, forward", "mixed-task-forward", _shapes(MIXED_TASK), "metamask/dense", _both(1.8), each=True),
        Target(f"{_FLOAT}, forward", "mixed-task-forward", _FIRST, "compiled/metamask", {"default": 2.5, "tuned": 1.1}, each=True),
        Target(
            f"{_FLOAT}, forward and backward",
            "mixed-task-backward",
            _FIRST,
            "compiled/metamask",
            {"default": 1.8, "tuned": 1.1},
            each=True,
        ),
        Target("a packed task of LeNet-300-100, 500 outputs", *_BYTES, "bytes a task in memory", {"default": 41_000}),
        Target("a packed task of LeNet-300-100, 500 outputs", *_BYTES, "bytes a task on disk", {"default": 42_500}),
        Target("a bank of 2,500 such tasks", *_BANK, "open, s", {"default": 1}),
        Target("a bank of 2,500 such tasks", *_BANK, "first batch, s", {"default": 0.2}),
        Target("a bank of 2,500 such tasks", *_BANK, "resident after a batch of every task, MB", {"default": 400}),
        Target("one-shot inference, LeNet-300-100", "one-shot-inference", _shapes((INFERENCE,)), "loop/metamask", _both(5)),
    ],
    "meta": [
        Target(*_SINE, "vmap/metamask", _default(2.0)),
        Target(*_SINE, "loop/metamask", _default(8)),
        Target(*_SINE, "higher/metamask", _default(12)),
        Target(*_SINE, "torchopt/metamask", _default(6)),
        *(
            Target(f"the same, adapt={adapt!r}", f"sine-step-{adapt}", _shapes((SINE,)), "vmap/metamask", _default(1.5))
            for adapt in ADAPT
        ),
        Target(
            "the same, the whole meta-step compiled",
            "compiled-sine-step",
            _shapes((SINE,)),
            "metamask/compiled-ours",
            _default(1.3),
        ),
        Target(_FEWSHOT, "fewshot-step", _shapes((FEWSHOT,)), "vmap/metamask", _default(2.0)),
        Target(_FEWSHOT, "fewshot-step", _shapes((FEWSHOT,)), "loop/metamask", _default(1.0)),
        *(
            Target(f"the same, adapt={adapt!r}", f"fewshot-step-{adapt}", _shapes((FEWSHOT,)), "vmap/metamask", _default(1.5))
            for adapt in ADAPT
        ),
        Target("checkpoint=True", "checkpoint-memory", (str(SINE[0]),), "memory of 20 inner steps / of 1", _default(1.3)),
    ],
    "cuda": [
        Target("theta, share of copy bandwidth", "masked_weight-forward", _SQUARE, "copy/metamask", _default(0.85), each=True),
        Target("theta and its gradients, the same", "masked_weight-backward", _SQUARE, "copy/metamask", _default(0.85), each=True),
        Target(_SHARE, "masked_linear-forward", ("1x4096", "8x4096"), "copy/metamask", _default(0.85), each=True),
        Target(_SHARE, "masked_linear-forward", ("16x4096",), "copy/metamask", _default(0.75)),
        Target(_FORWARD, "masked_linear-forward", _SMALL, "compiled/metamask", _default(1.6), each=True),
        Target(_STEP, "masked_linear-fused-step", ("8x4096",), "compiled/metamask", _default(2.0)),
        Target(_STEP, "masked_linear-fused-step", ("32x4096",), "compiled/metamask", _default(1.6)),
        Target(f"{_STEP}, bfloat16", "bfloat16-fused-step", ("4096x4096",), "metamask/dense", _default(1.1)),
        Target("packed, every sample its own task", "packed-forward", _MIXED, "metamask/dense", _default(4.0)),
        Target("the same", "packed-forward", _MIXED, "loop or gather/metamask", _default(40.0)),
        Target("32 tasks x 16 rows, forward", "mixed-task-forward", ("32x16x1024",), "compiled/metamask", _default(2.0)),
    ],
}


def number(value: float) -> str:
    """Writes 2 digits after the point, none of large numbers: 0.32, 185, 39,814."""
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def table(results: Results) -> list[list[str]]:
    """Returns the targets' table: a head, then a line for each target, with its value and limit by allocator."""
    lines = [["measure", "shapes", "target", "default allocator", "tuned allocator", "met"]]
    for target in TARGETS[results["suite"]]:
        texts: dict[str, str] = {}
        met = []
        for allocator, limit in target.limits.items():
            cell, verdict = target.shown(target.found(results, allocator), limit)
            texts[allocator] = cell
            met.append(verdict)
        ratio = target.ratio + (", each" if target.each else ", geometric mean" if len(target.shapes) > 1 else "")
        cells = [texts.get(allocator, "") for allocator in BOTH]
        lines.append([target.title, target.where or " ".join(target.shapes), ratio, *cells, ", ".join(dict.fromkeys(met))])
    return lines
