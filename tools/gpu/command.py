"""Tests and measures the CUDA kernels on a machine with a GPU, in stages, of which none stops the next.

``python tools/gpu_stages.py --out DIR --budget 700`` runs S0 to S8 and writes one JSON object a result to DIR/results.jsonl; what
the stages print is in DIR/stages.log. ``--from S4`` goes on after an earlier run; ``--dry-run`` runs all stages on a CPU machine;
``--keep DIR`` copies the results to bench/results, named after the card. The exit code is 0 if every result is ok.
docs/internals/cuda.md says what each stage looks at.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from . import results, runner

ROOT = runner.ROOT
SCRIPT = ROOT / "tools" / "gpu_stages.py"
PROGRAMS = ("large-ops", "small-ops")
DRY_BUDGET, BUDGET = 600.0, 700.0
DRY_PATIENCE = 3
"""Times its limit, a stage may take in a dry run: the machine may be busy, and nothing is paid for by the minute."""


def run_stage(stage: str, out: Path, dry: bool, seconds: float) -> None:
    """Runs one stage in this process, which ends after ``seconds``."""
    from . import checks, device, profilers, suite, timings

    end = time.monotonic() + seconds
    on = device.choose(dry)
    lines = results.Results(out, stage, dry)
    stages = {
        "S0": lambda: checks.machine(on, lines),
        "S1": lambda: checks.against_float64(on, lines),
        "S2": lambda: suite.executions(on, lines, end),
        "S3": lambda: suite.cuda_tests(on, lines, end),
        "S4": lambda: timings.ours_copy_dense(on, lines),
        "S5": lambda: profilers.sanitized(on, lines, SCRIPT, dry),
        "S6": lambda: profilers.profiled(on, lines, SCRIPT, dry),
        "S7": lambda: timings.compiled(on, lines),
        "S8": lambda: suite.opchecks_and_suite(on, lines, out, end),
    }
    stages[stage]()


def run_program(program: str, dry: bool) -> None:
    """Runs what a stage starts under a tool."""
    from . import device, profilers

    on = device.choose(dry)
    if program == "small-ops":
        profilers.small_ops(on)
    else:
        profilers.large_ops(on)


def environment_of_stages() -> dict[str, str]:
    # The source folder, in which nothing is built, must not hide the installed package.
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def build_emulator() -> None:
    """Builds what the stages of a dry run run on, before any of their time is counted."""
    from support import emulator

    if reason := emulator.why_not():
        print(f"on CPU tensors, without the emulator: {reason}")
    else:
        emulator.build("check")


def run(given: argparse.Namespace) -> int:
    if given.dry_run:
        build_emulator()
    start = time.monotonic()
    environment = environment_of_stages()
    found = runner.probe(environment)
    if found.card is None and not given.dry_run:
        sys.exit("gpu_stages: torch finds no GPU on this machine: nothing was tested or measured (--dry-run needs none)")
    if given.ready:
        return 0
    out = given.out.resolve()
    runner.refuse_another_card(out, None if given.dry_run else found.card)
    out.mkdir(parents=True, exist_ok=True)
    names = [stage.name for stage in runner.STAGES]
    first = names.index(given.first)
    if first == 0:
        (out / results.FILE).unlink(missing_ok=True)
        (out / runner.LOG).unlink(missing_ok=True)
    if reason := runner.why_build(found, given.dry_run):
        environment = runner.build(found, reason, out, environment)
    card = {} if given.dry_run else {"card": found.card, "capability": found.capability}
    # In each run: the results of one that begins later may lie elsewhere than those of S0.
    results.Results(out, "start", given.dry_run).write(results.MACHINE, True, time.monotonic() - start, **card)
    rest = ["--out", str(out), *(["--dry-run"] if given.dry_run else [])]
    budget = given.budget or (DRY_BUDGET if given.dry_run else BUDGET)

    def command(stage: runner.Stage, limit: float) -> list[str]:
        return [sys.executable, str(SCRIPT), "--stage", stage.name, "--seconds", f"{limit:.1f}", *rest]

    patience = DRY_PATIENCE if given.dry_run else 1
    stages = [stage._replace(seconds=patience * stage.seconds) for stage in runner.STAGES[first:]]
    return runner.run_stages(stages, command, out, budget, environment, given.dry_run, start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in runner.STAGES]
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the results")
    parser.add_argument("--budget", type=float, help=f"seconds for all stages ({BUDGET:g}; {DRY_BUDGET:g} in a dry run)")
    parser.add_argument("--from", dest="first", choices=names, default=names[0], help="the first stage; earlier results stay")
    parser.add_argument("--dry-run", action="store_true", help="every stage on CPU tensors and the emulator: nothing is measured")
    parser.add_argument("--ready", action="store_true", help="only tell, by the exit code, whether this machine has a GPU")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy the results of DIR into bench/results")
    parser.add_argument("--stage", choices=names, help="run this stage here: for the program itself")
    parser.add_argument("--seconds", type=float, default=DRY_BUDGET, help="the limit of --stage")
    parser.add_argument("--program", choices=PROGRAMS, help="run this here: for the stages themselves")
    given = parser.parse_args()
    if given.keep is not None:
        for path in results.keep(given.keep, ROOT / "bench" / "results"):
            print(path.relative_to(ROOT))
    elif given.program is not None:
        run_program(given.program, given.dry_run)
    elif given.stage is not None:
        run_stage(given.stage, given.out, given.dry_run, given.seconds)
    else:
        sys.exit(run(given))
