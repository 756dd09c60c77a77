"""Gradient descent as a learner beside a recurrent one: Finn and Levine, arXiv:1710.11622."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..meta import MAML
from ..nn import MaskedLinear
from ..tasks import SineTasks, sine_tasks
from .methods import descend, seeded
from .one_step_learner import OneStepLearner
from .output import Output, Scores, first_seeds, new_figure, one_thread, plot_seeds

METHODS: dict[str, dict[str, Any]] = {
    "maml": {"masked": False, "adapt": "weights", "inner_lr": 0.01},
    "masks": {"masked": True, "adapt": "masks", "inner_lr": 0.5},
}
LABELS = {
    "maml": ("weights", "MAML"),
    "masks": ("masks", "MAML on the masks of a masked net (ours)"),
    "lstm": ("shared", "LSTM that reads the support set"),
    "pretrained": ("pretrained", "net pretrained on all tasks, fine-tuned"),
    "random": ("independent", "net with random weights, trained"),
}
DEPTHS = {1: 586, 2: 40, 3: 29, 4: 23, 5: 20}
"""Hidden layers and their width: about 1,750 parameters each."""
DEPTH_INNER_LR = 0.003
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "lstm_lr": 3e-3,
    "iterations": 2000,
    "lstm_iterations": 4000,
    "depth_iterations": 800,
    "tasks": 25,
    "shots": 10,
    "inner_steps": 1,
    "lstm_hidden": 64,
    "test_tasks": 600,
    "curve_tasks": 200,
}
QUICK: dict[str, Any] = {"iterations": 500, "lstm_iterations": 1500, "depth_iterations": 150, "test_tasks": 200, "curve_tasks": 40}
STEPS = (0, 1, 2, 3, 5, 10, 20, 50, 100)
"""After how many gradient steps the prediction is tested."""
TEST_POINTS = 100
DIVERGED = 1000.0
"""Times what predicting 0 costs: a task with a larger error has diverged, and counts with this one."""
# Of training tasks: amplitudes [0.1, 5], phases [0, pi].
AMPLITUDES = tuple(float(value) for value in range(1, 11))
PHASES = tuple(round(0.25 * value * math.pi, 6) for value in range(9))
BINS, VALUES, CONSTRUCTION_LR = 6, (0.25, 0.5, 0.75, 1.0), 0.1


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


@one_thread()
def run(out: Path, seed: int, quick: bool) -> dict[str, Any]:
    """MAML on sine waves beside a recurrent meta-learner: more gradient steps than in training, tasks outside of the training
    distribution, nets of one to five hidden layers; and the construction of the universality proof, in float64. See
    :func:`metamask_ext.experiments.run`.
    """
    seeds = first_seeds(seed, quick)
    output = Output("universality", out, seed, quick)
    options = {**OPTIONS, **(QUICK if quick else {})}
    settings = {
        "seeds": seeds,
        **options,
        "optimizer": "adam, cosine schedule",
        "init": "torch's for W, normal for the masks",
        "methods": METHODS,
        "depth_inner_lr": DEPTH_INNER_LR,
        "depths": {str(depth): width for depth, width in DEPTHS.items()},
        "test_steps": STEPS,
        "amplitudes": AMPLITUDES,
        "phases": PHASES,
        "construction": {"bins": BINS, "values": VALUES, "inner_lr": CONSTRUCTION_LR},
    }
    data = (
        "drawn: y = a sin(x - p), a uniform in [0.1, 5], p in [0, pi], x in [-5, 5], no noise; outside of that: a in [5, 10], "
        "p in [pi, 2 pi]"
    )
    finished = output.begin(settings, data)
    if finished is not None:
        return finished

    work = {method: partial(_method, method, options=options) for method in LABELS}
    work |= {f"depth {depth}": partial(_depth, depth, options=options) for depth in DEPTHS}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in work}
    for number in seeds:
        for name, measure in work.items():
            found[name].append(output.piece(number, name, partial(measure, seed=number)))
    construction = construct(seed)

    trained = options["inner_steps"]
    scores: Scores = {}
    for method in LABELS:
        for steps in (trained, STEPS[-1]):
            after = f"{steps} step{'s' if steps > 1 else ''}"
            for column, curve in (
                ("MSE", "mse"),
                ("outside: MSE/power", "outside"),
                ("outside: diverged (%)", "outside, diverged (%)"),
            ):
                scores.setdefault(method, {})[f"{column}, {after}"] = [run[curve][STEPS.index(steps)] for run in found[method]]
    more = {
        "interval_95_over_tasks": {method: [run["interval"] for run in found[method]] for method in LABELS},
        "curves": found,
        "construction": construction,
    }
    budget = (
        f"{options['iterations']} steps on {options['tasks']} tasks of 2 x {options['shots']} samples for MAML and the "
        f"pretrained net, {options['lstm_iterations']} for the LSTM, {options['depth_iterations']} for each depth."
    )
    return output.finish(scores, ["lstm", "pretrained", "random"], budget, _figure(found, construction, settings), more)


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


def _train(model: nn.Module, loss: Loss, seed: int, iterations: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(seed)
    shots = options["shots"]

    def drawn() -> Tensor:
        tasks = sine_tasks(options["tasks"], generator)
        x, y = tasks.samples(2 * shots, generator)
        return loss(tasks, (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:]))

    lr = options["lstm_lr" if isinstance(model, RecurrentLearner) else "lr"]
    descend(model.parameters(), lr, iterations, drawn)


def _method(method: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train one of ``LABELS`` and test it."""
    if method == "lstm":
        recurrent = seeded(seed, lambda: RecurrentLearner(options["lstm_hidden"]))
        _train(recurrent, lambda tasks, s, q: F.mse_loss(recurrent(s, q[0]), q[1]), seed, options["lstm_iterations"], options)
        return _test(seed, lambda tasks, support, x: [recurrent(support, x)] * len(STEPS), options)
    chosen = METHODS.get(method, METHODS["maml"])
    model = seeded(seed, lambda: network(2, DEPTHS[2], chosen["masked"]))
    maml = MAML(model, chosen["inner_lr"], options["inner_steps"], chosen["adapt"])
    if method == "pretrained":
        _train(
            model,
            lambda tasks, s, q: F.mse_loss(model(torch.cat([s[0], q[0]])), torch.cat([s[1], q[1]])),
            seed,
            options["iterations"],
            options,
        )
    elif method != "random":
        _train(model, lambda tasks, s, q: maml(F.mse_loss, s, q), seed, options["iterations"], options)
    return _test(seed, _adapting(maml), options)


def _adapting(maml: MAML, test_steps: tuple[int, ...] = STEPS) -> Learner:
    def learner(tasks: SineTasks, support: Support, x: Tensor) -> list[Tensor]:
        parameters = maml.adapt(F.mse_loss, support, steps=0)
        made = [maml.predict(parameters, x)]
        for before, after in pairwise(test_steps):
            parameters = maml.adapt(F.mse_loss, support, steps=after - before, parameters=parameters)
            made.append(maml.predict(parameters, x))
        return made

    return learner


@torch.no_grad()
def _test(seed: int, learner: Learner, options: dict[str, Any]) -> dict[str, Any]:
    """Errors on new tasks of the training distribution, of one outside of it, and by amplitude and phase."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    inside, outside = sine_tasks(options["test_tasks"], generator), sine_tasks(options["test_tasks"], generator)
    outside = SineTasks(5 + outside.amplitude, math.pi + outside.phase)
    errors = _errors(inside, learner, generator, options)
    relative = [error / _power(outside) for error in _errors(outside, learner, generator, options)]
    measured: dict[str, Any] = {
        "mse": [float(error.mean()) for error in errors],
        "interval": [float(1.96 * error.std() / math.sqrt(len(error))) for error in errors],
        "outside": [float(error.median()) for error in relative],
        "outside, diverged (%)": [float(100 * (error >= DIVERGED).double().mean()) for error in relative],
        "by amplitude": [],
        "by phase": [],
    }
    for name, values in (("by amplitude", AMPLITUDES), ("by phase", PHASES)):
        for value in values:
            tasks = sine_tasks(options["curve_tasks"], generator)
            fixed = torch.full_like(tasks.phase, value)
            tasks = SineTasks(fixed, tasks.phase) if name == "by amplitude" else SineTasks(tasks.amplitude, fixed)
            errors = _errors(tasks, learner, generator, options)
            measured[name].append([float((error / _power(tasks)).median()) for error in errors])
    return measured


def _power(tasks: SineTasks) -> Tensor:
    """The mean square of each signal over a period, ``[T]``: what predicting 0 costs."""
    return 0.5 * tasks.amplitude.flatten().double().square()


def _errors(tasks: SineTasks, learner: Learner, generator: torch.Generator, options: dict[str, Any]) -> list[Tensor]:
    """Each task's mean squared error for each of the learner's predictions; ``DIVERGED`` times the power where descent diverged."""
    support = tasks.samples(options["shots"], generator)
    x = torch.linspace(-5, 5, TEST_POINTS)[None, :, None].expand(len(tasks.phase), -1, -1)
    errors = [(prediction - tasks(x)).square().mean((1, 2)).double() for prediction in learner(tasks, support, x)]
    most = DIVERGED * _power(tasks)
    return [torch.where(error < most, error, most) for error in errors]


def _depth(depth: int, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """MAML with so many hidden layers, and the same net told amplitude and phase: the errors of new tasks."""
    model = seeded(seed, lambda: network(depth, DEPTHS[depth]))
    # Wide layers need smaller steps than deep nets: every net learns its rates.
    maml = MAML(model, DEPTH_INNER_LR, options["inner_steps"], "weights", learn_inner_lr=True)
    _train(maml, lambda tasks, s, q: maml(F.mse_loss, s, q), seed, options["depth_iterations"], options)
    told = seeded(seed, lambda: network(depth, DEPTHS[depth], inputs=3))
    _train(told, lambda tasks, s, q: F.mse_loss(told(_told(tasks, q[0])), q[1]), seed, options["depth_iterations"], options)
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    tasks = sine_tasks(options["test_tasks"], generator)
    with torch.no_grad():
        before, after = _errors(tasks, _adapting(maml, (0, options["inner_steps"])), generator, options)
        (known,) = _errors(tasks, lambda tasks, support, x: [told(_told(tasks, x))], generator, options)
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "told": float(known.mean()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _told(tasks: SineTasks, x: Tensor) -> Tensor:
    return torch.cat([x, *(tensor.expand_as(x) for tensor in (tasks.amplitude, tasks.phase))], -1)


@torch.no_grad()
def construct(seed: int) -> dict[str, Any]:
    """Build :class:`OneStepLearner` for learners ``f(x, y, x*)``, take the step for every ``(x, y)`` with
    :class:`metamask_ext.meta.MAML` and compare the output at every ``x*`` with ``f``."""
    values = torch.tensor(VALUES, dtype=torch.float64)
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    x, y, x_star = torch.meshgrid(centres, values, centres, indexing="ij")
    generator = torch.Generator().manual_seed(seed)
    learners = {
        "a random table": torch.randn(x.shape, generator=generator, dtype=torch.float64),
        "y cos(2 pi (x - x*))": y * torch.cos(2 * math.pi * (x - x_star)),
        "y where x* is in the bin of x, else 0": y * (x == x_star),
    }
    made: dict[str, Any] = {}
    for name, chosen in learners.items():
        model = OneStepLearner(chosen.movedim(1, 2), values, CONSTRUCTION_LR)
        maml = MAML(model, CONSTRUCTION_LR, 1, adapt="weights")
        # A task for each (x, y), its queries all x*.
        parameters = maml.adapt(F.mse_loss, (x[:, :, 0].reshape(-1, 1, 1), y[:, :, 0].reshape(-1, 1, 1)))
        prediction = maml.predict(parameters, x_star.reshape(-1, BINS, 1)).reshape(x.shape)
        made[name] = {
            "largest error": float((prediction - chosen).abs().max()),
            "largest value": float(chosen.abs().max()),
            "largest output before the step": float(model(centres[:, None]).abs().max()),
            "at the largest y": prediction[:, -1].tolist(),
        }
    return made


def _figure(found: dict[str, list[dict[str, Any]]], construction: dict[str, Any], settings: dict[str, Any]) -> Any:
    figure, axes = new_figure(3, rows=2)
    trained = settings["inner_steps"]
    for panel, curve in zip(axes, ("mse", "outside")):
        for method, (style, label) in LABELS.items():
            plot_seeds(panel, style, label, STEPS, [run[curve] for run in found[method]])
        panel.set(xlabel=f"gradient steps (in training: {trained})", xscale="symlog", yscale="log", xticks=STEPS)
        panel.set_xticklabels([f"{step}" for step in STEPS])
    axes[0].set(ylabel="mean MSE (units of y squared)")
    axes[0].set_title(f"new tasks of the training distribution, K = {settings['shots']}", fontsize=10)
    axes[1].set(ylabel="median of MSE / mean square of y")
    axes[1].set_title("tasks outside of it: a in [5, 10], p in [pi, 2 pi]", fontsize=10)
    lines = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    shown = {label: lines[label] for _, label in LABELS.values()}
    bands = " (bands: range over seeds)" if len(found["maml"]) > 1 else ""
    figure.legend(shown.values(), shown, fontsize=8, loc="outside upper center", ncols=3, title=f"mean{bands}", title_fontsize=8)
    for panel, curve, values, limit in ((axes[2], "by amplitude", AMPLITUDES, 5), (axes[3], "by phase", PHASES, math.pi)):
        for method in ("maml", "masks", "lstm"):
            for steps, width in ((trained, 0.5), (STEPS[-1], 1.0)):
                if method == "lstm" and steps == STEPS[-1]:
                    continue
                label = LABELS[method][1] if method == "lstm" else f"{LABELS[method][1]}, {steps} step{'s' if steps > 1 else ''}"
                runs = [[errors[STEPS.index(steps)] for errors in run[curve]] for run in found[method]]
                plot_seeds(panel, LABELS[method][0], label, values, runs)
                panel.lines[-1].set_alpha(width)
        panel.axvspan(values[0], limit, color="#DDDDDD", zorder=0, linewidth=0)
        panel.set(ylabel="median of MSE / mean square of y", yscale="log")
    axes[2].set(xlabel="amplitude a (grey: in training)")
    axes[3].set(xlabel="phase p, radians (grey: in training)")
    depths = list(DEPTHS)
    by_seed = list(zip(*(found[f"depth {depth}"] for depth in depths)))
    after = f"MAML, rates learned, after {trained} step{'s' if trained > 1 else ''}"
    drawn = (("before", "pretrained", "MAML, before"), ("after", "weights", after), ("told", "oracle", "told amplitude and phase"))
    for key, style, label in drawn:
        plot_seeds(axes[4], style, label, depths, [[run[key] for run in runs] for runs in by_seed])
    axes[4].set(
        xlabel="hidden layers, about 1,750 parameters each", ylabel="mean MSE (units of y squared)", yscale="log", xticks=depths
    )
    name, built = next(iter(construction.items()))
    image = axes[5].imshow(built["at the largest y"], cmap="cividis", origin="lower", extent=(0, 1, 0, 1))
    axes[5].set(xlabel="x*, query", ylabel=f"x, support (y = {VALUES[-1]:g})")
    axes[5].set_title(f"one gradient step computes {name}: largest error {built['largest error']:.0e}", fontsize=9)
    figure.colorbar(image, ax=axes[5], label="output after the step (no unit)")
    for panel in axes[2:5]:
        entries = [(handle, label) for handle, label in zip(*panel.get_legend_handles_labels()) if "range over" not in label]
        panel.legend(*zip(*entries), fontsize=7, loc="upper left")
        panel.set_ylim(top=10 * panel.get_ylim()[1])
    return figure
