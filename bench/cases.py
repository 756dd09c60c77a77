"""The cases, by suite. A new suite is one more entry of :data:`SUITES`, its cases made by functions that return a Problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from . import grid
from .bank import OUTPUTS, opened_bank, task_bytes
from .compiled import many_layers
from .copy_bandwidth import (
    linear_against_copy,
    mixed_task_against_copy,
    packed_against_copy,
    step_against_copy,
    weight_against_copy,
)
from .layers import cnn, masked_linear, masked_weight
from .meta import checkpoint_memory, compiled_sine_step, fewshot_step, sine_step
from .mixed_task import inference, mixed_task_linear, packed_forward
from .models import bert_mini_step, resnet18_step, vit_tiny_step
from .problem import Problem
from .serving import served_bank
from .training import fused_step

BOTH = ("default", "tuned")
"""The settings of the allocator."""


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        suite, measure, shape: its name, ``<suite>/<measure>-<shape>``.
        build: makes its tensors and contenders, a :class:`Problem <metamask_ext.bench.problem.Problem>`; or, of a case that
            compares no times, measures and returns numbers by name.
        quick: whether it is in the suite's short form.
        device: where its work runs; ``"cuda"`` work is timed by :mod:`metamask_ext.bench.cuda_case`.
        quantities: it compares no times; its numbers are taken with one allocator.
        processes: how many measure it, one after another; the medians are over the rounds of all.
        allocators: with which it is measured. A quick run takes the default one, and ``"tuned"`` of a case of a group.
        group: cases of one group are measured in one process, one after another; empty: it has a process of its own. With none of
            the allocators, such a case is only in the full run, which takes both.
    """

    suite: str
    measure: str
    shape: str
    build: Callable[[], Problem | dict[str, float]]
    quick: bool = False
    device: str = "cpu"
    quantities: bool = False
    processes: int = 1
    allocators: tuple[str, ...] = BOTH
    group: str = ""

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.measure}-{self.shape}"

    def problem(self) -> Problem:
        """Builds a case that compares times."""
        built = self.build()
        assert isinstance(built, Problem)
        return built


WIDTHS = (64, 1024, 2048, 4096)
MODES = ("forward", "backward")
SMALL = ((10, 40), (16, 64))
QUICK = ("masked_linear-forward-32x1024", "masked_linear-step-32x1024")


def _core() -> list[Case]:
    cases = [
        (f"masked_weight-{mode}", f"{width}x{width}", partial(masked_weight, width, mode)) for mode in MODES for width in WIDTHS
    ]
    cases += [
        (f"masked_linear-{mode}", f"{batch}x{width}", partial(masked_linear, batch, width, mode))
        for mode in ("forward", "backward", "step")
        for batch, width in (*SMALL, (32, 1024), (8, 4096))
    ]
    cases.append(("cnn-step", "32x32", partial(cnn, 32, 32, "step")))
    return [Case("core", measure, shape, build, f"{measure}-{shape}" in QUICK) for measure, shape, build in cases]


# The sizes that targets.py has targets for.
FORWARD = ((8, 1024), (32, 1024), (256, 1024), (8, 2048), (64, 2048), (8, 4096), (128, 4096))
TRAINING = (*FORWARD, (1, 2048), (1024, 1024))
BATCH_1 = ((1, 1024), (1, 2048))
ADAMW = ((8, 1024), (32, 1024), (256, 1024), (32, 4096))


def _cpu() -> list[Case]:
    bfloat16 = torch.bfloat16
    cases = [
        *(("masked_linear-forward", f"{b}x{w}", partial(masked_linear, b, w, "forward")) for b, w in (*FORWARD, *BATCH_1)),
        *(("masked_linear-fused-step", f"{b}x{w}", partial(fused_step, b, w)) for b, w in TRAINING),
        *(("masked_linear-fused-adamw-step", f"{b}x{w}", partial(fused_step, b, w, optimizer="AdamW")) for b, w in ADAMW),
        *(("masked_linear-backward", f"{b}x{w}", partial(masked_linear, b, w, "backward")) for b, w in (*TRAINING, *SMALL)),
        *(("bfloat16-forward", f"{b}x{w}", partial(masked_linear, b, w, "forward", bfloat16, plain=False)) for b, w in FORWARD),
        *(("bfloat16-backward", f"{b}x{w}", partial(masked_linear, b, w, "backward", bfloat16, plain=False)) for b, w in FORWARD),
        ("resnet18-step", "16x64x64", partial(resnet18_step, 16, 64, False)),
        ("resnet18-fused-step", "16x64x64", partial(resnet18_step, 16, 64, True)),
        ("resnet18-fused-step", "32x64x64", partial(resnet18_step, 32, 64, True)),
        ("vit-tiny-fused-step", "32x128x128", partial(vit_tiny_step, 32, 128)),
        ("bert-mini-fused-step", "32x128", partial(bert_mini_step, 32, 128)),
    ]
    quick = ("masked_linear-forward-32x1024", "masked_linear-fused-step-32x1024", "masked_linear-backward-32x1024")
    return [Case("cpu", measure, shape, build, f"{measure}-{shape}" in quick) for measure, shape, build in cases]


# Batch x width x tasks; tasks x rows of each x width; batch x tasks.
PACKED = ((16, 1024, 16), (64, 1024, 64), (16, 2048, 64), (64, 1024, 1000))
MIXED_TASK = ((16, 16, 1024), (64, 4, 1024), (32, 16, 256))
INFERENCE = (64, 250)
# Layers x width.
COMPILED = (12, 64)
BANK_TASKS, FEW_TASKS = 2500, 100


def _tasks() -> list[Case]:
    def shape(sizes: tuple[int, ...]) -> str:
        return "x".join(map(str, sizes))

    cases = [
        *(("packed-forward", shape(sizes), partial(packed_forward, *sizes)) for sizes in PACKED),
        *(("mixed-task-forward", shape(sizes), partial(mixed_task_linear, *sizes, "forward")) for sizes in MIXED_TASK),
        *(("mixed-task-backward", shape(sizes), partial(mixed_task_linear, *sizes, "backward")) for sizes in MIXED_TASK[:2]),
        ("one-shot-inference", shape(INFERENCE), partial(inference, *INFERENCE, OUTPUTS)),
        *((f"compiled-layers-{mode}", shape(COMPILED), partial(many_layers, *COMPILED, mode)) for mode in ("forward", "backward")),
    ]
    quantities = [("task-bytes", FEW_TASKS, task_bytes), ("bank", BANK_TASKS, opened_bank)]
    quick = ("packed-forward-16x1024x16", "mixed-task-forward-32x16x256", f"task-bytes-{FEW_TASKS}")
    return [
        *(Case("tasks", measure, shape, build, f"{measure}-{shape}" in quick) for measure, shape, build in cases),
        *(
            Case("tasks", measure, str(tasks), partial(build, tasks), f"{measure}-{tasks}" in quick, quantities=True)
            for measure, tasks, build in quantities
        ),
    ]


SERVED_TASKS = 2000


def _bank() -> list[Case]:
    sizes = ((SERVED_TASKS, False), (FEW_TASKS, True))
    return [Case("bank", "served", str(tasks), partial(served_bank, tasks), quick, quantities=True) for tasks, quick in sizes]


# Tasks x samples of each to adapt to; ways x tasks x filters x queries of each class.
SINE, FEWSHOT = (25, 10), (5, 4, 64, 15)
ADAPT = ("weights", "all")
"""Names what is adapted, where it is not the masks."""


def _meta() -> list[Case]:
    sine, fewshot = ("x".join(map(str, sizes)) for sizes in (SINE, FEWSHOT))
    cases: list[tuple[str, str, Callable[[], Problem]]] = [
        ("sine-step", sine, partial(sine_step, *SINE)),
        *((f"sine-step-{adapt}", sine, partial(sine_step, *SINE, adapt)) for adapt in ADAPT),
        ("compiled-sine-step", sine, partial(compiled_sine_step, *SINE)),
        ("fewshot-step", fewshot, partial(fewshot_step, *FEWSHOT)),
        *((f"fewshot-step-{adapt}", fewshot, partial(fewshot_step, *FEWSHOT, adapt)) for adapt in ADAPT),
    ]
    return [
        *(
            Case("meta", measure, shape, build, quick=measure == "sine-step", processes=3, allocators=BOTH[:1])
            for measure, shape, build in cases
        ),
        Case("meta", "checkpoint-memory", str(SINE[0]), partial(checkpoint_memory, SINE[0]), quick=True, quantities=True),
    ]


# Widths; batches at 4096; batch x width x tasks; tasks x rows of each x width.
CUDA_WIDTHS, CUDA_BATCHES, CUDA_STEPS, CUDA_WIDTH = (4096, 8192), (1, 8, 16), (8, 32), 4096
CUDA_PACKED, CUDA_MIXED = (64, 4096, 64), (32, 16, 1024)


def _cuda() -> list[Case]:
    width, bfloat16 = CUDA_WIDTH, torch.bfloat16
    cases: list[tuple[str, tuple[int, ...], Callable[..., Problem]]] = [
        *((f"masked_weight-{mode}", (w, w), partial(weight_against_copy, w, mode)) for mode in MODES for w in CUDA_WIDTHS),
        *(("masked_linear-forward", (b, width), partial(linear_against_copy, b, width)) for b in CUDA_BATCHES),
        *(("masked_linear-fused-step", (b, width), partial(step_against_copy, b, width, torch.float32)) for b in CUDA_STEPS),
        ("bfloat16-fused-step", (width, width), partial(step_against_copy, width, width, bfloat16)),
        ("packed-forward", CUDA_PACKED, partial(packed_against_copy, *CUDA_PACKED)),
        ("mixed-task-forward", CUDA_MIXED, partial(mixed_task_against_copy, *CUDA_MIXED)),
    ]
    quick = ("masked_weight-forward-4096x4096", "masked_linear-forward-8x4096")
    named = [(measure, "x".join(map(str, sizes)), build) for measure, sizes, build in cases]
    return [
        Case("cuda", measure, shape, partial(build, device="cuda"), f"{measure}-{shape}" in quick, "cuda")
        for measure, shape, build in named
    ]


def _grid() -> list[Case]:
    cases = []
    for dtype in grid.DTYPES:
        for weight in grid.WEIGHTS:
            shape, group = grid.shape_name(*weight), f"{grid.shape_name(*weight)} {grid.name_of(dtype)}"
            small = dtype == torch.float32 and weight == grid.QUICK_WEIGHT
            copy = partial(grid.copy_rate, *weight, dtype)
            name = grid.measure_name("copy", dtype)
            cases.append(Case("grid", name, shape, copy, small, quantities=True, allocators=BOTH[1:], group=group))
            for batch in grid.BATCHES:
                few = batch in grid.FEW_BATCHES
                allocators = (BOTH if few else BOTH[1:]) if dtype == torch.float32 else BOTH[1:] if few else ()
                for mode in grid.MODES:
                    name, shape = grid.measure_name(mode, dtype), grid.shape_name(batch, *weight)
                    build = partial(grid.problem, batch, *weight, mode, dtype)
                    quick = small and batch in grid.QUICK_BATCHES
                    cases.append(Case("grid", name, shape, build, quick, allocators=allocators, group=group))
    return cases


SUITES: dict[str, list[Case]] = {
    "core": _core(),
    "cpu": _cpu(),
    "grid": _grid(),
    "tasks": _tasks(),
    "bank": _bank(),
    "meta": _meta(),
    "cuda": _cuda(),
}
