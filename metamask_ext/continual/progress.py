"""The progress bar of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

REDRAW_SECONDS = 0.1
"""The least time between two redraws: a round can be shorter than what one costs."""


@contextmanager
def progress_bar(label: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr where that is a terminal; yield the function that moves it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done)
        shown = 0.0

        def advance(completed: int) -> None:
            nonlocal shown
            if console.is_terminal and time.monotonic() - shown > REDRAW_SECONDS:
                bar.update(task, completed=completed)
                shown = time.monotonic()

        yield advance
