"""Stages S5 and S6: compute-sanitizer over small calls of every op, Nsight Compute over one call of each kind of kernel."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from support.strides import SIZES

from . import ops
from .device import Card
from .results import Results

CHECKS = {"memcheck": ("--padding", "32", "--report-api-errors", "no"), "racecheck": ()}
"""compute-sanitizer's tools, in this order, with the options of each. With padding an access just past a buffer is in no other."""

METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "dram__bytes.sum": "dram_bytes",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessor_percent",
    "smsp__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks_by_registers",
}
"""Nsight Compute's names of the numbers in the results, and their names there."""

PROFILED = (
    "masked_weight",
    "masked_linear",
    "masked_linear_backward",
    "task_masked_linear stacked",
    "packed_masked_linear stacked",
)


def sanitized(device: Card, results: Results, script: Path, dry: bool) -> None:
    """S5."""
    # Else torch hands out pieces of large blocks, and an access past one lands in the next.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check, options in CHECKS.items():
        with results.case(check) as line:
            command = [*device.tool("compute-sanitizer"), "--tool", check, *options, "--error-exitcode", "9"]
            ran = _program(command, script, "small-ops", dry, environment)
            line |= {"exit_code": ran.returncode, "errors": errors(ran.stdout)}
            if ran.returncode != 0 or line["errors"] != 0:
                first = re.search(r"^========= (?!COMPUTE).*", ran.stdout, re.MULTILINE)
                line |= {"ok": False, "reason": f"exit code {ran.returncode}: {first[0] if first else 'nothing said'}"}


def errors(said: str) -> int | None:
    """The number of errors or hazards that compute-sanitizer counts; None: it said none."""
    found = re.search(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", said)
    return int(found[1] or found[2]) if found else None


def profiled(device: Card, results: Results, script: Path, dry: bool) -> None:
    """S6: one line a kernel."""
    kernels: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder, results.case("ncu") as line:
        log = Path(folder) / "log.csv"
        options = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--log-file", str(log)]
        options += ["--kernel-name", "regex:masked|packed", "--metrics", ",".join(METRICS)]
        ran = _program([*device.tool("ncu"), *options], script, "large-ops", dry, dict(os.environ))
        said = log.read_text() if log.exists() else ""
        print(said)
        kernels = parse(said)
        line |= {"exit_code": ran.returncode, "kernels": len({kernel["kernel"] for kernel in kernels})}
        if ran.returncode != 0 or line["kernels"] < len(PROFILED):
            line |= {"ok": False, "reason": f"exit code {ran.returncode}, {line['kernels']} kernels, expected {len(PROFILED)}"}
    for kernel in kernels:
        name = str(kernel.pop("kernel"))
        results.write(name[:120], True, float(str(kernel.get("nanoseconds", 0))) / 1e9, **kernel)


def parse(said: str) -> list[dict[str, object]]:
    """Reads ncu's table: a row of names, one of units, and one for each launch; other lines begin with ``==``."""
    lines = [line for line in said.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    return [{"kernel": row["Kernel Name"]} | _numbers(row) for row in rows if row.get("ID")]


def _numbers(row: dict[str, str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for metric, name in METRICS.items():
        if text := row.get(metric, "").replace(",", ""):
            try:
                found[name] = float(text)
            except ValueError:
                found[name] = text  # "n/a"
    return found


def _program(
    tool: list[str], script: Path, program: str, dry: bool, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    command = [*tool, sys.executable, str(script), "--program", program, *(["--dry-run"] if dry else [])]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(ran.stdout, flush=True)
    return ran


def small_ops(device: Card) -> None:
    """Calls every op once in float32 and bfloat16, aligned and not."""
    for dtype in (torch.float32, torch.bfloat16):
        for moved in (False, True):
            for name in ops.OPS:
                ops.call(device, name, SIZES["ragged" if moved else "whole"], dtype, moved)


def large_ops(device: Card) -> None:
    """Calls each kind of kernel once at its full size."""
    for name in PROFILED:
        ops.call(device, name, device.profiled, torch.float32)
