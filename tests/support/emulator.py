"""Builds the CUDA kernels for the CPU and runs the library on them.

    with Emulator("check").running(FORWARD):
        ...  # every metamask op on CPU tensors runs its CUDA kernels, thread by thread

``build`` compiles tests/emulator, the emulator itself, together with the kernels. Tests use the fixtures of conftest.py.

A kernel's error (csrc/cuda/kernels is the source, scheduler.h and checker.h say what is looked for) raises ``RuntimeError``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from support.paths import ROOT, TESTS
from toolkit import find_nvcc, toolkit_includes
from torch.utils.cpp_extension import include_paths

FORWARD, RANDOM_WARPS = 0, 1
"""The schedules of scheduler.h."""

BUILDS = ("fast", "check")


def why_not() -> str | None:
    """Why the emulator cannot be built on this machine; None: it can."""
    if platform.machine() != "x86_64":
        return f"the emulator is for x86-64, this machine is {platform.machine()}"
    return None if find_nvcc() else "no CUDA toolkit: its headers are needed to compile the kernels"


def build(name: str) -> Path:
    """Compile what changed of a build; its library.

    The kernels are those of ``METAMASK_KERNEL_DIR/csrc`` where that is set (tools/mutate.py), and it gets the objects too.
    """
    kernels = Path(os.environ.get("METAMASK_KERNEL_DIR", ROOT))
    folder = (kernels if kernels != ROOT else ROOT / "build") / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = find_nvcc()
    assert nvcc is not None, why_not()
    definitions = {
        "CUDA_INCLUDE_DIRS": ";".join(toolkit_includes(nvcc)),
        "TORCH_INCLUDE_DIRS": ";".join(include_paths()),
        "TORCH_LIBRARY_DIRS": str(Path(torch.__file__).parent / "lib"),
        "TORCH_CXX11_ABI": str(int(torch._C._GLIBCXX_USE_CXX11_ABI)),
        "KERNEL_DIR": str(kernels),
        "CMAKE_BUILD_TYPE": "None",
    }
    target = f"cuda_on_cpu_{name}"
    configure = [
        "cmake",
        "-G",
        "Ninja",
        "-S",
        str(TESTS / "emulator"),
        "-B",
        str(folder),
        *(f"-D{key}={value}" for key, value in definitions.items()),
    ]
    # Several pytest workers start at once.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(folder), "--target", target]):
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")
    return folder / f"lib{target}.so"


class Emulator:
    """One build of the kernels, loaded."""

    floats = ctypes.c_float

    def __init__(self, build_name: str) -> None:
        library = ctypes.CDLL(str(build(build_name)))
        self.enter, self.leave = library.cuda_on_cpu_enter, library.cuda_on_cpu_leave
        self.set = library.cuda_on_cpu_set
        self.set.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.limit_grid = library.cuda_on_cpu_limit_grid
        self.limit_grid.argtypes, self.limit_grid.restype = [ctypes.c_uint], None
        self.launches = library.cuda_on_cpu_launches
        self.launches.restype = ctypes.c_uint64
        self.allocate, self.release = library.cuda_on_cpu_allocate, library.cuda_on_cpu_release
        self.allocate.argtypes, self.allocate.restype = [ctypes.c_size_t, ctypes.c_int], ctypes.c_void_p
        self.release.argtypes, self.release.restype = [ctypes.c_void_p], None
        self.run_planted = library.cuda_on_cpu_run_planted
        self.run_planted.argtypes = [ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 3, *[ctypes.c_int] * 3]
        self.run_planted.restype = ctypes.c_char_p

    @contextlib.contextmanager
    def running(self, schedule: int, seed: int = 1) -> Iterator[None]:
        """The library's ops on CPU tensors run in the emulator."""
        self.set(schedule, seed)
        self.enter()
        try:
            yield
        finally:
            self.leave()
