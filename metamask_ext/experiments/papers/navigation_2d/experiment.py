"""MAML for policies that walk to a goal they are not told: Finn, Abbeel and Levine, arXiv:1703.03400, section 5.3."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ...engine.claims import Claim, Metrics, Numbers, mean
from ...engine.figures import STYLES, Figures, bands, legend_above, new_figure, plot_seeds
from ...engine.jobs import Json
from ...engine.run_folder import RunFolder, Scores
from ...engine.settings import Changes, of_run
from .settings import SHOWN_EPISODES, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
QUICK: Changes = {"seeds": 1, "steps": 50, "episodes": 10, "rates": [0.1], "test": {"tasks": 40}}

FIRST_STEPS = 12
"""Those that are drawn: later ones walk about where the policy has gone to."""

QUESTION = """Can a policy that walks in the plane learn the way to a goal that it is not told, from the rewards of one
update's episodes? This is section 5.3 of Finn, Abbeel and Levine (arXiv:1703.03400), with masks as all that is adapted beside
the paper's MAML. The reward is minus the squared distance, so the numbers are not those of the paper's figure."""


def column(update: int) -> str:
    """The name of the return after so many updates in the metrics."""
    return f"return, {update} update{'s' if update != 1 else ''}"


def _returns(metrics: Metrics, method: str) -> Numbers:
    updates = metrics["settings"]["test"]["updates"]
    of = {name: mean(metrics, method, column(update)) for name, update in (("before", 0), ("one", 1), ("last", updates))}
    return {**of, "updates": updates, "straight": mean(metrics, "straight", column(0))}


def _after_one(metrics: Metrics) -> Numbers:
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


def run(folder: RunFolder, settings: Settings) -> Json:
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
    from .training import measure

    data = (
        "simulated: from the origin to a goal uniform in [-0.5, 0.5]^2, steps of at most 0.1 in each coordinate, reward minus the "
        "squared distance, 100 steps"
    )
    finished = folder.begin(data)
    if finished is not None:
        return finished

    made = folder.compute({(seed, method): partial(measure, method, seed, settings) for seed in folder.seeds for method in LABELS})
    found = {method: [made[seed, method] for seed in folder.seeds] for method in LABELS}
    scores: Scores = {method: {} for method in LABELS}
    intervals: dict[str, dict[str, float]] = {method: {} for method in LABELS}
    for method, runs in found.items():
        for update in range(settings.test.updates + 1):
            scores[method][column(update)] = [run["returns"][update] for run in runs]
            intervals[method][column(update)] = sum(run["interval"][update] for run in runs) / len(runs)
    more = {
        "interval_95_over_tasks": intervals,
        "curves": {method: [{key: run[key] for key in run if key != "paths"} for run in found[method]] for method in LABELS},
        "paths of the first seed": {method: found[method][0]["paths"] for method in SHOWN_METHODS},
    }
    budget = (
        f"{settings.steps} steps on {settings.tasks} goals of 2 x {settings.episodes} episodes for MAML, and as many "
        f"episodes for pretraining; the pretrained and the random policy take the best of {len(settings.rates)} rates."
    )
    return folder.finish(scores, BASELINES, budget, figures, more)


def figures(metrics: Metrics) -> Figures:
    """The return over updates, and paths to one goal."""
    settings, found = of_run(Settings(), metrics), metrics["curves"]
    figure, axes = new_figure(2, rows=2)
    _plot_returns(axes[0], list(LABELS), found, settings)
    axes[0].set_title("all methods", fontsize=10)
    _plot_returns(axes[1], ["maml", "masks", "pretrained", "straight"], found, settings)
    axes[1].set_title("from the first update on, without the random policy", fontsize=9)
    axes[1].set_xlim(0.8, settings.test.updates + 0.2)
    low = min(run["returns"][1] - run["interval"][1] for method in ("maml", "masks", "pretrained") for run in found[method])
    axes[1].set_ylim(1.1 * low, 0)
    legend_above(figure, axes[0], f"{bands(len(metrics['seeds']))}; bars: 95 % interval over goals")
    for panel, (method, paths) in zip(axes[2:], metrics["paths of the first seed"].items()):
        _plot_paths(panel, method, paths, settings)
        panel.set_title(
            f"{LABELS[method]}:\nfirst steps, mean of {SHOWN_EPISODES} episodes; dots: their ends; seed {metrics['seeds'][0]}",
            fontsize=9,
        )
    return {"": figure}


def _plot_returns(axes: Axes, methods: list[str], found: Metrics, settings: Settings) -> None:
    """The mean return of these methods over updates."""
    updates = list(range(settings.test.updates + 1))
    for method in methods:
        runs = found[method]
        plot_seeds(axes, LINES[method], LABELS[method], updates, [run["returns"] for run in runs])
        if method != "straight":
            means = [sum(run["returns"][update] for run in runs) / len(runs) for update in updates]
            spread = [sum(run["interval"][update] for run in runs) / len(runs) for update in updates]
            color = STYLES[LINES[method]]["color"]
            axes.errorbar(updates, means, spread, fmt="none", color=color, capsize=3, linewidth=1)
    axes.set(xlabel=f"policy-gradient updates on {settings.episodes} episodes each", xticks=updates)
    axes.set_ylabel("mean return on new goals (squared distance)")


def _plot_paths(axes: Axes, method: str, paths: list[list[list[list[float]]]], settings: Settings) -> None:
    """The first steps of some episodes' mean path before and after updates, and the places where they end."""
    last = settings.test.updates
    for update, style, shade in ((0, ":", "#999999"), (1, "--", "#56B4E9"), (last, "-", STYLES[LINES[method]]["color"])):
        middle = [
            [sum(place) / len(place) for place in zip(*places)] for places in zip(*(path[:FIRST_STEPS] for path in paths[update]))
        ]
        label = f"after {update} update{'s' if update != 1 else ''}"
        axes.plot(*zip(*middle), style, color=shade, linewidth=1.6, label=label)
        axes.plot(*zip(*(path[-1] for path in paths[update])), "o", color=shade, markersize=5, linestyle="none")
    axes.plot(*settings.test.goal, "*", color="#D55E00", markersize=14, linestyle="none", label="goal")
    axes.set(xlabel="x (the longest step is 0.1)", ylabel="y (the same)", xlim=(-0.4, 0.8), ylim=(-0.7, 0.5), aspect="equal")
    axes.legend(fontsize=7)
