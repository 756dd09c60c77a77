"""What all experiments do around their work: the folder, metrics.json, the table and the figure."""

from __future__ import annotations

import io
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from .._info import build_info
from ..continual.files import OutputError, check_same_settings, prepare_folder, write_atomic

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
    "pixels": {"color": "#555555", "linestyle": "-."},
}

Scores = dict[str, dict[str, list[float]]]


class Output:
    """The folder of one run of an experiment.

    ``run.json`` (written first) says which run it is: experiment, seed, settings, versions, data. ``metrics.json`` (written last)
    says the same and the results; where it is, the run is finished. Between them lie ``<experiment>.png`` and the folders of the
    training loops, each with a checkpoint and ``metrics.jsonl``.

    Args:
        name: the experiment.
        out: the folder; made if it is missing.
        seed, quick: as given by the user.

    Raises:
        OutputError: the folder cannot be written.
        ImportError: matplotlib is not installed.
    """

    def __init__(self, name: str, out: Path, seed: int, quick: bool):
        try:
            import matplotlib  # noqa: F401  before the work, not after it
        except ImportError as error:
            raise ImportError('matplotlib is not installed: pip install "metamask_ext[experiments]"') from error
        prepare_folder(out)
        self.name, self.folder = name, out
        self.console = Console()
        self.identity: dict[str, Any] = {"experiment": name, "seed": seed, "quick": quick}
        self.resumed = False
        self._started = time.monotonic()

    def begin(self, settings: Mapping[str, Any], data: str, note: str = "") -> dict[str, Any] | None:
        """Take the folder for a run with these settings.

        Args:
            settings: everything that the results depend on, besides the seed; JSON values.
            data: what the data are, in words.
            note: why these data; shown and kept, but not compared.

        Returns:
            None if there is work to do; the metrics of a finished run, which are shown once more.

        Raises:
            CheckpointError: the folder holds another run; the message names the first difference.
            OutputError: it holds results, but not what run they are of.
        """
        info = build_info()
        self.identity |= {
            "settings": json.loads(json.dumps(dict(settings))),
            "data": data,
            "versions": {"metamask_ext": info["version"], "torch": torch.__version__, "python": platform.python_version()},
            "build_info": info,
        }
        self._note = note
        self.say(f"data: {data}" + (f" ({note})" if note else ""))
        run, results = self.folder / "run.json", self.folder / "metrics.json"
        if run.exists():
            check_same_settings(run, _flat(read_json(run)), _flat(self.identity))
            if results.exists():
                self.say(f"{str(self.folder)!r} holds this run, finished: nothing is computed again")
                metrics = read_json(results)
                self.show(metrics)
                return metrics
            self.resumed = True
            self.say(f"resuming the run in {str(self.folder)!r}")
            return None
        if results.exists():
            raise OutputError(f"{str(results)!r} exists without run.json beside it: use another folder")
        write_atomic(run, json_bytes(self.identity))
        return None

    def finish(
        self,
        scores: Scores,
        baselines: Sequence[str],
        budget: str,
        figure: Figure | Mapping[str, Figure],
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write the figure, then ``metrics.json``, and show the table.

        Args:
            scores: for each method and name of a number (with its unit), the values of each seed.
            baselines: which of the methods are baselines.
            budget: data and steps that each method had, in words.
            figure: written as ``<experiment>.png``; several by name as ``<experiment>-<name>.png``.
            more: further entries of ``metrics.json``.
        """
        summary = {
            method: {
                key: {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "values": values}
                for key, values in numbers.items()
            }
            for method, numbers in scores.items()
        }
        metrics = {
            **self.identity,
            "data_note": self._note,
            "budget": budget,
            "results": {method: numbers for method, numbers in summary.items() if method not in baselines},
            "baselines": {method: summary[method] for method in baselines},
            **(more or {}),
            "duration_s": round(time.monotonic() - self._started, 3),
            "resumed": self.resumed,
        }
        several = {f"-{key}": each for key, each in figure.items()} if isinstance(figure, Mapping) else {"": figure}
        files = {f"{self.name}{suffix}.png": each for suffix, each in several.items()}
        for file, each in files.items():
            image = io.BytesIO()
            each.savefig(image, format="png", dpi=200)
            write_atomic(self.folder / file, image.getbuffer())
        write_atomic(self.folder / "metrics.json", json_bytes(metrics))
        self.show(metrics)
        self.say(f"wrote metrics.json and {', '.join(files)} to {str(self.folder)!r} in {metrics['duration_s']:.1f} s")
        return metrics

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Print the results as a table: the mean over seeds, and the range if there are several."""
        methods = {**metrics["results"], **metrics["baselines"]}
        columns = list(dict.fromkeys(key for numbers in methods.values() for key in numbers))
        seeds = metrics["settings"]["seeds"]
        seed_text = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of {len(seeds)} seeds from {seeds[0]} (lowest to highest)"
        self.say(f"{metrics['experiment']}: {seed_text}")
        table = Table()
        table.add_column("method")
        for key in columns:
            table.add_column(key, justify="right")
        for method, numbers in methods.items():
            table.add_row(method, *(_cell(numbers[key]) if key in numbers else "-" for key in columns))
        self.console.print(table)
        self.say(f"budget: {metrics['budget']}")

    def piece(self, seed: int, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What ``measure()`` gives, JSON values; kept in ``seed-<seed>/<name>.json``, so that a killed run goes on behind it."""
        path = self.folder / f"seed-{seed}" / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json_bytes(measure()))
        return read_json(path)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def first_seeds(seed: int, quick: bool) -> list[int]:
    """The seeds of a run: five, or one if it is quick."""
    return list(range(seed, seed + (1 if quick else 5)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: these models gain nothing from more, and their results then do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def plot_seeds(axes: Axes, method: str, label: str, steps: Sequence[float], values: Sequence[Sequence[float]]) -> None:
    """The mean of ``values`` (a curve for each seed), and a band from the lowest to the highest if there are several."""
    curves = torch.tensor(values, dtype=torch.float64)
    style = STYLES[method]
    axes.plot(steps, curves.mean(0).tolist(), label=label, linewidth=1.8, **style)
    if len(curves) > 1:
        low, high = curves.amin(0).tolist(), curves.amax(0).tolist()
        band = f"its range over {len(curves)} seeds"
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0, label=band)


def new_figure(panels: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with ``rows`` rows of ``panels`` axes each, for print; not registered with pyplot, which would keep it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * panels, 3.8 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, panels, squeeze=False).flatten())


def _cell(number: Mapping[str, Any]) -> str:
    if len(number["values"]) == 1:
        return f"{number['mean']:.4g}"
    return f"{number['mean']:.4g} ({number['min']:.4g} to {number['max']:.4g})"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, ``settings.lr``, so that a message can name one."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: item for name in value for key, item in _flat(value[name], f"{prefix}.{name}" if prefix else name).items()}


def json_bytes(value: Any) -> bytes:
    """``value`` as a JSON file. ValueError if a number in it is not finite."""
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. OutputError if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {str(path)!r}: {error}") from error
