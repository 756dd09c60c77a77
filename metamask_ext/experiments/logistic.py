"""Logistic regression whose weights are on or off in each task: Blum and Law, EE5239 project proposal (2020), section 3.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import MaskedLinear
from ..tasks import linear_tasks
from .methods import compare, seeded
from .output import STYLES, Output, Scores, first_seeds, new_figure, one_thread, plot_seeds

TASKS, VARIABLES, TRAIN, TEST = 20, 5, 200, 2000
OPTIONS: dict[str, Any] = {"steps": 10, "lr": 0.1, "weight_decay": 1e-3}
MASK_OPTIONS = {"mask_lr": 1.0}
ROUNDS, EVALUATE_EVERY = 1000, 20
ACCURACY = "test accuracy (%)"


@one_thread()
def run(out: Path, seed: int, quick: bool) -> dict[str, Any]:
    """The tasks of ``linear`` with labels that are 1 with probability ``sigmoid(z)``. Measured: the mean test accuracy of all
    tasks; beside it, that of the rule ``1[z > 0]`` with the true ``z``, which no classifier can beat on average. See
    :func:`metamask_ext.experiments.run`.
    """
    seeds = first_seeds(seed, quick)
    output = Output("logistic", out, seed, quick)
    settings = {
        "tasks": TASKS,
        "variables": VARIABLES,
        "train_samples": TRAIN,
        "test_samples": TEST,
        "seeds": seeds,
        "rounds": ROUNDS,
        "evaluate_every": EVALUATE_EVERY,
        "optimizer": "sgd",
        "init": "torch's for W, normal for the masks",
        **OPTIONS,
        **MASK_OPTIONS,
    }
    data = "drawn: as for 'linear' (x ~ N(0, I), each weight on with probability 1/2), y = 1 with probability sigmoid(z), else 0"
    finished = output.begin(settings, data)
    if finished is not None:
        return finished

    methods = ("masked", "shared", "independent")
    scores: Scores = {method: {ACCURACY: []} for method in (*methods, "true parameters")}
    comparisons = []
    for number in seeds:
        tasks = linear_tasks(TASKS, TRAIN, TEST, variables=VARIABLES, labels="binary", seed=number)
        comparison = compare(
            seeded(number, lambda: MaskedLinear(VARIABLES, 1)),
            lambda: nn.Linear(VARIABLES, 1),
            tasks.train,
            tasks.test,
            F.binary_cross_entropy_with_logits,
            _accuracy,
            rounds=ROUNDS,
            evaluate_every=EVALUATE_EVERY,
            seed=number,
            out=out / f"seed-{number}",
            mask_options=MASK_OPTIONS,
            **OPTIONS,
        )
        for method, numbers in comparison.scores.items():
            scores[method][ACCURACY].append(sum(numbers.values()) / len(numbers))
        best = [float(_accuracy(tasks.score(task, x), y)) for task, (x, y) in enumerate(tasks.test.values())]
        scores["true parameters"][ACCURACY].append(sum(best) / len(best))
        comparisons.append(comparison)

    figure, (left, right) = new_figure(2)
    for method, label in (("masked", "shared weights, a mask per task"), ("shared", "one shared net, no masks")):
        plot_seeds(left, method, label, comparisons[0].curves[method][0], [c.curves[method][1] for c in comparisons])
    means = {method: sum(scores[method][ACCURACY]) / len(seeds) for method in scores}
    left.axhline(means["independent"], label="a net per task alone, at the end", **STYLES["independent"])
    left.axhline(means["true parameters"], label="true parameters", color="#555555", linestyle=":")
    left.set(xlabel="gradient steps, all tasks together", ylabel="mean test accuracy (%)")
    left.legend(fontsize=8)
    for method, marker in (("shared", "x"), ("masked", "o")):
        alone = [c.scores["independent"][name] for c in comparisons for name in c.scores[method]]
        here = [accuracy for c in comparisons for accuracy in c.scores[method].values()]
        right.scatter(alone, here, marker=marker, s=16, alpha=0.7, color=STYLES[method]["color"], label=method)
    diagonal = min(scores["independent"][ACCURACY])
    right.axline((diagonal, diagonal), slope=1, color="#555555", linestyle=":", linewidth=1)
    right.set(xlabel="net for the task alone: test accuracy (%)", ylabel="this method: test accuracy (%)")
    right.legend(fontsize=8, title="one point a task and seed", title_fontsize=8)
    budget = (
        f"{TRAIN} samples a task; {ROUNDS * OPTIONS['steps']} steps in all for masked and shared; independent: for each task the "
        f"steps that masked took on it."
    )
    return output.finish(scores, ["shared", "independent", "true parameters"], budget, figure)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return 100 * ((logits > 0) == (labels > 0.5)).double().mean()
