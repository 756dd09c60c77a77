"""MAML for policies that walk to a goal they are not told: Finn, Abbeel and Levine, arXiv:1703.03400, section 5.3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metamask_ext.experiments.engine.claims import Claim, mean
from metamask_ext.experiments.engine.run_folder import STYLES, Output, Scores, bands, new_figure, plot_seeds
from metamask_ext.experiments.engine.tracking import track
from metamask_ext.experiments.engine.training import seeded
from metamask_ext.meta import MAML

LABELS = {
    "maml": "MAML",
    "masks": "MAML on the masks of a masked net (ours)",
    "pretrained": "pretrained on all goals",
    "random": "random policy",
    "straight": "oracle: told the goal, walks straight",
}
LINES = {"maml": "weights", "masks": "masks", "pretrained": "pretrained", "random": "independent", "straight": "oracle"}
SHOWN_METHODS = ("masks", "pretrained")
BASELINES = ["pretrained", "random", "straight"]
SETTINGS: dict[str, Any] = {
    "seeds": 5,
    "tasks": 20,
    "steps": 60,
    "lr": 1e-2,
    "episodes": 20,
    "hidden": 64,
    "inner_steps": 1,
    # The gradient of a mask is that of theta times W * s * (1 - s), which is small: hence its larger rate. 5 learns more slowly.
    "methods": {
        "maml": {"masked": False, "adapt": "weights", "inner_lr": 0.1},
        "masks": {"masked": True, "adapt": "masks", "inner_lr": 20.0},
    },
    # The paper tunes the rate of the pretrained policy; here, and of the random one, on goals of their own.
    "rates": [0.03, 0.1, 0.3],
    "advantages": {"discount": 0.99, "gae_lambda": 0.97},
    "test": {"tasks": 60, "updates": 3, "goal": [0.4, -0.3]},
}
QUICK: dict[str, Any] = {"seeds": 1, "steps": 50, "episodes": 10, "rates": [0.1], "test": {"tasks": 40}}
SHOWN_EPISODES = 3

QUESTION = """Can a policy that walks in the plane learn the way to a goal that it is not told, from the rewards of one
update's episodes? This is section 5.3 of Finn, Abbeel and Levine (arXiv:1703.03400), with masks as all that is adapted beside
the paper's MAML. The reward is minus the squared distance (the slides among the seeds), so the numbers are not those of the
paper's figure."""


def column(update: int) -> str:
    """What the return after so many updates is called in the metrics."""
    return f"return, {update} update{'s' if update != 1 else ''}"


def _returns(metrics: Mapping[str, Any], method: str) -> dict[str, float]:
    updates = metrics["settings"]["test"]["updates"]
    of = {name: mean(metrics, method, column(update)) for name, update in (("before", 0), ("one", 1), ("last", updates))}
    return {**of, "updates": updates, "straight": mean(metrics, "straight", column(0))}


def _after_one(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {method: mean(metrics, method, column(1)) for method in LABELS}


CLAIMS = [
    *(
        Claim(
            f"One update of {name} takes the mean return on new goals from {{before:.2f}} to {{one:.2f}}, more than half of "
            f"the way to "
            "the oracle's {straight:.2f}; {updates} updates to {last:.2f}.",
            partial(_returns, method=method),
            lambda numbers: (
                numbers["straight"] - numbers["one"] < 0.5 * (numbers["straight"] - numbers["before"])
                and max(numbers["one"], numbers["last"]) < numbers["straight"]
            ),
        )
        for method, name in (("maml", "MAML"), ("masks", "MAML on masks"))
    ),
    Claim(
        "After one update the pretrained policy is at {pretrained:.2f} and a random one at {random:.2f}, both at the best of "
        "their rates; "
        "MAML is at {maml:.2f}, on masks at {masks:.2f}.",
        _after_one,
        lambda numbers: min(numbers["maml"], numbers["masks"]) > numbers["pretrained"] + 2 > numbers["random"] + 4,
    ),
]


def run(output: Output, settings: dict[str, Any]) -> dict[str, Any]:
    """Meta-training by policy gradients through a policy gradient. Measured: the mean return on new goals before and after 1 to 3
    updates on 20 episodes each, against a policy pretrained on all goals, a random one (both at the best of three rates) and an
    oracle.

    Raises:
        ImportError: gymnasium is not installed.
    """
    try:
        import gymnasium  # noqa: F401  before the work, not after it
    except ImportError as error:
        raise ImportError('gymnasium is not installed: pip install "metamask_ext[experiments]"') from error
    data = (
        "simulated: from the origin to a goal uniform in [-0.5, 0.5]^2, steps of at most 0.1 in each coordinate, reward minus the "
        "squared distance, 100 steps"
    )
    finished = output.begin(data)
    if finished is not None:
        return finished

    made = output.pieces({(seed, method): partial(_measured, method, seed, settings) for seed in output.seeds for method in LABELS})
    found = {method: [made[seed, method] for seed in output.seeds] for method in LABELS}
    scores: Scores = {method: {} for method in LABELS}
    intervals: dict[str, dict[str, float]] = {method: {} for method in LABELS}
    for method, runs in found.items():
        for update in range(settings["test"]["updates"] + 1):
            scores[method][column(update)] = [run["returns"][update] for run in runs]
            intervals[method][column(update)] = sum(run["interval"][update] for run in runs) / len(runs)
    more = {
        "interval_95_over_tasks": intervals,
        "curves": {method: [{key: run[key] for key in run if key != "paths"} for run in found[method]] for method in LABELS},
        "paths of the first seed": {method: found[method][0]["paths"] for method in SHOWN_METHODS},
    }
    budget = (
        f"{settings['steps']} steps on {settings['tasks']} goals of 2 x {settings['episodes']} episodes for MAML, and as many "
        f"episodes for pretraining; the pretrained and the random policy take the best of {len(settings['rates'])} rates."
    )
    return output.finish(scores, BASELINES, budget, figures, more)


def _measured(method: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train a method and test it."""
    from .policy_gradient import GaussianPolicy

    if method == "straight":
        return _straight(seed, settings)
    chosen = settings["methods"].get(method, settings["methods"]["maml"])
    policy = seeded(seed, lambda: GaussianPolicy(settings["hidden"], chosen["masked"]))
    generator = torch.Generator().manual_seed(seed)
    if method == "pretrained":
        _pretrain(policy, generator, settings)
    elif method != "random":
        maml = MAML(policy, chosen["inner_lr"], settings["inner_steps"], chosen["adapt"])
        _meta_train(maml, generator, settings)
        return _test(maml, seed, settings)
    candidates = {rate: MAML(policy, rate, 1, "weights") for rate in settings["rates"]}
    tried = {rate: _test(maml, 1_000 + seed, settings)["returns"][-1] for rate, maml in candidates.items()}
    return _test(candidates[max(tried, key=lambda rate: tried[rate])], seed, settings)


def _meta_train(maml: MAML, generator: torch.Generator, settings: dict[str, Any]) -> None:
    from .policy_gradient import adaptation, surrogate

    optimizer = torch.optim.Adam(maml.parameters(), settings["lr"])
    for step in range(settings["steps"]):
        goals = _goals(settings["tasks"], generator)
        before, after = adaptation(maml, goals, settings["episodes"], 1, generator, **settings["advantages"])
        optimizer.zero_grad()
        maml(surrogate, before.samples(), after.samples()).backward()
        optimizer.step()
        track(step + 1, before=before.returns.mean(), after=after.returns.mean())


def _pretrain(policy: Any, generator: torch.Generator, settings: dict[str, Any]) -> None:
    from .policy_gradient import rollout, surrogate

    def act(x: Tensor) -> Tensor:
        return policy(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    optimizer = torch.optim.Adam(policy.parameters(), settings["lr"])
    # As many episodes as meta-training has: it takes those before and after the update.
    for step in range(2 * settings["steps"]):
        goals = _goals(settings["tasks"], generator)
        episodes = rollout(act, goals, settings["episodes"], generator, **settings["advantages"])
        x, target = episodes.samples()
        optimizer.zero_grad()
        surrogate(act(x), target).backward()
        optimizer.step()
        track(step + 1, returns=episodes.returns.mean())


def _goals(tasks: int, generator: torch.Generator) -> Tensor:
    return torch.rand(tasks, 2, generator=generator) - 0.5


def _test(maml: MAML, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The mean return of new goals after each update, half the width of its 95% interval, and some paths to one goal."""
    from .policy_gradient import adaptation

    test, episodes, advantages = settings["test"], settings["episodes"], settings["advantages"]
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    made = adaptation(maml, _goals(test["tasks"], generator), episodes, test["updates"], generator, **advantages)
    shown = adaptation(maml, torch.tensor([test["goal"]]), episodes, test["updates"], generator, **advantages)
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


def _straight(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The longest step towards the goal in each coordinate, on the goals of the tests."""
    from .policy_gradient import rollout

    test = settings["test"]
    goals = _goals(test["tasks"], torch.Generator().manual_seed(1_000_000 + seed))

    def policy(x: Tensor) -> Tensor:
        # Cut by the environment; no noise.
        return torch.cat([10 * (goals[:, None] - x), torch.full_like(x, -math.inf)], -1)

    made = rollout(policy, goals, 1, torch.Generator(), **settings["advantages"])
    return _summary([made.returns] * (test["updates"] + 1))


def figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The return over updates, and paths to one goal."""
    settings, found = metrics["settings"], metrics["curves"]
    last = settings["test"]["updates"]
    figure, axes = new_figure(2, rows=2)
    updates = list(range(last + 1))
    for panel, methods in ((axes[0], list(LABELS)), (axes[1], ["maml", "masks", "pretrained", "straight"])):
        for method in methods:
            runs = found[method]
            plot_seeds(panel, LINES[method], LABELS[method], updates, [run["returns"] for run in runs])
            if method != "straight":
                means = [sum(run["returns"][update] for run in runs) / len(runs) for update in updates]
                spread = [sum(run["interval"][update] for run in runs) / len(runs) for update in updates]
                color = STYLES[LINES[method]]["color"]
                panel.errorbar(updates, means, spread, fmt="none", color=color, capsize=3, linewidth=1)
        panel.set(xlabel=f"policy-gradient updates on {settings['episodes']} episodes each", xticks=updates)
        panel.set_ylabel("mean return on new goals (squared distance)")
    axes[0].set_title("all methods", fontsize=10)
    axes[1].set_title("from the first update on, without the random policy", fontsize=9)
    axes[1].set_xlim(0.8, last + 0.2)
    low = min(run["returns"][1] - run["interval"][1] for method in ("maml", "masks", "pretrained") for run in found[method])
    axes[1].set_ylim(1.1 * low, 0)
    handles, labels = axes[0].get_legend_handles_labels()
    title = f"{bands(len(metrics['seeds']))}; bars: 95 % interval over goals"
    figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=3, title=title, title_fontsize=8)
    for panel, (method, paths) in zip(axes[2:], metrics["paths of the first seed"].items()):
        for update, style, shade in ((0, ":", "#999999"), (1, "--", "#56B4E9"), (last, "-", STYLES[LINES[method]]["color"])):
            for number, path in enumerate(paths[update]):
                label = f"after {update} update{'s' if update != 1 else ''}" if number == 0 else "_"
                panel.plot(*zip(*path), style, color=shade, linewidth=1.2, label=label)
        panel.plot(*settings["test"]["goal"], "*", color="#D55E00", markersize=14, linestyle="none", label="goal")
        panel.set(xlabel="x (the longest step is 0.1)", ylabel="y (the same)", xlim=(-0.4, 0.8), ylim=(-0.7, 0.5), aspect="equal")
        panel.set_title(f"{LABELS[method]}: {SHOWN_EPISODES} episodes, seed {metrics['seeds'][0]}", fontsize=9)
        panel.legend(fontsize=7)
    return {"": figure}
