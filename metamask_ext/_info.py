"""Description of the build, and the check that it fits the torch that runs."""

from __future__ import annotations

from importlib import import_module
from typing import TypedDict

import torch

from ._build import BACKEND, TORCH, VERSION


class BuildInfo(TypedDict):
    """The value of :func:`build_info`."""

    version: str
    torch: str
    backend: str
    cpu_capability: str | None
    cpu_capabilities: list[str] | None
    threads: str | None
    cuda_archs: str | None
    compiler: str | None


def check_build() -> None:
    """Raise ImportError unless this build works with the torch that is running."""
    if BACKEND == "reference":
        return
    if torch.__version__ != TORCH:
        raise ImportError(
            f"metamask_ext was compiled for torch {TORCH}, and torch {torch.__version__} is running: install metamask_ext again"
        )
    try:
        import_module("metamask_ext._C")
    except ImportError as error:
        raise ImportError(f"the extension module of metamask_ext does not load ({error}): install metamask_ext again") from error


def build_info() -> BuildInfo:
    """Describe this installation.

    Returns:
        A dict: ``version`` of metamask_ext; ``torch``, the version it was compiled for; ``backend``, ``"cpu"``, ``"cuda"`` or
        ``"reference"`` (no kernels, plain torch throughout); ``cpu_capability``, the instruction set in use, and
        ``cpu_capabilities``, all that could be (variable ``METAMASK_CPU_CAPABILITY``); ``threads``, ``"openmp"``
        or ``"none"``; ``cuda_archs``, a string, or None; ``compiler``. In a reference build these are None.
    """
    info: BuildInfo = {
        "version": VERSION,
        "torch": TORCH,
        "backend": BACKEND,
        "cpu_capability": None,
        "cpu_capabilities": None,
        "threads": None,
        "cuda_archs": None,
        "compiler": None,
    }
    if BACKEND == "reference":
        return info
    from ._C import build_info as compiled_info

    return {**info, **compiled_info(), "torch": TORCH}
