"""Executors and loggers that tests name as ``support.executors:<name>``."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path


def spawned(max_workers: int = 1) -> ProcessPoolExecutor:
    """The standard library's, of processes that are not forked."""
    return ProcessPoolExecutor(max_workers, mp_context=multiprocessing.get_context("spawn"))


class Failing(Executor):
    """Gives every job back undone: with an error, or cancelled."""

    def __init__(self, cancelled: bool = False):
        self.cancelled = cancelled

    def submit(self, function, /, *arguments, **options):
        future: Future = Future()
        if self.cancelled:
            future.cancel()
            future.set_running_or_notify_cancel()
        else:
            future.set_exception(OSError("the machine is gone"))
        return future


def nothing() -> None:
    """No executor."""


def broken() -> None:
    """Cannot be made."""
    raise OSError("no such machine")


NUMBER = 3


class Lines:
    """A logger as Lightning's: a line of JSON for each call."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / "lines" / f"{name}.jsonl"
        self.lines: list[object] = []

    def log_metrics(self, metrics, step):
        self.lines.append([step, dict(metrics)])

    def finalize(self, status):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in [*self.lines, status]))


def lightning_csv(folder: Path, name: str):
    """Lightning's logger of tables."""
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(folder / "lightning", name, version="")


def lightning_tensorboard(folder: Path, name: str):
    """Lightning's logger for TensorBoard."""
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(folder / "lightning", name, version="")
