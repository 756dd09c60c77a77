"""The common study's findings: the numbers that answer its four questions, from a run's metrics."""

from __future__ import annotations

import math
import statistics

from ..engine.claims import Metrics, Numbers
from .new_tasks import FROM_SCRATCH, MASK_ONLY

JUST_LEARNED, AT_THE_END = "in order: just learned", "in order: at the end"
"""Names of scores: of each task, the tasks one after another."""


def trained(metrics: Metrics, method: str) -> float:
    """Question 1: the score on the trained tasks."""
    return statistics.fmean(metrics["study"]["trained"][method])


def new_tasks(metrics: Metrics, method: str, way: str, samples: int) -> float:
    """Question 2: the score on new tasks, learned by this way from so many samples."""
    study = metrics["study"]
    place = study["samples"].index(samples)
    return statistics.fmean(seed[place] for seed in study["new"][method][way])


def needed(metrics: Metrics, method: str, way: str) -> float:
    """Question 2: the fewest samples from which new tasks are learned as well, within the score's margin, as by a fresh plain net
    from the most; infinity if none of the numbers tried is enough."""
    study = metrics["study"]
    fresh = "independent" if "independent" in study["methods"] else "shared"
    score, higher = new_tasks(metrics, fresh, FROM_SCRATCH, study["samples"][-1]), study["score"]["higher_is_better"]
    score -= study["score"]["margin"] if higher else -study["score"]["margin"]
    for samples in study["samples"]:
        found = new_tasks(metrics, method, way, samples)
        if found >= score if higher else found <= score:
            return samples
    return math.inf


def masks_beside_scratch(metrics: Metrics, few: int) -> Numbers:
    """Question 2: the score on new tasks learned by masks alone and by fresh nets, from ``few`` samples and from the most."""
    counts = {"few": few, "many": metrics["study"]["samples"][-1]}
    masks = {f"masks_{key}": new_tasks(metrics, "masked", MASK_ONLY, count) for key, count in counts.items()}
    scratch = {f"scratch_{key}": new_tasks(metrics, "independent", FROM_SCRATCH, count) for key, count in counts.items()}
    return {**counts, **masks, **scratch}


def after_learning(metrics: Metrics, method: str) -> float:
    """Question 3: the score of a task when it was just learned, the tasks in order."""
    return statistics.fmean(value for seed in metrics["study"]["order"][method]["after"] for value in seed)


def at_the_end(metrics: Metrics, method: str) -> float:
    """Question 3: the score of the tasks when all were learned, one after another."""
    return statistics.fmean(value for seed in metrics["study"]["order"][method]["end"] for value in seed)


def in_order(metrics: Metrics, *methods: str) -> Numbers:
    """Question 3 of these methods: ``NAME`` at the end, ``NAME_learned`` when just learned."""
    found = {}
    for name in methods:
        found[name] = at_the_end(metrics, name)
        found[f"{name}_learned"] = after_learning(metrics, name)
    return found


def cost_ratio(metrics: Metrics, method: str) -> float:
    """Question 4: the time of a training step over that of the shared net. ``maml``: of a meta-step on several tasks."""
    times = metrics["study"]["cost"]["milliseconds"]
    return times[method] / times["shared"]
