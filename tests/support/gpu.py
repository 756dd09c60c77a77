"""Marks of tests that need a GPU, and what such a test does with one; on a CPU the same calls run one after another."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metamask_ext import build_info


def why_no_gpu() -> str | None:
    """The reason for which nothing runs on a GPU here; None: it does."""
    if not torch.cuda.is_available():
        return "no GPU"
    return None if build_info()["cuda_archs"] else "metamask_ext was built without CUDA kernels"


needs_gpu = pytest.mark.cuda
"""conftest.py skips the test where there is none, and `pytest -m cuda` runs these alone."""

DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
"""Devices of a test: the suite is the same on a GPU."""

SECOND = pytest.param("cuda:1", marks=[needs_gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")])
"""The second GPU, as a device of a test."""

SLEEP = 200_000_000
"""Cycles of a GPU: about a tenth of a second."""


def captured(run, device):
    """Capture ``run`` in a CUDA graph; a function that replays it, and the results, which a replay writes anew."""
    if device == "cpu":
        results = run()
        kept = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]

        def again():
            made = [leaf for leaf in tree_leaves(run()) if isinstance(leaf, Tensor)]
            with torch.no_grad():
                for old, new in zip(kept, made, strict=True):
                    old.copy_(new)

        return again, results
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


@contextlib.contextmanager
def behind_a_sleep(device):
    """On a stream of its own, behind a kernel that sleeps: what runs elsewhere comes first, and reads what was there before."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextlib.contextmanager
def no_waiting(device):
    """The host does not wait for the device: what would raises."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
