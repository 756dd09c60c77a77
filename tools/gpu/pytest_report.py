"""A plugin of pytest that writes how each test ended as soon as it has: what ran before a test that hangs is not lost."""

from __future__ import annotations

import json
import os

FILE = "GPU_STAGES_REPORTS"
"""The variable that names the file."""


def pytest_runtest_logreport(report):
    # Under xdist a worker's reports come to the controller, which is the one that writes.
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or not report.passed:
        _write(report.nodeid, report.outcome, report.duration, report.longrepr)


def pytest_collectreport(report):
    if "PYTEST_XDIST_WORKER" not in os.environ and report.failed:
        _write(report.nodeid, "failed", 0.0, report.longrepr)


def _write(test, outcome, seconds, said):
    line = {"test": test, "outcome": outcome, "seconds": seconds}
    if outcome == "failed":
        crash = getattr(said, "reprcrash", None)
        line["reason"] = str(crash.message if crash is not None else said).strip()[:600]
    with open(os.environ[FILE], "a") as file:
        file.write(json.dumps(line) + "\n")
