"""Settings of every test."""

from __future__ import annotations

import os
import sys

# Before torch is imported: pytest's workers share the processors, and a thread that waits leaves its own to the others.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--threads", help="run every test with each of these numbers of threads, as in 1,2")


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "once: neither the instruction set nor the number of threads can change what it tests (schemas, torch.compile, other "
        "processes); `make test-instruction-sets` leaves it out",
    )


def pytest_generate_tests(metafunc):
    if metafunc.config.option.threads:
        counts = [int(count) for count in metafunc.config.option.threads.split(",")]
        metafunc.parametrize("_same_start", counts, indirect=True, ids=[f"{count}-threads" for count in counts])


@pytest.fixture(autouse=True)
def _same_start(request):
    """The same random numbers for a test whatever ran before, and no setting left behind."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", threads))
    yield
    torch.set_num_threads(threads)
    if "torch._dynamo" in sys.modules:  # else there is nothing to forget, and importing it takes seconds
        torch.compiler.reset()
