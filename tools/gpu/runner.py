"""Runs stages one after another, each in a process of its own with a time limit, within a budget for all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .results import FILE, WHOLE, Results, card_of, failure, read, table

ROOT = Path(__file__).resolve().parents[2]
LOG = "stages.log"
"""All that the stages print; one file, for few may come back from a machine."""

BUILD, BUILD_SECONDS, JOBS = "build", 240, 16
LEAST_SECONDS = 1.0


class Stage(NamedTuple):
    name: str
    seconds: float
    about: str


STAGES = (
    Stage("S0", 60, "the machine, copy bandwidth, matrix product rate"),
    Stage("S1", 90, "every op against float64, aligned and offset, poisoned memory, TF32"),
    Stage("S2", 90, "graphs, streams, repeats, waits, device asserts"),
    Stage("S3", 180, "the CUDA tests without opcheck"),
    Stage("S4", 180, "benchmarks: ours, copy, dense"),
    Stage("S5", 240, "memcheck and racecheck"),
    Stage("S6", 120, "ncu on five kernels"),
    Stage("S7", 240, "benchmarks: compiled contenders"),
    Stage("S8", 500, "the opcheck tests, and the benchmark suite by itself"),
)
"""In this order: what is worth most comes first. The limits are about twice what a stage should take."""


class Outcome(NamedTuple):
    seconds: float
    reason: str | None


def run_process(command: Sequence[str], limit: float, log: Path, environment: dict[str, str]) -> Outcome:
    """Runs a command with its output in ``log``, and ends it and all that it started when its time is up."""
    start = time.perf_counter()
    with log.open("ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        try:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            return Outcome(time.perf_counter() - start, f"did not start: {error}")
        try:
            code = process.wait(limit)
            reason = None if code == 0 else f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(time.perf_counter() - start, reason)


def run_stages(
    stages: Sequence[Stage],
    command: Callable[[Stage, float], Sequence[str]],
    out: Path,
    budget: float,
    environment: dict[str, str],
    dry: bool = False,
    start: float | None = None,
) -> int:
    """Runs the stages, says what each found, and returns the exit code: 0 if every line of this run is ok.

    Args:
        command: that of a stage and its time limit; it appends its lines to ``out``.
        budget: seconds for all; a stage gets its own limit, or what is left of this.
        dry: the lines are of a dry run.
        start: when the budget began, by ``time.monotonic()``; now, if None.
    """
    end = (time.monotonic() if start is None else start) + budget
    begin = len(read(out))
    for stage in stages:
        before = len(read(out))
        limit = min(stage.seconds, end - time.monotonic())
        if limit < LEAST_SECONDS:
            outcome = Outcome(0.0, f"not started: the budget of {budget:g} s is spent")
        else:
            print(f"{stage.name}: {stage.about}, at most {limit:.0f} s", flush=True)
            outcome = run_process(command(stage, limit), limit, out / LOG, environment)
        lines = read(out)[before:]
        reason = outcome.reason or (None if lines else "wrote no result")
        Results(out, stage.name, dry).write(WHOLE, reason is None, outcome.seconds, reason)
        for line in read(out)[before:]:
            if not line["ok"]:
                print(failure(line), flush=True)
    lines = read(out)[begin:]
    print(table(lines))
    print(f"{out / FILE}: {sum(line['ok'] for line in lines)} of {len(lines)} lines of this run are ok")
    return 0 if lines and all(line["ok"] for line in lines) else 1


PROBE = """
import json, sys, torch
found = {"card": None, "capability": None, "archs": None, "error": None}
if torch.cuda.is_available():
    found["card"], found["capability"] = torch.cuda.get_device_name(), "%d.%d" % torch.cuda.get_device_capability()
try:
    import metamask_ext
    found["archs"] = metamask_ext.build_info()["cuda_archs"]
except Exception as error:
    found["error"] = "%s: %s" % (type(error).__name__, error)
print(json.dumps(found))
"""


class Found(NamedTuple):
    """The card of this machine and the package in its environment.

    ``error``: the reason for which metamask_ext cannot be imported; None: it can.
    """

    card: str | None
    capability: str | None
    archs: str | None
    error: str | None


def probe(environment: dict[str, str]) -> Found:
    ran = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, cwd=os.sep)
    if ran.returncode != 0:
        raise SystemExit(f"gpu_stages: torch does not work here:\n{ran.stderr}")
    return Found(**json.loads(ran.stdout.splitlines()[-1]))


def why_build(found: Found, dry: bool) -> str | None:
    """Returns the reason for building the package here; None: the one that is installed works."""
    if found.error is not None:
        return found.error
    if not dry and found.archs is None:
        return "the metamask_ext that is installed has no CUDA kernels"
    return None


def build_command(folder: Path) -> list[str]:
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--upgrade"]
    return [*pip, "--target", str(folder), str(ROOT)]


def build(found: Found, reason: str, out: Path, environment: dict[str, str]) -> dict[str, str]:
    """Builds the package for this card alone, in a folder that git ignores; returns the environment that finds it.

    Raises:
        SystemExit: it does not build.
    """
    folder = ROOT / ".gpu" / "built"
    print(f"building metamask_ext here, at most {BUILD_SECONDS} s: {reason}", flush=True)
    chosen = {"METAMASK_BACKEND": "cpu"}
    if found.capability is not None:
        chosen = {"METAMASK_BACKEND": "cuda", "TORCH_CUDA_ARCH_LIST": found.capability}
    outcome = run_process(build_command(folder), BUILD_SECONDS, out / LOG, {**environment, **chosen, "MAX_JOBS": str(JOBS)})
    built = {**environment, "PYTHONPATH": os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    failed = outcome.reason or why_build(probe(built), found.capability is None)
    Results(out, BUILD).write(BUILD, failed is None, outcome.seconds, failed, because=reason)
    if failed is not None:
        raise SystemExit(f"gpu_stages: no stage can run: {failed}; see {out / LOG}")
    return built


def refuse_another_card(out: Path, card: str | None) -> None:
    earlier = card_of(read(out))
    if earlier != card and earlier is not None:
        raise SystemExit(f"gpu_stages: {out / FILE} is of {earlier}, this is {card or 'no card'}: give another --out")
