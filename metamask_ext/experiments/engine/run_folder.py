"""What all experiments do around their work: the folder, the pieces of the work, metrics.json, the table and the figure."""

from __future__ import annotations

import io
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from metamask_ext._info import build_info
from metamask_ext.files.atomic import prepare_folder, write_atomic
from metamask_ext.files.checkpoint import check_same_settings
from metamask_ext.files.errors import OutputError
from metamask_ext.files.lock import locked_run

from .jobs import Job, Key, Place, Workers, cores, file_name, json_bytes
from .settings import OptionError, flat
from .tracking import check_tracking

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; line styles differ too, for print without colour.
STYLES: dict[str, dict[str, Any]] = {
    "masked": {"color": "#0072B2", "linestyle": "-"},
    "shared": {"color": "#D55E00", "linestyle": "--"},
    "independent": {"color": "#009E73", "linestyle": "-."},
    "plain": {"color": "#D55E00", "linestyle": "--"},
    "masks": {"color": "#0072B2", "linestyle": "-"},
    "weights": {"color": "#56B4E9", "linestyle": (0, (5, 1))},
    "both": {"color": "#CC79A7", "linestyle": "-."},
    "pretrained": {"color": "#555555", "linestyle": "--"},
    "oracle": {"color": "#000000", "linestyle": ":"},
    "masks, first order": {"color": "#0072B2", "linestyle": (0, (1, 1)), "marker": "."},
    "weights, first order": {"color": "#56B4E9", "linestyle": (0, (1, 1)), "marker": "."},
    "plain, first order": {"color": "#D55E00", "linestyle": (0, (1, 1)), "marker": "."},
    # Of the common study, and of it the ways to learn a new task by masks
    "hard": {"color": "#CC79A7", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    "lottery": {"color": "#E69F00", "linestyle": (0, (5, 1))},
    "maml": {"color": "#000000", "linestyle": ":"},
    "sequence": {"color": "#999999", "linestyle": "-"},
    "look-up": {"color": "#56B4E9", "linestyle": ":", "marker": "s", "markersize": 4},
    "superposition": {"color": "#56B4E9", "linestyle": "-.", "marker": "^", "markersize": 4},
    "mask only": {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 4},
    "everything": {"color": "#0072B2", "linestyle": "--", "marker": "D", "markersize": 4},
    "pixels": {"color": "#555555", "linestyle": "-."},
}

Scores = dict[str, dict[str, list[float]]]
Figures = Mapping[str, "Figure"]
ELAPSED = "elapsed.json"


class Output:
    """The folder of one run of an experiment.

    ``run.json`` (written first) says which run it is: experiment, seed, settings, versions, data. ``metrics.json`` (written last)
    says the same and the results; where it is, the run is finished. Between them lie ``<experiment>.png``, the pieces of the work
    in ``seed-<seed>`` and ``elapsed.json``, how long the run has taken so far.

    Args:
        name: the experiment.
        out: the folder; made if it is missing.
        seed: the first of ``settings["seeds"]`` seeds.
        quick: whether it is called a quick run; what that means is in ``settings``.
        settings: everything that the results depend on, besides the seed; JSON values.
        workers: how many processes compute pieces; None: the cores. With 1, this process does.
        tracking: ``"csv"`` or ``"tensorboard"``, see :mod:`metamask_ext.experiments.tracking`; None: nothing is tracked.
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
        name: str,
        out: Path,
        seed: int,
        quick: bool,
        settings: Mapping[str, Any],
        workers: int | None = None,
        tracking: str | None = None,
        command: str = "",
    ):
        try:
            import matplotlib  # noqa: F401  before the work, not after it
        except ImportError as error:
            raise ImportError('matplotlib is not installed: pip install "metamask_ext[experiments]"') from error
        check_tracking(tracking)
        if workers is not None and workers < 1:
            raise OptionError(f"workers must be at least 1, got {workers}")
        self.name, self.folder, self.quick = name, out, quick
        self.settings = json.loads(json.dumps(dict(settings)))
        self.seeds = list(range(seed, seed + self.settings["seeds"]))
        self._workers = Workers(cores() if workers is None else workers, Place(out, tracking))
        self.console = Console()
        self.resumed = False
        self._command = command
        self.identity: dict[str, Any] = {"experiment": name, "seed": seed, "settings": self.settings}
        self._started, self._before = time.monotonic(), 0.0
        self._lock = ExitStack()
        self._unfinished = False
        self._pieces_done = self._pieces_computed = 0
        self._computing = 0.0

    def begin(self, data: str, note: str = "") -> dict[str, Any] | None:
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
        prepare_folder(self.folder)
        self._lock.enter_context(locked_run(self.folder))
        info = build_info()
        self.identity |= {
            "data": data,
            "versions": {"metamask_ext": info["version"], "torch": torch.__version__, "python": platform.python_version()},
            "build_info": info,
        }
        self._note = note
        self.say(f"data: {data}" + (f" ({note})" if note else ""))
        run, results = self.folder / "run.json", self.folder / "metrics.json"
        if run.exists():
            check_same_settings(run, flat(read_json(run)), flat(self.identity))
            if results.exists():
                self.say(f"{str(self.folder)!r} holds this run, finished: nothing is computed again")
                metrics = read_json(results)
                self.show(metrics)
                return metrics
            self.resumed = self._unfinished = True
            elapsed = self.folder / ELAPSED
            self._before = read_json(elapsed)["seconds"] if elapsed.exists() else 0.0
            self.say(f"resuming the run in {str(self.folder)!r}")
            return None
        if results.exists():
            raise OutputError(f"{str(results)!r} exists without run.json beside it: use another folder")
        write_atomic(run, json_bytes(self.identity))
        self._unfinished = True
        return None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        if self._unfinished:
            self._save_elapsed()
        self._workers.close()
        self._lock.close()

    def pieces(self, jobs: Mapping[Key, Job], later: int = 0) -> dict[Key, dict[str, Any]]:
        """What each of ``jobs``, by seed and name, returns: a dict of JSON values.

        Each is kept in ``seed-<seed>/<name>.json`` when it is there, so that a killed run goes on behind it. They are computed by
        the workers, processes with one torch thread each, and are the same for any number of these. After each a line says how
        many are done, and about how much time is left.

        Args:
            jobs: functions without arguments; with more than one process they must be picklable: :func:`functools.partial` of a
                function of a module, say.
            later: how many pieces calls after this one will have.

        Raises:
            PieceError: a job raised an error, or its process died; the message names the piece.
        """
        return self._pieces(jobs, later, self._workers)

    def _pieces(self, jobs: Mapping[Key, Job], later: int, workers: Workers) -> dict[Key, dict[str, Any]]:
        paths = {(seed, name): self.folder / f"seed-{seed}" / f"{file_name(name)}.json" for seed, name in jobs}
        if len({*paths.values()}) != len(paths):
            raise ValueError(f"pieces must have names of different files, got {list(jobs)}")
        todo = {key: job for key, job in jobs.items() if not paths[key].exists()}
        self._pieces_done += len(jobs) - len(todo)
        total = self._pieces_done + len(todo) + later
        started, before = time.monotonic(), self._computing
        with closing(workers.compute(todo)) as results:
            for result in results:
                self._computing = before + time.monotonic() - started
                self._save_elapsed()
                if result is None:
                    continue
                key, data = result
                paths[key].parent.mkdir(exist_ok=True)
                write_atomic(paths[key], data)
                self._pieces_done += 1
                self._pieces_computed += 1
                left = (total - self._pieces_done) * self._computing / self._pieces_computed
                self.say(f"{self._pieces_done} of {total} pieces" + (f", {shown_time(left)} left" if left else ""))
        return {key: read_json(path) for key, path in paths.items()}

    def piece(self, seed: int, name: str, job: Job, later: int = 0) -> dict[str, Any]:
        """One of :meth:`pieces`, computed in this process."""
        return self._pieces({(seed, name): job}, later, Workers(1, self._workers.place))[seed, name]

    def finish(
        self,
        scores: Scores,
        baselines: Sequence[str],
        budget: str,
        figure: Figure | Figures | Callable[[Mapping[str, Any]], Figures],
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write the figure, then ``metrics.json``, and show the table.

        Args:
            scores: for each method and name of a number (with its unit), the values of each seed.
            baselines: which of the methods are baselines.
            budget: data and steps that each method had, in words.
            figure: written as ``<experiment>.png``; several by name as ``<experiment>-<name>.png`` (the name may be empty); or a
                function of the metrics that makes these.
            more: further entries of ``metrics.json``.
        """
        summary = {method: {key: summarized(values) for key, values in numbers.items()} for method, numbers in scores.items()}
        metrics = {
            **self.identity,
            "quick": self.quick,
            "seeds": self.seeds,
            "data_note": self._note,
            "budget": budget,
            "results": {method: numbers for method, numbers in summary.items() if method not in baselines},
            "baselines": {method: summary[method] for method in baselines},
            **(more or {}),
            "machine": machine(),
            "workers": self._workers.count,
            "command": self._command,
            "duration_s": round(self._elapsed(), 3),
            "resumed": self.resumed,
        }
        metrics = json.loads(json_bytes(metrics))
        made = figure(metrics) if callable(figure) else figure
        files = write_figures(self.folder, self.name, made)
        write_atomic(self.folder / "metrics.json", json_bytes(metrics))
        self._unfinished = False
        self.show(metrics)
        self.say(f"wrote metrics.json and {', '.join(files)} to {str(self.folder)!r} in {metrics['duration_s']:.1f} s")
        return metrics

    def show(self, metrics: Mapping[str, Any]) -> None:
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
        write_atomic(self.folder / ELAPSED, json_bytes({"seconds": round(self._elapsed(), 3)}))


def summarized(values: Sequence[float]) -> dict[str, Any]:
    """The mean of one number over seeds, its extremes, the values; of several seeds also the half width of the mean's interval."""
    summary = {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "values": list(values)}
    return summary if len(values) == 1 else {**summary, "interval": half_width(values)}


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean: Student's t, the values independent and normal."""
    from scipy.special import stdtrit

    return float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / len(values) ** 0.5


def table_of(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The head of the common table and its rows, one a method."""
    methods = {**metrics["results"], **metrics["baselines"]}
    columns = list(dict.fromkeys(key for numbers in methods.values() for key in numbers))
    rows = [[method, *(cell(numbers[key]) if key in numbers else "-" for key in columns)] for method, numbers in methods.items()]
    return ["method", *columns], rows


def cell(number: Mapping[str, Any]) -> str:
    """A mean over seeds, with its interval if there are several."""
    return f"{number['mean']:.4g}" + (f" ± {number['interval']:.2g}" if "interval" in number else "")


def seeds_text(metrics: Mapping[str, Any]) -> str:
    """What the numbers of a run are."""
    seeds = metrics["seeds"]
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of seeds {seeds[0]} to {seeds[-1]} ± 95 % interval"


def shown_time(seconds: float) -> str:
    """A time that is not known well."""
    if seconds < 100:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


def machine() -> dict[str, Any]:
    """What the run was computed on."""
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


def write_figures(folder: Path, name: str, figures: Figure | Figures) -> list[str]:
    """Write them as ``<name>.png``, or ``<name>-<key>.png`` by key; the names of the files."""
    by_key = figures if isinstance(figures, Mapping) else {"": figures}
    files = {f"{name}-{key}.png" if key else f"{name}.png": figure for key, figure in by_key.items()}
    for file, figure in files.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=200)
        write_atomic(folder / file, image.getbuffer())
    return list(files)


def plot_seeds(
    axes: Axes,
    method: str,
    label: str,
    steps: Sequence[float],
    values: Sequence[Sequence[float]],
    geometric: bool = False,
    **style: Any,
) -> None:
    """The mean of ``values`` (a curve for each seed); with several also a band, the 95 % interval of the mean at each step.

    ``method`` is one of ``STYLES``; ``style`` is changed in it. ``geometric``: mean and interval are of the logarithms, for a
    logarithmic axis; the values must be positive.
    """
    forth, back = (math.log, math.exp) if geometric else (float, float)
    points = [[forth(value) for value in of_seeds] for of_seeds in zip(*values)]
    means = [statistics.fmean(of_seeds) for of_seeds in points]
    style = {"linewidth": 1.8, **STYLES[method], **style}
    axes.plot(steps, [back(mean) for mean in means], label=label, **style)
    if len(values) > 1:
        widths = [half_width(of_seeds) for of_seeds in points]
        low, high = ([back(mean + sign * width) for mean, width in zip(means, widths)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)


def bands(seeds: int, drawn: str = "bands") -> str:
    """What the lines of :func:`plot_seeds` are, for a legend's title; ``drawn``: what the intervals are drawn as."""
    return f"mean over seeds; {drawn}: its 95 % interval" if seeds > 1 else "one seed"


def new_figure(panels: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with ``rows`` rows of ``panels`` axes each, for print; not registered with pyplot, which would keep it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * panels, 3.8 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, panels, squeeze=False).flatten())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. OutputError if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {str(path)!r}: {error}") from error
