"""Compiles every CUDA source without a GPU and, if need be, without a CUDA torch: the check that CI makes.

The .cu files need only the toolkit. The .cpp files in csrc/cuda compile against the headers of any torch: a CPU torch lacks one
generated header of theirs, which is written here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from toolkit import find_nvcc, toolkit_includes
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PLANTED = ROOT / "tests" / "emulator" / "planted.cu"
ARCHITECTURES = ("80", "90", "100", "120")


def run(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0 or "warning" in ran.stderr:
        sys.exit(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("cuda-check: nvcc was not found: put a CUDA toolkit's bin on PATH")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    architectures = [arch for arch in ARCHITECTURES if f"compute_{arch}" in known]
    codes = [part for arch in architectures for part in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder) / "include/c10/cuda/impl/cuda_cmake_macros.h"
        generated.parent.mkdir(parents=True)
        generated.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
        includes = [flag for path in [*include_paths(), *toolkit_includes(nvcc)] for flag in ("-isystem", path)]
        # Not optimised by ptxas: that is half of the time, and finds no errors.
        kernels = [nvcc, "-std=c++20", "-O3", "-Xptxas", "-O1", "-I", str(CSRC), *codes, "-c"]
        # After the torch's own headers, so that a CUDA torch's generated header wins.
        host = [os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *includes]
        host += ["-I", str(CSRC), "-idirafter", f"{folder}/include"]

        def check(source: Path) -> str:
            if source.suffix == ".cu":
                run(*kernels, str(source), "-o", f"{folder}/{source.stem}.o")
                return f"{source.name}: compiles for {', '.join(architectures)}"
            run(*host, str(source))
            return f"{source.name}: compiles"

        # The emulator's own kernels too: they use all of the device API. The largest first: none is waited for alone at the end.
        sources = [*(CSRC / "cuda/kernels").glob("*.cu"), PLANTED, *(CSRC / "cuda").glob("*.cpp")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for line in pool.map(check, sorted(sources, key=lambda source: (source.suffix != ".cu", -source.stat().st_size))):
                print(line, flush=True)


if __name__ == "__main__":
    main()
