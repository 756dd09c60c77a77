"""Describes the machine and the software of a run, without names of hosts, users or folders."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metamask_ext import build_info

from .results_json import Machine

AMD = "AuthenticAMD"
ZEN_4, ZEN_5 = 25, 26
"""Families. Zen 3 has the number of Zen 4, without bfloat16."""


def processor(known: Mapping[str, Any], used: str | None, usable: Sequence[str] | None) -> str:
    """Names a processor for a file name: ``zen4``, ``zen5``, or the model's name in small letters.

    Args:
        known: what ``cpuinfo`` says.
        used: the instruction set in use. A lesser one than the processor's best is part of the name: ``zen4-avx2``.
        usable: all instruction sets that could be used, the best last.
    """
    family, bfloat16 = known.get("family"), "avx512_bf16" in known.get("flags", ())
    if known.get("vendor_id_raw") == AMD and family == ZEN_4 and bfloat16:
        name = "zen4"
    elif known.get("vendor_id_raw") == AMD and family == ZEN_5:
        name = "zen5"
    else:
        name = re.sub("[^a-z0-9]+", "-", known.get("brand_raw", "unknown").lower()).strip("-")
    return name if not usable or used == usable[-1] else f"{name}-{used or 'none'}"


def describe_machine() -> Machine:
    """Describes the machine and the software, without names of hosts, users or folders."""
    from cpuinfo import get_cpu_info  # of pytest-benchmark

    info = build_info()
    known = get_cpu_info()
    return {
        "cpu": known.get("brand_raw", "unknown"),
        "processor": processor(known, info["cpu_capability"], info["cpu_capabilities"]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": info["cpu_capability"],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_state": _gpu_state(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "metamask_ext": info["version"],
        "backend": info["backend"],
        "commit": _commit(),
    }


def _gpu_state() -> dict[str, str] | None:
    """Asks nvidia-smi for the driver and clocks (MHz; ``max`` the card's limit) of the GPU in use; None without one.

    Where it cannot tell (a container without it, a part of a card), the answer is what it says.
    """
    if not torch.cuda.is_available():
        return None
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not on PATH"}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")
    # By its own name: nvidia-smi counts cards that CUDA_VISIBLE_DEVICES hides.
    card = f"GPU-{torch.cuda.get_device_properties().uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", card]
    ran = subprocess.run(command, capture_output=True, text=True)
    values = [value.strip() for value in ran.stdout.split(",")]
    if ran.returncode != 0 or len(values) != len(fields):
        return {"nvidia-smi": (ran.stdout + ran.stderr).strip() or f"exit code {ran.returncode}"}
    return dict(zip(fields, values))


def _commit() -> str | None:
    """Returns the commit of the checkout that this package runs from, marked if files differ; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    modified = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + (" with local changes" if modified else "")
