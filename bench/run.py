"""Measures a suite: one fresh process for each case and allocator setting, all results in one ``results.json``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from metamask_ext import build_info
from metamask_ext.files.atomic import prepare_folder
from metamask_ext.files.errors import OutputError
from metamask_ext.files.read import read_json

from . import report, targets
from .cases import SUITES, Case
from .measure import summarise
from .results_json import FORMAT, Machine, Results, Row, Timed, save

ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    # Freed memory stays with the process instead of going back to the system.
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
}
# These would change the allocator, or bring in options of the user's pytest.
DROPPED_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "PYTEST_")
TIMEOUT_SECONDS = 600
console = Console()


class CaseError(Exception):
    """The process of a case failed; the message says why."""


def run(suite: str, out: Path, quick: bool = False, only: Iterable[str] | None = None) -> int:
    """Measures ``suite`` and writes ``results.json``, ``table.md`` and, if there are ratios, ``ratios.png`` into ``out``.

    Args:
        suite: a key of :data:`metamask_ext.bench.cases.SUITES`.
        out: a folder; made if it does not exist.
        quick: only the suite's few quick cases, with the default allocator.
        only: only the cases with these ids.

    Returns:
        0; 1 if a case failed; 2, after one line on stderr, if there is nothing to run or an extra is not installed.
    """
    if suite not in SUITES:
        return _refuse(f"suite must be one of {', '.join(sorted(SUITES))}, got {suite!r}")
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

    begin = time.perf_counter()
    work = [(case, name) for case in cases for name in (ALLOCATORS if _both(case, quick) else ["default"])]
    rows = [_row(case, allocator, "not measured", "the run ended before it") for case, allocator in work]
    results: Results = {
        "format": FORMAT,
        "suite": suite,
        "quick": quick,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "seconds": 0.0,
        "machine": describe_machine(),
        "rows": rows,
    }
    for index, (case, allocator) in enumerate(work):
        rows[index] = _measure(case, allocator)
        _show(rows[index])
        results["seconds"] = round(time.perf_counter() - begin, 1)
        save(results, out / "results.json")  # a run that is stopped keeps what it measured

    report.write(results, out, console)
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        console.print(f"failed: {row['case']}, {row['allocator']} allocator: {row['reason']}", style="bold red", markup=False)
    return 1 if failed else 0


def _both(case: Case, quick: bool) -> bool:
    """Tells whether the case is measured with both allocators."""
    return not quick and case.device == "cpu" and case.tuned and not case.quantities


def describe_machine() -> Machine:
    """Describes the machine and the software, without names of hosts, users or folders."""
    from cpuinfo import get_cpu_info  # of pytest-benchmark

    info = build_info()
    return {
        "cpu": get_cpu_info().get("brand_raw", "unknown"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": info["cpu_capability"],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_state": _gpu_state(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "metamask_ext": info["version"],
        "backend": info["backend"],
        "commit": _commit(),
    }


def _gpu_state() -> dict[str, str] | None:
    """Asks nvidia-smi for the driver and clocks (MHz; ``max`` the card's limit) of the GPU in use; None without one.

    Where it cannot tell (a container without it, a part of a card), the answer is what it says.
    """
    if not torch.cuda.is_available():
        return None
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not on PATH"}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")
    # By its own name: nvidia-smi counts cards that CUDA_VISIBLE_DEVICES hides.
    card = f"GPU-{torch.cuda.get_device_properties().uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", card]
    ran = subprocess.run(command, capture_output=True, text=True)
    values = [value.strip() for value in ran.stdout.split(",")]
    if ran.returncode != 0 or len(values) != len(fields):
        return {"nvidia-smi": (ran.stdout + ran.stderr).strip() or f"exit code {ran.returncode}"}
    return dict(zip(fields, values))


def _commit() -> str | None:
    """Returns the commit of the checkout that this package runs from, marked if files differ; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    modified = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + (" with local changes" if modified else "")


def _measure(case: Case, allocator: str) -> Row:
    """Measures one row of the results."""
    if case.device == "cuda" and not torch.cuda.is_available():
        return _row(case, allocator, "not measured", "no GPU")
    if allocator == "tuned" and platform.libc_ver()[0] != "glibc":
        return _row(case, allocator, "not measured", "the settings are those of glibc's allocator")
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
    environment = {key: value for key, value in os.environ.items() if not key.startswith(DROPPED_VARIABLES)}
    # Plugins of other packages, and a checkout's configuration and conftest files, have no say here.
    environment.update(ALLOCATORS[allocator], PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    tests = Path(__file__).with_name("test_suite.py")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider"]
        command += ["-c", os.devnull, "--rootdir", str(tests.parent), "--noconftest", "--disable-warnings"]
        command += [f"--benchmark-json={output}", f"{tests}::test_case[{case.id}]"]
        try:
            child = subprocess.run(
                command,
                env=environment,
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
    parser.add_argument("--only", action="append", metavar="ID", help="a case to run; may be given several times")
    given = parser.parse_args()
    sys.exit(run(given.suite, given.out, given.quick, given.only))


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
