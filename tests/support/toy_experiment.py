"""An experiment that takes no time, for the tests of what runs experiments: its jobs can be made to fail."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import partial

import torch

from metamask_ext.experiments.engine.claims import Claim, Metrics, mean
from metamask_ext.experiments.engine.figures import Figures, new_figure, plot_seeds
from metamask_ext.experiments.engine.jobs import Json
from metamask_ext.experiments.engine.run_folder import RunFolder
from metamask_ext.experiments.engine.settings import Changes, RunSettings
from metamask_ext.experiments.engine.tracking import track


@dataclass(frozen=True)
class StudySettings:
    lr: float = 0.1
    rates: tuple[float, ...] = (0.1, 1.0)


@dataclass(frozen=True)
class Settings(RunSettings):
    seeds: int = 3
    tasks: int = 2
    steps: int = 4
    study: StudySettings = StudySettings()
    fault: str = ""
    wide: bool = False


@dataclass(frozen=True)
class RotatedSettings(Settings):
    rotated: bool = False


QUICK: Changes = {"seeds": 1, "study": {"lr": 0.2}}
QUESTION = "Does the toy do what toys do (section 0)?"
CLAIMS = [
    Claim(
        "masked has {masked:.3g}, shared {shared:.3g}",
        lambda metrics: {"masked": mean(metrics, "masked", "score (%)"), "shared": mean(metrics, "shared", "score (%)")},
        lambda numbers: numbers["masked"] > numbers["shared"],
    ),
    Claim("shared has more than {limit:.0f}", lambda metrics: {"limit": 1e6}, lambda numbers: False),
]


def run(folder: RunFolder, settings: Settings) -> Json:
    finished = folder.begin("drawn")
    if finished is not None:
        return finished
    methods = ("masked", "shared")
    jobs = {(seed, method): partial(job, seed, method, settings) for seed in folder.seeds for method in methods}
    found = folder.compute(jobs, later=len(folder.seeds))
    extra = folder.compute({(seed, "last one"): partial(job, seed, "last one", settings) for seed in folder.seeds})
    scores = {method: {"score (%)": [found[seed, method]["score"] for seed in folder.seeds]} for method in methods}
    more = {"curves": {method: [found[seed, method]["curve"] for seed in folder.seeds] for method in methods}}
    assert len(extra) == len(folder.seeds)
    return folder.finish(scores, ["shared"], f"{settings.steps} steps", figures, more)


def figures(metrics: Metrics) -> Figures:
    figure, (axes,) = new_figure(1)
    for method, curves in metrics["curves"].items():
        plot_seeds(axes, method, method, range(len(curves[0])), curves)
    return {"": figure}


def job(seed: int, method: str, settings: Settings) -> Json:
    """Numbers that depend on the global generator, as no job should: they must be the same nevertheless."""
    if method == settings.fault.partition(":")[0] and seed == 1:
        fault(settings.fault.partition(":")[2])
    assert torch.get_num_threads() == 1
    curve = [float(value) for value in (10 if method == "masked" else 1) + torch.rand(settings.steps, dtype=torch.float64)]
    for step, value in enumerate(curve):
        track(step, value=value, twice=torch.tensor(2 * value))
    return {"score": curve[-1], "curve": curve}


def fault(kind: str) -> None:
    if kind == "raises":
        raise FloatingPointError("the loss is nan")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exits":
        os._exit(3)
    if kind == "waits":
        time.sleep(600)
