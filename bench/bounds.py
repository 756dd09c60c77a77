"""What a suite must reach, and whether its results do."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from .cases import BATCH_1, FORWARD, SMALL, TRAINING


@dataclass(frozen=True)
class Bound:
    """One bound on the ratios of some cases.

    Attributes:
        title: of its line in the table.
        measure, shapes: the cases.
        ratio: ``"ours/dense"``, at most ``limits``; or another contender ``"<name>/ours"``, at least ``limits``.
        limits: by allocator.
        each: whether it holds for each case, or for their geometric mean.
    """

    title: str
    measure: str
    shapes: tuple[str, ...]
    ratio: str
    limits: dict[str, float]
    each: bool = False


def _both(limit: float) -> dict[str, float]:
    return {"default": limit, "tuned": limit}


def _default(limit: float) -> dict[str, float]:
    """On a GPU the host's allocator has no part in it."""
    return {"default": limit}


def _shapes(pairs: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
    return tuple(f"{batch}x{width}" for batch, width in pairs)


_FORWARD, _STEP = "forward, no gradient", "step: FusedMaskedSGD, against torch.optim.SGD"
_BACKWARD, _RESNET = "forward and backward, gradients written", "ResNet-18 training step, batch 16, 64x64"
_BFLOAT16 = "bfloat16"
_SQUARE, _FEW, _PACKED = ("4096x4096", "8192x8192"), ("1x4096", "8x4096", "16x4096"), ("64x64x4096",)

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
    "cuda": [
        Bound("theta, share of copy bandwidth", "masked_weight-forward", _SQUARE, "copy/ours", _default(0.85), each=True),
        Bound("theta and its gradients, the same", "masked_weight-backward", _SQUARE, "copy/ours", _default(0.85), each=True),
        Bound("forward, share of copy bandwidth", "masked_linear-forward", _FEW, "copy/ours", _default(0.8), each=True),
        Bound(_FORWARD, "masked_linear-forward", _FEW, "compiled/ours", _default(1.6), each=True),
        Bound(_STEP, "masked_linear-fused-step", ("8x4096", "32x4096"), "compiled/ours", _default(2.2), each=True),
        Bound(f"{_STEP}, bfloat16", "bfloat16-fused-step", ("4096x4096",), "ours/dense", _default(1.15)),
        Bound("packed, every sample its own task", "packed-forward", _PACKED, "ours/dense", _default(2.0)),
        Bound("the same", "packed-forward", _PACKED, "loop/ours", _default(50.0)),
        Bound("the same", "packed-forward", _PACKED, "gather/ours", _default(50.0)),
        Bound("32 tasks x 16 rows, forward", "tasks-forward", ("32x16x1024",), "compiled/ours", _default(3.0)),
    ],
}


def table(results: dict[str, Any]) -> list[list[str]]:
    """The bounds' table: a head, then for each bound its title, its shapes, what is bounded, and value and bound by allocator."""
    head = ["measure", "shapes", "bounded", "default allocator", "tuned allocator", "holds"]
    rows = {(row["measure"], row["shape"], row["allocator"]): row.get("ratios", {}) for row in results["rows"]}
    lines = [head]
    for bound in BOUNDS[results["suite"]]:
        cells, held = [], []
        for allocator, limit in bound.limits.items():
            ratios = [rows.get((bound.measure, shape, allocator), {}).get(bound.ratio) for shape in bound.shapes]
            values = [ratio["of_medians"] for ratio in ratios if ratio is not None]
            if len(values) < len(ratios):
                cells.append(f"{len(values)} of {len(ratios)} measured")
                held.append("not measured")
                continue
            value = _statistic(bound, values)
            # As far as the digits show that are printed.
            holds = round(value, 2) <= limit if bound.ratio == "ours/dense" else round(value, 2) >= limit
            cells.append(f"{value:.2f} ({'at most' if bound.ratio == 'ours/dense' else 'at least'} {limit:g})")
            held.append("yes" if holds else "**no**")
        bounded = bound.ratio + (", each" if bound.each else ", geometric mean" if len(bound.shapes) > 1 else "")
        cells += ["" for _ in range(2 - len(cells))]
        lines.append([bound.title, " ".join(bound.shapes), bounded, *cells, ", ".join(dict.fromkeys(held))])
    return lines


def _statistic(bound: Bound, values: list[float]) -> float:
    if not bound.each:
        return statistics.geometric_mean(values)
    return max(values) if bound.ratio == "ours/dense" else min(values)
