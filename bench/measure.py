"""Checks, times and summarises a case."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from .cases import Case
from .problem import COMPILED, COMPILED_OURS, METAMASK, Contender, Problem, Work
from .results_json import Ratio, Spread, Summary

ROUNDINGS = 32.0
SHORT_ROUNDINGS = 4.0
WARMUP_ROUNDS = 3
MIN_ROUNDS, MAX_ROUNDS = 9, 101
TARGET_SECONDS = 1.0
"""The time that the rounds of a case should take, within the limits of their number."""

BLOCKS = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
"""In bytes, never written to: the smallest that fits no free block lies at the heap's end."""

FLOOR = "dense"
"""The contender that does less than metamask must; its ratio is written the other way round."""


class Checked(NamedTuple):
    """``errors``: by contender, the largest error as a share of the tolerance; ``not_measured``: reasons, by contender."""

    errors: dict[str, float]
    not_measured: dict[str, str]


def check(problem: Problem) -> Checked:
    """Compares every contender's results with float64.

    Raises:
        AssertionError: a result is wrong: too far off, not finite, or of another shape or dtype.
    """
    not_measured = dict(problem.missing)
    errors = {}
    exact: dict[Work, tuple[Tensor, ...]] = {}
    for name, contender in problem.contenders.items():
        if contender.exact not in exact:
            exact[contender.exact] = contender.exact()
        results = first_call(name, contender)
        if isinstance(results, str):
            not_measured[name] = results
        else:
            errors[name] = worst_error(name, contender.results, results, exact[contender.exact], problem)
    return Checked(errors, not_measured)


def first_call(name: str, contender: Contender) -> tuple[Tensor, ...] | str:
    """Returns the results of a contender's first call; of one that cannot be compiled, why."""
    try:
        return contender.work()
    except TorchDynamoException as error:
        if name not in (COMPILED, COMPILED_OURS):
            raise
        # Its text may be empty or pages long; the first line names the cause (no C++ compiler, say).
        return f"torch.compile failed: {(str(error).strip() or repr(error)).splitlines()[0]}"


def worst_error(name: str, names: Sequence[str], results: Sequence[Tensor], exact: Sequence[Tensor], problem: Problem) -> float:
    """Returns the largest error of a contender's results as a share of the tolerance.

    Raises:
        AssertionError: it is more than 1, or a result has another shape or dtype, or there are more or fewer than ``names``.
    """
    assert len(results) == len(exact) == len(names), f"{name} returned {len(results)} results, not {len(exact)}"
    worst = 0.0
    for what, result, expected in zip(names, results, exact):
        assert result.shape == expected.shape, f"{what} of {name} has shape {list(result.shape)}, not {list(expected.shape)}"
        assert result.dtype == problem.dtype, f"{what} of {name} is {result.dtype}, not {problem.dtype}"
        assert expected.isfinite().all(), f"the float64 reference of {what} is not finite"
        if problem.tolerance is not None:
            size = expected.norm().item()
            norm_error = (result.detach().double() - expected).norm().item() / (problem.tolerance * size + 1e-30)
            if not norm_error <= 1.0:
                raise AssertionError(
                    f"{what} of {name} is wrong: off by {norm_error:.2g} times what is allowed, {problem.tolerance:g}"
                )
            worst = max(worst, norm_error)
            continue
        # The rounding errors of n additions grow like a random walk, as eps * sqrt(n) times the size of a typical sum. The
        # constant is for element-wise factors: in 1 - sigmoid(M) the leading digits cancel where M is large, so there the
        # error is some eps of the other factors and not of the product.
        share = torch.finfo(torch.float32).eps * (ROUNDINGS + 2.0 * math.sqrt(problem.reduction))
        if result.dtype != torch.float32:
            # 16 bits round theta, the gradient's inputs and the result; their sums are kept in float32.
            share += SHORT_ROUNDINGS * torch.finfo(result.dtype).eps
        tolerance = share * (expected.abs() + expected.square().mean().sqrt())
        error = (result.detach().double() - expected).abs() / tolerance
        # Written so that a NaN is wrong.
        wrong = ~(error <= 1.0)
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{what} of {name} is wrong in {int(wrong.sum())} of {wrong.numel()} elements; at {list(index)} it is "
                f"{result[index].item():.9g} instead of {expected[index].item():.9g} (tolerance {tolerance[index].item():.2g})"
            )
        worst = max(worst, error.max().item())
    return worst


def check_apart(case: Case) -> Checked:
    """Runs :func:`check` in a process of its own, so that its float64 arithmetic leaves no trace in the process that is timed.

    glibc raises the sizes at which it asks the system for memory, and gives it back, when a larger block is freed. Counted: after a
    check in the same process, the eager forward and backward of 8 x 1024 takes 120 page faults instead of 1756.

    Raises:
        AssertionError: as :func:`check`, or the process died.
    """
    # Spawned: OpenMP hangs in a process forked from one that has used it.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_check, args=(case, sender))
    process.start()
    sender.close()
    try:
        outcome: Checked | AssertionError = receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the check of {case.id} ended without a result, exit code {process.exitcode}") from None
    process.join()
    if isinstance(outcome, AssertionError):
        raise outcome
    return outcome


def _send_check(case: Case, sender: Connection) -> None:
    try:
        sender.send(check(case.problem()))
    except Exception as error:
        text = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
        sender.send(AssertionError(text))


def timed(contender: Contender) -> Callable[[], None]:
    """Makes one unit of work. Its results are freed inside, as in a loop that keeps nothing."""
    work = contender.work

    def unit() -> None:
        work()

    return unit


def settle_heap() -> None:
    """Lets the C library give back to the system what the call before has freed, before the next is timed.

    glibc does so in a later free of a block at the heap's end, whoever's that is: the 64 KiB that a contender frees may cost it
    several times its own time, because of two weights' worth of memory that another has freed. Measured without this, a forward
    of 8 x 2048 took from 0.22 to 3.1 of dense's time, by process; with it 0.72 to 0.76.
    """
    blocks = [torch.empty(size, dtype=torch.uint8) for size in BLOCKS]
    del blocks


def nanoseconds(unit: Callable[[], None]) -> int:
    """Times one call."""
    settle_heap()
    start = time.perf_counter_ns()
    unit()
    return time.perf_counter_ns() - start


def choose_rounds(units: dict[str, Callable[[], None]], fewest: int = MIN_ROUNDS, seconds: float = TARGET_SECONDS) -> int:
    """Warms up, and returns the number of rounds that fit into ``seconds``, from ``fewest`` to :data:`MAX_ROUNDS`."""
    # The shortest: the first compiles, and another may have been disturbed.
    took = min(sum(nanoseconds(unit) for unit in units.values()) for _ in range(WARMUP_ROUNDS))
    return max(fewest, min(MAX_ROUNDS, int(seconds * 1e9 / took)))


def time_round(units: dict[str, Callable[[], None]], times: dict[str, list[int]]) -> None:
    """Times every unit once, and adds to ``times``: rotating, so that each follows each other one equally often."""
    names = list(units)
    start = len(times[names[0]]) % len(names)
    for name in names[start:] + names[:start]:
        times[name].append(nanoseconds(units[name]))


class Others:
    """Measures the share of the machine's CPU time that other processes take from here on (Linux; None elsewhere).

    Contenders that use all cores wait for the slowest thread: beside another busy process their times can be off by any factor.
    """

    def __init__(self) -> None:
        self._begin = self._read()

    def share(self) -> float | None:
        end = self._read()
        if self._begin is None or end is None:
            return None
        wall, machine, own = (b - a for a, b in zip(self._begin, end))
        return max(0.0, machine - own) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Reads the seconds of the clock, of the machine's CPU time, and of this process's."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
        ticks = user + nice + system + irq + softirq + steal
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def summarise(times: dict[str, list[int]]) -> Summary:
    """Summarises the times of interleaved rounds: nanoseconds, by contender.

    A ratio says how many times as long as metamask a contender takes; that to the floor is the other way round. This library
    compiled is compared with plain torch compiled.
    """
    ratios: dict[str, Ratio] = {}
    for name in times:
        if name != METAMASK:
            above, below = (METAMASK, name) if name == FLOOR else (name, METAMASK)
            if name == COMPILED_OURS:
                above, below = (COMPILED if COMPILED in times else METAMASK), name
            per_round = [a / b for a, b in zip(times[above], times[below])]
            ratios[f"{above}/{below}"] = {
                "of_medians": statistics.median(times[above]) / statistics.median(times[below]),
                "per_round": statistics.median(per_round),
                "iqr": _interquartile_range(per_round),
            }
    contenders: dict[str, Spread] = {
        name: {"median": statistics.median(values), "iqr": _interquartile_range(values), "times": values}
        for name, values in times.items()
    }
    return {"contenders": contenders, "ratios": ratios}


def _interquartile_range(values: Sequence[float]) -> float:
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return upper - lower
