"""Stages S3 and S8: the test suite's CUDA tests, those with opcheck apart, and the suite ``cuda`` of the benchmarks by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from .device import Card
from .results import Results

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
APART = ("emulator", "faults", "support", "tools")
"""Folders without tests of a GPU."""

MARKS = ("DEVICES", '"cuda"', "needs_gpu", "needs_two_gpus")
"""A file of tests in which one of these stands has tests of a GPU. Others are not imported: some need packages of no other use."""

NAMED = 40
"""At most so many failed tests get a line each."""

SECONDS_AFTER = 10
"""Left of a stage's time to write what the benchmarks have measured."""


def files() -> list[str]:
    found = sorted(path for path in TESTS.rglob("test_*.py") if path.relative_to(TESTS).parts[0] not in APART)
    return [str(path.relative_to(ROOT)) for path in found if any(mark in path.read_text() for mark in MARKS)]


def cuda_tests(device: Card, results: Results) -> None:
    """S3."""
    run_pytest(results, "tests without opcheck", device.tests, device.workers)


def opchecks_and_suite(device: Card, results: Results, out: Path, end: float) -> None:
    """S8, which is stopped at ``end``, by ``time.monotonic()``."""
    run_pytest(results, "opcheck tests", device.opchecks, device.workers)
    run_suite(device, results, out / "bench", end - SECONDS_AFTER - time.monotonic())


def run_pytest(results: Results, case: str, expression: str, workers: int) -> None:
    """Runs the tests that ``expression`` selects; a line for all, and one for each that fails."""
    failed: Sequence[tuple[str, str]] = ()
    with tempfile.TemporaryDirectory() as folder, results.case(case) as line:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-k", expression, "-m", "not emulated"]
        command += ["--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}", *files()]
        line["exit_code"] = subprocess.run(command, cwd=ROOT).returncode
        counts, failed = parse(report.read_text())
        line |= counts
        if line["exit_code"] != 0 or counts["passed"] == 0:
            line |= {"ok": False, "reason": f"{len(failed)} failed, {counts['passed']} passed, exit code {line['exit_code']}"}
    for name, reason in failed[:NAMED]:
        results.write(name, False, 0.0, reason)


def parse(report: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads pytest's report: how many tests had which end, and the names of those that failed, each with its reason."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    failed = [
        (f"{case.get('classname')}.{case.get('name')}", bad.get("message") or "no message")
        for case in cases
        for bad in case
        if bad.tag in ("failure", "error")
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = {name for name, _ in failed}
    return {"passed": len(cases) - skipped - len(names), "failed": len(names), "skipped": skipped}, failed


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


def summary(row: dict) -> dict[str, object]:
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
