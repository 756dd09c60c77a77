"""Measures a case of the suite ``cuda``: builds the copies of its inputs, checks it, and times its contenders."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from .cases import Case
from .cuda_timing import Device, copies, time_all
from .measure import check, summarise
from .problem import METAMASK, Problem
from .results_json import TimedOnGpu


def measure(case: Case, device: Device, only: Collection[str] | None = None) -> TimedOnGpu:
    """Checks a case against float64, in this process, and times it.

    Args:
        only: the contenders to measure beside ``metamask``; all if None.

    Raises:
        AssertionError: a result is wrong; nothing was timed.
    """
    with device.running():
        first = _only(case.problem(), only)
        checked = check(first)
        count = copies(first.moved, device)
        problems = [first, *(_only(case.problem(), only) for _ in range(count - 1))]
        works = {name: [problem.contenders[name].work for problem in problems] for name in checked.errors}
        timings = time_all(works, first.moved, device)
    times = {name: timing.times for name, timing in timings.items()}
    return {
        **summarise(times),
        "rounds": len(times[METAMASK]),
        "cpu_share_of_others": None,
        "error_over_tolerance": checked.errors,
        "not_measured": checked.not_measured,
        "gpu": device.name,
        "copies": count,
        "moved": first.moved,
        "timed_by": {name: timing.how for name, timing in timings.items()},
    }


def _only(problem: Problem, names: Collection[str] | None) -> Problem:
    if names is None:
        return problem
    kept = {name: contender for name, contender in problem.contenders.items() if name == METAMASK or name in names}
    return replace(problem, contenders=kept)
