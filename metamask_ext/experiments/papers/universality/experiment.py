"""Gradient descent as a learner beside a recurrent one: Finn and Levine, arXiv:1710.11622."""

from __future__ import annotations

from functools import partial
from statistics import fmean

from ...engine.claims import Claim, Metrics, Numbers
from ...engine.jobs import Json
from ...engine.run_folder import RunFolder, Scores
from ...engine.settings import Changes, OptionError
from ...engine.statistics import cell, summarized
from ...engine.tables import Tables, table_of
from .figures import figures
from .learners import LABELS, learn, learn_with_depth
from .one_step_learner import construct
from .settings import Settings

__all__ = ["CLAIMS", "LABELS", "QUESTION", "QUICK", "Settings", "figures", "run", "tables"]

QUICK: Changes = {
    "seeds": 1,
    "steps": 500,
    "lstm": {"steps": 1500},
    "depths": {"steps": 150},
    "test": {"tasks": 200, "curve_tasks": 40},
}
QUESTION = """Is a learner that takes gradient steps weaker than a recurrent one that reads the samples, and does it generalise
better? Finn and Levine (arXiv:1710.11622) prove that one step of gradient descent can be any learner, if the net is deep
enough, and find that it keeps improving beyond what it was trained for; here also with the masks as all that is adapted.
"Outside" are amplitudes of 5 to 10 and phases of pi to 2 pi; there the number is the median over tasks of the MSE over the
signal's mean square, so that 1 is what predicting 0 costs."""


def _errors_of(method: str, metrics: Metrics, curve: str) -> dict[int, float]:
    """By the number of gradient steps, the mean over seeds."""
    runs = [run[curve] for run in metrics["curves"][method]]
    return {steps: fmean(values) for steps, values in zip(metrics["settings"]["test"]["steps"], zip(*runs))}


def _further(metrics: Metrics, method: str) -> Numbers:
    steps = metrics["settings"]["test"]["steps"]
    errors = _errors_of(method, metrics, "mse")
    return {"before": errors[0], "one": errors[1], "ten": errors[10], "last": errors[steps[-1]], "steps": steps[-1]}


def _last(metrics: Metrics, curve: str) -> Numbers:
    """After the most steps, by method; and of the learners what they have after one."""
    last = metrics["settings"]["test"]["steps"][-1]
    found = {method: _errors_of(method, metrics, curve) for method in LABELS}
    return {method: errors[last] for method, errors in found.items()} | {
        "steps": last,
        "maml_one": found["maml"][1],
        "masks_one": found["masks"][1],
    }


def _diverged(metrics: Metrics) -> Numbers:
    last = metrics["settings"]["test"]["steps"][-1]
    shares = {method: _errors_of(method, metrics, "outside, diverged (%)")[last] for method in ("maml", "masks")}
    return {**shares, "steps": last}


def _depths(metrics: Metrics) -> Numbers:
    def of(depth: int, key: str) -> float:
        return fmean(run[key] for run in metrics["curves"][f"depth {depth}"])

    return {"one": of(1, "after"), "told": of(1, "told"), "two": of(2, "after"), "three": of(3, "after")}


def _construction(metrics: Metrics) -> Numbers:
    built = metrics["construction"]
    return {
        "error": max(made["largest error"] for made in built.values()),
        "value": min(made["largest value"] for made in built.values()),
        "before": max(made["largest output before the step"] for made in built.values()),
    }


CLAIMS = [
    Claim(
        "Trained for one step, MAML goes on improving with more: MSE on new tasks {before:.3g} before, {one:.3g} after one, "
        "{ten:.3g} after ten, {last:.3g} after {steps} steps.",
        partial(_further, method="maml"),
        lambda numbers: numbers["last"] < 0.8 * numbers["ten"] < 0.8 * numbers["one"] < 0.4 * numbers["before"],
    ),
    Claim(
        "MAML on masks improves too, most of it in the first ten steps: MSE {before:.3g} before, {one:.3g} after one, {ten:.3g} "
        "after ten, {last:.3g} after {steps} steps.",
        partial(_further, method="masks"),
        lambda n: n["last"] < n["ten"] < 0.8 * n["one"] < 0.4 * n["before"] and n["ten"] - n["last"] < n["one"] - n["ten"],
    ),
    Claim(
        "Within the training distribution the recurrent learner is the better one after as many steps as in training: MSE "
        "{lstm:.3g}, MAML {maml_one:.3g}, on masks {masks_one:.3g}.",
        partial(_last, curve="mse"),
        lambda numbers: numbers["lstm"] < min(numbers["maml_one"], numbers["masks_one"]),
    ),
    Claim(
        "It has no further step to take: outside of the training distribution it stays at {lstm:.3g} of the signal's power; after "
        "{steps} steps MAML is at {maml:.3g}, on masks at {masks:.3g}.",
        partial(_last, curve="outside"),
        lambda numbers: max(numbers["maml"], numbers["masks"]) < 0.5 * numbers["lstm"],
    ),
    Claim(
        "Neither pretraining nor random weights are such starts: MSE {pretrained:.3g} and {random:.3g} after {steps} steps, MAML "
        "{maml:.3g}, on masks {masks:.3g}.",
        partial(_last, curve="mse"),
        lambda numbers: max(numbers["maml"], numbers["masks"]) < numbers["pretrained"] < numbers["random"],
    ),
    Claim(
        "Of the tasks outside {maml:.2g} % diverge within {steps} steps of MAML, {masks:.2g} % of MAML on masks.",
        _diverged,
        lambda numbers: max(numbers["maml"], numbers["masks"]) < 5,
    ),
    Claim(
        "One hidden layer represents the waves when it is told amplitude and phase (MSE {told:.3g}), but cannot learn them in one "
        "gradient step ({one:.3g}); with as many parameters, two can ({two:.3g}), and three ({three:.3g}).",
        _depths,
        lambda numbers: max(numbers["two"], numbers["three"], numbers["told"]) < 0.7 * numbers["one"],
    ),
    Claim(
        "The proof's construction is exact in float64: after one step the outputs differ by at most {error:.1e} from "
        "learners whose "
        "values reach at least {value:.2g}; before it they are {before:g}.",
        _construction,
        lambda numbers: numbers["error"] < 1e-12 < 0.5 < numbers["value"] and numbers["before"] == 0,
    ),
]


def run(folder: RunFolder, settings: Settings) -> Json:
    """MAML on sine waves beside a recurrent meta-learner: more gradient steps than in training, tasks outside of the training
    distribution, nets of one to five hidden layers; and the construction of the universality proof, in float64."""
    steps, trained = settings.test.steps, settings.inner_steps
    if not {0, trained, 1, 10} <= {*steps} or list(steps) != sorted(steps):
        wanted = f"ascend and include 0, 1, 10 and {trained}"
        raise OptionError(f"experiment 'universality': 'test.steps' must {wanted}, got {list(steps)}")
    data = (
        "drawn: y = a sin(x - p), a uniform in [0.1, 5], p in [0, pi], x in [-5, 5], no noise; outside of that: a in [5, 10], "
        "p in [pi, 2 pi]"
    )
    finished = folder.begin(data)
    if finished is not None:
        return finished

    work = {method: partial(learn, method, settings=settings) for method in LABELS}
    work |= {f"depth {depth}": partial(learn_with_depth, int(depth), settings=settings) for depth in settings.depths.widths}
    made = folder.compute({(seed, name): partial(measure, seed=seed) for seed in folder.seeds for name, measure in work.items()})
    found = {name: [made[seed, name] for seed in folder.seeds] for name in work}

    scores: Scores = {}
    for method in LABELS:
        for number in (trained, steps[-1]):
            after = f"{number} step{'s' if number > 1 else ''}"
            for column, curve in (
                ("MSE", "mse"),
                ("outside: MSE/power", "outside"),
                ("outside: diverged (%)", "outside, diverged (%)"),
            ):
                scores.setdefault(method, {})[f"{column}, {after}"] = [run[curve][steps.index(number)] for run in found[method]]
    more = {
        "interval_95_over_tasks": {method: [run["interval"] for run in found[method]] for method in LABELS},
        "curves": found,
        "construction": construct(folder.seeds[0], settings.construction),
    }
    budget = (
        f"{settings.steps} steps on {settings.tasks} tasks of 2 x {settings.shots} samples for MAML and the pretrained "
        f"net, {settings.lstm.steps} for the LSTM, which has no gradient steps to take in a task, and "
        f"{settings.depths.steps} for each depth."
    )
    return folder.finish(scores, ["lstm", "pretrained", "random"], budget, figures, more)


def tables(metrics: Metrics) -> Tables:
    """The common table, and one of the depths."""
    head, rows = table_of(metrics)
    numbers = {"before": "before", "after": "after one step", "told": "told the task"}
    by_depth = [
        [depth, *(cell(summarized([run[key] for run in metrics["curves"][f"depth {depth}"]])) for key in numbers)]
        for depth in metrics["settings"]["depths"]["widths"]
    ]
    title = "By the number of hidden layers, with about as many parameters and learned inner rates: MSE on new tasks"
    return [
        ("", [head, *([LABELS[method], *cells] for method, *cells in rows)]),
        (title, [["hidden layers", *numbers.values()], *by_depth]),
    ]
