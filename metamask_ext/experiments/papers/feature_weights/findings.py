"""The numbers behind the claims, figures and answers of ``feature-weights``, from a run's metrics."""

from __future__ import annotations

import statistics

from ...engine.claims import Metrics
from ...engine.settings import of_run
from .settings import Settings

KINDS = ("regression", "classification")
"""Kinds of tasks; the baselines are of these."""
GROUPS = {
    "true": ("oracle", "true features"),
    "aliases": ("shared", "their aliases on the grid"),
    "others": ("independent", "others"),
}


def members_of(group: str, settings: Settings) -> list[int]:
    """The features of a group: ``"true"``; ``"aliases"`` of these on the grid of the support set; ``"others"``."""
    true, points = settings.true_features, settings.support_points

    def kind(index: int) -> str:
        frequency = (index + 1) // 2
        of = min(frequency % points, -frequency % points)
        # On the grid a cosine of frequency jn is the constant, a sine is zero and nobody's alias.
        aliased = of <= true // 2 and not (of == 0 and index % 2 == 1)
        return "true" if index < true else "aliases" if aliased else "others"

    return [index for index in range(settings.features) if kind(index) == group]


class Measured:
    """Means over seeds."""

    def __init__(self, metrics: Metrics):
        self.metrics, self.settings = metrics, of_run(Settings(), metrics)
        self.n = self.settings.support_points

    def curve(self, part: str, name: str) -> list[float]:
        return [statistics.fmean(values) for values in zip(*(run[name] for run in self.metrics["curves"][part]))]

    def __call__(self, part: str, name: str, size: int | None = None) -> float:
        return self.curve(part, name)[self.settings.sizes.index(size or self.n)]

    def weights(self, part: str) -> tuple[str, str, str]:
        """The mean |c| of the true features, of their aliases and of the others at the end."""
        runs = self.metrics["weights"][part]
        true, aliases, others = (f"{statistics.fmean(run[group][-1] for run in runs):.2f}" for group in GROUPS)
        return true, aliases, others

    def better(self, part: str, name: str, other: str) -> str:
        """At how many numbers of points the first curve, of a part, is below the second, of a baseline."""
        base = "classification" if self.settings.parts[part].labels else "regression"
        pairs = zip(self.settings.sizes, self.curve(part, name), self.curve(base, other))
        below = [first < second for size, first, second in pairs if size < self.settings.features]
        return f"{sum(below)} of the {len(below)} tested numbers of points below {self.settings.features}"
