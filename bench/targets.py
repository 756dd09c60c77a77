"""The targets of each suite, and the table that says which its results meet."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .cases import ADAMW, BANK_TASKS, BATCH_1, FEW_TASKS, FEWSHOT, FORWARD, INFERENCE, MIXED_TASK, PACKED, SINE, SMALL, TRAINING
from .problem import METAMASK
from .results_json import Results, Row


@dataclass(frozen=True)
class Target:
    """One target for the ratios, or for a quantity, of some cases.

    Attributes:
        title: of its line in the table.
        measure, shapes: the cases.
        ratio: ``"metamask/dense"``, at most ``limits``; another contender ``"<name>/metamask"``, at least ``limits``, or the
            fastest of several, ``"<name> or <name>/metamask"``; or a quantity's name, at most ``limits``.
        limits: by allocator.
        each: whether each case must meet it, or their geometric mean.
    """

    title: str
    measure: str
    shapes: tuple[str, ...]
    ratio: str
    limits: dict[str, float]
    each: bool = False

    @property
    def at_most(self) -> bool:
        return not self.ratio.endswith(f"/{METAMASK}")

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
            return f"{len(values)} of {len(found)} measured", "not measured"
        value = self._statistic(values)
        # As far as the digits show that are printed.
        met = round(value, 2) <= limit if self.at_most else round(value, 2) >= limit
        return f"{number(value)} ({'at most' if self.at_most else 'at least'} {limit:,g})", "yes" if met else "**no**"

    def _statistic(self, values: list[float]) -> float:
        if not self.each:
            return statistics.geometric_mean(values)
        return max(values) if self.at_most else min(values)


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
_BFLOAT16 = "bfloat16"
_SQUARE, _SMALL, _MIXED = ("4096x4096", "8192x8192"), ("1x4096", "8x4096", "16x4096"), ("64x4096x64",)

_PACKED, _FLOAT = "packed masks, every sample its own task", "mixed-task batch, float masks"
_FEW, _FIRST = _shapes(PACKED[:3]), _shapes(MIXED_TASK[:2])
_BYTES = ("task-bytes", (str(FEW_TASKS),))
_BANK = ("bank", (str(BANK_TASKS),))
_SINE = "MAML step on sine waves, masks adapted, second order", "sine-step", _shapes((SINE,))

TARGETS: dict[str, list[Target]] = {
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
        Target(*_SINE, "vmap/metamask", _default(1.3)),
        Target(*_SINE, "loop/metamask", _default(8)),
        Target(*_SINE, "higher/metamask", _default(12)),
        Target(*_SINE, "torchopt/metamask", _default(6)),
        Target(
            "the same of a convolutional net, 5-way 1-shot", "fewshot-step", _shapes((FEWSHOT,)), "vmap/metamask", _default(1.2)
        ),
        Target("checkpoint=True", "checkpoint-memory", (str(SINE[0]),), "memory of 20 inner steps / of 1", _default(1.5)),
    ],
    "cuda": [
        Target("theta, share of copy bandwidth", "masked_weight-forward", _SQUARE, "copy/metamask", _default(0.85), each=True),
        Target("theta and its gradients, the same", "masked_weight-backward", _SQUARE, "copy/metamask", _default(0.85), each=True),
        Target("forward, share of copy bandwidth", "masked_linear-forward", _SMALL, "copy/metamask", _default(0.8), each=True),
        Target(_FORWARD, "masked_linear-forward", _SMALL, "compiled/metamask", _default(1.6), each=True),
        Target(_STEP, "masked_linear-fused-step", ("8x4096", "32x4096"), "compiled/metamask", _default(2.2), each=True),
        Target(f"{_STEP}, bfloat16", "bfloat16-fused-step", ("4096x4096",), "metamask/dense", _default(1.15)),
        Target("packed, every sample its own task", "packed-forward", _MIXED, "metamask/dense", _default(2.0)),
        Target("the same", "packed-forward", _MIXED, "loop or gather/metamask", _default(50.0)),
        Target("32 tasks x 16 rows, forward", "mixed-task-forward", ("32x16x1024",), "compiled/metamask", _default(3.0)),
    ],
}


def number(value: float) -> str:
    """Writes 2 digits after the point, none of large numbers: 0.32, 185, 39,814."""
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def table(results: Results) -> list[list[str]]:
    """Returns the targets' table: a head, then a line for each target, with its value and limit by allocator."""
    rows = {(row["measure"], row["shape"], row["allocator"]): row for row in results["rows"]}
    lines = [["measure", "shapes", "target", "default allocator", "tuned allocator", "met"]]
    for target in TARGETS[results["suite"]]:
        cells, met = [], []
        for allocator, limit in target.limits.items():
            keys = [(target.measure, shape, allocator) for shape in target.shapes]
            cell, verdict = target.shown([target.value(rows[key]) if key in rows else None for key in keys], limit)
            cells.append(cell)
            met.append(verdict)
        ratio = target.ratio + (", each" if target.each else ", geometric mean" if len(target.shapes) > 1 else "")
        cells += ["" for _ in range(2 - len(cells))]
        lines.append([target.title, " ".join(target.shapes), ratio, *cells, ", ".join(dict.fromkeys(met))])
    return lines
