"""Measures a suite: one fresh process for each case, or group of cases, and allocator setting; all results in one JSON file."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from metamask_ext.files.atomic import prepare_folder
from metamask_ext.files.errors import OutputError
from metamask_ext.files.read import read_json

from . import grid_estimate, group, report, results_json, targets
from .cases import SUITES, Case
from .group import ALLOCATORS, CaseError, environment
from .machine import describe_machine
from .measure import summarise
from .results_json import FORMAT, Results, Row, Timed, save

TIMEOUT_SECONDS = 600
GRID = "grid"
console = Console()


def run(suite: str, out: Path, quick: bool = False, only: Iterable[str] | None = None, full: bool = False) -> int:
    """Measures ``suite`` and writes ``results.json``, ``table.md`` and, if there are ratios, ``ratios.png`` into ``out``.

    The suite ``grid`` writes ``grid-PROCESSOR.json`` and two heat maps. If that file is there, of the same machine and commit, what
    it has is not measured again.

    Args:
        suite: a key of :data:`metamask_ext.bench.cases.SUITES`.
        out: a folder; made if it does not exist.
        quick: only the suite's few quick cases, with the default allocator.
        only: only the cases with these ids.
        full: of the suite ``grid``, all batches with both dtypes and allocators.

    Returns:
        0; 1 if a case failed; 2, after one line on stderr, if there is nothing to run or an extra is not installed.
    """
    if suite not in SUITES:
        return _refuse(f"suite must be one of {', '.join(sorted(SUITES))}, got {suite!r}")
    if full and (quick or suite != GRID):
        return _refuse(f"full is for the suite {GRID!r} alone, and not quick, got suite {suite!r} and quick {quick}")
    cases = SUITES[suite]
    if only is not None:
        only = list(only)
        if unknown := sorted(set(only) - {case.id for case in cases}):
            return _refuse(f"suite {suite!r} has no case {', '.join(unknown)}; it has {', '.join(case.id for case in cases)}")
        cases = [case for case in cases if case.id in only]
    elif quick:
        cases = [case for case in cases if case.quick]
    needed = ("pytest", "pytest_benchmark", "matplotlib")
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        return _refuse(f"benchmarks need {', '.join(absent)}: pip install 'metamask-ext[bench]'")

    out = Path(out)
    try:
        prepare_folder(out)
    except OutputError as error:
        return _refuse(str(error))

    results: Results = {
        "format": FORMAT,
        "suite": suite,
        "quick": quick,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "seconds": 0.0,
        "machine": describe_machine(),
        "rows": [],
    }
    path = out / report.file_name(results)
    try:
        before = _earlier(path, results) if suite == GRID else []
    except OutputError as error:
        return _refuse(str(error))
    _measure_all(_jobs(cases, quick, full), before, results, path)
    report.write(results, out, console)
    failed = [row for row in results["rows"] if row["status"] == "failed"]
    for row in failed:
        console.print(f"failed: {row['case']}, {row['allocator']} allocator: {row['reason']}", style="bold red", markup=False)
    return 1 if failed else 0


class _Job(NamedTuple):
    """A process's work: a case, or cases of a group."""

    cases: list[Case]
    allocator: str


def _jobs(cases: list[Case], quick: bool, full: bool) -> list[_Job]:
    jobs = []
    for _, its in groupby(cases, key=lambda case: case.group or case.id):
        together = list(its)
        for allocator in ALLOCATORS:
            if some := [case for case in together if allocator in _allocators(case, quick, full)]:
                jobs.append(_Job(some, allocator))
    return jobs


def _allocators(case: Case, quick: bool, full: bool) -> tuple[str, ...]:
    if case.group:
        return case.allocators[-1:] if quick else tuple(ALLOCATORS) if full and not case.quantities else case.allocators
    both = not quick and case.device == "cpu" and not case.quantities
    return case.allocators if both else ("default",)


def _earlier(path: Path, results: Results) -> list[Row]:
    """Returns the rows that an earlier run has measured and written into ``path``, and adds its seconds to ``results``.

    Raises:
        OutputError: the file is of another machine, commit or kind of run, or none of results.
    """
    if not path.exists():
        return []
    try:
        found = results_json.read(path)
        other = [key for key in ("suite", "quick") if found[key] != results[key]]
        # A card's clocks change from minute to minute, and have no part in these times.
        machine = {key: value for key, value in results["machine"].items() if key != "gpu_state"}
        other += [key for key, value in machine.items() if found["machine"].get(key) != value]
        rows = [row for row in found["rows"] if row["status"] == "measured"]
        results["seconds"] = found["seconds"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path} must hold results of this suite: {error!r}") from error
    if other:
        raise OutputError(f"{path} is of a run with another {', '.join(other)}: give another folder, or remove it")
    return rows


def _measure_all(jobs: list[_Job], before: list[Row], results: Results, path: Path) -> None:
    """Measures what is not among the rows ``before``, and saves after every row: a run that is stopped keeps what it measured."""
    begin, earlier = time.perf_counter(), results["seconds"]
    rows = results["rows"] = [
        _row(case, job.allocator, "not measured", "the run ended before it") for job in jobs for case in job.cases
    ]
    places = {(row["case"], row["allocator"]): index for index, row in enumerate(rows)}
    for row in before:
        if (key := (row["case"], row["allocator"])) in places:
            rows[places[key]] = row
        else:  # of an earlier full run
            rows.append(row)
    for job in jobs:
        job.cases[:] = [case for case in job.cases if rows[places[case.id, job.allocator]]["status"] != "measured"]
    if results["suite"] == GRID:
        minutes = grid_estimate.minutes([job.cases for job in jobs])
        console.print(f"about {math.ceil(minutes)} min on two cores of AMD Zen 4", highlight=False)
    for job in jobs:
        for row in _measured(job):
            rows[places[row["case"], row["allocator"]]] = row
            _show(row)
            results["seconds"] = round(earlier + time.perf_counter() - begin, 1)
            save(results, path)


def _measured(job: _Job) -> Iterator[Row]:
    """Measures the cases of a job, and yields the row of each."""
    if not all(case.group for case in job.cases):
        yield from (_measure(case, job.allocator) for case in job.cases)
        return
    left = job.cases
    while left:
        if reason := _unable(left[0], job.allocator):
            yield from (_row(case, job.allocator, "not measured", reason) for case in left)
            return
        try:
            for found in group.measured(left, job.allocator):
                case, *left = left
                failed = found.pop("failed", None)
                row = _row(case, job.allocator, "measured" if failed is None else "failed", failed)
                row.update(found)  # type: ignore[typeddict-item]  # from JSON
                yield row
        except CaseError as error:  # the others get a process of their own
            case, *left = left
            yield _row(case, job.allocator, "failed", str(error))


def _unable(case: Case, allocator: str) -> str | None:
    """Returns why a case cannot be measured here."""
    if case.device == "cuda" and not torch.cuda.is_available():
        return "no GPU"
    if allocator == "tuned" and platform.libc_ver()[0] != "glibc":
        return "the settings are those of glibc's allocator"
    return None


def _measure(case: Case, allocator: str) -> Row:
    """Measures one row of the results."""
    if reason := _unable(case, allocator):
        return _row(case, allocator, "not measured", reason)
    runs: list[Timed] = []
    for _ in range(case.processes):
        try:
            found = _measure_once(case, allocator)
        except CaseError as error:
            return _row(case, allocator, "failed", str(error))
        if case.quantities:
            return {**_row(case, allocator, "measured"), "quantities": found["quantities"]}
        runs.append(found)
    return {**_row(case, allocator, "measured"), **combined(runs)}


def _measure_once(case: Case, allocator: str) -> Any:
    """Measures in one process, and returns what it found: :class:`Timed`, or ``quantities``.

    Raises:
        CaseError: the process failed.
    """
    # Plugins of other packages, and a checkout's configuration and conftest files, have no say here.
    variables = {**environment(allocator), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    tests = Path(__file__).with_name("test_suite.py")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider"]
        command += ["-c", os.devnull, "--rootdir", str(tests.parent), "--noconftest", "--disable-warnings"]
        command += [f"--benchmark-json={output}", f"{tests}::test_case[{case.id}]"]
        try:
            child = subprocess.run(
                command,
                env=variables,
                cwd=folder,
                timeout=TIMEOUT_SECONDS,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except subprocess.TimeoutExpired:
            raise CaseError(f"it took longer than {TIMEOUT_SECONDS} s") from None
        if child.returncode != 0:
            console.print(child.stdout, markup=False, highlight=False)
            raise CaseError(_reason(child))
        return read_json(output)["benchmarks"][0]["extra_info"]


def combined(runs: list[Timed]) -> Timed:
    """Combines the measurements of several processes: all rounds, the largest share of others and the largest errors."""
    first = runs[0]
    if len(runs) == 1:
        return first
    times = {name: [time for run in runs for time in run["contenders"][name]["times"]] for name in first["contenders"]}
    shares = [run["cpu_share_of_others"] for run in runs if run["cpu_share_of_others"] is not None]
    return {
        **first,
        "rounds": sum(run["rounds"] for run in runs),
        "cpu_share_of_others": max(shares, default=None),
        "error_over_tolerance": {name: max(run["error_over_tolerance"][name] for run in runs) for name in times},
        **summarise(times),
    }


def _row(case: Case, allocator: str, status: str, reason: str | None = None) -> Row:
    row: Row = {"case": case.id, "measure": case.measure, "shape": case.shape, "allocator": allocator, "status": status}
    return row if reason is None else {**row, "reason": reason}


def _reason(child: subprocess.CompletedProcess[str]) -> str:
    """Returns the first line of the error, as pytest marks it; without one, how the process ended."""
    errors = [line[1:].strip() for line in child.stdout.splitlines() if line.startswith("E  ")]
    return errors[0] if errors else f"pytest ended with exit code {child.returncode}"


def _show(row: Row) -> None:
    line = f"{row['case']:<44}{row['allocator']:<9}"
    if "quantities" in row:
        line += "  ".join(f"{name} {targets.number(value)}" for name, value in row["quantities"].items())
    elif row["status"] == "measured":
        line += "  ".join(f"{name} {ratio['of_medians']:.2f}" for name, ratio in row["ratios"].items())
        line += "".join(f"  {name} not measured: {reason}" for name, reason in row["not_measured"].items())
    else:
        line += f"{row['status']}: {row['reason']}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m metamask_ext.bench.run", description=__doc__)
    parser.add_argument("--suite", default="core", help=f"one of {', '.join(sorted(SUITES))}")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="a few cases, default allocator")
    parser.add_argument("--full", action="store_true", help="grid: all batches with both dtypes and allocators")
    parser.add_argument("--only", action="append", metavar="ID", help="a case to run; may be given several times")
    given = parser.parse_args()
    sys.exit(run(given.suite, given.out, given.quick, given.only, given.full))


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
