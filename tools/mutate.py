"""Takes one barrier, one wait or one bounds check out of a CUDA kernel, on a copy, and sees whether a test fails.

A kernel's barriers are written ``__syncthreads()`` and ``cp_async_wait<N>()``, its bounds checks ``IN_BOUNDS(...)``: this script
finds them, removes each in turn, and runs the kernel's smallest tests in the emulator. What no test misses is either not needed
(take it out), or the tests are too weak (add one), or EXPLAINED says why it must stay.

    python tests/mutate.py --all
    python tests/mutate.py --sample 4 --seed $(git rev-parse HEAD)
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
COPY = ROOT / "build" / "mutants"
sys.path.insert(0, str(TESTS / "cuda_on_cpu"))

SMALL_BATCH = "test_linear_of_a_small_batch and forward and (float32 or bfloat16) and (ragged or odd or share)"

TASKS = "test_output_and_gradients and (float32 or bfloat16) and (several or share or depthwise)"

# Of each kernel file in csrc/cuda/kernels: which tests of test_cuda_*on_cpu.py, as pytest's -k takes it
SMALLEST_TESTS = {
    "masked_linear.cuh": SMALL_BATCH,
    "masked_linear_backward.cuh": SMALL_BATCH,
    "vector_access.cuh": "test_forward_and_derivatives and forward and (17x3 or 2x3) and float32",
    "pack_mask.cuh": "test_pack_and_unpack and float32",
    "packed_masked_linear.cuh": f"{TASKS} and packed",
    "packed_superposition_gradient.cuh": "test_output_and_gradients and packed and many and float32",
    "split_k.cuh": f"{SMALL_BATCH} and share",
    "segments.cu": f"({TASKS} and several and not packed) or absent_tasks",
    "task_masked_linear.cuh": f"{TASKS} and not packed",
    "task_masked_linear_backward.cuh": f"{TASKS} and not packed",
}

# Where the code removed begins, as in "masked_weight.cuh: IN_BOUNDS(i < n)": why no test can miss it
EXPLAINED: dict[str, str] = {}

SECONDS = 120  # for the tests of one mutant; the unchanged kernels take a few


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    removed: str
    text: str  # of the whole file

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.removed}"

    @property
    def explanation(self) -> str | None:
        return EXPLAINED.get(f"{self.file}: {self.removed}")


def closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at or after ``start`` has been closed."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if text[position] == ")" and depth == 0:
            return position + 1
    raise ValueError("a parenthesis is not closed")


def mutants_of(path: Path) -> list[Mutant]:
    text = path.read_text()
    found = []
    for match in re.finditer(r"__syncthreads\(|cp_async_wait<[^>]*>\(|IN_BOUNDS ?\(", text):
        end = closing(text, match.start())
        removed = text[match.start() : end]
        instead = "(true)" if removed.startswith("IN_BOUNDS") else "static_cast<void>(0)"
        line = text.count("\n", 0, match.start()) + 1
        found.append(Mutant(path.name, line, " ".join(removed.split()), text[: match.start()] + instead + text[end:]))
    return found


def all_mutants() -> list[Mutant]:
    found = []
    for path in sorted((ROOT / "csrc/cuda/kernels").glob("*.cu*")):
        # the device API only defines them
        if path.name != "device.cuh":
            found += mutants_of(path)
    missing = {mutant.file for mutant in found} - SMALLEST_TESTS.keys()
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


def run_tests(file: str) -> str:
    """``pass`` or ``fail``, of the tests of a file's kernels on the copy; anything else ends the script."""
    from support.emulator import build

    # A mutant that does not compile proves nothing.
    build("check")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *map(str, sorted(TESTS.glob("test_cuda_*on_cpu.py"))),
    ]
    try:
        ran = subprocess.run([*command, "-k", SMALLEST_TESTS[file]], capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return "fail"
    if ran.returncode < 0:
        return "fail"  # ended by a signal
    if ran.returncode > 1:
        sys.exit(f"mutate: the tests of {file} did not run:\n{ran.stdout}{ran.stderr}")
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
        chosen = [mutant for mutant in chosen if mutant.file == options.file]
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))

    os.environ["METAMASK_KERNEL_DIR"] = str(COPY)
    copy_sources()
    for file in sorted({mutant.file for mutant in chosen}):
        if run_tests(file) != "pass":
            sys.exit(f"mutate: the tests of {file} fail on the kernels as they are: {SMALLEST_TESTS[file]}")

    survived = 0
    for mutant in chosen:
        target = COPY / "csrc/cuda/kernels" / mutant.file
        original = target.read_text()
        target.write_text(mutant.text)
        missed = run_tests(mutant.file) == "pass"
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
