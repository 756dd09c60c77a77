"""All experiments in turn: ``metamask run all``."""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path

from .catalogue import EXPERIMENTS, module_of, run_with
from .engine.clusters import workers_of
from .engine.jobs import Json, read_results
from .engine.tables import estimate_text

MINUTES = {
    "saturation": 5,
    "linear": 3,
    "sinusoid": 9,
    "sine-cosine": 3,
    "logistic": 3,
    "mnist": 9,
    "colored-mnist": 25,
    "supsup": 9,
    "supsup-rotated": 1,
    "universality": 3,
    "navigation-2d": 3,
    "mae": 12,
    "ewc": 8,
    "transfer": 6,
}
"""About how long a full run takes on two cores, for the remaining time that is shown; others take about ``OTHER_MINUTES``."""
OTHER_MINUTES = 6


def runs() -> dict[str, tuple[str, Json]]:
    """All runs: by the name of the folder the experiment and the settings that are changed."""
    made: dict[str, tuple[str, Json]] = {}
    for name in EXPERIMENTS:
        made[name] = name, {}
        if hasattr(module_of(name), "ROTATED"):
            made[f"{name}-rotated"] = name, {"rotated": True}
    return made


def run_all(
    out: str | Path,
    seed: int = 0,
    quick: bool = False,
    *,
    workers: int | None = None,
    executor: str | Executor = "local",
    address: str | None = None,
    gpus: float = 0.0,
    tracking: str | None = None,
) -> None:
    """Run every experiment in ``out/<name>``; a finished one is not computed again, a killed one resumes. Arguments and errors are
    those of :func:`metamask_ext.experiments.catalogue.run`."""
    todo = runs()
    took = expected = 0.0
    with workers_of(executor, workers, address, gpus) as made:
        for index, (folder, (name, changes)) in enumerate(todo.items()):
            print(f"\n{folder} ({index + 1} of {len(todo)})", flush=True)
            metrics = run_with(made, name, Path(out) / folder, seed, quick, tracking=tracking, **changes)
            took += metrics["duration_s"]
            expected += _minutes(folder)
            left = took / expected * sum(_minutes(each) for each in [*todo][index + 1 :])
            print(f"{index + 1} of {len(todo)} experiments" + (f", {estimate_text(left)} left in all" if left else ""), flush=True)


def finished(folder: Path) -> Json | None:
    """The metrics of the run in ``folder``; None if there is no finished one."""
    path = folder / "metrics.json"
    return read_results(path) if path.exists() else None


def _minutes(folder: str) -> float:
    return MINUTES.get(folder, OTHER_MINUTES)
