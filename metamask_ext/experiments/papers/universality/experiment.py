"""Gradient descent as a learner beside a recurrent one: Finn and Levine, arXiv:1710.11622."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.data import SineTasks, sine_tasks
from metamask_ext.experiments.engine.claims import Claim
from metamask_ext.experiments.engine.run_folder import Output, Scores, bands, cell, new_figure, plot_seeds, summarized, table_of
from metamask_ext.experiments.engine.settings import OptionError
from metamask_ext.experiments.engine.training import descend, seeded
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedLinear

from .one_step_learner import OneStepLearner

LABELS = {
    "maml": "MAML",
    "masks": "MAML on the masks of a masked net (ours)",
    "lstm": "LSTM that reads the support set",
    "pretrained": "net pretrained on all tasks, fine-tuned",
    "random": "net with random weights, trained",
}
LINES = {"maml": "weights", "masks": "masks", "lstm": "shared", "pretrained": "pretrained", "random": "independent"}
SETTINGS: dict[str, Any] = {
    "seeds": 5,
    "tasks": 25,
    "steps": 2000,
    "lr": 1e-2,
    "shots": 10,
    "inner_steps": 1,
    "methods": {
        "maml": {"masked": False, "adapt": "weights", "inner_lr": 0.01},
        "masks": {"masked": True, "adapt": "masks", "inner_lr": 0.5},
    },
    "hidden": 40,
    "lstm": {"steps": 4000, "lr": 3e-3, "hidden": 64},
    # Hidden layers and their width: about 1,750 parameters each.
    "depths": {"steps": 800, "inner_lr": 0.003, "widths": {"1": 586, "2": 40, "3": 29, "4": 23, "5": 20}},
    # After how many gradient steps the prediction is tested; amplitudes and phases beyond those of training tasks, [0.1, 5] and
    # [0, pi].
    "test": {
        "tasks": 600,
        "curve_tasks": 200,
        "steps": [0, 1, 2, 3, 5, 10, 20, 50, 100],
        "amplitudes": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0],
        "phases": [0.0, 0.785398, 1.570796, 2.356194, 3.141593, 3.926991, 4.712389, 5.497787, 6.283185],
    },
    "construction": {"bins": 6, "values": [0.25, 0.5, 0.75, 1.0], "inner_lr": 0.1},
}
QUICK: dict[str, Any] = {
    "seeds": 1,
    "steps": 500,
    "lstm": {"steps": 1500},
    "depths": {"steps": 150},
    "test": {"tasks": 200, "curve_tasks": 40},
}
TEST_POINTS = 100
DIVERGED = 1000.0
"""Times what predicting 0 costs: a task with a larger error has diverged, and counts with this one."""

QUESTION = """Is a learner that takes gradient steps weaker than a recurrent one that reads the samples, and does it generalise
better? Finn and Levine (arXiv:1710.11622) prove that one step of gradient descent can be any learner, if the net is deep
enough, and find that it keeps improving beyond what it was trained for; here also with the masks as all that is adapted.
"Outside" are amplitudes of 5 to 10 and phases of pi to 2 pi; there the number is the median over tasks of the MSE over the
signal's mean square, so that 1 is what predicting 0 costs."""


def _errors_of(method: str, metrics: Mapping[str, Any], curve: str) -> dict[int, float]:
    """By the number of gradient steps, the mean over seeds."""
    runs = [run[curve] for run in metrics["curves"][method]]
    return {steps: fmean(values) for steps, values in zip(metrics["settings"]["test"]["steps"], zip(*runs))}


def _further(metrics: Mapping[str, Any], method: str) -> dict[str, float]:
    steps = metrics["settings"]["test"]["steps"]
    errors = _errors_of(method, metrics, "mse")
    return {"before": errors[0], "one": errors[1], "ten": errors[10], "last": errors[steps[-1]], "steps": steps[-1]}


def _last(metrics: Mapping[str, Any], curve: str) -> dict[str, float]:
    """After the most steps, by method; and of the learners what they have after one."""
    last = metrics["settings"]["test"]["steps"][-1]
    found = {method: _errors_of(method, metrics, curve) for method in LABELS}
    return {method: errors[last] for method, errors in found.items()} | {
        "steps": last,
        "maml_one": found["maml"][1],
        "masks_one": found["masks"][1],
    }


def _diverged(metrics: Mapping[str, Any]) -> dict[str, float]:
    last = metrics["settings"]["test"]["steps"][-1]
    shares = {method: _errors_of(method, metrics, "outside, diverged (%)")[last] for method in ("maml", "masks")}
    return {**shares, "steps": last}


def _depths(metrics: Mapping[str, Any]) -> dict[str, float]:
    def of(depth: int, key: str) -> float:
        return fmean(run[key] for run in metrics["curves"][f"depth {depth}"])

    return {"one": of(1, "after"), "told": of(1, "told"), "two": of(2, "after"), "three": of(3, "after")}


def _construction(metrics: Mapping[str, Any]) -> dict[str, float]:
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
        lambda numbers: max(numbers["two"], numbers["told"]) < 0.7 * numbers["one"],
    ),
    Claim(
        "The proof's construction is exact in float64: after one step the outputs differ by at most {error:.1e} from "
        "learners whose "
        "values reach at least {value:.2g}; before it they are {before:g}.",
        _construction,
        lambda numbers: numbers["error"] < 1e-12 < 0.5 < numbers["value"] and numbers["before"] == 0,
    ),
]


class RecurrentLearner(nn.Module):
    """An LSTM that reads the support set; its last state and ``x*`` go through two hidden layers to the prediction."""

    def __init__(self, hidden: int):
        super().__init__()
        self.lstm = nn.LSTM(2, hidden, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(hidden + 1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, support: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """``[T, n, 1]`` for a support set of ``[T, K, 1]`` and ``x`` ``[T, n, 1]``."""
        _, (state, _) = self.lstm(torch.cat(support, -1))
        return self.head(torch.cat([state[0][:, None].expand(-1, x.shape[1], -1), x], -1))


def run(output: Output, settings: dict[str, Any]) -> dict[str, Any]:
    """MAML on sine waves beside a recurrent meta-learner: more gradient steps than in training, tasks outside of the training
    distribution, nets of one to five hidden layers; and the construction of the universality proof, in float64."""
    steps, trained = settings["test"]["steps"], settings["inner_steps"]
    if not {0, trained, 1, 10} <= {*steps} or steps != sorted(steps):
        raise OptionError(f"experiment 'universality': 'test.steps' must ascend and have 0, 1, 10 and {trained}, got {steps}")
    data = (
        "drawn: y = a sin(x - p), a uniform in [0.1, 5], p in [0, pi], x in [-5, 5], no noise; outside of that: a in [5, 10], "
        "p in [pi, 2 pi]"
    )
    finished = output.begin(data)
    if finished is not None:
        return finished

    work = {method: partial(_method, method, settings=settings) for method in LABELS}
    work |= {f"depth {depth}": partial(_depth, int(depth), settings=settings) for depth in settings["depths"]["widths"]}
    made = output.pieces({(seed, name): partial(measure, seed=seed) for seed in output.seeds for name, measure in work.items()})
    found = {name: [made[seed, name] for seed in output.seeds] for name in work}

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
        "construction": construct(output.seeds[0], settings["construction"]),
    }
    budget = (
        f"{settings['steps']} steps on {settings['tasks']} tasks of 2 x {settings['shots']} samples for MAML and the pretrained "
        f"net, {settings['lstm']['steps']} for the LSTM, which has no gradient steps to take in a task, and "
        f"{settings['depths']['steps']} for each depth."
    )
    return output.finish(scores, ["lstm", "pretrained", "random"], budget, figures, more)


def tables(metrics: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
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


def network(depth: int, width: int, masked: bool = False, inputs: int = 1) -> nn.Sequential:
    """``depth`` hidden layers with ReLU; ``[n, inputs]`` to ``[n, 1]``."""
    linear: Any = MaskedLinear if masked else nn.Linear
    sizes = [inputs] + depth * [width]
    hidden = [module for size in pairwise(sizes) for module in (linear(*size), nn.ReLU())]
    return nn.Sequential(*hidden, linear(width, 1))


Support = tuple[Tensor, Tensor]
Loss = Callable[[SineTasks, Support, Support], Tensor]
Learner = Callable[[SineTasks, Support, Tensor], list[Tensor]]
"""For tasks and their support sets the predictions at ``x`` after each number of test steps."""


def _train(model: nn.Module, loss: Loss, seed: int, settings: dict[str, Any], *, lr: float, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shots = settings["shots"]

    def drawn() -> Tensor:
        tasks = sine_tasks(settings["tasks"], generator)
        x, y = tasks.samples(2 * shots, generator)
        return loss(tasks, (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:]))

    descend(model.parameters(), lr, steps, drawn)


def _method(method: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one of ``LABELS`` and test it."""
    if method == "lstm":
        its = settings["lstm"]
        recurrent = seeded(seed, lambda: RecurrentLearner(its["hidden"]))
        train = partial(_train, recurrent, seed=seed, settings=settings, lr=its["lr"], steps=its["steps"])
        train(lambda tasks, s, q: F.mse_loss(recurrent(s, q[0]), q[1]))
        return _test(seed, lambda tasks, support, x: [recurrent(support, x)] * len(settings["test"]["steps"]), settings)
    chosen = settings["methods"].get(method, settings["methods"]["maml"])
    model = seeded(seed, lambda: network(2, settings["hidden"], chosen["masked"]))
    maml = MAML(model, chosen["inner_lr"], settings["inner_steps"], chosen["adapt"])
    train = partial(_train, model, seed=seed, settings=settings, lr=settings["lr"], steps=settings["steps"])
    if method == "pretrained":
        train(lambda tasks, s, q: F.mse_loss(model(torch.cat([s[0], q[0]])), torch.cat([s[1], q[1]])))
    elif method != "random":
        train(lambda tasks, s, q: maml(F.mse_loss, s, q))
    return _test(seed, _adapting(maml, settings["test"]["steps"]), settings)


def _adapting(maml: MAML, test_steps: list[int]) -> Learner:
    def learner(tasks: SineTasks, support: Support, x: Tensor) -> list[Tensor]:
        parameters = maml.adapt(F.mse_loss, support, steps=0)
        made = [maml.predict(parameters, x)]
        for before, after in pairwise(test_steps):
            parameters = maml.adapt(F.mse_loss, support, steps=after - before, parameters=parameters)
            made.append(maml.predict(parameters, x))
        return made

    return learner


@torch.no_grad()
def _test(seed: int, learner: Learner, settings: dict[str, Any]) -> dict[str, Any]:
    """Errors on new tasks of the training distribution, of one outside of it, and by amplitude and phase."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    test, shots = settings["test"], settings["shots"]
    inside, outside = (sine_tasks(test["tasks"], generator) for _ in range(2))
    outside = SineTasks(5 + outside.amplitude, math.pi + outside.phase)
    errors = _errors(inside, learner, generator, shots)
    relative = [error / _power(outside) for error in _errors(outside, learner, generator, shots)]
    measured: dict[str, Any] = {
        "mse": [float(error.mean()) for error in errors],
        "interval": [float(1.96 * error.std() / math.sqrt(len(error))) for error in errors],
        "outside": [float(error.median()) for error in relative],
        "outside, diverged (%)": [float(100 * (error >= DIVERGED).double().mean()) for error in relative],
        "by amplitude": [],
        "by phase": [],
    }
    for name, values in (("by amplitude", test["amplitudes"]), ("by phase", test["phases"])):
        for value in values:
            tasks = sine_tasks(test["curve_tasks"], generator)
            fixed = torch.full_like(tasks.phase, value)
            tasks = SineTasks(fixed, tasks.phase) if name == "by amplitude" else SineTasks(tasks.amplitude, fixed)
            errors = _errors(tasks, learner, generator, shots)
            measured[name].append([float((error / _power(tasks)).median()) for error in errors])
    return measured


def _power(tasks: SineTasks) -> Tensor:
    """The mean square of each signal over a period, ``[T]``: what predicting 0 costs."""
    return 0.5 * tasks.amplitude.flatten().double().square()


def _errors(tasks: SineTasks, learner: Learner, generator: torch.Generator, shots: int) -> list[Tensor]:
    """Each task's mean squared error for each of the learner's predictions; ``DIVERGED`` times the power where descent diverged."""
    support = tasks.samples(shots, generator)
    x = torch.linspace(-5, 5, TEST_POINTS)[None, :, None].expand(len(tasks.phase), -1, -1)
    errors = [(prediction - tasks(x)).square().mean((1, 2)).double() for prediction in learner(tasks, support, x)]
    most = DIVERGED * _power(tasks)
    return [torch.where(error < most, error, most) for error in errors]


def _depth(depth: int, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """MAML with so many hidden layers, and the same net told amplitude and phase: the errors of new tasks."""
    its, inner_steps, shots = settings["depths"], settings["inner_steps"], settings["shots"]
    width = its["widths"][str(depth)]
    train = partial(_train, seed=seed, settings=settings, lr=settings["lr"], steps=its["steps"])
    model = seeded(seed, lambda: network(depth, width))
    # Wide layers need smaller steps than deep nets: every net learns its rates.
    maml = MAML(model, its["inner_lr"], inner_steps, "weights", learn_inner_lr=True)
    train(maml, lambda tasks, s, q: maml(F.mse_loss, s, q))
    told = seeded(seed, lambda: network(depth, width, inputs=3))
    train(told, lambda tasks, s, q: F.mse_loss(told(_told(tasks, q[0])), q[1]))
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    tasks = sine_tasks(settings["test"]["tasks"], generator)
    with torch.no_grad():
        before, after = _errors(tasks, _adapting(maml, [0, inner_steps]), generator, shots)
        (known,) = _errors(tasks, lambda tasks, support, x: [told(_told(tasks, x))], generator, shots)
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "told": float(known.mean()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _told(tasks: SineTasks, x: Tensor) -> Tensor:
    return torch.cat([x, *(tensor.expand_as(x) for tensor in (tasks.amplitude, tasks.phase))], -1)


@torch.no_grad()
def construct(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Build :class:`OneStepLearner` for learners ``f(x, y, x*)``, take the step for every ``(x, y)`` with
    :class:`metamask_ext.meta.MAML` and compare the output at every ``x*`` with ``f``."""
    bins, lr = settings["bins"], settings["inner_lr"]
    values = torch.tensor(settings["values"], dtype=torch.float64)
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    x, y, x_star = torch.meshgrid(centres, values, centres, indexing="ij")
    generator = torch.Generator().manual_seed(seed)
    learners = {
        "a random table": torch.randn(x.shape, generator=generator, dtype=torch.float64),
        "y cos(2 pi (x - x*))": y * torch.cos(2 * math.pi * (x - x_star)),
        "y where x* is in the bin of x, else 0": y * (x == x_star),
    }
    made: dict[str, Any] = {}
    for name, chosen in learners.items():
        model = OneStepLearner(chosen.movedim(1, 2), values, lr)
        maml = MAML(model, lr, 1, adapt="weights")
        # A task for each (x, y), its queries all x*.
        parameters = maml.adapt(F.mse_loss, (x[:, :, 0].reshape(-1, 1, 1), y[:, :, 0].reshape(-1, 1, 1)))
        prediction = maml.predict(parameters, x_star.reshape(-1, bins, 1)).reshape(x.shape)
        made[name] = {
            "largest error": float((prediction - chosen).abs().max()),
            "largest value": float(chosen.abs().max()),
            "largest output before the step": float(model(centres[:, None]).abs().max()),
            "at the largest y": prediction[:, -1].tolist(),
        }
    return made


def figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Errors over gradient steps, amplitude, phase and depth, and what one step of the construction computes."""
    settings, found = metrics["settings"], metrics["curves"]
    test, trained = settings["test"], settings["inner_steps"]
    figure, axes = new_figure(3, rows=2)
    for panel, curve in zip(axes, ("mse", "outside")):
        for method, label in LABELS.items():
            plot_seeds(panel, LINES[method], label, test["steps"], [run[curve] for run in found[method]])
        panel.set(xlabel=f"gradient steps (in training: {trained})", xscale="symlog", yscale="log", xticks=test["steps"])
        panel.set_xticklabels([f"{step}" for step in test["steps"]])
    axes[0].set(ylabel="mean MSE (units of y squared)")
    axes[0].set_title(f"new tasks of the training distribution, K = {settings['shots']}", fontsize=10)
    axes[1].set(ylabel="median of MSE / mean square of y")
    axes[1].set_title("tasks outside of it: a in [5, 10], p in [pi, 2 pi]", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    title = bands(len(metrics["seeds"]))
    figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=3, title=title, title_fontsize=8)
    shown = ((axes[2], "by amplitude", test["amplitudes"], 5), (axes[3], "by phase", test["phases"], math.pi))
    for panel, curve, values, limit in shown:
        for method in ("maml", "masks", "lstm"):
            for steps, width in ((trained, 0.5), (test["steps"][-1], 1.0)):
                if method == "lstm" and steps != trained:
                    continue
                label = LABELS[method] if method == "lstm" else f"{LABELS[method]}, {steps} step{'s' if steps > 1 else ''}"
                runs = [[errors[test["steps"].index(steps)] for errors in run[curve]] for run in found[method]]
                plot_seeds(panel, LINES[method], label, values, runs)
                panel.lines[-1].set_alpha(width)
        panel.axvspan(values[0], limit, color="#DDDDDD", zorder=0, linewidth=0)
        panel.set(ylabel="median of MSE / mean square of y", yscale="log")
    axes[2].set(xlabel="amplitude a (grey: in training)")
    axes[3].set(xlabel="phase p, radians (grey: in training)")
    depths = settings["depths"]["widths"]
    by_seed = list(zip(*(found[f"depth {depth}"] for depth in depths)))
    after = f"MAML, rates learned, after {trained} step{'s' if trained > 1 else ''}"
    drawn = (("before", "pretrained", "MAML, before"), ("after", "weights", after), ("told", "oracle", "told amplitude and phase"))
    for key, style, label in drawn:
        plot_seeds(axes[4], style, label, [int(depth) for depth in depths], [[run[key] for run in runs] for runs in by_seed])
    axes[4].set(xlabel="hidden layers, about 1,750 parameters each", ylabel="mean MSE (units of y squared)", yscale="log")
    axes[4].set_xticks([int(depth) for depth in depths])
    name, built = next(iter(metrics["construction"].items()))
    image = axes[5].imshow(built["at the largest y"], cmap="cividis", origin="lower", extent=(0, 1, 0, 1))
    axes[5].set(xlabel="x*, query", ylabel=f"x, support (y = {settings['construction']['values'][-1]:g})")
    axes[5].set_title(f"one gradient step computes {name}: largest error {built['largest error']:.0e}", fontsize=9)
    figure.colorbar(image, ax=axes[5], label="output after the step (no unit)")
    for panel in axes[2:5]:
        panel.legend(fontsize=7, loc="upper left")
        panel.set_ylim(top=10 * panel.get_ylim()[1])
    return {"": figure}
