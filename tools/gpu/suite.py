"""Stages S2, S3 and S8: the test suite's CUDA tests in three parts, and the suite ``cuda`` of the benchmarks by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import pytest_report
from .device import Card
from .results import Results

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
MARK = "from support.gpu import"
"""A file of tests that says so has tests of a GPU. Others are not imported: some need packages that are of no other use."""

EXECUTION = ("tests/ops/test_execution.py", "tests/test_optim_streams.py")
"""Graphs, streams, repeats, waits and device asserts."""

NAMED = 20
"""At most so many failed tests of one function are named."""

SECONDS_AFTER = 10
"""Left of a stage's time to write what the benchmarks have measured."""


def files() -> list[str]:
    found = sorted(path for path in TESTS.rglob("test_*.py") if MARK in path.read_text())
    return [str(path.relative_to(ROOT)) for path in found]


def executions(device: Card, results: Results, end: float) -> None:
    """S2; every stage here is over at ``end``, by ``time.monotonic()``."""
    run_pytest(device, results, "S2", EXECUTION, end)


def cuda_tests(device: Card, results: Results, end: float) -> None:
    """S3."""
    run_pytest(device, results, "S3", [name for name in files() if name not in EXECUTION], end)


def opchecks_and_suite(device: Card, results: Results, out: Path, end: float) -> None:
    """S8; the tests have half of its time at most."""
    run_pytest(device, results, "S8", files(), (time.monotonic() + end) / 2)
    run_suite(device, results, out / "bench", left(end))


def left(end: float) -> float:
    """Returns the seconds of a stage that what it starts may take."""
    return max(end - SECONDS_AFTER - time.monotonic(), 0.0)


def run_pytest(device: Card, results: Results, stage: str, names: Sequence[str], end: float) -> None:
    """Runs a stage's tests: a line for all, and one for each function of tests. What ended before the time is up counts."""
    functions: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, results.case("tests") as line:
        reports, seconds = Path(folder) / "reports.jsonl", left(end)
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(device.workers), "-m", device.marks, "-k", device.tests[stage]]
        command += ["--tb=short", "-p", "no:cacheprovider", "-p", "gpu.pytest_report", "--continue-on-collection-errors"]
        path = os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        # Without those of a pytest that this one runs in, whose workers it would take for its own.
        outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        environment = {**outside, pytest_report.FILE: str(reports), "PYTHONPATH": path}
        try:
            command += device.files(names)
            ended = f"exit code {subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        functions = by_function(reports.read_text() if reports.exists() else "")
        line |= {name: sum(its[name] for its in functions.values()) for name in ("passed", "failed", "skipped")}
        if ended != "exit code 0" or line["passed"] == 0:
            line |= {"ok": False, "reason": f"{ended}, {line['failed']} failed, {line['passed']} passed"}
    for name, its in functions.items():
        results.write(name, **its)


def by_function(reports: str) -> dict[str, dict[str, Any]]:
    """Reads how tests ended: by function, how many in which way, their seconds, and which failed and why."""
    functions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in reports[: reports.rfind("\n") + 1].splitlines():
        ended = json.loads(line)
        functions[ended["test"].split("[")[0]].append(ended)
    return {name: _together(its) for name, its in functions.items()}


def _together(ends: list[dict[str, Any]]) -> dict[str, Any]:
    bad = {end["test"]: end["reason"] for end in ends if end["outcome"] == "failed"}
    found: dict[str, Any] = {"ok": not bad, "seconds": sum(end["seconds"] for end in ends)}
    found["passed"] = sum(end["outcome"] == "passed" and end["test"] not in bad for end in ends)
    found |= {"failed": len(bad), "skipped": sum(end["outcome"] == "skipped" for end in ends)}
    if bad:
        named = {test.partition("[")[2].rstrip("]") or test: why for test, why in bad.items()}
        found |= {"reason": "; ".join(f"{name}: {why}" for name, why in named.items()), "tests": list(named)[:NAMED]}
    return found


def run_suite(device: Card, results: Results, out: Path, seconds: float) -> None:
    """Runs the benchmarks as a user does; a line for each of its rows. What is measured when the time is up counts."""
    reason = None
    with results.case("benchmarks") as line:
        command = [sys.executable, "-m", "metamask_ext.bench.run", *device.suite, "--out", str(out)]
        try:
            line["exit_code"] = subprocess.run(command, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            reason = f"stopped after {seconds:.0f} s"
        if reason or line["exit_code"] != 0:
            line |= {"ok": False, "reason": reason or f"exit code {line['exit_code']}"}
    with results.case("benchmarks: rows") as line:
        rows = json.loads((out / "results.json").read_text())["rows"]
        line["measured"] = sum(row["status"] == "measured" for row in rows)
    for row in rows:
        if row["status"] == "measured":
            results.write(f"{row['case']} {row['allocator']}", True, 0.0, **summary(row))
        else:
            results.write(f"{row['case']} {row['allocator']}", False, 0.0, row.get("reason"))


def summary(row: dict[str, Any]) -> dict[str, object]:
    """The numbers of a measured case: medians, ratios, errors."""
    numbers: dict[str, object] = {
        "microseconds": {name: spread["median"] / 1e3 for name, spread in row["contenders"].items()},
        "ratios": {name: ratio["of_medians"] for name, ratio in row["ratios"].items()},
        "error_over_tolerance": row["error_over_tolerance"],
    }
    for name in ("copies", "moved", "timed_by", "not_measured"):
        if row.get(name):
            numbers[name] = row[name]
    return numbers
