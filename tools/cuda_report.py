"""Prints what ptxas and the machine code say of every CUDA kernel, and fails where that is worse than it was: no GPU is needed.

    python tools/cuda_report.py [ARCHITECTURE] [--all]

The architecture is 90 unless given, and only its limits are known; ``--all`` prints each instance. Looked for are

- a stack frame: part of a thread's numbers is in memory;
- in kernels that update parameters in place, loads through the cache for constants, which do not see the update;
- stores of less than 8 bytes in a main loop whose rows are whole packs;
- more instructions for 512 weights in a main loop than LIMITS allows.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import sass
from toolkit import find_nvcc, find_nvdisasm

CSRC = Path(__file__).resolve().parent.parent / "csrc"

IN_PLACE = ("masked_linear_backward_kernel", "masked_weight_backward_kernel")

TF32 = "tf32 is off unless asked for"
# Instances whose name begins so may have a stack frame: why
STACKS = {
    "masked_linear_backward_kernel<0, true, float, float, TensorBackward<float, 32": TF32,
    "masked_linear_backward_kernel<1, true, float, float, TensorBackward<float, 32": TF32,
}

# Instances whose name begins so: the most instructions for 512 weights
LIMITS = {
    "masked_linear_kernel<0, true, float, float, PlainForward<float, 8": 600,
    "masked_linear_kernel<0, true, __nv_bfloat16, __nv_bfloat16, TensorForward<__nv_bfloat16, 8": 430,
}


class Usage(NamedTuple):
    kernel: str
    """Mangled."""
    registers: int
    shared: int
    stack: int
    spilled: int


class Instance(NamedTuple):
    name: str
    """As in ``masked_linear_kernel<0, true, float, float, PlainForward<float, 8``, without what follows the arguments."""
    usage: Usage
    constant_loads: int
    narrow_stores: int
    """Of the main loop."""
    instructions: int
    """Of the main loop, for 512 weights; 0: there is no such loop."""
    ahead: int
    """The bytes that the threads of a multiprocessor have asked for before the first one waits."""


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


def short(name: str) -> str:
    """A demangled name without return type, namespaces and arguments."""
    return (
        re.sub(r"metamask::cuda::|\(anonymous namespace\)::|^void |\((metamask::)?GateKind\)", "", name).split("(")[0].rstrip(" >")
    )


def demangled(names: list[str]) -> list[str]:
    ran = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [short(line) for line in ran.stdout.splitlines()]


def base(name: str) -> str:
    return name.split("<")[0]


def threads_of_multiprocessor(registers: int, threads: int = 256) -> int:
    """The threads that run at a time, by their registers: 65,536, given out to warps by 256."""
    return 65536 // (-(-registers // 8) * 8 * threads) * threads


def instance(usage: Usage, name: str, kernel: sass.Kernel) -> Instance:
    loop = kernel.main_loop()
    weights = sass.weights_of(loop)
    whole_packs = base(name).startswith("masked_linear") and ", true, " in name
    return Instance(
        name,
        usage,
        sass.count(kernel.instructions, r"LDG\S*\.CONSTANT"),
        sass.count(loop, r"STG(?!\S*\.(64|128)\b)") if whole_packs else 0,
        len(loop) * 512 // weights if weights else 0,
        sass.loaded_ahead(loop) * threads_of_multiprocessor(usage.registers) if weights else 0,
    )


def faults(one: Instance) -> list[str]:
    """The ways in which it is worse than it was."""
    found = []
    if one.usage.stack > 0 and not one.name.startswith(tuple(STACKS)):
        found.append(f"a stack frame of {one.usage.stack} bytes")
    if one.constant_loads > 0 and base(one.name) in IN_PLACE:
        found.append(f"{one.constant_loads} loads through the cache for constants, of what it may update in place")
    if one.narrow_stores > 0:
        found.append(f"{one.narrow_stores} stores of less than 8 bytes in the main loop")
    limit = next((most for name, most in LIMITS.items() if one.name.startswith(name)), None)
    if limit is not None and not 0 < one.instructions <= limit:
        found.append(f"{one.instructions} instructions for 512 weights, at most {limit} are wanted")
    return found


def compile_and_read(nvcc: str, nvdisasm: str, architecture: str) -> list[Instance]:
    with tempfile.TemporaryDirectory() as folder:

        def read(source: Path) -> tuple[list[Usage], list[sass.Kernel]]:
            cubin = f"{folder}/{source.stem}.cubin"
            command = [nvcc, "-std=c++20", "-O3", f"-I{CSRC}", "-cubin", "-Xptxas", "-v", f"-arch=sm_{architecture}", str(source)]
            ran = subprocess.run([*command, "-o", cubin], capture_output=True, text=True)
            if ran.returncode != 0:
                sys.exit(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")
            usages = parse(ran.stderr)
            code = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout if usages else ""
            return usages, sass.parse(code)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            read_all = list(pool.map(read, sorted((CSRC / "cuda/kernels").glob("*.cu"))))
    usages = [usage for some, _ in read_all for usage in some]
    kernels = {kernel.name: kernel for _, some in read_all for kernel in some}
    if not usages or any(usage.kernel not in kernels for usage in usages):
        sys.exit("cuda-report: ptxas or nvdisasm did not say what is expected; is its wording another one in this toolkit?")
    names = demangled([usage.kernel for usage in usages])
    return [instance(usage, name, kernels[usage.kernel]) for usage, name in zip(usages, names)]


def show(instances: list[Instance], every: bool) -> None:
    by_kernel: dict[str, list[Instance]] = defaultdict(list)
    for one in instances:
        by_kernel[base(one.name)].append(one)
    print(f"{'kernel':<42}{'instances':>10}{'registers':>12}{'shared':>14}{'stack':>8}{'constant loads':>16}")
    for kernel, each in sorted(by_kernel.items()):
        registers, shared = [one.usage.registers for one in each], [one.usage.shared for one in each]
        ranges = f"{min(registers)}-{max(registers)}", f"{min(shared)}-{max(shared)}"
        stacks, loads = sum(one.usage.stack > 0 for one in each), sum(one.constant_loads for one in each)
        print(f"{kernel:<42}{len(each):>10}{ranges[0]:>12}{ranges[1]:>14}{stacks:>8}{loads:>16}")
    print(f"\n{'instructions for 512 weights':<30}{'registers':>10}{'stack':>7}{'KB ahead':>10}  instance")
    for one in sorted(instances):
        if every or one.name.startswith(tuple(LIMITS)) or one.usage.stack > 0:
            print(
                f"{one.instructions or '-':<30}{one.usage.registers:>10}{one.usage.stack:>7}{one.ahead / 1024:>10.0f}  {one.name}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="?", default="90")
    parser.add_argument("--all", action="store_true", help="print each instance")
    options = parser.parse_args()
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    if nvcc is None:
        sys.exit("cuda-report: nvcc was not found: put a CUDA toolkit's bin on PATH")
    if nvdisasm is None:
        sys.exit("cuda-report: nvdisasm was not found: put a CUDA toolkit's bin on PATH, or 'pip install nvidia-cuda-nvdisasm'")
    instances = compile_and_read(nvcc, nvdisasm, options.architecture)
    print(f"sm_{options.architecture}")
    show(instances, options.all)
    found = [f"{fault}: {one.name}" for one in sorted(instances) for fault in faults(one)]
    missing = [name for name in LIMITS if not any(one.name.startswith(name) for one in instances)]
    if options.architecture == "90" and (found or missing):
        sys.exit("\n".join(["", *found, *(f"there is no such instance any more: {name}" for name in missing)]))


if __name__ == "__main__":
    main()
