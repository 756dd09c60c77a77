"""Takes one barrier, one fence, one wait or one bounds check out of a CUDA kernel, on a copy, and checks that a test fails.

A kernel's barriers, fences and waits are written ``__syncthreads()``, ``__syncwarp()``, ``__threadfence()`` and
``cp_async_wait<N>()``, its bounds checks ``IN_BOUNDS(...)``: this script finds them, removes each in turn, and runs the kernel's smallest tests in the emulator. A removal
that no test notices is either harmless (take the code out), or the tests are too weak (add one), or EXPLAINED says why the code
must stay.

    python tools/mutate.py --all
    python tools/mutate.py --sample 4 --seed $(git rev-parse HEAD)
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
COPY = ROOT / "build" / "mutants"
sys.path.insert(0, str(TESTS))


class Tests(NamedTuple):
    files: tuple[str, ...]
    chosen: str
    """As pytest's -k takes it."""


LINEAR, MIXED_TASK, PACKED = (f"tests/emulator/test_{name}.py" for name in ("linear", "mixed_task", "packed"))
PACK = "tests/ops/packed/test_raw.py"

SMALL_BATCH = "test_linear_of_a_small_batch and forward and (float32 or bfloat16) and (ragged or odd or share)"

TASKS = "test_output_and_gradients and (float32 or bfloat16) and (several or share or depthwise)"

# Of each kernel file in csrc/cuda/kernels, by its name: the smallest tests in the emulator
SMALLEST_TESTS = {
    "masked_linear*.cuh": Tests((LINEAR,), SMALL_BATCH),
    "vector_access.cuh": Tests(("tests/emulator/test_weight.py",), "test_forward_and_derivatives and (17x3 or 2x3) and float32"),
    "packed_masked_linear.cuh": Tests((PACKED, PACK), f"({TASKS}) or (strips and float32) or masks_anywhere"),
    "packed_masked_linear_backward.cuh": Tests((PACKED,), TASKS),
    "pack_mask.cuh": Tests((PACK,), "test_pack_and_unpack and float32"),
    "packed_superposition_gradient.cuh": Tests((PACKED,), "test_output_and_gradients and many and float32"),
    "split_k.cuh": Tests((LINEAR, MIXED_TASK), f"({SMALL_BATCH} and share) or ({TASKS} and share)"),
    "segments.cu": Tests((MIXED_TASK, "tests/ops/mixed_task/test_raw.py"), f"({TASKS} and several) or absent_tasks"),
    "task_masked_linear*.cuh": Tests((MIXED_TASK,), TASKS),
}

# Where the code removed begins, as in "masked_weight.cuh: IN_BOUNDS(i < n)": why no test can miss it
EXPLAINED: dict[str, str] = {}

SECONDS = 120  # for the tests of one mutant; the unchanged kernels take a few


@dataclass(frozen=True)
class Mutant:
    path: Path
    """From the root of the checkout, and of its copy."""
    line: int
    removed: str
    text: str
    """Of the whole file, without ``removed``."""

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}: {self.removed}"

    @property
    def explanation(self) -> str | None:
        return EXPLAINED.get(f"{self.path.name}: {self.removed}")


def closing(text: str, start: int) -> int:
    """Finds the end of the parenthesis that opens at or after ``start``."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if text[position] == ")" and depth == 0:
            return position + 1
    raise ValueError("a parenthesis is not closed")


def mutants_of(path: Path) -> list[Mutant]:
    text = path.read_text()
    found = []
    for match in re.finditer(r"__sync(threads|warp)\(|__threadfence\(|cp_async_wait<[^>]*>\(|IN_BOUNDS ?\(", text):
        end = closing(text, match.start())
        removed = text[match.start() : end]
        instead = "(true)" if removed.startswith("IN_BOUNDS") else "static_cast<void>(0)"
        line = text.count("\n", 0, match.start()) + 1
        changed = text[: match.start()] + instead + text[end:]
        found.append(Mutant(path.relative_to(ROOT), line, " ".join(removed.split()), changed))
    return found


def tests_of(name: str) -> Tests | None:
    return next((tests for pattern, tests in SMALLEST_TESTS.items() if fnmatch(name, pattern)), None)


def all_mutants() -> list[Mutant]:
    found = []
    for path in sorted((ROOT / "csrc/cuda/kernels").glob("*.cu*")):
        # the device API only defines them
        if path.name != "device.cuh":
            found += mutants_of(path)
    missing = {mutant.path.name for mutant in found if tests_of(mutant.path.name) is None}
    if missing:
        sys.exit(f"mutate: SMALLEST_TESTS has no tests for {', '.join(sorted(missing))}")
    return found


def copy_sources() -> None:
    """Makes COPY/csrc equal csrc. What differs gets the time of now: an earlier run may have left objects of its last mutant."""
    theirs = {path.relative_to(COPY) for path in (COPY / "csrc").rglob("*") if path.is_file()}
    ours = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    for path in theirs - ours:
        (COPY / path).unlink()
    for path in ours:
        (COPY / path).parent.mkdir(parents=True, exist_ok=True)
        if path not in theirs or (COPY / path).read_bytes() != (ROOT / path).read_bytes():
            (COPY / path).write_bytes((ROOT / path).read_bytes())


def run_tests(name: str) -> str:
    """``pass`` or ``fail``, of the smallest tests of a file's kernels on the copy; anything else ends the script."""
    from support.emulator import build

    tests = tests_of(name)
    assert tests is not None
    # A mutant that does not compile proves nothing.
    build("check")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "emulated", "-k", tests.chosen]
    try:
        ran = subprocess.run([*command, *tests.files], capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return "fail"
    if ran.returncode < 0:
        return "fail"  # ended by a signal
    if ran.returncode > 1:
        sys.exit(f"mutate: the tests of {name} did not run:\n{ran.stdout}{ran.stderr}")
    return "fail" if ran.returncode == 1 else "pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    some = parser.add_mutually_exclusive_group(required=True)
    some.add_argument("--all", action="store_true", help="every mutant")
    some.add_argument("--file", help="those of one file, as in masked_linear.cuh")
    some.add_argument("--sample", type=int, metavar="N", help="N of them, drawn by --seed")
    some.add_argument("--list", action="store_true", help="only name them")
    parser.add_argument("--seed", default="")
    options = parser.parse_args()

    chosen = all_mutants()
    if options.list:
        print(*chosen, sep="\n")
        return
    if options.file is not None:
        chosen = [mutant for mutant in chosen if mutant.path.name == options.file]
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))

    os.environ["METAMASK_KERNEL_DIR"] = str(COPY)
    copy_sources()
    for name in sorted({mutant.path.name for mutant in chosen}):
        if run_tests(name) != "pass":
            sys.exit(f"mutate: the tests of {name} fail on the kernels as they are: {tests_of(name)}")

    survived = 0
    for mutant in chosen:
        target = COPY / mutant.path
        original = target.read_text()
        target.write_text(mutant.text)
        missed = run_tests(mutant.path.name) == "pass"
        target.write_text(original)
        if missed and mutant.explanation:
            print(f"{mutant}: no test fails, as explained: {mutant.explanation}", flush=True)
        elif missed:
            survived += 1
            print(f"{mutant}: NO TEST FAILS", flush=True)
        else:
            print(f"{mutant}: noticed", flush=True)
    if survived:
        sys.exit(f"mutate: {survived} of {len(chosen)} removals went unnoticed")
    print(f"{len(chosen)} removals, each noticed or explained")


if __name__ == "__main__":
    main()
