"""MAML for policies that walk to a goal they are not told: Finn, Abbeel and Levine, arXiv:1703.03400, section 5.3."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..meta import MAML
from .methods import seeded
from .output import STYLES, Output, Scores, first_seeds, new_figure, one_thread, plot_seeds

# The gradient of a mask is that of theta times W * s * (1 - s), which is small: hence its larger rate. 5 learns more slowly.
METHODS: dict[str, dict[str, Any]] = {
    "maml": {"masked": False, "adapt": "weights", "inner_lr": 0.1},
    "masks": {"masked": True, "adapt": "masks", "inner_lr": 20.0},
}
LABELS = {
    "maml": ("weights", "MAML"),
    "masks": ("masks", "MAML on the masks of a masked net (ours)"),
    "pretrained": ("pretrained", "pretrained on all goals"),
    "random": ("independent", "random policy"),
    "straight": ("oracle", "oracle: told the goal, walks straight"),
}
BASELINES = ["pretrained", "random", "straight"]
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "iterations": 60,
    "tasks": 20,
    "episodes": 20,
    "hidden": 64,
    "inner_steps": 1,
    "test_tasks": 60,
}
QUICK: dict[str, Any] = {"iterations": 50, "episodes": 10, "test_tasks": 40}
UPDATES = 3
# The paper tunes the rate of the pretrained policy; here, and of the random one, on goals of their own.
RATES = (0.03, 0.1, 0.3)
SHOWN_GOAL, SHOWN_EPISODES = (0.4, -0.3), 3


@one_thread()
def run(out: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Meta-training by policy gradients through a policy gradient. Measured: the mean return on new goals before and after 1 to 3
    updates on 20 episodes each, against a policy pretrained on all goals, a random one (both at the best of three rates) and an
    oracle. See :func:`metamask_ext.experiments.run`.

    Raises:
        ImportError: gymnasium is not installed.
    """
    try:
        import gymnasium  # noqa: F401  before the work, not after it
    except ImportError as error:
        raise ImportError('gymnasium is not installed: pip install "metamask_ext[experiments]"') from error
    from . import policy_gradient

    seeds = first_seeds(seed, quick)
    output = Output("navigation-2d", out, seed, quick)
    options = {**OPTIONS, **(QUICK if quick else {})}
    settings = {
        "seeds": seeds,
        **options,
        "optimizer": "adam",
        "init": "torch's for W, normal for the masks",
        "methods": METHODS,
        "rates": RATES,
        "updates": UPDATES,
        "discount": policy_gradient.DISCOUNT,
        "lambda": policy_gradient.LAMBDA,
    }
    data = (
        "simulated: from the origin to a goal uniform in [-0.5, 0.5]^2, steps of at most 0.1 in each coordinate, reward minus the "
        "squared distance, 100 steps"
    )
    finished = output.begin(settings, data)
    if finished is not None:
        return finished

    found: dict[str, list[dict[str, Any]]] = {method: [] for method in LABELS}
    for number in seeds:
        for method in LABELS:
            found[method].append(output.piece(number, method, partial(_measured, method, number, options)))

    scores: Scores = {method: {} for method in LABELS}
    intervals: dict[str, dict[str, float]] = {method: {} for method in LABELS}
    for method, runs in found.items():
        for update in range(UPDATES + 1):
            column = f"return, {update} update{'s' if update != 1 else ''}"
            scores[method][column] = [run["returns"][update] for run in runs]
            intervals[method][column] = sum(run["interval"][update] for run in runs) / len(runs)
    more = {
        "interval_95_over_tasks": intervals,
        "curves": {method: [{key: run[key] for key in run if key != "paths"} for run in found[method]] for method in LABELS},
    }
    budget = (
        f"{options['iterations']} steps on {options['tasks']} goals of 2 x {options['episodes']} episodes for MAML, and as many "
        f"episodes for pretraining."
    )
    return output.finish(scores, BASELINES, budget, _figure(found, settings), more)


def _measured(method: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train a method and test it."""
    from .policy_gradient import GaussianPolicy

    if method == "straight":
        return _straight(seed, options)
    chosen = METHODS.get(method, METHODS["maml"])
    policy = seeded(seed, lambda: GaussianPolicy(options["hidden"], chosen["masked"]))
    generator = torch.Generator().manual_seed(seed)
    if method == "pretrained":
        _pretrain(policy, generator, options)
    elif method != "random":
        maml = MAML(policy, chosen["inner_lr"], options["inner_steps"], chosen["adapt"])
        _meta_train(maml, generator, options)
        return _test(maml, seed, options)
    candidates = {rate: MAML(policy, rate, 1, "weights") for rate in RATES}
    tried = {rate: _test(maml, 1_000 + seed, options)["returns"][-1] for rate, maml in candidates.items()}
    return _test(candidates[max(tried, key=lambda rate: tried[rate])], seed, options)


def _meta_train(maml: MAML, generator: torch.Generator, options: dict[str, Any]) -> None:
    from .policy_gradient import adaptation, surrogate

    optimizer = torch.optim.Adam(maml.parameters(), options["lr"])
    for _ in range(options["iterations"]):
        goals = _goals(options["tasks"], generator)
        before, after = adaptation(maml, goals, options["episodes"], 1, generator)
        optimizer.zero_grad()
        maml(surrogate, before.samples(), after.samples()).backward()
        optimizer.step()


def _pretrain(policy: Any, generator: torch.Generator, options: dict[str, Any]) -> None:
    from .policy_gradient import rollout, surrogate

    def act(x: Tensor) -> Tensor:
        return policy(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    optimizer = torch.optim.Adam(policy.parameters(), options["lr"])
    # As many episodes as meta-training has: it takes those before and after the update.
    for _ in range(2 * options["iterations"]):
        x, target = rollout(act, _goals(options["tasks"], generator), options["episodes"], generator).samples()
        optimizer.zero_grad()
        surrogate(act(x), target).backward()
        optimizer.step()


def _goals(tasks: int, generator: torch.Generator) -> Tensor:
    return torch.rand(tasks, 2, generator=generator) - 0.5


def _test(maml: MAML, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """The mean return of new goals after each update, half the width of its 95% interval, and some paths to one goal."""
    from .policy_gradient import adaptation

    generator = torch.Generator().manual_seed(1_000_000 + seed)
    made = adaptation(maml, _goals(options["test_tasks"], generator), options["episodes"], UPDATES, generator)
    shown = adaptation(maml, torch.tensor([SHOWN_GOAL]), options["episodes"], UPDATES, generator)
    return {
        **_summary([episodes.returns for episodes in made]),
        "inner_lr": maml.inner_lr,
        "paths": [episodes.positions[0, :SHOWN_EPISODES].tolist() for episodes in shown],
    }


def _summary(returns: list[Tensor]) -> dict[str, list[float]]:
    means = [each.double().mean(1) for each in returns]
    return {
        "returns": [float(mean.mean()) for mean in means],
        "interval": [float(1.96 * mean.std() / math.sqrt(len(mean))) for mean in means],
    }


def _straight(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """The longest step towards the goal in each coordinate, on the goals of the tests."""
    from .policy_gradient import rollout

    goals = _goals(options["test_tasks"], torch.Generator().manual_seed(1_000_000 + seed))

    def policy(x: Tensor) -> Tensor:
        # Cut by the environment; no noise.
        return torch.cat([10 * (goals[:, None] - x), torch.full_like(x, -math.inf)], -1)

    made = rollout(policy, goals, 1, torch.Generator())
    return {**_summary([made.returns] * (UPDATES + 1)), "inner_lr": None}


def _figure(found: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> Any:
    figure, axes = new_figure(2, rows=2)
    updates = list(range(UPDATES + 1))
    for panel, methods in ((axes[0], list(LABELS)), (axes[1], ["maml", "masks", "pretrained", "straight"])):
        for method in methods:
            style, label = LABELS[method]
            runs = found[method]
            plot_seeds(panel, style, label, updates, [run["returns"] for run in runs])
            if method != "straight":
                means = [sum(run["returns"][update] for run in runs) / len(runs) for update in updates]
                spread = [sum(run["interval"][update] for run in runs) / len(runs) for update in updates]
                panel.errorbar(updates, means, spread, fmt="none", color=STYLES[style]["color"], capsize=3, linewidth=1)
        panel.set(xlabel=f"policy-gradient updates on {settings['episodes']} episodes each", xticks=updates)
        panel.set_ylabel("mean return on new goals")
    axes[0].set_title("all methods", fontsize=10)
    axes[1].set_title("from the first update on, without the random policy", fontsize=9)
    axes[1].set_xlim(0.8, UPDATES + 0.2)
    low = min(run["returns"][1] - run["interval"][1] for method in ("maml", "masks", "pretrained") for run in found[method])
    axes[1].set_ylim(1.1 * low, 0)
    lines = {label: line for line, label in zip(*axes[0].get_legend_handles_labels()) if "range over" not in label}
    note = "bars: 95 % intervals over goals" + ("; bands: range over seeds" if len(found["maml"]) > 1 else "")
    figure.legend(lines.values(), lines, fontsize=8, loc="outside upper center", ncols=3, title=f"mean; {note}", title_fontsize=8)
    for panel, method in zip(axes[2:], ("masks", "pretrained")):
        for update, style in ((0, ":"), (1, "--"), (UPDATES, "-")):
            for number, path in enumerate(found[method][0]["paths"][update]):
                label = f"after {update} update{'s' if update != 1 else ''}" if number == 0 else "_"
                color = {0: "#999999", 1: "#56B4E9", UPDATES: STYLES[LABELS[method][0]]["color"]}[update]
                panel.plot(*zip(*path), style, color=color, linewidth=1.2, label=label)
        panel.plot(*SHOWN_GOAL, "*", color="#D55E00", markersize=14, linestyle="none", label="goal")
        panel.set(xlabel="x (the longest step is 0.1)", ylabel="y", xlim=(-0.4, 0.8), ylim=(-0.7, 0.5), aspect="equal")
        panel.set_title(f"{LABELS[method][1]}: {SHOWN_EPISODES} episodes, seed {settings['seeds'][0]}", fontsize=9)
        panel.legend(fontsize=7)
    return figure
