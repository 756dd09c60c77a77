"""The cases, by suite. A new suite is one more entry of :data:`SUITES`, its cases made by functions that return a Problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .bank import OUTPUTS, opened_bank, task_bytes
from .compiled import many_layers
from .copy_bandwidth import linear_against_copy, weight_against_copy
from .layers import cnn, masked_linear, masked_weight
from .meta import checkpoint_memory, fewshot_step, sine_step
from .mixed_task import inference, mixed_task_linear, packed_forward
from .problem import Problem
from .training import fused_step, resnet18_step


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        suite, measure, shape: its name, ``<suite>/<measure>-<shape>``.
        build: makes its tensors and contenders, a :class:`Problem <metamask_ext.bench.problem.Problem>`; or, of a case that
            compares no times, measures and returns numbers by name.
        quick: whether it is in the suite's short form.
        device: where its work runs; ``"cuda"`` work is waited for before the clock is read.
        quantities: it compares no times; its numbers are taken with one allocator.
        processes: how many measure it, one after another; the medians are over the rounds of all.
        tuned: whether it is measured with the tuned allocator too.
    """

    suite: str
    measure: str
    shape: str
    build: Callable[[], Problem | dict[str, float]]
    quick: bool = False
    device: str = "cpu"
    quantities: bool = False
    processes: int = 1
    tuned: bool = True

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.measure}-{self.shape}"

    def problem(self) -> Problem:
        """Builds a case that compares times."""
        built = self.build()
        assert isinstance(built, Problem)
        return built


WIDTHS = (64, 1024, 2048, 4096)
SMALL = ((10, 40), (16, 64))
QUICK = ("masked_linear-forward-32x1024", "masked_linear-step-32x1024")


def _core() -> list[Case]:
    cases = [
        (f"masked_weight-{mode}", f"{width}x{width}", partial(masked_weight, width, mode))
        for mode in ("forward", "backward")
        for width in WIDTHS
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


def _cpu() -> list[Case]:
    bfloat16 = torch.bfloat16
    cases = [
        *(("masked_linear-forward", f"{b}x{w}", partial(masked_linear, b, w, "forward")) for b, w in (*FORWARD, *BATCH_1)),
        *(("masked_linear-fused-step", f"{b}x{w}", partial(fused_step, b, w)) for b, w in TRAINING),
        *(("masked_linear-backward", f"{b}x{w}", partial(masked_linear, b, w, "backward")) for b, w in (*TRAINING, *SMALL)),
        *(("bfloat16-forward", f"{b}x{w}", partial(masked_linear, b, w, "forward", bfloat16)) for b, w in FORWARD),
        *(("bfloat16-backward", f"{b}x{w}", partial(masked_linear, b, w, "backward", bfloat16)) for b, w in FORWARD),
        ("resnet18-step", "16x64x64", partial(resnet18_step, 16, 64, False)),
        ("resnet18-fused-step", "16x64x64", partial(resnet18_step, 16, 64, True)),
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


# Tasks x samples of each to adapt to; ways x tasks x filters x queries of each class.
SINE, FEWSHOT = (25, 10), (5, 4, 64, 15)


def _meta() -> list[Case]:
    sine, fewshot = ("x".join(map(str, sizes)) for sizes in (SINE, FEWSHOT))
    return [
        Case("meta", "sine-step", sine, partial(sine_step, *SINE), quick=True, processes=3, tuned=False),
        Case("meta", "fewshot-step", fewshot, partial(fewshot_step, *FEWSHOT), processes=3, tuned=False),
        Case("meta", "checkpoint-memory", str(SINE[0]), partial(checkpoint_memory, SINE[0]), quick=True, quantities=True),
    ]


def _cuda() -> list[Case]:
    on = "cuda"
    cases = [
        *(
            (f"masked_weight-{mode}", f"{width}x{width}", partial(weight_against_copy, width, mode, on))
            for mode in ("forward", "backward")
            for width in (4096, 8192)
        ),
        *(("masked_linear-forward", f"{b}x4096", partial(linear_against_copy, b, 4096, on)) for b in (1, 8, 16)),
        *(("masked_linear-fused-step", f"{b}x4096", partial(fused_step, b, 4096, device=on)) for b in (8, 32)),
        ("bfloat16-fused-step", "4096x4096", partial(fused_step, 4096, 4096, torch.bfloat16, on)),
        ("packed-forward", "64x4096x64", partial(packed_forward, 64, 4096, 64, on)),
        ("mixed-task-forward", "32x16x1024", partial(mixed_task_linear, 32, 16, 1024, "forward", on)),
    ]
    quick = ("masked_weight-forward-4096x4096", "masked_linear-forward-8x4096")
    return [Case("cuda", measure, shape, build, f"{measure}-{shape}" in quick, on) for measure, shape, build in cases]


SUITES: dict[str, list[Case]] = {"core": _core(), "cpu": _cpu(), "tasks": _tasks(), "meta": _meta(), "cuda": _cuda()}
