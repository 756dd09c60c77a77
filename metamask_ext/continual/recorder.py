"""Where a round's line goes: the metrics file, and TensorBoard where it is wanted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ..files.atomic import output_errors
from ..files.metrics import MetricsFile

Line = dict[str, str | float]
"""A line of metrics: ``round``, ``step``, ``task``, ``loss`` and the numbers of ``evaluate``."""


def has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def recorder(metrics: MetricsFile, tensorboard: Path | None, done: int, stack: ExitStack) -> Callable[[Line], None]:
    """Return the function that writes a line, beginning after ``done`` rounds; what it opens is closed with ``stack``."""
    if tensorboard is None:
        return metrics.write
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard=True needs TensorBoard: pip install tensorboard") from error
    with output_errors(tensorboard):
        writer = SummaryWriter(str(tensorboard), purge_step=done + 1)
    stack.callback(writer.close)

    def record(line: Line) -> None:
        metrics.write(line)
        for key, value in line.items():
            if key not in ("round", "step", "task"):
                writer.add_scalar(f"loss/{line['task']}" if key == "loss" else key, value, line["round"])

    return record
