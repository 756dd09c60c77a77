"""Stages S0 and S1: the machine, and every op against float64."""

from __future__ import annotations

import filecmp
import importlib.util
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import metamask_ext as mm
from metamask_ext import bench

from . import ops
from .device import Card
from .results import Results
from .runner import ROOT

NEEDED = ("hypothesis", "matplotlib", "pytest", "pytest_benchmark", "rich", "safetensors", "xdist")
"""Beside torch and NumPy, what the stages import."""

TOOLS = ("compute-sanitizer", "ncu")


def machine(device: Card, results: Results) -> None:
    """S0: what is here, and the rates that all others are a share of."""
    with results.case("facts") as line:
        info = mm.build_info()
        line |= {"python": platform.python_version(), "torch": torch.__version__, "metamask_ext": info["version"]}
        line |= {"backend": info["backend"], "cuda_archs": info["cuda_archs"], "compiler": info["compiler"], **device.facts()}
    with results.case("the package is of this tree") as line:
        if others := _of_another_tree():
            line |= {"ok": False, "reason": f"{len(others)} files differ from those installed: {', '.join(others[:5])}"}
    with results.case("modules") as line:
        lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if lacking:
            line |= {"ok": False, "reason": f"not installed: {', '.join(lacking)}"}
    for tool in TOOLS:
        with results.case(tool) as line:
            command = [*device.tool(tool), "--version"]
            said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
            line["version"] = said.strip().splitlines()[-1]
    timing = device.timing()
    with results.case("copy bandwidth") as line:
        source = torch.ones(device.copy_bytes // 8, device=device.kind)
        target = torch.empty_like(source)
        took = _fastest(lambda: timing.nanoseconds(lambda: target.copy_(source)))
        line |= {"gigabytes_per_second": device.copy_bytes / took, "moved": device.copy_bytes}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        with results.case(f"matrix product {name}") as line:
            width = device.product_width
            a, b = (torch.randn(width, width, device=device.kind, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)
            took = _fastest(lambda a=a, b=b, out=out: timing.nanoseconds(lambda: torch.mm(a, b, out=out)))
            line |= {"teraflops": 2e-3 * width**3 / took, "width": width}


def _of_another_tree() -> list[str]:
    """Lists the Python files of this tree that the installed package, whose code is what runs, has not or has otherwise."""
    others = []
    for source, package in ((ROOT / "metamask_ext", mm), (ROOT / "bench", bench)):
        installed = Path(str(package.__file__)).parent
        for path in sorted(source.rglob("*.py")):
            copy = installed / path.relative_to(source)
            if path.name != "_build.py" and not (copy.exists() and filecmp.cmp(path, copy, shallow=False)):
                others.append(str(path.relative_to(ROOT)))
    return others


def _fastest(measure: Callable[[], int], rounds: int = 7) -> int:
    return min(measure() for _ in range(rounds))


TF32 = ("masked_linear", "masked_linear_backward", "task_masked_linear stacked", "task_masked_linear_backward stacked")


def against_float64(device: Card, results: Results) -> None:
    """S1: each op in each dtype, aligned and one element off, on poisoned memory; products with TF32."""
    with ops.poisoned():
        with results.case("memory that nothing has written is NaN"):
            assert torch.empty(1000, device=device.kind).isnan().all()
        for dtype in ops.DTYPES:
            for name in ops.OPS:
                _compare(device, results, name, dtype)
    # The new way comes last: after it torch refuses the old one.
    for way, switch in (("allow_tf32", _allow_tf32), ("fp32_precision", _fp32_precision)):
        for name in TF32:
            for sizes in (device.sizes, device.many):
                wanted = ops.exact(name, sizes, torch.float32)
                with results.case(f"{name} {sizes.batch} rows tf32 by {way}") as line:
                    switch(True)
                    try:
                        got = ops.call(device, name, sizes, torch.float32)
                    finally:
                        switch(False)
                    # More than 1 where the product did round its factors to TF32.
                    line["error_over_float32_tolerance"] = ops.share_of_tolerance(name, sizes, got, wanted)
                    _judge(line, ops.share_of_tolerance(name, sizes, got, wanted, ops.TF32_UNIT))


def _compare(device: Card, results: Results, name: str, dtype: torch.dtype) -> None:
    for sizes, layouts in ((device.sizes, ("aligned", "offset")), (device.many, ("aligned",))):
        wanted = ops.exact(name, sizes, dtype)
        for layout in layouts:
            with results.case(f"{name} {sizes.batch} rows {str(dtype)[6:]} {layout}") as line:
                got = ops.call(device, name, sizes, dtype, layout == "offset")
                _judge(line, ops.share_of_tolerance(name, sizes, got, wanted))


def _allow_tf32(on: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = on


def _fp32_precision(on: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "ieee"


def _judge(line: dict[str, Any], share: float) -> None:
    line["error_over_tolerance"] = share
    if not share <= 1.0:
        line |= {"ok": False, "reason": f"off by {share:.3g} times what is allowed"}
