"""Runs the fuzzer of the ops on a build that checks each access to memory and each undefined operation, for every instruction set.

The build has a folder of its own, build/sanitized. The cases are shared out among the instruction sets of this machine; the first
finding of a case ends the process that runs it, and is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitized"
PACKAGE = BUILD / "lib"


def build() -> None:
    environment = {**os.environ, "METAMASK_BACKEND": "cpu", "METAMASK_SANITIZE": "1"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD), "--build-lib", str(PACKAGE)]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
        sys.exit("sanitize: the build failed")


def environment(instruction_set: str = "") -> dict[str, str]:
    """Variables of a Python with the sanitizer's runtime, which must be loaded before everything else."""
    compiler = os.environ.get("CXX", "g++")
    # The runtime passes exceptions on to the C++ library, which must be there when it starts.
    runtimes = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        # Python and torch keep memory to the end; a refused allocation is torch's error to raise.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(ROOT / "tests")]),
        "METAMASK_CPU_CAPABILITY": instruction_set,
    }


def instruction_sets() -> list[str]:
    code = "import metamask_ext; print(*metamask_ext.build_info()['cpu_capabilities'])"
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    return ran.stdout.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="of all instruction sets together")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build()
    sets = instruction_sets()
    failed = []
    for index, name in enumerate(sets):
        first, last = (arguments.cases * part // len(sets) for part in (index, index + 1))
        fuzzer = [sys.executable, str(ROOT / "tests" / "faults" / "fuzz_ops.py"), "--seed", str(arguments.seed)]
        begin = time.monotonic()
        ran = subprocess.run([*fuzzer, "--first", str(first), "--cases", str(last - first)], env=environment(name))
        print(f"{name}: cases {first} to {last} in {time.monotonic() - begin:.0f} s", flush=True)
        if ran.returncode != 0:
            failed.append(name)
    if failed:
        sys.exit(f"sanitize: findings with {', '.join(failed)}")


if __name__ == "__main__":
    main()
