"""Linear regression whose weights are on or off in each task: Blum and Law, EE5239 project proposal (2020), section 3.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import MaskedLinear
from ..tasks import linear_tasks
from .methods import compare, seeded
from .output import STYLES, Output, Scores, first_seeds, new_figure, one_thread, plot_seeds

TASKS, VARIABLES, TRAIN, TEST = 20, 5, 100, 1000
OPTIONS: dict[str, Any] = {"steps": 10, "lr": 0.01, "weight_decay": 1e-3}
# The gradient of a mask that closes vanishes with its gate (the proposal's "notable difficulty"), hence the larger rate.
MASK_OPTIONS = {"mask_lr": 1.0}
ROUNDS, EVALUATE_EVERY = 1000, 20


@one_thread()
def run(out: Path, seed: int, quick: bool) -> dict[str, Any]:
    """20 tasks of 5 variables and a bias. Measured: the mean test MSE of all tasks, and in how many of the 20 x 6 entries the gate
    ``sigmoid(M) > 1/2`` agrees with the true mask. See :func:`metamask_ext.experiments.run`.
    """
    seeds = first_seeds(seed, quick)
    output = Output("linear", out, seed, quick)
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
    finished = output.begin(settings, "drawn: x ~ N(0, I), |w| and |b| uniform in [1, 3], each on with probability 1/2, no noise")
    if finished is not None:
        return finished

    scores: Scores = {"masked": {"test MSE": [], "support recovered (%)": []}, "shared": {"test MSE": []}}
    scores["independent"] = {"test MSE": []}
    comparisons, shown = [], None
    for number in seeds:
        data = linear_tasks(TASKS, TRAIN, TEST, variables=VARIABLES, seed=number)
        model = seeded(number, lambda: MaskedLinear(VARIABLES, 1))
        comparison = compare(
            model,
            lambda: nn.Linear(VARIABLES, 1),
            data.train,
            data.test,
            F.mse_loss,
            F.mse_loss,
            rounds=ROUNDS,
            evaluate_every=EVALUATE_EVERY,
            seed=number,
            out=out / f"seed-{number}",
            mask_options=MASK_OPTIONS,
            **OPTIONS,
        )
        for method, numbers in comparison.scores.items():
            scores[method]["test MSE"].append(sum(numbers.values()) / len(numbers))
        gates = _gates(model, list(data.train))
        recovered = ((gates > 0.5) == data.support).double().mean()
        scores["masked"]["support recovered (%)"].append(100 * float(recovered))
        comparisons.append(comparison)
        shown = shown or (gates, data.support)

    figure, (left, right) = new_figure(2)
    for method, label in (("masked", "shared weights, a mask per task"), ("shared", "one shared net, no masks")):
        plot_seeds(left, method, label, comparisons[0].curves[method][0], [c.curves[method][1] for c in comparisons])
    alone = scores["independent"]["test MSE"]
    left.axhline(sum(alone) / len(alone), label="a net per task alone, at the end", **STYLES["independent"])
    left.set(xlabel="gradient steps, all tasks together", ylabel="mean test MSE (units of y squared)", yscale="log")
    left.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.87))
    assert shown is not None
    gates, support = shown
    image = right.imshow(gates.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    rows, columns = support.nonzero(as_tuple=True)
    right.plot(columns, rows, "o", markersize=4, markerfacecolor="none", markeredgecolor="#D55E00", linestyle="none")
    right.set(xlabel=f"parameter (circle: on in the true model), seed {seed}", ylabel="task (number)")
    right.set_xticks(range(VARIABLES + 1), [f"$w_{k + 1}$" for k in range(VARIABLES)] + ["$b$"])
    right.set_yticks(range(0, TASKS, 5))
    figure.colorbar(image, ax=right, label="gate, sigmoid(M) (no unit)")
    budget = (
        f"{TRAIN} samples a task; {ROUNDS * OPTIONS['steps']} steps in all for masked and shared; independent: for each task the "
        f"steps that masked took on it."
    )
    return output.finish(scores, ["shared", "independent"], budget, figure)


def _gates(model: MaskedLinear, names: list[str]) -> Tensor:
    """``sigmoid(M)`` of weights and bias, ``[tasks, variables + 1]``."""
    assert model.bias_masks is not None
    rows = [torch.cat([model.masks[name][0], model.bias_masks[name]]) for name in names]
    return torch.stack(rows).detach().sigmoid()
