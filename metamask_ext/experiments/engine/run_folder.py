"""The folder of a run: its lock, its identity, the results of its jobs, and ``metrics.json``."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from metamask_ext._info import build_info
from metamask_ext.files.atomic import output_errors, prepare_folder, sweep, write_atomic
from metamask_ext.files.checkpoint import check_same_settings
from metamask_ext.files.errors import OutputError
from metamask_ext.files.lock import locked_run

from .claims import Metrics
from .executors import Processes, cores
from .figures import Figures, write_figures
from .jobs import (
    CHECKSUM,
    Job,
    Json,
    Key,
    checked_bytes,
    file_name,
    flat,
    json_bytes,
    read_json,
    read_results,
    without_checksum,
)
from .settings import OptionError, RunSettings, as_json
from .statistics import summarized
from .tables import estimate_text, seeds_text, table_of
from .tracking import Tracking

Scores = dict[str, dict[str, list[float]]]
"""By method and name of a number (with its unit), the values of each seed."""
ELAPSED = "elapsed.json"
SHOWN = "seeds", "results", "baselines", "budget"
"""The entries of the metrics, beside the run's identity, that are shown."""


class RunFolder:
    """The folder of one run of an experiment.

    ``run.json`` (written first) says which run it is: experiment, seed, settings, versions, data. ``metrics.json`` (written last)
    says the same and the results; where it is, the run is finished. Between them lie ``<experiment>.png``, the results of the jobs
    in ``seed-<seed>`` and ``elapsed.json``, how long the run has taken so far. A run resumes after a kill, with identical results.
    Results have a checksum each: one that was edited is refused, and one without, of an earlier version, is computed again.

    Args:
        experiment: its name.
        path: the folder; made if it is missing.
        seed: the first of ``settings.seeds`` seeds.
        quick: whether it is called a quick run; what that means is in ``settings``.
        settings: everything that the results depend on, besides the seed.
        workers: how many processes compute jobs; None: the cores. With 1, this process does.
        tracking: ``"csv"`` or ``"tensorboard"``, see :mod:`metamask_ext.experiments.engine.tracking`; None: nothing is tracked.
        command: what the user typed, without the folder.

    Attributes:
        seeds: the seeds of the run.

    Raises:
        OptionError: ``workers`` or ``tracking`` cannot be.
        ImportError: matplotlib or what tracking needs is not installed.

    A context: at its end the workers are ended, and other processes may use the folder.
    """

    def __init__(
        self,
        experiment: str,
        path: Path,
        seed: int,
        quick: bool,
        settings: RunSettings,
        workers: int | None = None,
        tracking: str | None = None,
        command: str = "",
    ):
        try:
            import matplotlib  # noqa: F401  before the work, not after it
        except ImportError as error:
            raise ImportError('matplotlib is not installed: pip install "metamask_ext[experiments]"') from error
        if workers is not None and workers < 1:
            raise OptionError(f"workers must be at least 1, got {workers}")
        self.experiment, self.path, self.quick = experiment, path, quick
        self.seeds = list(range(seed, seed + settings.seeds))
        self.console = Console()
        self.resumed = False
        self.identity: Json = {"experiment": experiment, "seed": seed, "settings": as_json(settings)}
        self._executor = Processes(cores() if workers is None else workers, Tracking(path, tracking))
        self._command = command
        self._started, self._before = time.monotonic(), 0.0
        self._lock = ExitStack()
        self._unfinished = False
        self._jobs_done = self._jobs_computed = 0
        self._computing = 0.0

    def begin(self, data: str, note: str = "") -> Json | None:
        """Take the folder for this run.

        Args:
            data: what the data are, in words.
            note: why these data; shown and kept, but not compared.

        Returns:
            None if there is work to do; the metrics of a finished run, which are shown once more.

        Raises:
            CheckpointError: the folder holds another run; the message names the first difference.
            OutputError: it cannot be written, another process is writing to it, or it holds results of a run that is not named.
        """
        prepare_folder(self.path)
        self._lock.enter_context(locked_run(self.path))
        with output_errors(self.path):
            for folder in (self.path, *self.path.glob("seed-*")):
                if folder.is_dir() and not folder.is_symlink():
                    sweep(folder, lambda name: name.endswith((".json", ".png", ".pt")))
        info = build_info()
        self.identity |= {
            "data": data,
            "versions": {"metamask_ext": info["version"], "torch": torch.__version__, "python": platform.python_version()},
            "build_info": info,
        }
        self._note = note
        self.say(f"data: {data}" + (f" ({note})" if note else ""))
        run, results = self.path / "run.json", self.path / "metrics.json"
        if run.exists():
            check_same_settings(run, flat(without_checksum(read_json(run))), flat(self.identity))
            if results.exists():
                self.say(f"{str(self.path)!r} holds this run, finished: nothing is computed again")
                metrics = self._same_run(results)
                try:
                    self.show(metrics)
                except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:  # what they say is used as it comes
                    raise OutputError(f"{str(results)!r} is not of this version: {error!r:.200}") from error
                return metrics
            self.resumed = self._unfinished = True
            self._before = self._read_elapsed()
            self.say(f"resuming the run in {str(self.path)!r}")
            return None
        if results.exists():
            raise OutputError(f"{str(results)!r} exists without run.json beside it: use another folder")
        write_atomic(run, checked_bytes(self.identity))
        self._unfinished = True
        return None

    def _same_run(self, results: Path) -> Json:
        """The metrics of this run, finished. OutputError if they are another's, or not whole."""
        metrics = read_results(results)
        if missing := [name for name in (*self.identity, *SHOWN) if name not in metrics]:
            raise OutputError(f"{str(results)!r} is not of this version: it lacks {missing[0]!r}")
        check_same_settings(results, flat({name: metrics[name] for name in self.identity}), flat(self.identity))
        return metrics

    def _read_elapsed(self) -> float:
        """The seconds that the run has taken so far. That number is for people: if it is damaged, the run continues without it."""
        path = self.path / ELAPSED
        if not path.exists():
            return 0.0
        try:
            seconds = read_json(path).get("seconds")
        except OutputError as error:
            self.say(f"{error}; the time of the run so far is not known")
            return 0.0
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            self.say(f"{str(path)!r} has the seconds {seconds!r}; the time of the run so far is not known")
            return 0.0
        return float(seconds)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._lock:
            self._executor.close()
            if self._unfinished:
                # Where the run ended by an error, that is the one to know.
                with nullcontext() if kind is None else suppress(OutputError):
                    self._save_elapsed()

    def compute(self, jobs: Mapping[Key, Job], later: int = 0) -> dict[Key, Json]:
        """Compute jobs, by seed and name, except those whose results are in the folder already.

        A result is kept in ``seed-<seed>/<name>.json`` as soon as it is there, so that a killed run resumes behind it. The workers
        are processes with one torch thread each, and the results are the same for any number of them. After each job a line says
        how many are done, and about how much time is left.

        Args:
            jobs: functions without arguments.
            later: the number of jobs that later calls will have.

        Raises:
            JobError: a job raised an error, or its process died; the message names the job.
        """
        return self._compute(jobs, later, self._executor)

    def compute_here(self, seed: int, name: str, job: Job, later: int = 0) -> Json:
        """Compute one job in this process, otherwise as :meth:`compute`."""
        return self._compute({(seed, name): job}, later, Processes(1, self._executor.tracking))[seed, name]

    def _compute(self, jobs: Mapping[Key, Job], later: int, executor: Processes) -> dict[Key, Json]:
        paths = {(seed, name): self.path / f"seed-{seed}" / f"{file_name(name)}.json" for seed, name in jobs}
        if len({*paths.values()}) != len(paths):
            raise ValueError(f"jobs must have names of different files, got {list(jobs)}")
        found = {key: piece for key, path in paths.items() if (piece := _read_piece(path)) is not None}
        todo = {key: job for key, job in jobs.items() if key not in found}
        self._jobs_done += len(jobs) - len(todo)
        total = self._jobs_done + len(todo) + later
        started, before = time.monotonic(), self._computing
        with closing(executor.compute(todo)) as results:
            for result in results:
                self._computing = before + time.monotonic() - started
                self._save_elapsed()
                if result is None:
                    continue
                key, data = result
                with output_errors(paths[key].parent):
                    paths[key].parent.mkdir(exist_ok=True)
                found[key] = json.loads(data)
                write_atomic(paths[key], checked_bytes(found[key]))
                self._jobs_done += 1
                self._jobs_computed += 1
                left = (total - self._jobs_done) * self._computing / self._jobs_computed
                self.say(f"{self._jobs_done} of {total} jobs" + (f", {estimate_text(left)} left" if left else ""))
        return {key: found[key] for key in paths}

    def finish(
        self,
        scores: Scores,
        baselines: Sequence[str],
        budget: str,
        figures: Callable[[Metrics], Figures],
        more: Mapping[str, object] | None = None,
    ) -> Json:
        """Write the figures, then ``metrics.json``, and show the table.

        Args:
            scores: the numbers of the methods.
            baselines: which of the methods are baselines.
            budget: data and steps that each method had, in words.
            figures: makes the figures from the metrics; they are written as ``<experiment>-<name>.png``, ``<experiment>.png``
                where the name is empty.
            more: further entries of ``metrics.json``.
        """
        summary = {method: {key: summarized(values) for key, values in numbers.items()} for method, numbers in scores.items()}
        described = {
            **self.identity,
            "quick": self.quick,
            "seeds": self.seeds,
            "data_note": self._note,
            "budget": budget,
            "results": {method: numbers for method, numbers in summary.items() if method not in baselines},
            "baselines": {method: summary[method] for method in baselines},
            **(more or {}),
            "machine": machine(),
            "workers": self._executor.count,
            "command": self._command,
            "duration_s": round(self._elapsed(), 3),
            "resumed": self.resumed,
        }
        metrics: Json = json.loads(checked_bytes(described))
        files = write_figures(self.path, self.experiment, figures(metrics))
        write_atomic(self.path / "metrics.json", json_bytes(metrics))
        self._unfinished = False
        self.show(metrics)
        self.say(f"wrote metrics.json and {', '.join(files)} to {str(self.path)!r} in {metrics['duration_s']:.1f} s")
        return metrics

    def show(self, metrics: Metrics) -> None:
        """Print the results as a table: the mean over seeds, and its 95 % interval if there are several."""
        columns, rows = table_of(metrics)
        self.say(f"{metrics['experiment']}: {seeds_text(metrics)}")
        table = Table()
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        self.say(f"budget: {metrics['budget']}")

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _elapsed(self) -> float:
        return self._before + time.monotonic() - self._started

    def _save_elapsed(self) -> None:
        write_atomic(self.path / ELAPSED, json_bytes({"seconds": round(self._elapsed(), 3)}))


def _read_piece(path: Path) -> Json | None:
    """The result of a job; None if there is none, or one without a checksum, which is computed again."""
    value = read_json(path) if os.path.lexists(path) else {}
    return without_checksum(value) if CHECKSUM in value else None


def machine() -> Json:
    """The machine of this process, as ``metrics.json`` names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads per process": 1,
        "capability": build_info()["cpu_capability"],
        "torch": torch.__version__,
    }
