"""Finds the CUDA toolkit, for checks that need its compiler or headers but no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_nvdisasm() -> str | None:
    """That of a toolkit, or of the Python package nvidia-cuda-nvdisasm."""
    places = ("/usr/local/cuda/bin", os.path.join(sysconfig.get_path("purelib"), "nvidia/cu13/bin"))
    return shutil.which("nvdisasm") or next(filter(None, (shutil.which("nvdisasm", path=place) for place in places)), None)


def toolkit_includes(nvcc: str) -> list[str]:
    """The toolkit's header folders, as nvcc itself uses them."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True).stderr
    (line,) = [line for line in said.splitlines() if line.startswith("#$ INCLUDES=")]
    return [part[2:] for part in line.split('"') if part.startswith("-I")]
