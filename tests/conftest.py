"""Settings and fixtures of every test, and which tests also run in the emulator."""

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
from support.emulator import FORWARD, Emulator, why_not
from support.gpu import why_no_gpu

# cuDNN multiplies float32 with the 10 bits of TF32 unless told otherwise, and may choose a convolution that adds up in no fixed
# order: neither is what tests compare.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.deterministic = True

MARKERS = (
    "once: neither the instruction set nor the number of threads can change the outcome (schemas, torch.compile, other processes); "
    "`make test-instruction-sets` leaves the test out",
    "every_device(emulated_if=None): the test runs a second time in the emulator, where it takes far longer; emulated_if, "
    "a function of the test's parameters, chooses which of them run there",
    "emulated: the test runs in the emulator (tests/emulator); `make emulate` runs these alone",
    "long: the test takes more than ten seconds; of tests/models, `make test-models MODELS=\"-m 'not long'\"` leaves it out",
    "cuda: the test needs a GPU, and a build with kernels for it; `pytest -m cuda` runs these alone",
)


def pytest_addoption(parser):
    parser.addoption("--threads", help="run every test with each of these numbers of threads, as in 1,2")
    parser.addoption("--inductor", action="store_true", help="run every case of torch.compile with Inductor too: minutes")


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_generate_tests(metafunc):
    if metafunc.config.option.threads:
        counts = [int(count) for count in metafunc.config.option.threads.split(",")]
        metafunc.parametrize("_same_start", counts, indirect=True, ids=[f"{count}-threads" for count in counts])
    if metafunc.definition.get_closest_marker("every_device"):
        metafunc.parametrize("_device", ["native", pytest.param("emulated", marks=pytest.mark.emulated)], indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem():
    """Drops emulated tests on a GPU, and those that emulated_if leaves out: parametrize makes every combination."""
    items = yield
    return list(filter(_is_wanted, items)) if isinstance(items, list) else items


def _is_wanted(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("_device") != "emulated":
        return True
    emulated_if = item.get_closest_marker("every_device").kwargs.get("emulated_if")
    on_gpu = str(parameters.get("device", "cpu")).startswith("cuda")
    return not on_gpu and (emulated_if is None or emulated_if(**parameters))


def pytest_collection_modifyitems(items):
    for marker, reason in (("emulated", why_not()), ("cuda", why_no_gpu())):
        if reason:
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason))


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


@pytest.fixture(autouse=True)
def _device(request):
    """Runs a test marked ``every_device`` natively or in the emulator."""
    if getattr(request, "param", "native") == "emulated":
        request.getfixturevalue("in_the_emulator")


@pytest.fixture(scope="session")
def emulator():
    """The CUDA kernels' source, compiled for the CPU with checks.

    A race, an access out of bounds and a value that nothing has written raise.
    """
    return Emulator("check")


@pytest.fixture
def in_the_emulator(emulator):
    """Metamask ops on CPU tensors run the CUDA side of the library, launchers and kernels. A test may set another schedule."""
    with emulator.running(FORWARD):
        yield emulator
