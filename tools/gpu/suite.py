"""Stages S2, S3 and S8: the test suite's CUDA tests in three parts, and the suite ``cuda`` of the benchmarks by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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


def executions(device: Card, results: Results) -> None:
    """S2."""
    run_pytest(device, results, "S2", EXECUTION)


def cuda_tests(device: Card, results: Results) -> None:
    """S3."""
    run_pytest(device, results, "S3", [name for name in files() if name not in EXECUTION])


def opchecks_and_suite(device: Card, results: Results, out: Path, end: float) -> None:
    """S8, which is stopped at ``end``, by ``time.monotonic()``."""
    run_pytest(device, results, "S8", files())
    run_suite(device, results, out / "bench", end - SECONDS_AFTER - time.monotonic())


def run_pytest(device: Card, results: Results, stage: str, names: Sequence[str]) -> None:
    """Runs a stage's tests: a line for all, and one for each function of tests."""
    functions: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, results.case("tests") as line:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(device.workers), "-m", device.marks, "-k", device.tests[stage]]
        command += ["--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}"]
        command += device.files(names)
        line["exit_code"] = subprocess.run(command, cwd=ROOT).returncode
        functions = parse(report.read_text())
        line |= {end: sum(its[end] for its in functions.values()) for end in ("passed", "failed", "skipped")}
        if line["exit_code"] != 0 or line["passed"] == 0:
            line |= {"ok": False, "reason": f"exit code {line['exit_code']}, {line['failed']} failed, {line['passed']} passed"}
    for name, its in functions.items():
        results.write(name, **its)


def parse(report: str) -> dict[str, dict[str, Any]]:
    """Reads pytest's report: by function, how many of its tests had which end, their seconds, and which failed and why."""
    cases: dict[str, list[ElementTree.Element]] = defaultdict(list)
    for case in ElementTree.fromstring(report).iter("testcase"):
        cases[f"{case.get('classname')}.{case.get('name', '').split('[')[0]}"].append(case)
    return {name: _ends(its) for name, its in cases.items()}


def _ends(cases: list[ElementTree.Element]) -> dict[str, Any]:
    bad = {case.get("name", ""): one.get("message") or "no message" for case in cases for one in case if one.tag in BAD}
    skipped = sum(case.find("skipped") is not None for case in cases)
    found: dict[str, Any] = {"ok": not bad, "seconds": sum(float(case.get("time", 0)) for case in cases)}
    found |= {"passed": len(cases) - skipped - len(bad), "failed": len(bad), "skipped": skipped}
    if bad:
        found |= {"reason": "; ".join(f"{name}: {why}" for name, why in bad.items()), "tests": list(bad)[:NAMED]}
    return found


BAD = ("failure", "error")


def run_suite(device: Card, results: Results, out: Path, seconds: float) -> None:
    """Runs the benchmarks as a user does; a line for each of its rows. What is measured when the time is up counts."""
    reason = None
    with results.case("benchmarks") as line:
        command = [sys.executable, "-m", "metamask_ext.bench.run", *device.suite, "--out", str(out)]
        try:
            line["exit_code"] = subprocess.run(command, timeout=max(seconds, 0)).returncode
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
