"""What was built, and whether it fits what runs."""

from __future__ import annotations

from typing import Any

import torch

from ._build import BACKEND, TORCH, VERSION


def check_build() -> None:
    """ImportError unless this build works with the torch that is running."""
    if BACKEND == "reference":
        return
    if torch.__version__ != TORCH:
        raise ImportError(
            f"metamask_ext was compiled for torch {TORCH}, and torch {torch.__version__} is running: install metamask_ext again"
        )
    try:
        from . import _C  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the extension module of metamask_ext does not load ({error}): install metamask_ext again") from error


def build_info() -> dict[str, Any]:
    """What this installation is.

    Returns:
        A dict: ``version`` of metamask_ext; ``torch``, the version it was compiled for; ``backend``, ``"cpu"``, ``"cuda"`` or
        ``"reference"`` (no kernels, plain torch throughout); ``cpu_capability``, the instruction set in use, and
        ``cpu_capabilities``, all that could be (variable ``METAMASK_CPU_CAPABILITY``); ``threads``, ``"openmp"``
        or ``"none"``; ``cuda_archs``, a string, or None; ``compiler``. In a reference build these are None.
    """
    info: dict[str, Any] = {"version": VERSION, "torch": TORCH, "backend": BACKEND}
    if BACKEND == "reference":
        return {**info, "cpu_capability": None, "cpu_capabilities": None, "threads": None, "cuda_archs": None, "compiler": None}
    from . import _C

    return {**info, **_C.build_info(), "torch": TORCH}
