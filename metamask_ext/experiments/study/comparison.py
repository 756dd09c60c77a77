"""The common study of the proposal's experiments: seven methods, four questions (Blum and Law, EE5239, 2020, section 3).

Methods: ``masked`` (``W * sigmoid(M_task)``, section 2.1), ``hard`` (``W * 1[M_task > 0]``), ``lottery`` (the same with frozen
random W: section 2's reading of the lottery ticket hypothesis), ``shared`` (one net), ``independent`` (a net for each task),
``maml`` (arXiv:1703.03400), ``sequence`` (one net, fine-tuned on task after task).

Questions: how good on the trained tasks; how good on new tasks, from how many samples, by which way; what is forgotten when tasks
come one after another; what a training step costs.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..engine.run_folder import Output
from . import methods as methods_
from .methods import FORGETTING, METHODS
from .new_tasks import new_task_scores
from .problem import Problem, Score, TaskData
from .report import (
    AT_THE_END,
    JUST_LEARNED,
    after_learning,
    at_the_end,
    cost_claim,
    cost_ratio,
    figure,
    needed,
    new_tasks,
    tables,
    trained,
)

__all__ = [
    "BASELINES",
    "METHODS",
    "Problem",
    "Score",
    "Study",
    "TaskData",
    "after_learning",
    "at_the_end",
    "cost_claim",
    "cost_ratio",
    "figure",
    "grid",
    "needed",
    "new_tasks",
    "run",
    "settings",
    "tables",
    "trained",
]

SHORTEST_S = 0.02
"""How long a method is timed at least before the next one."""
BASELINES = ("shared", "independent", "maml", "sequence")
MakeProblem = Callable[[int, Mapping[str, Any]], Problem]


def grid(**values: list[float]) -> list[dict[str, float]]:
    """All combinations of these values, the first of each first."""
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


def settings(grid: Mapping[str, Sequence[Mapping[str, float]]], **changes: Any) -> dict[str, Any]:
    """The entry ``study`` of an experiment's SETTINGS.

    Args:
        grid: for each method the configurations tried, as many for each: ``lr`` (of W) and, with masks, ``mask_lr``, or other
            options of the loop; ``lottery``: ``mask_lr`` and ``scale``, a factor of the frozen weights; ``maml``: ``lr`` and
            ``inner_lr``. A run without tuning takes the first.
        changes: of the values below; ``maml`` and ``new`` are merged.
    """
    if len({len(configs) for configs in grid.values()}) != 1:
        raise ValueError(f"grid must have as many configurations for each method, got { ({k: len(v) for k, v in grid.items()}) }")
    made: dict[str, Any] = {
        "tuning": True,
        "optimizer": "adam",
        "round_steps": 10,
        "batch": 32,
        "weight_decay": 0.0,
        "cost_rounds": 20,
        "maml": {"tasks": 5, "inner_steps": 3, "samples": 100, "first_order": False},
        "new": {
            "samples": [1, 3, 10, 30, 100, 300, 1000],
            "steps": 500,
            "batch": 32,
            "rates": {
                "superposition": [0.1, 0.03, 0.01, 0.3],
                "mask only": [0.3, 0.1, 0.03, 1.0],
                "everything": [0.1, 0.03, 0.01, 0.003],
                "from scratch": [0.1, 0.03, 0.01, 0.003],
                "inner steps": [1.0, 0.5, 0.2, 0.1],
            },
        },
        "grid": {name: [dict(config) for config in configs] for name, configs in grid.items()},
    }
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(value, Mapping) else value
    return made


@dataclass(frozen=True)
class Study:
    """What the study found, as :meth:`Output.finish` takes it.

    Attributes:
        scores, baselines, budget, more: its arguments. ``more["study"]`` holds what tables and figures are made of.
        examined: what ``Problem.examine`` gave: by method, for each seed.
    """

    scores: dict[str, dict[str, list[float]]]
    baselines: list[str]
    budget: str
    more: dict[str, Any]
    examined: dict[str, list[dict[str, Any]]]


def run(
    output: Output,
    settings: Mapping[str, Any],
    problem: MakeProblem,
    score: Score,
    methods: tuple[str, ...] = METHODS,
    *,
    later: int = 0,
) -> Study:
    """Compare the methods on a problem.

    Args:
        output: of the experiment.
        settings: of the experiment: ``tasks``, ``steps`` (gradient steps, of all tasks together) and ``study``, as
            :func:`settings` makes it.
        problem: a function of a module (it is called in other processes): ``problem(seed, settings)``.
        score: what ``Problem.score`` computes.
        methods: which of ``METHODS``; with one task, ``shared``, ``independent`` and ``sequence`` are the same net.
        later: how many pieces the experiment computes after the study, for the remaining time that is shown.
    """
    given = (problem, settings, score)
    in_order = [name for name in methods if name in FORGETTING and settings["tasks"] > 1]
    seeds = output.seeds
    chosen, tuning = _tuned(output, given, methods, len(seeds) * len([*methods, *in_order]) + 1 + later)
    jobs: dict[tuple[int, str], Callable[[], Mapping[str, Any]]] = {}
    for seed in seeds:
        for name in methods:
            jobs[seed, name] = partial(_measure, given, name, chosen[name], seed, tuning["rates"][name])
        for name in in_order:
            jobs[seed, f"{name}, in order"] = partial(_measure_in_order, given, name, chosen[name], seed)
    found = output.pieces(jobs, later=1 + later)
    # By itself: other processes would change the times.
    cost = output.piece(seeds[0], "cost", partial(_cost, given, methods, chosen, seeds[0]), later)

    by_seed = {name: [found[seed, name] for seed in seeds] for name in methods}
    scores = {name: {score.name: [statistics.fmean(piece["trained"]) for piece in by_seed[name]]} for name in methods}
    order = {
        name: {key: [found[seed, f"{name}, in order"][key] for seed in seeds] for key in ("after", "end", "earlier")}
        for name in in_order
    }
    for name, kept in order.items():
        scores[name][JUST_LEARNED] = [statistics.fmean(each) for each in kept["after"]]
        scores[name][AT_THE_END] = [statistics.fmean(each) for each in kept["end"]]
    more = {
        "study": {
            "score": {"name": score.name, "unit": score.unit, "higher_is_better": score.higher_is_better, "margin": score.margin},
            "methods": list(methods),
            "chosen": chosen,
            **tuning,
            "samples": by_seed[methods[0]][0]["samples"],
            "trained": {name: scores[name][score.name] for name in methods},
            "new": {
                name: {way: [piece["new"][way] for piece in pieces] for way in pieces[0]["new"]} for name, pieces in by_seed.items()
            },
            "order": order,
            "cost": cost,
        }
    }
    examined = {name: [piece["examined"] for piece in pieces] for name, pieces in by_seed.items() if "examined" in pieces[0]}
    return Study(
        scores,
        [name for name in methods if name in BASELINES],
        _budget(settings, methods, more["study"]["samples"]),
        more,
        examined,
    )


Given = tuple[MakeProblem, Mapping[str, Any], Score]


def _tuned(output: Output, given: Given, methods: tuple[str, ...], later: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of each method, and the rates of its ways to learn a new task for each number of samples."""
    study = given[1]["study"]
    counts = study["new"]["samples"]
    if not study["tuning"]:
        chosen = {name: study["grid"][name][0] for name in methods}
        first = {way: [rates[0]] * len(counts) for way, rates in study["new"]["rates"].items()}
        return chosen, {"tuned": {}, "rates": {name: first for name in methods}}
    seed = output.seeds[-1] + 1
    jobs = {
        (seed, f"tuning, {name}, {place}"): partial(_try, given, name, config, seed)
        for name in methods
        for place, config in enumerate(study["grid"][name])
    }
    tried = output.pieces(jobs, later=len(methods) + later)
    tuned = {
        name: [tried[seed, f"tuning, {name}, {place}"]["score"] for place in range(len(study["grid"][name]))] for name in methods
    }
    chosen = {name: study["grid"][name][given[2].best(tuned[name])] for name in methods}
    jobs = {(seed, f"tuning, {name}, new tasks"): partial(_try_new, given, name, chosen[name], seed) for name in methods}
    if "sequence" in methods:
        ends = [tried[seed, f"tuning, sequence, {place}"].get("end") for place in range(len(study["grid"]["sequence"]))]
        tuned["sequence, at the end"] = ends
    ways = output.pieces(jobs, later=later)
    rates = {}
    for name in methods:
        by_way = ways[seed, f"tuning, {name}, new tasks"]["new"]
        rates[name] = {
            way: [study["new"]["rates"][way][given[2].best(list(scores))] for scores in zip(*by_way[way])]
            for way in by_way
            if way in study["new"]["rates"]
        }
    return chosen, {"tuned": tuned, "rates": rates}


def _trained(given: Given, name: str, config: Mapping[str, Any], seed: int) -> tuple[Problem, methods_.Method]:
    make, settings, _ = given
    problem = make(seed, settings)
    method = methods_.method(name, problem, settings, config, seed)
    method.train()
    return problem, method


def _try(given: Given, name: str, config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The score of one configuration on the trained tasks of the tuning seed; none if it diverged.

    Of ``sequence``, each task's when it was just learned: at the end the best rate would be one that learns nothing, and so has
    nothing to forget. The score at the end is kept beside it.
    """
    make, settings, _ = given
    problem = make(seed, settings)
    method = methods_.method(name, problem, settings, config, seed)
    tasks, learned = range(len(problem.train.x)), []
    try:
        if name == "sequence":
            method.train(lambda count: learned.extend(method.scores([count - 1])))
        else:
            method.train()
        end = statistics.fmean(method.scores(tasks))
        return {"score": statistics.fmean(learned) if learned else end, "end": end}
    except FloatingPointError as error:
        return {"score": None, "diverged": str(error)}


def _try_new(given: Given, name: str, config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    problem, method = _trained(given, name, config, seed)
    return {"new": new_task_scores(name, problem, method, given[1]["study"])}


def _measure(given: Given, name: str, config: Mapping[str, Any], seed: int, rates: Mapping[str, list[float]]) -> dict[str, Any]:
    """Questions 1 and 2 for one method and seed."""
    problem, method = _trained(given, name, config, seed)
    measured: dict[str, Any] = {"trained": method.scores(range(len(problem.train.x)))}
    counts = [count for count in given[1]["study"]["new"]["samples"] if count <= problem.new_train.x.shape[1]]
    found = new_task_scores(name, problem, method, given[1]["study"], {way: [each[: len(counts)]] for way, each in rates.items()})
    measured["samples"] = counts
    measured["new"] = {way: scores[0] for way, scores in found.items()}
    for way, scores in measured["new"].items():
        if None in scores:
            raise FloatingPointError(f"{name}, {way}, {counts[scores.index(None)]} samples: the score is not finite")
    if problem.examine is not None and method.model is not None:
        measured["examined"] = dict(problem.examine(name, method.model))
    return measured


def _measure_in_order(given: Given, name: str, config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Question 3: each task's score when it was just learned and at the end, and the mean score of those before the latest."""
    make, settings, _ = given
    problem = make(seed, settings)
    method = methods_.method(name, problem, settings, config, seed)
    scores: list[list[float]] = []
    method.train(lambda learned: scores.append(method.scores(range(learned))))
    earlier = [statistics.fmean(each[:-1]) for each in scores[1:]]
    return {"after": [each[-1] for each in scores], "end": scores[-1], "earlier": earlier}


def _cost(given: Given, methods: tuple[str, ...], chosen: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Question 4: milliseconds of a training step, medians of interleaved measurements."""
    make, settings, _ = given
    problem = make(seed, settings)
    timed = [name for name in ("masked", "hard", "lottery", "shared", "maml") if name in methods]
    made = {name: methods_.method(name, problem, settings, chosen[name], seed) for name in timed}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for each in made.values():
        if isinstance(each, methods_.Loop):  # until it has seen the tasks: a new one costs more
            for _ in range(3 * len(problem.train.x)):
                each.some_steps()
    for _ in range(settings["study"]["cost_rounds"]):
        for name, each in made.items():
            each.some_steps()  # the caches hold what the method before it used
            started, steps, passed = time.perf_counter(), 0, 0.0
            while passed < SHORTEST_S:
                steps += each.some_steps()
                passed = time.perf_counter() - started
            times[name].append(1e3 * passed / steps)
    return {"milliseconds": {name: statistics.median(values) for name, values in times.items()}}


def _budget(settings: Mapping[str, Any], methods: tuple[str, ...], samples: list[int]) -> str:
    study = settings["study"]
    new, tried = study["new"], len(study["grid"][methods[0]])
    parts = [f"{settings['steps']} gradient steps, of {study['batch']} samples each, for all tasks together ({settings['tasks']})"]
    if "independent" in methods:
        parts.append("independent: for each net a task's share of them")
    if "maml" in methods:
        parts.append(
            f"maml: meta-steps on {study['maml']['tasks']} tasks at once, so many fewer, half of the samples support and half "
            f"queries, {study['maml']['inner_steps']} inner steps, on trained tasks from {study['maml']['samples']} samples"
        )
    parts.append(f"new tasks: {new['steps']} steps of Adam on {new['batch']} samples")
    if len(samples) < len(new["samples"]):
        parts.append(f"they have no more than {samples[-1]} samples")
    if study["tuning"]:
        parts.append(
            f"tuning: {tried} configurations of each method, and {max(map(len, new['rates'].values()))} rates of each way to learn "
            "a new task for each number of samples, tried on one further seed with all steps"
        )
        if "sequence" in methods:
            parts.append("sequence is judged there by tasks just learned, the others by the trained tasks")
    else:
        parts.append("the first configuration of each grid, without a search")
    if settings["tasks"] > 1:
        parts.append("tasks in order: the same configurations")
    return "; ".join(parts) + "."
