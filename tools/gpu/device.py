"""All in which a stage on a GPU and its dry run on a CPU differ: the calls of a device, and how much of each stage is run."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from metamask_ext.bench.cuda_timing import Cpu, Gpu
from metamask_ext.bench.cuda_timing import Device as TimingDevice
from support.strides import SIZES, Sizes

STAND_IN_TOOL = Path(__file__).with_name("stand_in_tool.py")


class Card:
    """The current CUDA device."""

    kind = "cuda"
    sizes, many = Sizes(16, 1, 512, 272, 6), Sizes(130, 1, 512, 272, 6)
    profiled = Sizes(8, 1, 4096, 4096, 8)
    copy_bytes, product_width = 1 << 31, 8192
    workers = 8
    marks = "cuda"
    tests: ClassVar[dict[str, str]] = {"S2": "", "S3": "not opcheck", "S8": "opcheck"}
    suite = ("--suite", "cuda")

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()

    def on(self) -> contextlib.AbstractContextManager[object]:
        """Inside, metamask ops run the CUDA kernels."""
        return contextlib.nullcontext()

    def wait(self) -> None:
        torch.cuda.synchronize()

    def timing(self) -> TimingDevice:
        return Gpu()

    def tool(self, name: str) -> list[str]:
        found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
        if found is None:
            raise FileNotFoundError(f"{name} is not on PATH")
        return [found]

    def facts(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties()
        return {
            "name": self.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "memory_bytes": found.total_memory,
            "cuda": torch.version.cuda,
        }

    def resized(self, build: partial[Any]) -> partial[Any]:
        """A case of the benchmarks as it is measured here."""
        return build

    def compiled_cases(self, ids: Sequence[str]) -> Sequence[str]:
        return ids

    def files(self, names: Sequence[str]) -> Sequence[str]:
        """The files of tests that are run."""
        return names


class StandIn(Card):
    """No GPU: CPU tensors, on the emulator where it can be built; a call in place of a stream, a graph or a tool."""

    kind = "cpu"
    sizes = profiled = SIZES["whole"]
    many = SIZES["many"]
    copy_bytes, product_width = 1 << 20, 64
    workers = 2
    marks = "not cuda"
    tests: ClassVar[dict[str, str]] = {
        "S2": "cpu and float32 and ragged and packed or emulated and float32 and packed_masked_linear and graph",
        "S3": "cpu and not opcheck and 1x1",
        "S8": "opcheck and cpu and float64 and not list",
    }
    suite = ("--suite", "cpu", "--quick", "--only", "cpu/bfloat16-forward-8x1024")

    def __init__(self) -> None:
        self.name = "dry run"
        from support import emulator

        self._emulated = not emulator.why_not()

    def on(self) -> contextlib.AbstractContextManager[object]:
        return _emulator().running(0) if self._emulated else contextlib.nullcontext()

    def wait(self) -> None:
        pass

    def timing(self) -> TimingDevice:
        return Cpu()

    def tool(self, name: str) -> list[str]:
        return [sys.executable, str(STAND_IN_TOOL), name]

    def facts(self) -> dict[str, Any]:
        return {"emulator": self._emulated}

    def resized(self, build: partial[Any]) -> partial[Any]:
        small = [min(value, 16) if isinstance(value, int) else value for value in build.args]
        return partial(build.func, *small, **{**build.keywords, "device": "cpu"})

    def compiled_cases(self, ids: Sequence[str]) -> Sequence[str]:
        return ids[:1]

    def files(self, names: Sequence[str]) -> Sequence[str]:
        return [name for name in names if "ops/linear" in name or "execution" in name]


@cache
def _emulator() -> Any:
    from support.emulator import Emulator

    return Emulator("check")


def choose(dry: bool) -> Card:
    return StandIn() if dry else Card()
