"""A masked and a plain CNN on handwritten digits: Blum and Law, EE5239 project proposal (2020), section 3.6."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..continual import TaskLoop, read_metrics
from ..nn import MaskedConv2d, MaskedLayer, MaskedLinear
from ..tasks import load_digits
from .methods import seeded
from .output import STYLES, Output, Scores, first_seeds, new_figure, one_thread, plot_seeds

# One recipe for both networks. The L2 term on W is the proposal's (section 2.1).
OPTIONS: dict[str, Any] = {"steps": 50, "lr": 3e-3, "weight_decay": 1e-4, "optimizer": "adam", "batch_size": 64}
ROUNDS, EVALUATE_EVERY = 20, 2
ACCURACY = "test accuracy (%)"
TASK = "digits"


def network(masked: bool) -> nn.Sequential:
    """Two 5x5 convolutions with 2x2 max pooling and a linear layer; ``[n, 1, 28, 28]`` to ``[n, 10]``."""
    conv, linear = (MaskedConv2d, MaskedLinear) if masked else (nn.Conv2d, nn.Linear)
    return nn.Sequential(
        conv(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), conv(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear(512, 10)
    )


@one_thread()
def run(out: Path, seed: int, quick: bool) -> dict[str, Any]:
    """One task: the same network, data, optimiser, rates and steps with and without masks. Measured: test accuracy. With a
    single task the shared and the independent baseline are the same, the plain network. See :func:`metamask_ext.experiments.run`.
    """
    seeds = first_seeds(seed, quick)
    output = Output("mnist", out, seed, quick)
    digits = load_digits()
    settings = {
        "seeds": seeds,
        "train_samples": len(digits.train[0]),
        "test_samples": len(digits.test[0]),
        "network": str(network(masked=False)),
        "init": "torch's for W, normal for the masks",
        "rounds": ROUNDS,
        "evaluate_every": EVALUATE_EVERY,
        **OPTIONS,
    }
    finished = output.begin(settings, digits.source, digits.note)
    if finished is not None:
        return finished

    def evaluate(loop: TaskLoop) -> dict[str, float]:
        loop.model.eval()
        images, labels = digits.test
        with torch.no_grad(), loop.using(TASK):
            right = sum(int((loop.model(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000)))
        return {"test": 100 * right / len(labels)}

    scores: Scores = {"masked": {ACCURACY: []}, "plain": {ACCURACY: []}}
    curves: dict[str, list[list[float]]] = {"masked": [], "plain": []}
    gates: list[torch.Tensor] = []
    for number in seeds:
        for method in ("masked", "plain"):
            masked = method == "masked"
            folder = out / f"seed-{number}" / method
            loop = TaskLoop(
                seeded(number, partial(network, masked)),
                {TASK: digits.train},
                F.cross_entropy,
                per_task_masks=masked,
                seed=number,
                out=folder,
                evaluate=evaluate,
                evaluate_every=EVALUATE_EVERY,
                tensorboard=False,
                label=f"{method}, seed {number}",
                **OPTIONS,
            ).run(ROUNDS)
            curves[method].append([line["test"] for line in read_metrics(folder) if "test" in line])
            scores[method][ACCURACY].append(evaluate(loop)["test"])
            if masked:
                layers = [layer for layer in loop.model.modules() if isinstance(layer, MaskedLayer)]
                gates.append(torch.cat([layer.masks[TASK].detach().sigmoid().flatten() for layer in layers]))

    figure, (left, right) = new_figure(2)
    steps = [OPTIONS["steps"] * rounds for rounds in range(EVALUATE_EVERY, ROUNDS + 1, EVALUATE_EVERY)]
    for method, label in (("masked", "masked CNN"), ("plain", "the same CNN, no masks")):
        plot_seeds(left, method, label, steps, curves[method])
    left.set(xlabel="gradient steps", ylabel="test accuracy (%)")
    left.legend(fontsize=8)
    start = torch.randn(len(gates[0]), generator=torch.Generator().manual_seed(seed)).sigmoid()
    for values, label, style in (
        (start, "normal init (a sample)", STYLES["plain"]),
        (gates[0], "after training", STYLES["masked"]),
    ):
        right.hist(values.tolist(), bins=40, range=(0, 1), histtype="step", linewidth=1.8, label=label, **style)
    right.set(xlabel=f"gate, sigmoid(M) (no unit), seed {seed}", ylabel="weights (number)")
    right.legend(fontsize=8)
    budget = (
        f"{len(digits.train[0])} training images, {ROUNDS * OPTIONS['steps']} steps of {OPTIONS['batch_size']} for either; with "
        f"one task, the plain net is both baselines, shared and independent."
    )
    return output.finish(scores, ["plain"], budget, figure)
