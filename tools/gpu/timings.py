"""Stages S4 and S7: the cases of the benchmark suite ``cuda``, all in one process, first those whose prediction is worst."""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import replace
from functools import partial

import torch
from metamask_ext.bench import cuda_case
from metamask_ext.bench.cases import SUITES, Case

from .device import Card
from .results import Results
from .suite import summary

FIRST = (
    "cuda/packed-forward",
    "cuda/masked_linear-forward-8x",
    "cuda/masked_linear-forward-16x",
    "cuda/masked_linear-forward-1x",
    "cuda/masked_linear-fused-step-32x",
    "cuda/masked_linear-fused-step-8x",
    "cuda/mixed-task-forward",
    "cuda/masked_weight",
    "cuda/bfloat16-fused-step",
)
"""The order, by the beginnings of names; what is not here comes last."""


def ordered() -> list[Case]:
    def place(case: Case) -> int:
        return next((place for place, begin in enumerate(FIRST) if case.id.startswith(begin)), len(FIRST))

    return sorted((case for case in SUITES["cuda"] if not case.quantities), key=place)


def ours_copy_dense(device: Card, results: Results) -> None:
    """S4."""
    _measure(device, results, ordered(), ("copy", "dense"))


def compiled(device: Card, results: Results) -> None:
    """S7."""
    cases = ordered()
    wanted = device.compiled_cases([case.id for case in cases])
    _measure(device, results, [case for case in cases if case.id in wanted], ("compiled",))


def _measure(device: Card, results: Results, cases: list[Case], only: Collection[str]) -> None:
    timing = device.timing()
    for case in cases:
        with results.case(case.id) as line:
            assert isinstance(case.build, partial), f"{case.id} has no sizes"
            line |= summary(dict(cuda_case.measure(replace(case, build=device.resized(case.build)), timing, only)))
        gc.collect()
        torch.compiler.reset()
        if device.kind == "cuda":
            torch.cuda.empty_cache()
