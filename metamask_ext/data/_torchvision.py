"""Import of torchvision beside a torch without CUDA."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch

_fragment: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """Return torchvision, with ``torchvision.datasets`` loaded.

    A torchvision built for CUDA does not load its operators beside a CPU torch, and then its import fails where it describes two of
    them: ``operator torchvision::nms does not exist``. Only then this function declares the two, without an
    implementation, and imports again: data sets work, ``nms`` itself raises when called.

    Raises:
        ImportError: torchvision is not installed.
    """
    global _fragment
    try:
        import torchvision
    except RuntimeError as error:
        if torch.version.cuda is not None or "torchvision::nms does not exist" not in str(error):
            raise
        # Kept for good: the schemas go when the Library does.
        _fragment = torch.library.Library("torchvision", "FRAGMENT")
        _fragment.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _fragment.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    except ImportError as error:
        raise ImportError(
            "torchvision is not installed: pip install --no-deps torchvision, in the version that belongs to your torch (without "
            "--no-deps, pip may replace torch)"
        ) from error
    import torchvision.datasets

    return torchvision


def let_others_import_torchvision() -> None:
    """Import torchvision, where it is installed: packages that import it by themselves then find it loaded."""
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
