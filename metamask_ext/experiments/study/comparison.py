"""The common study of the proposal's experiments: its methods, and four questions (Blum and Law, EE5239, 2020, section 3).

Methods: ``masked`` (``W * sigmoid(M_task)``, section 2.1), ``hard`` (``W * 1[M_task > 0]``), ``lottery`` (the same with frozen
random W: section 2's reading of the lottery ticket hypothesis), ``shared`` (one net), ``independent`` (a net for each task),
``maml`` (arXiv:1703.03400), ``sequence`` (one net, fine-tuned on task after task). On request also ``masked+ewc``: ``masked`` with
the tasks in order, W held by elastic weight consolidation (arXiv:1612.00796) where earlier tasks need it.

Questions: how good on the trained tasks; how good on new tasks, from how many samples, by which way; what is forgotten when tasks
come one after another; what a training step costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from ..engine.jobs import Job, Json, Key
from ..engine.run_folder import RunFolder, Scores
from ..engine.settings import as_json
from .findings import AT_THE_END, JUST_LEARNED
from .methods import FORGETTING, METHODS, Loop, Method, method
from .new_tasks import new_task_scores
from .problem import Problem, Score
from .settings import ComparedSettings, Config

SHORTEST_S = 0.02
"""A method is timed for at least so long before the next one."""
BASELINES = ("shared", "independent", "maml", "sequence")
TIMED = ("masked", "hard", "lottery", "shared", "maml")
S = TypeVar("S", bound=ComparedSettings)


@dataclass(frozen=True)
class Question(Generic[S]):
    """The subject of a comparison.

    Attributes:
        problem: a function of a module (it is called in other processes): ``problem(seed, settings)``.
        settings: of the experiment.
        score: the number that ``Problem.score`` computes.
    """

    problem: Callable[[int, S], Problem]
    settings: S
    score: Score

    def untrained(self, name: str, config: Config, seed: int) -> Method:
        """A method on the problem of this seed."""
        return method(name, self.problem(seed, self.settings), self.settings, config, seed)

    def trained(self, name: str, config: Config, seed: int) -> Method:
        """A method that has learned all tasks."""
        made = self.untrained(name, config, seed)
        made.train()
        return made


@dataclass(frozen=True)
class Choice:
    """The configurations that the methods are compared with.

    Attributes:
        configs: by method.
        tuned: by method the score of each configuration of its grid; None: it diverged. Empty without tuning.
        rates: by method and way to learn a new task, the rate for each number of samples.
    """

    configs: Mapping[str, Config]
    tuned: dict[str, list[float | None]]
    rates: Mapping[str, Mapping[str, list[float]]]


@dataclass(frozen=True)
class Study:
    """The results of a comparison, as :meth:`RunFolder.finish` takes them.

    Attributes:
        scores, baselines, budget, more: its arguments. ``more["study"]`` holds what tables and figures are made of.
        configs: those that the methods were compared with.
        examined: the results of ``Problem.examine`` by method, for each seed.
    """

    scores: Scores
    baselines: list[str]
    budget: str
    more: Json
    configs: Mapping[str, Config]
    examined: dict[str, list[Json]]


def run(
    folder: RunFolder,
    settings: S,
    problem: Callable[[int, S], Problem],
    score: Score,
    methods: tuple[str, ...] = METHODS,
    *,
    later: int = 0,
) -> Study:
    """Compare the methods on a problem.

    Args:
        folder: of the run.
        settings: of the experiment.
        problem: see :class:`Question`.
        score: the number that ``Problem.score`` computes.
        methods: which of ``METHODS``; with one task, ``shared``, ``independent`` and ``sequence`` are the same net.
        later: how many jobs the experiment computes after the study, for the remaining time that is shown.
    """
    question, seeds = Question(problem, settings, score), folder.seeds
    in_order = [name for name in methods if name in FORGETTING and settings.tasks > 1]
    choice = _choose(folder, question, methods, len(seeds) * len([*methods, *in_order]) + 1 + later)
    found = folder.compute(_measurements(question, choice, methods, in_order, seeds), later=1 + later)
    # By itself: other processes would change the times.
    cost = folder.compute_here(seeds[0], "cost", partial(_cost, question, methods, choice.configs, seeds[0]), later)

    by_seed = {name: [found[seed, name] for seed in seeds] for name in methods}
    order = {
        name: {key: [found[seed, f"{name}, in order"][key] for seed in seeds] for key in ("after", "end", "earlier")}
        for name in in_order
    }
    samples = by_seed[methods[0]][0]["samples"]
    scores = _scores(score, by_seed, order)
    study = {
        "score": {"name": score.name, "unit": score.unit, "higher_is_better": score.higher_is_better, "margin": score.margin},
        "methods": list(methods),
        "chosen": {name: as_json(config) for name, config in choice.configs.items()},
        "tuned": choice.tuned,
        "rates": choice.rates,
        "samples": samples,
        "trained": {name: scores[name][score.name] for name in methods},
        "new": {name: {way: [job["new"][way] for job in jobs] for way in jobs[0]["new"]} for name, jobs in by_seed.items()},
        "order": order,
        "cost": cost,
    }
    return Study(
        scores,
        [name for name in methods if name in BASELINES],
        _budget(settings, methods, samples),
        {"study": study},
        choice.configs,
        {name: [job["examined"] for job in jobs] for name, jobs in by_seed.items() if "examined" in jobs[0]},
    )


def _scores(score: Score, by_seed: Mapping[str, list[Json]], order: Mapping[str, Mapping[str, list[list[float]]]]) -> Scores:
    """The means over tasks: of all in random order, and of those in order."""
    scores: Scores = {name: {score.name: [statistics.fmean(job["trained"]) for job in jobs]} for name, jobs in by_seed.items()}
    for name, kept in order.items():
        scores[name][JUST_LEARNED] = [statistics.fmean(each) for each in kept["after"]]
        scores[name][AT_THE_END] = [statistics.fmean(each) for each in kept["end"]]
    return scores


def _choose(folder: RunFolder, question: Question[S], methods: tuple[str, ...], later: int) -> Choice:
    """The best configuration of each method on a further seed, and then the best rates of its ways to learn a new task."""
    study = question.settings.study
    if not study.tuning:
        first = {way: [rates[0]] * len(study.new.samples) for way, rates in study.new.rates.items()}
        return Choice({name: study.grid[name][0] for name in methods}, {}, {name: first for name in methods})
    seed = folder.seeds[-1] + 1
    tried = folder.compute(_trials(question, methods, seed), later=len(methods) + later)
    by_place = {name: [tried[seed, _trial_name(name, place)] for place in range(len(study.grid[name]))] for name in methods}
    tuned: dict[str, list[float | None]] = {name: [job["score"] for job in jobs] for name, jobs in by_place.items()}
    configs = {name: study.grid[name][question.score.best(tuned[name])] for name in methods}
    if "sequence" in methods:
        tuned["sequence, at the end"] = [job.get("end") for job in by_place["sequence"]]
    return Choice(configs, tuned, _best_rates(folder, question, configs, seed, later))


def _trials(question: Question[S], methods: tuple[str, ...], seed: int) -> dict[Key, Job]:
    """A job for each configuration in the grid."""
    return {
        (seed, _trial_name(name, place)): partial(_try, question, name, config, seed)
        for name in methods
        for place, config in enumerate(question.settings.study.grid[name])
    }


def _trial_name(name: str, place: int) -> str:
    return f"tuning, {name}, {place}"


def _best_rates(
    folder: RunFolder, question: Question[S], configs: Mapping[str, Config], seed: int, later: int
) -> dict[str, dict[str, list[float]]]:
    """By method and way, the best rate for each number of samples."""
    jobs: dict[Key, Job] = {
        (seed, f"tuning, {name}, new tasks"): partial(_try_new, question, name, config, seed) for name, config in configs.items()
    }
    found = folder.compute(jobs, later=later)
    rates = question.settings.study.new.rates
    best: dict[str, dict[str, list[float]]] = {}
    for name in configs:
        by_way = found[seed, f"tuning, {name}, new tasks"]["new"]
        best[name] = {
            way: [rates[way][question.score.best(list(scores))] for scores in zip(*by_way[way])] for way in by_way if way in rates
        }
    return best


def _try(question: Question[S], name: str, config: Config, seed: int) -> Json:
    """The score of one configuration on the trained tasks of the tuning seed; none if it diverged.

    Of ``sequence``, each task's when it was just learned: at the end the best rate would be one that learns nothing, and so has
    nothing to forget. The score at the end is kept beside it.
    """
    made = question.untrained(name, config, seed)
    learned: list[float] = []
    try:
        if name == "sequence":
            made.train(lambda count: learned.extend(made.scores([count - 1])))
        else:
            made.train()
        end = statistics.fmean(made.scores(range(len(made.problem.train.x))))
        return {"score": statistics.fmean(learned) if learned else end, "end": end}
    except FloatingPointError as error:
        return {"score": None, "diverged": str(error)}


def _try_new(question: Question[S], name: str, config: Config, seed: int) -> Json:
    made = question.trained(name, config, seed)
    return {"new": new_task_scores(name, made.problem, made, question.settings.study.new)}


def _measurements(
    question: Question[S], choice: Choice, methods: tuple[str, ...], in_order: Sequence[str], seeds: Sequence[int]
) -> dict[Key, Job]:
    """A job for each seed and method, and one for each method with tasks in order."""
    jobs: dict[Key, Job] = {}
    for seed in seeds:
        for name in methods:
            jobs[seed, name] = partial(_measure, question, name, choice.configs[name], seed, choice.rates[name])
        for name in in_order:
            jobs[seed, f"{name}, in order"] = partial(_measure_in_order, question, name, choice.configs[name], seed)
    return jobs


def _measure(question: Question[S], name: str, config: Config, seed: int, rates: Mapping[str, list[float]]) -> Json:
    """Questions 1 and 2 for one method and seed."""
    made, new = question.trained(name, config, seed), question.settings.study.new
    problem = made.problem
    measured: Json = {"trained": made.scores(range(len(problem.train.x)))}
    counts = [count for count in new.samples if count <= problem.new_train.x.shape[1]]
    found = new_task_scores(name, problem, made, new, {way: [each[: len(counts)]] for way, each in rates.items()})
    measured["samples"] = counts
    measured["new"] = {way: scores[0] for way, scores in found.items()}
    for way, scores in measured["new"].items():
        if None in scores:
            raise FloatingPointError(f"{name}, {way}, {counts[scores.index(None)]} samples: the score is not finite")
    if problem.examine is not None and made.model is not None:
        measured["examined"] = dict(problem.examine(name, made.model))
    return measured


def _measure_in_order(question: Question[S], name: str, config: Config, seed: int) -> Json:
    """Question 3: each task's score when it was just learned and at the end, and the mean score of those before the latest."""
    made = question.untrained(name, config, seed)
    scores: list[list[float]] = []
    made.train(lambda learned: scores.append(made.scores(range(learned))))
    earlier = [statistics.fmean(each[:-1]) for each in scores[1:]]
    return {"after": [each[-1] for each in scores], "end": scores[-1], "earlier": earlier}


def _cost(question: Question[S], methods: tuple[str, ...], configs: Mapping[str, Config], seed: int) -> Json:
    """Question 4: milliseconds of a training step, medians of interleaved measurements."""
    settings, problem = question.settings, question.problem(seed, question.settings)
    made = {name: method(name, problem, settings, configs[name], seed) for name in TIMED if name in methods}
    times: dict[str, list[float]] = {name: [] for name in made}
    for each in made.values():
        if isinstance(each, Loop):  # until it has seen the tasks: a new one costs more
            for _ in range(3 * len(problem.train.x)):
                each.some_steps()
    for _ in range(settings.study.cost_rounds):
        for name, each in made.items():
            each.some_steps()  # the caches hold what the method before it used
            started, steps, passed = time.perf_counter(), 0, 0.0
            while passed < SHORTEST_S:
                steps += each.some_steps()
                passed = time.perf_counter() - started
            times[name].append(1e3 * passed / steps)
    return {"milliseconds": {name: statistics.median(values) for name, values in times.items()}}


def _budget(settings: ComparedSettings, methods: tuple[str, ...], samples: list[int]) -> str:
    study = settings.study
    new, tried = study.new, len(study.grid[methods[0]])
    parts = [f"{settings.steps} gradient steps, of {study.batch} samples each, for all tasks together ({settings.tasks})"]
    if "independent" in methods:
        parts.append("independent: for each net a task's share of them")
    if "maml" in methods:
        parts.append(
            f"maml: meta-steps on {study.maml.tasks} tasks at once, so many fewer, half of the samples support and half "
            f"queries, {study.maml.inner_steps} inner steps, on trained tasks from {study.maml.samples} samples"
        )
    parts.append(f"new tasks: {new.steps} steps of Adam on {new.batch} samples")
    if len(samples) < len(new.samples):
        parts.append(f"they have no more than {samples[-1]} samples")
    if study.tuning:
        parts.append(
            f"tuning: {tried} configurations of each method, and {max(map(len, new.rates.values()))} rates of each way to learn "
            "a new task for each number of samples, tried on one further seed with all steps"
        )
        if "sequence" in methods:
            parts.append("sequence is judged there by tasks just learned, the others by the trained tasks")
    else:
        parts.append("the first configuration of each grid, without a search")
    if settings.tasks > 1:
        parts.append("tasks in order: the same configurations")
    return "; ".join(parts) + "."
