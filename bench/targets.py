"""What a suite must reach, and whether its results do."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from .cases import BANK_TASKS, BATCH_1, BY_TASK, FEW_TASKS, FEWSHOT, FORWARD, INFERENCE, PACKED, SINE, SMALL, TRAINING


@dataclass(frozen=True)
class Bound:
    """One bound on the ratios, or on a quantity, of some cases.

    Attributes:
        title: of its line in the table.
        measure, shapes: the cases.
        ratio: ``"ours/dense"``, at most ``limits``; another contender ``"<name>/ours"``, at least ``limits``, or the fastest of
            several, ``"<name> or <name>/ours"``; or a quantity's name, at most ``limits``.
        limits: by allocator.
        each: whether it holds for each case, or for their geometric mean.
    """

    title: str
    measure: str
    shapes: tuple[str, ...]
    ratio: str
    limits: dict[str, float]
    each: bool = False

    @property
    def at_most(self) -> bool:
        return not self.ratio.endswith("/ours")

    def value(self, row: dict[str, Any]) -> float | None:
        """In one row of the results; None if it was not measured."""
        if self.ratio in row.get("quantities", {}):
            return row["quantities"][self.ratio]
        names, _, ours = self.ratio.partition("/")
        ratios = [row.get("ratios", {}).get(f"{name}/{ours}") for name in names.split(" or ")]
        return None if None in ratios else min(ratio["of_medians"] for ratio in ratios)


def _both(limit: float) -> dict[str, float]:
    return {"default": limit, "tuned": limit}


def _default(limit: float) -> dict[str, float]:
    """On a GPU the host's allocator has no part in it."""
    return {"default": limit}


def _shapes(sizes: tuple[tuple[int, ...], ...]) -> tuple[str, ...]:
    return tuple("x".join(map(str, shape)) for shape in sizes)


_FORWARD, _STEP = "forward, no gradient", "step: FusedMaskedSGD, against torch.optim.SGD"
_BACKWARD, _RESNET = "forward and backward, gradients written", "ResNet-18 training step, batch 16, 64x64"
_BFLOAT16 = "bfloat16"
_SQUARE, _SMALL, _MIXED = ("4096x4096", "8192x8192"), ("1x4096", "8x4096", "16x4096"), ("64x4096x64",)

_PACKED, _BY_TASK = "packed masks, every sample its own task", "float masks by task"
_FEW, _FIRST = _shapes(PACKED[:3]), _shapes(BY_TASK[:2])
_BYTES = ("task-bytes", (str(FEW_TASKS),))
_BANK = ("bank", (str(BANK_TASKS),))
_SINE = "MAML step on sine waves, masks adapted, second order", "sine-step", _shapes((SINE,))

BOUNDS: dict[str, list[Bound]] = {
    "cpu": [
        Bound(_FORWARD, "masked_linear-forward", _shapes(FORWARD), "ours/dense", _both(1.0)),
        Bound(_FORWARD, "masked_linear-forward", _shapes(FORWARD), "ours/dense", _both(1.25), each=True),
        Bound(_FORWARD, "masked_linear-forward", _shapes(FORWARD), "compiled/ours", {"default": 2.0, "tuned": 1.4}),
        Bound(_STEP, "masked_linear-fused-step", _shapes(TRAINING), "ours/dense", _both(0.8)),
        Bound(_STEP, "masked_linear-fused-step", _shapes(TRAINING), "ours/dense", _both(1.1), each=True),
        Bound(_STEP, "masked_linear-fused-step", _shapes(TRAINING), "compiled/ours", {"default": 2.0, "tuned": 1.5}),
        Bound(_BACKWARD, "masked_linear-backward", _shapes(TRAINING), "ours/dense", _both(1.35)),
        Bound(_BACKWARD, "masked_linear-backward", _shapes(TRAINING), "compiled/ours", {"default": 1.3, "tuned": 1.2}),
        Bound("batch 1, forward", "masked_linear-forward", _shapes(BATCH_1), "ours/dense", _both(2.4), each=True),
        Bound("small layers, forward and backward", "masked_linear-backward", _shapes(SMALL), "eager/ours", _both(1.0), each=True),
        Bound(f"{_RESNET}: torch.optim.SGD", "resnet18-step", ("16x64x64",), "ours/dense", _both(1.45)),
        Bound(f"{_RESNET}: FusedMaskedSGD", "resnet18-fused-step", ("16x64x64",), "ours/dense", _both(1.2)),
        Bound(f"{_BFLOAT16}, forward", "bfloat16-forward", _shapes(FORWARD), "ours/dense", _both(1.3)),
        Bound(f"{_BFLOAT16}, forward and backward", "bfloat16-backward", _shapes(FORWARD), "ours/dense", _both(1.3)),
    ],
    "tasks": [
        Bound(_PACKED, "packed-forward", _FEW, "ours/dense", _both(1.15), each=True),
        Bound(_PACKED, "packed-forward", _shapes(PACKED[3:]), "ours/dense", _both(1.5), each=True),
        Bound(_PACKED, "packed-forward", _FEW, "loop or gather/ours", _both(25), each=True),
        Bound(f"{_BY_TASK}, forward", "by-task-forward", _shapes(BY_TASK), "ours/dense", _both(1.8), each=True),
        Bound(f"{_BY_TASK}, forward", "by-task-forward", _FIRST, "compiled/ours", {"default": 2.5, "tuned": 1.1}, each=True),
        Bound(
            f"{_BY_TASK}, forward and backward",
            "by-task-backward",
            _FIRST,
            "compiled/ours",
            {"default": 1.8, "tuned": 1.1},
            each=True,
        ),
        Bound("a packed task of LeNet-300-100, 500 outputs", *_BYTES, "bytes a task in memory", {"default": 41_000}),
        Bound("a packed task of LeNet-300-100, 500 outputs", *_BYTES, "bytes a task on disk", {"default": 42_500}),
        Bound("a bank of 2,500 such tasks", *_BANK, "open, s", {"default": 1}),
        Bound("a bank of 2,500 such tasks", *_BANK, "first batch, s", {"default": 0.2}),
        Bound("a bank of 2,500 such tasks", *_BANK, "resident after a batch of every task, MB", {"default": 400}),
        Bound("one-shot inference, LeNet-300-100", "one-shot-inference", _shapes((INFERENCE,)), "loop/ours", _both(5)),
    ],
    "meta": [
        Bound(*_SINE, "vmap/ours", _default(1.3)),
        Bound(*_SINE, "loop/ours", _default(8)),
        Bound(*_SINE, "higher/ours", _default(12)),
        Bound(*_SINE, "torchopt/ours", _default(6)),
        Bound("the same of a convolutional net, 5-way 1-shot", "fewshot-step", _shapes((FEWSHOT,)), "vmap/ours", _default(1.2)),
        Bound("checkpoint=True", "checkpoint-memory", (str(SINE[0]),), "memory of 20 inner steps / of 1", _default(1.5)),
    ],
    "cuda": [
        Bound("theta, share of copy bandwidth", "masked_weight-forward", _SQUARE, "copy/ours", _default(0.85), each=True),
        Bound("theta and its gradients, the same", "masked_weight-backward", _SQUARE, "copy/ours", _default(0.85), each=True),
        Bound("forward, share of copy bandwidth", "masked_linear-forward", _SMALL, "copy/ours", _default(0.8), each=True),
        Bound(_FORWARD, "masked_linear-forward", _SMALL, "compiled/ours", _default(1.6), each=True),
        Bound(_STEP, "masked_linear-fused-step", ("8x4096", "32x4096"), "compiled/ours", _default(2.2), each=True),
        Bound(f"{_STEP}, bfloat16", "bfloat16-fused-step", ("4096x4096",), "ours/dense", _default(1.15)),
        Bound("packed, every sample its own task", "packed-forward", _MIXED, "ours/dense", _default(2.0)),
        Bound("the same", "packed-forward", _MIXED, "loop or gather/ours", _default(50.0)),
        Bound("32 tasks x 16 rows, forward", "by-task-forward", ("32x16x1024",), "compiled/ours", _default(3.0)),
    ],
}


def number(value: float) -> str:
    """2 digits after the point, none of large numbers: 0.32, 185, 39,814."""
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def table(results: dict[str, Any]) -> list[list[str]]:
    """The bounds' table: a head, then for each bound its title, its shapes, what is bounded, and value and bound by allocator."""
    head = ["measure", "shapes", "bounded", "default allocator", "tuned allocator", "holds"]
    rows = {(row["measure"], row["shape"], row["allocator"]): row for row in results["rows"]}
    lines = [head]
    for bound in BOUNDS[results["suite"]]:
        cells, held = [], []
        for allocator, limit in bound.limits.items():
            found = [bound.value(rows.get((bound.measure, shape, allocator), {})) for shape in bound.shapes]
            values = [value for value in found if value is not None]
            if len(values) < len(found):
                cells.append(f"{len(values)} of {len(found)} measured")
                held.append("not measured")
                continue
            value = _statistic(bound, values)
            # As far as the digits show that are printed.
            holds = round(value, 2) <= limit if bound.at_most else round(value, 2) >= limit
            cells.append(f"{number(value)} ({'at most' if bound.at_most else 'at least'} {limit:,g})")
            held.append("yes" if holds else "**no**")
        bounded = bound.ratio + (", each" if bound.each else ", geometric mean" if len(bound.shapes) > 1 else "")
        cells += ["" for _ in range(2 - len(cells))]
        lines.append([bound.title, " ".join(bound.shapes), bounded, *cells, ", ".join(dict.fromkeys(held))])
    return lines


def _statistic(bound: Bound, values: list[float]) -> float:
    if not bound.each:
        return statistics.geometric_mean(values)
    return max(values) if bound.at_most else min(values)
