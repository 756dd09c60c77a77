"""The cases as pytest-benchmark tests, with ids such as ``core/masked_linear-forward-8x1024``.

``metamask_ext.bench.run`` starts a process for each: what a case compiles or allocates changes the next one's times.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import cuda_case
from .cases import SUITES, Case
from .cuda_timing import Gpu
from .measure import Others, check_apart, choose_rounds, summarise, time_round, timed
from .problem import METAMASK


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for cases in SUITES.values() for case in cases])
def test_case(case: Case, benchmark: BenchmarkFixture) -> None:
    if case.quantities:
        benchmark.extra_info["quantities"] = benchmark.pedantic(case.build, rounds=1)
        return
    if case.device == "cuda":
        benchmark.extra_info.update(benchmark.pedantic(cuda_case.measure, (case, Gpu()), rounds=1))
        return
    checked = check_apart(case)
    problem = case.problem()
    units = {name: timed(problem.contenders[name]) for name in checked.errors}
    rounds = choose_rounds(units)

    times: dict[str, list[int]] = {name: [] for name in units}

    def time_all() -> None:
        # metamask too is timed here, not by pytest-benchmark, whose own work before a call costs a small layer some of its caches.
        time_round(units, times)

    others_cpu = Others()
    benchmark.pedantic(units[METAMASK], setup=time_all, rounds=rounds, iterations=1)
    benchmark.extra_info.update(
        rounds=rounds,
        cpu_share_of_others=others_cpu.share(),
        error_over_tolerance=checked.errors,
        not_measured=checked.not_measured,
        **summarise(times),
    )
