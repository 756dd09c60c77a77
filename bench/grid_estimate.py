"""Estimates how long the suite ``grid`` takes, counted from operations and bytes, on two cores of AMD Zen 4."""

from __future__ import annotations

from collections.abc import Sequence

from . import grid
from .cases import Case
from .measure import MAX_ROUNDS, WARMUP_ROUNDS

CONTENDERS = 4
PRODUCTS = 150e9
"""Operations a second."""
TRAFFIC = 10e9
"""Bytes a second, with the clearing of fresh pages."""
ARRAYS = {"forward": 7, "backward": 16, "fused-step": 20}
"""Of the weight's size, read and written by plain torch."""
COMPILE_SECONDS, PROCESS_SECONDS = 0.5, 20.0
"""Of a case, and of a process: its imports, those of its check, and the first compilation of the weight's kernels."""


def seconds(mode: str, batch: int, inputs: int, outputs: int) -> float:
    """Estimates what a case takes, counted from its operations and bytes."""
    weights = inputs * outputs
    operations = (1 if mode == "forward" else 3) * 2 * batch * weights
    activations = batch * (inputs + outputs)
    call = operations / PRODUCTS + 4 * (ARRAYS[mode] * weights + 4 * activations) / TRAFFIC + 1e-5
    timed = CONTENDERS * call
    fitting = max(grid.FEWEST, min(MAX_ROUNDS, int(grid.SECONDS / timed)))
    rounds = grid.FEWEST_SLOW if timed > grid.SECONDS else WARMUP_ROUNDS + fitting
    # Each contender's first call is checked. Random numbers: 10 ns each, in both processes.
    return COMPILE_SECONDS + (1 + rounds) * timed + 2 * 1e-8 * (activations + 2 * weights)


def minutes(groups: Sequence[Sequence[Case]]) -> float:
    """Estimates what groups of the grid's cases take, in a process each."""
    cases = [case for its in groups for case in its if not case.quantities]
    modes = [next(mode for mode in grid.MODES if case.measure.endswith(mode)) for case in cases]
    taken = (seconds(mode, *grid.sizes_of(case.shape)) for case, mode in zip(cases, modes))
    return (sum(map(bool, groups)) * PROCESS_SECONDS + sum(taken)) / 60
