"""The cases, by suite. A new suite is one more entry of :data:`SUITES`, its cases made by functions that return a Problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .problems import Problem, cnn, masked_linear, masked_weight


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        suite, measure, shape: its name, ``<suite>/<measure>-<shape>``.
        build: makes its tensors and contenders.
        quick: whether it is in the suite's short form.
        device: where its work runs; ``"cuda"`` work is waited for before the clock is read.
    """

    suite: str
    measure: str
    shape: str
    build: Callable[[], Problem]
    quick: bool = False
    device: str = "cpu"

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.measure}-{self.shape}"


WIDTHS = (64, 1024, 2048, 4096)
BATCHES_AND_WIDTHS = ((10, 40), (16, 64), (8, 1024), (32, 1024), (256, 1024), (8, 2048), (64, 2048), (8, 4096))
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
        for batch, width in BATCHES_AND_WIDTHS
    ]
    cases.append(("cnn-step", "32x32", partial(cnn, 32, 32, "step")))
    return [Case("core", measure, shape, build, f"{measure}-{shape}" in QUICK) for measure, shape, build in cases]


SUITES: dict[str, list[Case]] = {"core": _core()}
