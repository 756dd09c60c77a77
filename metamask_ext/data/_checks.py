"""Checks that several data sets share."""

from __future__ import annotations


def check_at_least_one(**counts: int) -> None:
    """Raise ValueError for the first of ``counts``, by argument name, that is less than 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
