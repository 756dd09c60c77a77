"""Stages S0 to S2: the machine, every op against float64, and graphs, streams, repeats, waits and device asserts."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metamask_ext as mm

from . import ops
from .device import Card, TimingDevice
from .results import MACHINE, Results

NEEDED = ("hypothesis", "matplotlib", "pytest", "pytest_benchmark", "rich", "safetensors", "xdist")
"""Beside torch and NumPy, what the stages import."""

TOOLS = ("compute-sanitizer", "ncu")


def machine(device: Card, results: Results) -> None:
    """S0: what is here, and the rates that all others are a share of."""
    with results.case(MACHINE) as line:
        info = mm.build_info()
        line |= {"python": platform.python_version(), "torch": torch.__version__, "metamask_ext": info["version"]}
        line |= {"backend": info["backend"], "cuda_archs": info["cuda_archs"], "compiler": info["compiler"], **device.facts()}
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


def _fastest(measure: Callable[[], int], rounds: int = 7) -> int:
    return min(measure() for _ in range(rounds))


def against_float64(device: Card, results: Results) -> None:
    """S1: each op in each dtype, aligned and one element off, on poisoned memory; products with TF32."""
    with ops.poisoned(), device.on():
        with results.case("memory that nothing has written is NaN"):
            assert torch.empty(1000, device=device.kind).isnan().all()
        for dtype in ops.DTYPES:
            for offset in (False, True):
                for op in ops.OPS:
                    with results.case(f"{op.name} {str(dtype)[6:]} {'offset' if offset else 'aligned'}") as line:
                        arguments = op.make(ops.Inputs(device.sizes, dtype, device.kind, offset))
                        _judge(line, ops.share_of_tolerance(op, arguments, device.sizes))
        # The new way comes last: after it torch refuses the old one.
        for way in (_tf32_by_flag, _tf32_by_precision):
            for name in ("masked_linear", "masked_linear backward", "masked_linear large", ops.BY_TASK, f"{ops.BY_TASK} backward"):
                with results.case(f"{name} tf32 {way.__name__[6:].replace('_', ' ')}") as line:
                    op = ops.BY_NAME[name]
                    arguments = op.make(ops.Inputs(device.sizes, torch.float32, device.kind, False))
                    way(True)
                    try:
                        _judge(line, ops.share_of_tolerance(op, arguments, device.sizes, ops.UNITS * ops.TF32_UNIT))
                    finally:
                        way(False)


def _tf32_by_flag(on: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = on


def _tf32_by_precision(on: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "ieee"


def _judge(line: dict[str, Any], share: float) -> None:
    line["error_over_tolerance"] = share
    if not share <= 1.0:
        line |= {"ok": False, "reason": f"off by {share:.3g} times what is allowed"}


REPEATED = ("masked_linear", "masked_linear backward", ops.BY_TASK, f"{ops.BY_TASK} backward", ops.PACKED, f"{ops.PACKED} backward")


def schedules(device: Card, results: Results, script: Path, dry: bool) -> None:
    """S2: graphs, streams, repeats, waits, asserts."""
    timing = device.timing()
    with device.on():
        for name in REPEATED:
            op = ops.BY_NAME[name]
            with results.case(f"{name} in a graph") as line:
                line["replays"] = _replays(device, timing, op)
            with results.case(f"{name} behind a sleep"):
                _follows_its_stream(device, op)
            with results.case(f"{name} {device.repeats} times"):
                _repeats(device, op)
        for op in ops.OPS:
            with results.case(f"{op.name} waits for nothing"):
                arguments = op.make(ops.Inputs(device.sizes, torch.float32, device.kind, False))
                op.call(*arguments)  # allocates
                with device.refusing_waits():
                    op.call(*arguments)
        with results.case("a step of two layers waits for nothing"):
            _step_waits_for_nothing(device)
    _asserts(device, results, script, dry)


def _fill(arguments: ops.Arguments, others: ops.Arguments) -> None:
    for one, other in zip(ops.leaves(arguments), ops.leaves(others)):
        one.copy_(other)


def _inputs(device: Card, op: ops.Op, seed: int) -> ops.Arguments:
    return op.make(ops.Inputs(device.sizes, torch.float32, device.kind, False, seed))


def _copies(tree: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in ops.leaves(tree)]


def _assert_equal(got: list[Tensor], wanted: list[Tensor], what: str) -> None:
    assert len(got) == len(wanted), what
    for index, (one, other) in enumerate(zip(got, wanted)):
        assert torch.equal(one, other), f"{what}: result {index} differs in {int((one != other).sum())} of {one.numel()} elements"


def _replays(device: Card, timing: TimingDevice, op: ops.Op) -> int:
    """A captured call follows the slots and values that are put into its arguments."""
    arguments = _inputs(device, op, 0)
    others = [_inputs(device, op, seed) for seed in (1, 2, 3)]
    wanted = [_copies(op.call(*each)) for each in others]
    device.wait()
    kept: dict[str, Any] = {}

    def run() -> None:
        kept["results"] = op.call(*arguments)

    with timing.running():
        run()
        replay = timing.capture(run)
        for number, (other, exact) in enumerate(zip(others, wanted)):
            _fill(arguments, other)
            replay()
            device.wait()
            _assert_equal(ops.leaves(kept["results"]), exact, f"replay {number}")
    return len(others)


def _follows_its_stream(device: Card, op: ops.Op) -> None:
    """On a stream whose arguments are written late, the op reads them later still."""
    arguments, written = _inputs(device, op, 0), _inputs(device, op, 1)
    wanted = _copies(op.call(*written))
    device.wait()
    with device.behind_a_sleep():
        _fill(arguments, written)
        got = op.call(*arguments)
    _assert_equal(ops.leaves(got), wanted, "behind a sleep")


def _repeats(device: Card, op: ops.Op) -> None:
    arguments = _inputs(device, op, 0)
    first = _copies(op.call(*arguments))
    for number in range(1, device.repeats):
        _assert_equal(ops.leaves(op.call(*arguments)), first, f"call {number}")


def _step_waits_for_nothing(device: Card) -> None:
    sizes = device.sizes
    model = nn.Sequential(mm.nn.MaskedLinear(sizes.columns, sizes.out), nn.ReLU(), mm.nn.MaskedLinear(sizes.out, 8)).to(device.kind)
    optimizer = mm.optim.FusedMaskedSGD(model, lr=0.1, momentum=0.9)
    x = torch.randn(sizes.batch, sizes.columns, device=device.kind)

    def step() -> None:
        optimizer.backward(model(x).square().mean())

    step()
    with device.refusing_waits():
        step()


ASSERTS = (ops.BY_TASK, f"{ops.BY_TASK} backward", ops.PACKED, f"{ops.PACKED} backward")
"""Each in a process of its own: a device assert is the end of it."""


def _asserts(device: Card, results: Results, script: Path, dry: bool) -> None:
    started = []
    for name in ASSERTS:
        command = [sys.executable, str(script), "--program", "bad-slot", "--op", name, *(["--dry-run"] if dry else [])]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for name, process in zip(ASSERTS, started):
        with results.case(f"{name} asserts its slots") as line:
            said, _ = process.communicate(timeout=80)
            line["said"] = next((text for text in said.splitlines() if device.assertion in text), "")[:200]
            if process.returncode == 0 or not line["said"]:
                print(said)
                line |= {"ok": False, "reason": f"ended with {process.returncode}, without {device.assertion!r}"}


def call_with_a_bad_slot(device: Card, name: str) -> None:
    """Ends with the error of the device, if the op looks at its slots."""
    op = ops.BY_NAME[name]
    with device.on():
        arguments = op.make(ops.Inputs(device.sizes, torch.float32, device.kind, False))
        for leaf in ops.leaves(arguments):
            if leaf.dtype == torch.int64:
                leaf[-1] = device.sizes.tasks
        op.call(*arguments)
        device.wait()
