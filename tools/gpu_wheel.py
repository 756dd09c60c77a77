"""Builds, on a machine without a GPU, all that a machine with one needs to run tools/gpu_stages.py without a network.

``python tools/gpu_wheel.py`` makes a Python 3.12 environment with a CUDA torch in .gpu/venv (once: it is several GB), builds the
wheel for one architecture into .gpu/wheels, imports it, and prints the command to run there. Both folders are ignored by git.

PYTHON312=/path/to/python3.12   the interpreter; by default python3.12 on PATH, or pyenv's
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".gpu"
WHEELS = FOLDER / "wheels"
TORCH, ARCHITECTURE, PYTHON = "2.11.0", "9.0", (3, 12)
LIMIT = 64 << 20
"""Bytes that can be carried to the machine, beside what git tracks."""

# What the package imports itself, for the check of the wheel; a machine with torch and pytest has it.
DEPENDENCIES = ("numpy", "rich>=13", "safetensors>=0.8", "setuptools>=77", "typer>=0.15")
SITE = "/tmp/metamask_ext"
BUDGET = 700


def command(budget: int) -> str:
    """Returns what is run on the machine. If the wheels cannot be installed there, the stages build the package."""
    return (
        f"python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target {SITE} .gpu/wheels/*.whl; "
        f"export PYTHONPATH={SITE} PYTHONSAFEPATH=1; "
        f'python3 tools/gpu_stages.py --out "$OUT" --budget {budget}'
    )


def fail(message: str) -> None:
    sys.exit(f"gpu-wheel: {message}")


def find_python() -> str:
    """Returns a Python of the version that the machine has."""
    name = ".".join(map(str, PYTHON))
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{name}*/bin/python"))
    candidates = [os.environ.get("PYTHON312"), shutil.which(f"python{name}"), *map(str, pyenv)]
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "-c", _version_check()], capture_output=True).returncode == 0:
            return candidate
    fail(f"no Python {name} was found: set PYTHON312 to one")
    raise AssertionError


def _version_check() -> str:
    return f"import sys; sys.exit(sys.version_info[:2] != {PYTHON})"


def run(command: Sequence[str | Path], **environment: str) -> str:
    ran = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    if ran.returncode != 0:
        fail(f"{' '.join(map(str, command))} ended with exit code {ran.returncode}\n{ran.stdout}")
    return ran.stdout


def environment(folder: Path) -> Path:
    """Makes the environment with torch in it, unless it is there; returns its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        run([find_python(), "-m", "venv", folder])
    asked = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    if asked.stdout.strip().split("+")[0] != TORCH:
        print(f"installing torch {TORCH} into {folder}: several GB, once", flush=True)
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        run([*pip, f"torch=={TORCH}", *DEPENDENCIES])
    cuda = run([python, "-c", "import torch; print(torch.version.cuda)"]).strip()
    if cuda == "None":
        fail(f"the torch {TORCH} of {folder} is built without CUDA: no wheel for a GPU can be built against it")
    return python


def build(python: Path, extra: Sequence[str]) -> None:
    """Fills the folder of wheels, and nothing else is left in it."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    # Setuptools would pack what an earlier build left here, files that are gone from the source too.
    for stale in (ROOT / "build").glob("lib.*-cpython-312"):
        shutil.rmtree(stale)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    chosen = {"METAMASK_BACKEND": "cuda", "TORCH_CUDA_ARCH_LIST": ARCHITECTURE, "PATH": path}
    run([*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", WHEELS, ROOT], **chosen)
    if extra:
        run([*pip, "download", "-q", "--no-deps", "--only-binary=:all:", "-d", WHEELS, *extra])


def check_size(folder: Path, limit: int = LIMIT) -> int:
    """Returns the bytes of the wheels.

    Raises:
        SystemExit: there are none, or they are more than ``limit``.
    """
    wheels = sorted(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")
    if not wheels:
        fail(f"{folder} holds no wheel")
    if size > limit:
        fail(f"the wheels are {size / 2**20:.1f} MiB together, more than the {limit / 2**20:g} MiB that can be carried")
    return size


def check_import(python: Path) -> str:
    """Installs the wheels as the command does, and imports the package; returns what it was built for."""
    site = FOLDER / "site"
    shutil.rmtree(site, ignore_errors=True)
    wheels = sorted(WHEELS.glob("*.whl"))
    run([python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", site, *wheels])
    look = "import metamask_ext; info = metamask_ext.build_info(); print(metamask_ext.__file__); print(info['cuda_archs'])"
    where, archs = run([python, "-c", look], PYTHONPATH=str(site), PYTHONSAFEPATH="1").split("\n")[:2]
    if not Path(where).is_relative_to(site):
        fail(f"metamask_ext was imported from {where}, not from the wheel in {site}")
    if archs == "None":
        fail("the wheel has no CUDA kernels")
    return archs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", nargs="*", default=[], help="distributions that the machine lacks, carried too: NAME==VERSION")
    parser.add_argument("--budget", type=int, default=BUDGET, help="seconds for all stages there")
    given = parser.parse_args()
    python = environment(FOLDER / "venv")
    build(python, given.extra)
    size, archs = check_size(WHEELS), check_import(python)
    print(f"{WHEELS.relative_to(ROOT)}: {size / 2**20:.1f} MiB, kernels for {archs}; built from the files as they are now")
    print("On the machine, in the root of this tree, with .gpu/wheels carried along:\n")
    print(command(given.budget))


if __name__ == "__main__":
    main()
