"""Claims: sentences about an experiment whose numbers come from its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Metrics = Mapping[str, Any]
"""A run's ``metrics.json``, or an object in it."""
Numbers = dict[str, float]


@dataclass(frozen=True)
class Claim:
    """A sentence about an experiment that its numbers bear out or not.

    Attributes:
        text: a format string of the numbers: ``"the masked net reaches {masked:.3g}, one shared net {shared:.3g}"``.
        numbers: these numbers, from a run's metrics.
        holds: whether they bear the sentence out.
        applies: whether the sentence is about a run with these metrics at all; most are about every run.
    """

    text: str
    numbers: Callable[[Metrics], Numbers]
    holds: Callable[[Numbers], bool]
    applies: Callable[[Metrics], bool] = lambda metrics: True

    def answer(self, metrics: Metrics) -> tuple[str, bool]:
        """The sentence with its numbers, and whether it holds."""
        numbers = self.numbers(metrics)
        return self.text.format(**numbers), bool(self.holds(numbers))


def by_method(metrics: Metrics) -> Metrics:
    """The summarized numbers of each method, those of baselines last."""
    return {**metrics["results"], **metrics["baselines"]}


def mean(metrics: Metrics, method: str, number: str) -> float:
    """The mean over seeds of a method's number; the method may be a baseline."""
    return by_method(metrics)[method][number]["mean"]
