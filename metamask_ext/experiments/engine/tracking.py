"""Tracking: numbers that a training writes down while it runs, where the user asks for it (``--tracking csv``, ``tensorboard``)."""

from __future__ import annotations

import csv
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from metamask_ext.files.atomic import open_new

from .settings import OptionError

KINDS = ("csv", "tensorboard")

_recorder: ContextVar[Callable[[int, dict[str, float]], None] | None] = ContextVar("recorder", default=None)


@dataclass(frozen=True)
class Tracking:
    """The place and the kind of the numbers that the jobs of a run write down.

    Attributes:
        folder: of the run.
        kind: one of ``KINDS``, or None.
    """

    folder: Path
    kind: str | None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise OptionError(f"tracking must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise ImportError('tensorboard is not installed: pip install "metamask_ext[experiments]"')


def track(step: int, **numbers: float | Tensor) -> None:
    """Record numbers (Python's, or tensors of one element) of the job that is running; without ``--tracking`` nothing."""
    record = _recorder.get()
    if record is not None:
        record(step, {name: float(number) for name, number in numbers.items()})


@contextmanager
def recording(tracking: Tracking, seed: int, job: str) -> Iterator[None]:
    """Within the block :func:`track` writes the numbers of this job, in the place of what an earlier, killed try wrote.

    ``csv``: ``<folder>/seed-<seed>/<job>.csv`` with the columns step, name and value. ``tensorboard``: event files in
    ``<folder>/tensorboard/seed-<seed>/<job>``.
    """
    if tracking.kind is None:
        yield
    elif tracking.kind == "csv":
        path = tracking.folder / f"seed-{seed}" / f"{job}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(open_new(path), "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "name", "value"))
            with _recording(lambda step, numbers: writer.writerows((step, *item) for item in numbers.items())):
                yield
    else:
        from torch.utils.tensorboard import SummaryWriter

        events = tracking.folder / "tensorboard" / f"seed-{seed}" / job
        shutil.rmtree(events, ignore_errors=True)
        with SummaryWriter(str(events)) as summary:

            def record(step: int, numbers: dict[str, float]) -> None:
                for name, number in numbers.items():
                    summary.add_scalar(name, number, step)

            with _recording(record):
                yield


@contextmanager
def _recording(record: Callable[[int, dict[str, float]], None]) -> Iterator[None]:
    token = _recorder.set(record)
    try:
        yield
    finally:
        _recorder.reset(token)
