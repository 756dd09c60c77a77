"""Tracking: numbers of a training, where the user asks for them (``--track csv``, ``tensorboard``, ``wandb``).

A job records its numbers, wherever it runs, and the process that writes the results of the run writes them too.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from metamask_ext.data._torchvision import let_others_import_torchvision
from metamask_ext.files.atomic import output_errors, prepare_folder, write_atomic

from .named import by_name
from .settings import OptionError

KINDS = ("csv", "tensorboard", "wandb")
EXTRAS = {"tensorboard": {"tensorboard": "experiments"}, "wandb": {"lightning": "lightning", "wandb": "lightning"}}
"""The packages of a kind, with the extra that brings them."""

Rows = list[tuple[int, dict[str, float]]]
"""Recorded numbers: step, and value by name."""

_rows: ContextVar[Rows | None] = ContextVar("rows", default=None)


class Logger(Protocol):
    """The part of Lightning's loggers that is used."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def finalize(self, status: str) -> None: ...


def track(step: int, **numbers: float | Tensor) -> None:
    """Record numbers (Python's, or tensors of one element) of the job that is running; without ``--track`` nothing."""
    rows = _rows.get()
    if rows is not None:
        rows.append((step, {name: float(number) for name, number in numbers.items()}))


@contextmanager
def recording(wanted: bool = True) -> Iterator[Rows]:
    """Within the block :func:`track` adds to the list that the block gets; if it is not ``wanted``, to none."""
    rows: Rows = []
    token = _rows.set(rows if wanted else None)
    try:
        yield rows
    finally:
        _rows.reset(token)


@dataclass(frozen=True)
class Tracking:
    """The place and the kind of what the jobs of a run record.

    - ``csv``: ``<folder>/seed-<seed>/<job>.csv`` with the columns step, name and value.
    - ``tensorboard``: event files in ``<folder>/tensorboard/seed-<seed>/<job>``.
    - ``wandb``: an offline run of Weights & Biases in ``<folder>/wandb/seed-<seed>/<job>``, by Lightning's ``WandbLogger``;
      ``wandb sync`` sends it.
    - ``module:factory``: any of Lightning's loggers. ``factory(folder, name)`` makes the one of the job ``seed-<seed>/<job>``.

    Attributes:
        folder: of the run.
        kind: as above; None: nothing is tracked.

    Raises:
        OptionError: the kind is unknown, or its module or factory is.
        ImportError: its package is not installed.
    """

    folder: Path
    kind: str | None

    def __post_init__(self) -> None:
        if self.kind is None:
            return
        if ":" in self.kind:
            by_name("tracking", self.kind)
        elif self.kind not in KINDS:
            raise OptionError(f"tracking must be one of {', '.join(KINDS)} or module:factory, got {self.kind!r}")
        for package, extra in EXTRAS.get(self.kind, {}).items():
            if importlib.util.find_spec(package) is None:
                raise ImportError(f'{package} is not installed: pip install "metamask_ext[{extra}]"')

    def write(self, seed: int, job: str, rows: Rows) -> None:
        """Write what a job recorded, in the place of what an earlier, killed try wrote.

        Args:
            seed: of the job.
            job: its name, as that of a file.
            rows: what it recorded.

        Raises:
            OutputError: it cannot be written.
        """
        name = f"seed-{seed}/{job}"
        if self.kind is None:
            return
        if self.kind == "csv":
            text = io.StringIO(newline="")
            writer = csv.writer(text)
            writer.writerow(("step", "name", "value"))
            writer.writerows((step, *item) for step, numbers in rows for item in numbers.items())
            prepare_folder(self.folder / f"seed-{seed}")
            write_atomic(self.folder / f"{name}.csv", text.getvalue().encode())
        elif self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(self._emptied(name))) as summary:
                for step, numbers in rows:
                    for number, value in numbers.items():
                        summary.add_scalar(number, value, step)
        elif self.kind == "wandb":
            self._write_wandb(name, rows)
        else:
            make: Callable[[Path, str], Logger] = by_name("tracking", self.kind)
            _logged(make(self.folder, name), rows)

    def _emptied(self, name: str) -> Path:
        folder = self.folder / str(self.kind) / name
        with output_errors(folder):
            if folder.exists():
                shutil.rmtree(folder)
        prepare_folder(folder)
        return folder

    def _write_wandb(self, name: str, rows: Rows) -> None:
        let_others_import_torchvision()  # torchmetrics does
        from lightning.pytorch.loggers import WandbLogger

        logger = WandbLogger(name=name, project="metamask", save_dir=self._emptied(name), offline=True, reinit="finish_previous")
        _logged(logger, rows)
        logger.experiment.finish()


def _logged(logger: Logger, rows: Rows) -> None:
    for step, numbers in rows:
        logger.log_metrics(numbers, step)
    logger.finalize("success")
