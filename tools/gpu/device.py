"""All in which a stage on a GPU and its dry run on a CPU differ: the calls of a device, and how much of each stage is run."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from metamask_ext.bench.cuda_timing import Cpu, Gpu
from metamask_ext.bench.cuda_timing import Device as TimingDevice

STAND_IN_TOOL = Path(__file__).with_name("stand_in_tool.py")


@dataclass(frozen=True)
class Sizes:
    """Of the ops of S1, S2 and S5."""

    batch: int
    columns: int
    out: int
    tasks: int
    large_batch: int


SMALL = Sizes(batch=5, columns=48, out=32, tasks=3, large_batch=70)
"""For the emulator, which runs thread by thread, and for compute-sanitizer."""


class Card:
    """The current CUDA device."""

    kind = "cuda"
    sizes = Sizes(batch=16, columns=512, out=272, tasks=6, large_batch=130)
    profiled = Sizes(batch=8, columns=4096, out=4096, tasks=8, large_batch=256)
    repeats = 200
    copy_bytes, product_width = 1 << 31, 8192
    assertion = "device-side assert"
    workers = 8
    tests = "(cuda or gpu) and not opcheck"
    opchecks = "cuda and opcheck"
    suite = ("--suite", "cuda")

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()

    def on(self) -> contextlib.AbstractContextManager[object]:
        """Inside, metamask ops run the CUDA kernels."""
        return contextlib.nullcontext()

    def wait(self) -> None:
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def behind_a_sleep(self) -> Iterator[None]:
        """A stream of its own, on which a sleep comes first: what does not follow this stream runs before what is inside."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles: about 50 ms
            yield
        self.wait()

    @contextlib.contextmanager
    def refusing_waits(self) -> Iterator[None]:
        """Inside, an op that waits for the device raises."""
        self.wait()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

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
            "card": self.name,
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


class StandIn(Card):
    """No GPU: CPU tensors, on the emulator where it can be built; a call in place of a stream, a graph or a tool."""

    kind = "cpu"
    sizes = profiled = SMALL
    repeats = 3
    copy_bytes, product_width = 1 << 20, 64
    workers = 2
    tests = "cpu and not opcheck and 1x1"
    opchecks = "opcheck and cpu and float64 and not list"
    suite = ("--suite", "cpu", "--quick", "--only", "cpu/bfloat16-forward-8x1024")

    def __init__(self) -> None:
        self.name = "dry run"
        from support import emulator

        self._emulated = not emulator.why_not()
        # Without the emulator the ops' own check of slots stands in for that of the kernels.
        self.assertion = "assertion failed" if self._emulated else "slots"

    def on(self) -> contextlib.AbstractContextManager[object]:
        return _emulator().running(0) if self._emulated else contextlib.nullcontext()

    def wait(self) -> None:
        pass

    def behind_a_sleep(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def refusing_waits(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

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


@cache
def _emulator() -> Any:
    from support.emulator import Emulator

    return Emulator("check")


def choose(dry: bool) -> Card:
    return StandIn() if dry else Card()
