"""Numbers that a training writes down while it runs, where the user asked for it: ``--tracking csv`` or ``tensorboard``."""

from __future__ import annotations

import csv
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .settings import OptionError

KINDS = ("csv", "tensorboard")

_recorder: ContextVar[Callable[[int, dict[str, float]], None] | None] = ContextVar("recorder", default=None)


def track(step: int, **numbers: Any) -> None:
    """Record numbers (Python's, or tensors of one element) of the piece that is running; without ``--tracking`` nothing."""
    record = _recorder.get()
    if record is not None:
        record(step, {name: float(number) for name, number in numbers.items()})


def check_tracking(kind: str | None) -> None:
    """OptionError unless ``kind`` is one of ``KINDS`` or None; ImportError if it needs a package that is missing."""
    if kind is not None and kind not in KINDS:
        raise OptionError(f"tracking must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ImportError('tensorboard is not installed: pip install "metamask_ext[experiments]"')


@contextmanager
def recording(kind: str | None, folder: Path, seed: int, piece: str) -> Iterator[None]:
    """Within the block :func:`track` writes the numbers of this piece, in the place of what an earlier, killed try wrote.

    ``csv``: ``folder/seed-<seed>/<piece>.csv`` with the columns step, name and value. ``tensorboard``: event files in
    ``folder/tensorboard/seed-<seed>/<piece>``.
    """
    if kind is None:
        yield
    elif kind == "csv":
        path = folder / f"seed-{seed}" / f"{piece}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "name", "value"))
            with _recording(lambda step, numbers: writer.writerows((step, *item) for item in numbers.items())):
                yield
    else:
        from torch.utils.tensorboard import SummaryWriter

        events = folder / "tensorboard" / f"seed-{seed}" / piece
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
