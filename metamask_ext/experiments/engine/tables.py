"""Tables of results: the common one with a row for each method, and texts about runs."""

from __future__ import annotations

from collections.abc import Sequence

from .claims import Metrics, by_method
from .statistics import cell

Rows = list[list[str]]
"""A table; the first row is its head."""
Tables = list[tuple[str, Rows]]
"""Tables with their titles."""


def table_of(metrics: Metrics) -> tuple[list[str], Rows]:
    """The head of the common table and its rows, one a method."""
    methods = by_method(metrics)
    columns = list(dict.fromkeys(key for numbers in methods.values() for key in numbers))
    return ["method", *columns], [[method, *cells(numbers, columns)] for method, numbers in methods.items()]


def cells(numbers: Metrics, columns: Sequence[str]) -> list[str]:
    """The cells of a method's row; "-" for numbers that it lacks."""
    return [cell(numbers[key]) if key in numbers else "-" for key in columns]


def seeds_text(metrics: Metrics) -> str:
    """The seeds behind the numbers of a run."""
    seeds = metrics["seeds"]
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of seeds {seeds[0]} to {seeds[-1]} ± 95 % interval"


def estimate_text(seconds: float) -> str:
    """A time that is not known well."""
    if seconds < 100:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


def duration_text(seconds: float) -> str:
    """A time that was measured."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
