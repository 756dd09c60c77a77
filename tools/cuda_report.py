"""Prints the registers, stack and spills of every CUDA kernel, as ptxas reports them: no GPU is needed.

``python tools/cuda_report.py [ARCHITECTURE]`` (90). A kernel that spills keeps part of a thread's numbers in memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from toolkit import find_nvcc

CSRC = Path(__file__).resolve().parent.parent / "csrc"


class Usage(NamedTuple):
    kernel: str
    registers: int
    shared: int
    stack: int
    spilled: int


def parse(said: str) -> list[Usage]:
    """Reads what ptxas -v says of each entry function."""
    found = []
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for name, stack, stores, loads, registers, rest in re.findall(pattern, said, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(Usage(name, int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads)))
    return found


def demangled(names: list[str]) -> list[str]:
    ran = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    # without return type, namespaces and arguments
    return [
        re.sub(r"metamask::cuda::|\(anonymous namespace\)::|^void |\((metamask::)?GateKind\)", "", line)
        for line in ran.stdout.splitlines()
    ]


def base(name: str) -> str:
    return re.split(r"[<(]", name)[0]


def main() -> None:
    architecture = sys.argv[1] if len(sys.argv) > 1 else "90"
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("cuda-report: nvcc was not found: put a CUDA toolkit's bin on PATH")
    usages: list[Usage] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((CSRC / "cuda/kernels").glob("*.cu")):
            command = [nvcc, "-std=c++20", "-O3", f"-I{CSRC}", "-cubin", "-Xptxas", "-v", f"-arch=sm_{architecture}", str(source)]
            ran = subprocess.run([*command, "-o", f"{folder}/{source.stem}.cubin"], capture_output=True, text=True)
            if ran.returncode != 0:
                sys.exit(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")
            usages += parse(ran.stderr)
    if not usages:
        sys.exit("cuda-report: ptxas said nothing of any kernel; is its wording another one in this toolkit?")
    by_kernel: dict[str, list[Usage]] = defaultdict(list)
    for usage, name in zip(usages, demangled([usage.kernel for usage in usages])):
        by_kernel[base(name)].append(usage._replace(kernel=name))
    print(f"sm_{architecture}")
    print(f"{'kernel':<42}{'instances':>10}{'registers':>12}{'shared':>14}{'spilling':>10}")
    for kernel, each in sorted(by_kernel.items()):
        registers, shared = [one.registers for one in each], [one.shared for one in each]
        spilling = sum(one.spilled > 0 for one in each)
        ranges = f"{min(registers)}-{max(registers)}", f"{min(shared)}-{max(shared)}"
        print(f"{kernel:<42}{len(each):>10}{ranges[0]:>12}{ranges[1]:>14}{spilling:>10}")
    for one in sorted(usage for each in by_kernel.values() for usage in each if usage.spilled > 0):
        name = one.kernel.split("(")[0]
        print(f"spills {one.spilled} bytes, stack {one.stack}, {one.registers} registers: {name}")


if __name__ == "__main__":
    main()
