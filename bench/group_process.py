"""Measures the cases of a group, one after another in this process, and prints a line of JSON for each: run.py starts it.

A contender's first call is what is checked, in another process (:mod:`metamask_ext.bench.group_check`): that gets samples of the
results, and computes in float64. Nothing larger than the results themselves is allocated or freed here for it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

import torch

from . import grid
from .cases import SUITES, Case
from .group_check import Checker
from .measure import Others, choose_rounds, first_call, summarise, time_round, timed
from .problem import METAMASK


def main(ids: list[str]) -> None:
    cases = {case.id: case for its in SUITES.values() for case in its}
    with _own_stdout() as lines, Checker() as checker:
        for case in [cases[id] for id in ids]:
            try:
                found = measure(case, checker)
            except Exception as error:
                traceback.print_exc()
                found = {"failed": (str(error).strip() or repr(error)).splitlines()[0]}
            print(json.dumps(found), file=lines, flush=True)


def _own_stdout() -> TextIO:
    """Returns what was stdout; what others print there goes to stderr."""
    mine = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(mine, "w")


def measure(case: Case, checker: Checker) -> dict[str, Any]:
    """Checks and times one case: its quantities, or :class:`Timed <metamask_ext.bench.results_json.Timed>` and ``dtype``.

    Raises:
        AssertionError: a result is wrong; nothing was timed.
    """
    # What was compiled for another shape would be tried first at each call.
    torch.compiler.reset()
    gc.collect()
    if case.quantities:
        return {"quantities": case.build()}
    problem = case.problem()
    not_measured, errors, seconds = dict(problem.missing), {}, {}
    for name, contender in problem.contenders.items():
        start = time.perf_counter()
        results = first_call(name, contender)
        seconds[name] = time.perf_counter() - start
        if isinstance(results, str):
            not_measured[name] = results
        else:
            errors[name] = checker.worst_error(case.id, name, results)
        del results
    units = {name: timed(problem.contenders[name]) for name in errors}
    slow = seconds[METAMASK] * len(units) > grid.SECONDS
    rounds = grid.FEWEST_SLOW if slow else choose_rounds(units, grid.FEWEST, grid.SECONDS)
    times: dict[str, list[int]] = {name: [] for name in units}
    others_cpu = Others()
    for _ in range(rounds):
        time_round(units, times)
    return {
        "dtype": grid.name_of(problem.dtype),
        "rounds": rounds,
        "cpu_share_of_others": others_cpu.share(),
        "error_over_tolerance": errors,
        "not_measured": not_measured,
        **summarise(times),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
