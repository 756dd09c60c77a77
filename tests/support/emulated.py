"""What the tests that run in the emulator share: see test_cuda_on_cpu.py."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_on_cpu"))
from support.emulator import FORWARD, RANDOM_WARPS, Emulator, why_not  # noqa: F401  for the tests

if why_not():
    pytest.skip(why_not(), allow_module_level=True)


def bring(tests: dict[str, object], module: ModuleType, names: Iterable[str]) -> None:
    """Put tests of another file into this one's ``globals()``; a name that is not there, or there already, is an error."""
    for name in names:
        assert name not in tests, name
        tests[name] = getattr(module, name)


@pytest.fixture(scope="module")
def emulator():
    return Emulator("check")


@pytest.fixture(autouse=True)
def in_the_emulator(emulator):
    """The tests whose kernels' threads exchange values set other schedules too."""
    with emulator.running(FORWARD):
        yield
