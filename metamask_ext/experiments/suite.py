"""All experiments in turn: ``metamask run all``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .catalogue import EXPERIMENTS, module_of, run
from .engine.run_folder import read_json, shown_time

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
}
"""About how long a full run takes on two cores, for the remaining time that is shown; others take about ``OTHER_MINUTES``."""
OTHER_MINUTES = 6


def runs() -> dict[str, tuple[str, dict[str, Any]]]:
    """What there is to run in all: by the name of its folder the experiment and the settings that are changed."""
    made: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in EXPERIMENTS:
        made[name] = name, {}
        if hasattr(module_of(name), "ROTATED"):
            made[f"{name}-rotated"] = name, {"rotated": True}
    return made


def run_all(
    out: str | Path, seed: int = 0, quick: bool = False, *, workers: int | None = None, tracking: str | None = None
) -> None:
    """Every experiment in ``out/<name>``; where one is finished nothing is computed again, a killed one goes on. The arguments, and
    what is raised, are those of :func:`metamask_ext.experiments.run`."""
    todo = runs()
    took = expected = 0.0
    for index, (folder, (name, changes)) in enumerate(todo.items()):
        print(f"\n{folder} ({index + 1} of {len(todo)})", flush=True)
        metrics = run(name, Path(out) / folder, seed, quick, workers=workers, tracking=tracking, **changes)
        took += metrics["duration_s"]
        expected += _minutes(folder)
        left = took / expected * sum(_minutes(each) for each in [*todo][index + 1 :])
        print(f"{index + 1} of {len(todo)} experiments" + (f", {shown_time(left)} left in all" if left else ""), flush=True)


def finished(folder: Path) -> dict[str, Any] | None:
    """The metrics of the run in ``folder``; None if there is no finished one."""
    path = folder / "metrics.json"
    return read_json(path) if path.exists() else None


def _minutes(folder: str) -> float:
    return MINUTES.get(folder, OTHER_MINUTES)
