"""Numbers over the seeds of a run: means, and their 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor


class _OfOne(TypedDict):
    mean: float
    min: float
    max: float
    values: list[float]


class Summary(_OfOne, total=False):
    """A number over seeds, as ``metrics.json`` holds it. ``interval``, of several seeds: half the width of the mean's interval."""

    interval: float


def summarized(values: Sequence[float]) -> Summary:
    """The mean, the extremes and the values of one number over seeds; of several seeds also the interval of the mean."""
    summary: Summary = {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "values": list(values)}
    return summary if len(values) == 1 else {**summary, "interval": half_width(values)}


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean: Student's t, the values independent and normal."""
    from scipy.special import stdtrit

    return float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / len(values) ** 0.5


def interval(values: Sequence[float], geometric: bool = False) -> tuple[float, float, float]:
    """The lower end, the mean and the upper end of the 95 % interval of the mean; of the logarithms' mean if ``geometric``.

    One value has no interval: all three are that value.
    """
    known = [math.log(value) for value in values] if geometric else list(values)
    middle, width = statistics.fmean(known), half_width(known) if len(known) > 1 else 0.0
    low, middle, high = (math.exp(end) if geometric else end for end in (middle - width, middle, middle + width))
    return low, middle, high


def interval_over_tasks(errors: Tensor) -> Tensor:
    """Half the width of the 95 % interval of the mean over many tasks ``[T, ...]``, which is about normal."""
    return 1.96 * errors.std(0) / math.sqrt(len(errors))


def cell(number: Summary) -> str:
    """A mean over seeds, with its interval if there are several."""
    return f"{number['mean']:.4g}" + (f" ± {number['interval']:.2g}" if "interval" in number else "")
