"""Runs the whole test suite, compute-sanitizer on small samples and the benchmarks on a machine with a GPU, for `make gpu`.

``--ready`` only says whether this machine can. The results become bench/results/<gpu>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# The smallest samples of each kind of kernel
SANITIZED_FILES = [f"tests/ops/{family}/test_raw.py" for family in ("weight", "linear", "mixed_task", "packed")]
SANITIZED = "cuda and ((test_forward_and_derivatives and 17x3) or (test_output_and_gradients and (3-d or groups or rows)))"


def require_gpu() -> None:
    if torch.version.cuda is None:
        sys.exit(f"gpu: torch {torch.__version__} is built without CUDA: install one with it, then `make clean gpu`")
    if not torch.cuda.is_available():
        sys.exit(f"gpu: torch {torch.__version__} finds no GPU on this machine: nothing was tested or measured on one")


def run(*command: str) -> None:
    print("$", " ".join(command), flush=True)
    ran = subprocess.run(command, cwd=ROOT)
    if ran.returncode != 0:
        sys.exit(f"gpu: {' '.join(command)} ended with exit code {ran.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ready", action="store_true", help="end here if this machine has no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the benchmarks' results")
    options = parser.parse_args()
    require_gpu()
    if options.ready:
        return
    from metamask_ext import build_info

    if build_info()["cuda_archs"] is None:
        sys.exit("gpu: metamask_ext was built without CUDA kernels: is nvcc on PATH? Then `make clean gpu`")

    run(sys.executable, "-m", "pytest", "-q", "tests")
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("gpu: compute-sanitizer is not on PATH: not run")
    else:
        for tool in ("memcheck", "racecheck"):
            tests = [sys.executable, "-m", "pytest", "-q", "-x", *SANITIZED_FILES, "-k", SANITIZED]
            run(sanitizer, "--tool", tool, "--error-exitcode", "1", *tests)
    run(sys.executable, "-m", "metamask_ext", "bench", "--suite", "cuda", "--out", str(options.out))

    results = ROOT / options.out / "results.json"
    gpu = json.loads(results.read_text())["machine"]["gpu"]
    kept = ROOT / "bench" / "results" / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    shutil.copyfile(results, kept)
    print(f"gpu: the results are in {kept.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
