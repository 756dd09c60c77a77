"""Marks of tests that need a GPU."""

from __future__ import annotations

import pytest
import torch

from metamask_ext import build_info


def why_no_gpu() -> str | None:
    """The reason for which nothing runs on a GPU here; None: it does."""
    if not torch.cuda.is_available():
        return "no GPU"
    return None if build_info()["cuda_archs"] else "metamask_ext was built without CUDA kernels"


needs_gpu = pytest.mark.skipif(why_no_gpu() is not None, reason=str(why_no_gpu()))
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"{torch.cuda.device_count()} GPUs, two are needed")
