"""Sweeps: an experiment with every combination of some values, side by side, in one table: ``metamask run NAME --multirun``."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import closing, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..files.atomic import prepare_folder, write_atomic
from ..files.lock import locked_run
from .catalogue import EXPERIMENTS, Entry, run, settings_of
from .engine.assignments import assigned, merged, nested, text_of
from .engine.claims import Metrics, by_method
from .engine.clusters import PACKAGES, workers_of
from .engine.executors import Origin, Workers, cores, installed
from .engine.jobs import Job, Json, Key
from .engine.settings import Changes, OptionError, Value
from .engine.tables import Rows, cells
from .engine.tracking import Tracking

TABLE = "sweep.csv"
LONGEST = 100
"""Letters of a folder's name."""


class Run(NamedTuple):
    """One run of a sweep.

    Attributes:
        folder: its name.
        values: of the settings that the sweep changes, by name.
        changes: of settings, all that were asked for.
    """

    folder: str
    values: Mapping[str, Value]
    changes: Json


def planned(
    name: str,
    sets: Sequence[str],
    quick: bool = False,
    config: str | Path | None = None,
    changes: Changes | None = None,
) -> list[Run]:
    """The runs of a sweep, each with settings that can be.

    Args:
        name: of the experiment.
        sets: ``setting=value,value``, see :func:`metamask_ext.experiments.engine.assignments.assigned`.
        quick, config, changes: as :func:`metamask_ext.experiments.catalogue.settings_of` takes them.

    Raises:
        ValueError: the experiment is unknown.
        OptionError: a setting is unknown, of another type, or also in ``changes``.
    """
    changes = changes or {}
    # Which settings there are may depend on a choice among them ("rotated").
    values = assigned(name, settings_of(name, quick, config, changes), sets)
    for key in values:
        if key.split(".")[0] in changes:
            raise OptionError(f"experiment {name!r}: {key!r} is set twice, by an option of its own and by --set")
    made = []
    for chosen in itertools.product(*values.values()):
        of_run = dict(zip(values, chosen))
        every = merged([changes, *(nested(key, value) for key, value in of_run.items())])
        settings_of(name, quick, config, every)
        made.append(Run(_folder(of_run), of_run, every))
    return made


def sweep(
    name: str,
    out: str | Path,
    sets: Sequence[str],
    seed: int = 0,
    quick: bool = False,
    *,
    config: str | Path | None = None,
    workers: int | None = None,
    executor: str = "local",
    address: str | None = None,
    gpus: float = 0.0,
    tracking: str | None = None,
    **changes: Value,
) -> Rows:
    """Run an experiment with every combination of the values in ``sets``, in ``out/<setting>=<value>,...``.

    The runs are side by side, in processes of their own; ``workers`` are those of all of them together. Each is one of
    :func:`metamask_ext.experiments.catalogue.run`: it resumes after a kill, and is not computed again where it is finished. Times
    among its results are of a busy machine.

    Args:
        name: of the experiment.
        out: the folder of the sweep. ``sweep.csv`` in it has a row for each run that is finished, and each method.
        sets: ``setting=value,value``.
        seed, quick, config, workers, gpus, tracking, changes: as for a run.
        executor: as for a run, but not an executor itself.
        address: of a cluster that exists, which a sweep on Ray or Dask needs: each run connects to it.

    Returns:
        The table: settings, method, and the means of the numbers with their intervals. Its first row is the head.

    Raises:
        The errors of :func:`metamask_ext.experiments.catalogue.run` and :func:`planned`. OptionError leaves nothing written.
        JobError: a run failed; the message names it. What is finished stays.
    """
    runs = planned(name, sets, quick, config, changes)
    if executor in PACKAGES and address is None:
        raise OptionError(f"address must be given for a sweep on {executor}: each run connects to the cluster")
    together = cores() if workers is None else workers
    side_by_side = min(together, len(runs))
    each = None  # A run on a cluster waits here for its jobs, which are there.
    if executor == "local" or (executor not in PACKAGES and workers is not None):
        each = max(1, together // side_by_side)
    with workers_of(executor, each, address, gpus):  # which refuses what cannot be; nothing is started
        Tracking(Path(out), tracking)
    how = {"config": config, "workers": each, "executor": executor, "address": address, "gpus": gpus, "tracking": tracking}
    folder = Path(out)
    jobs: dict[Key, Job] = {
        (seed, one.folder): partial(_run, EXPERIMENTS[name], name, folder / one.folder, seed, quick, how, one.changes)
        for one in runs
    }
    prepare_folder(folder)
    done: dict[str, Metrics] = {}
    with (
        locked_run(folder),
        Workers(side_by_side) as processes,
        closing(processes.compute(jobs, Origin(None, installed(), False))) as results,
    ):
        for result in results:
            if result is not None:
                (_, finished), data, _ = result
                done[finished] = json.loads(data)
                print(f"{len(done)} of {len(runs)} runs: {finished}", flush=True)
                _write(folder / TABLE, runs, done)
    return table(runs, done)


def table(runs: Sequence[Run], done: Mapping[str, Metrics]) -> Rows:
    """A row for each run that is done and each of its methods, for people."""
    columns = _columns(done)
    rows = [[*_texts(one), method, *cells(numbers, columns)] for one, method, numbers in _each(runs, done)]
    return [[*runs[0].values, "method", *columns], *rows]


def _write(path: Path, runs: Sequence[Run], done: Mapping[str, Metrics]) -> None:
    columns = _columns(done)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    of_numbers = [name for column in columns for name in (column, f"{column}, interval")]
    writer.writerow([*runs[0].values, "method", *of_numbers, "folder"])
    for one, method, numbers in _each(runs, done):
        found = [numbers.get(column, {}).get(key, "") for column in columns for key in ("mean", "interval")]
        writer.writerow([*_texts(one), method, *found, one.folder])
    write_atomic(path, text.getvalue().encode())


def _columns(done: Mapping[str, Metrics]) -> list[str]:
    return list(dict.fromkeys(key for metrics in done.values() for numbers in by_method(metrics).values() for key in numbers))


def _each(runs: Sequence[Run], done: Mapping[str, Metrics]) -> list[tuple[Run, str, Metrics]]:
    finished = [one for one in runs if one.folder in done]
    return [(one, method, numbers) for one in finished for method, numbers in by_method(done[one.folder]).items()]


def _texts(one: Run) -> list[str]:
    return [text_of(value) for value in one.values.values()]


def _folder(values: Mapping[str, Value]) -> str:
    """The name of a run's folder: its values; where they cannot be in one, or are long, a checksum says which they are."""
    text = ",".join(f"{key}={text_of(value)}" for key, value in values.items()) or "run"
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "_", text)[:LONGEST]
    if safe == text and not safe.startswith("."):
        return safe
    return f"{safe.lstrip('.')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _run(entry: Entry, name: str, out: Path, seed: int, quick: bool, how: Json, changes: Json) -> Json:
    """Run one; the parts of its metrics that the table is made of."""
    EXPERIMENTS.setdefault(name, entry)  # This process may know fewer of them.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        metrics = run(name, out, seed, quick, **how, **changes)
    return {"results": metrics["results"], "baselines": metrics["baselines"]}
