"""Few-shot classification of characters: Finn, Abbeel and Levine, arXiv:1703.03400, section 5.2, with masked and plain nets."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..meta import MAML
from ..nn import MaskedConv2d, MaskedLinear
from ..tasks import Characters, few_shot_tasks, load_characters
from .methods import descend, seeded
from .output import Output, Scores, new_figure, one_thread, plot_seeds

# What each method adapts, at which inner rate, of a few that were tried. The gradient of a mask is that of theta times
# W * s * (1 - s), which is small: hence its larger rate. 0.4 is the paper's.
METHODS: dict[str, dict[str, Any]] = {
    "masks": {"masked": True, "adapt": "masks", "inner_lr": 1000.0, "first_order": False},
    "masks, first order": {"masked": True, "adapt": "masks", "inner_lr": 1000.0, "first_order": True},
    "weights": {"masked": True, "adapt": "weights", "inner_lr": 0.4, "first_order": False},
    "weights, first order": {"masked": True, "adapt": "weights", "inner_lr": 0.4, "first_order": True},
    "plain": {"masked": False, "adapt": "weights", "inner_lr": 0.4, "first_order": False},
    "plain, first order": {"masked": False, "adapt": "weights", "inner_lr": 0.4, "first_order": True},
}
LABELS = {
    "masks": "masked net, masks adapted (ours)",
    "weights": "masked net, weights adapted",
    "plain": "plain net (the paper's MAML)",
    "pixels": "nearest neighbour, by pixels",
}
LABELS |= {method: f"{LABELS[method.split(',')[0]]}, first order" for method in METHODS if "first order" in method}
BASELINES = ["plain", "plain, first order", "pixels"]
# Images of a step: tasks * ways * (shots + queries). Fewer tasks where there are more images, so that all take about as long.
SETTINGS: dict[str, dict[str, int]] = {
    "5-way 1-shot": {"ways": 5, "shots": 1, "queries": 2, "tasks": 8, "iterations": 400, "test_tasks": 300},
    "5-way 5-shot": {"ways": 5, "shots": 5, "queries": 3, "tasks": 4, "iterations": 300, "test_tasks": 300},
    "20-way 1-shot": {"ways": 20, "shots": 1, "queries": 1, "tasks": 4, "iterations": 300, "test_tasks": 100},
    "20-way 5-shot": {"ways": 20, "shots": 5, "queries": 1, "tasks": 2, "iterations": 200, "test_tasks": 100},
}
QUICK = {"5-way 1-shot": {**SETTINGS["5-way 1-shot"], "iterations": 150, "test_tasks": 100}}
OPTIONS: dict[str, Any] = {"lr": 3e-3, "inner_steps": 1, "filters": 32}
TEST_QUERIES, TEST_STEPS = 5, 3
PAPER = {"5-way 1-shot": 98.7, "5-way 5-shot": 99.9, "20-way 1-shot": 95.8, "20-way 5-shot": 98.9}
"""MAML on Omniglot, arXiv:1703.03400, table 1: test accuracy in percent, 64 filters."""


def network(masked: bool, ways: int, filters: int) -> nn.Sequential:
    """The paper's net for Omniglot: four blocks of a 3x3 convolution of stride 2, batch norm and ReLU; ``[n, 1, 28, 28]`` to logits
    ``[n, ways]``."""
    conv: Any = MaskedConv2d if masked else nn.Conv2d
    linear: Any = MaskedLinear if masked else nn.Linear
    layers: list[nn.Module] = []
    for channels in (1, filters, filters, filters):
        # A bias would be taken away again by the batch norm.
        layers += [conv(channels, filters, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), linear(4 * filters, ways))


@one_thread()
def run(out: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Meta-training with one inner step, for each number of classes and images of each. Measured: the accuracy on tasks of new
    characters after 0 to 3 steps; against the nearest image by pixels. One seed. See :func:`metamask_ext.experiments.run`.
    """
    settings = QUICK if quick else SETTINGS
    output = Output("fewshot", out, seed, quick)
    data = load_characters()
    finished = output.begin(
        {
            "seeds": [seed],
            **OPTIONS,
            "optimizer": "adam, cosine schedule",
            "settings": settings,
            "methods": METHODS,
            "batch_norm": "batch",
            "test_queries": TEST_QUERIES,
            "test_steps": TEST_STEPS,
        },
        f"{data.source}: {len(data.train)} for training, {len(data.test)} for the test; turned by 90 degrees, others",
        data.note,
    )
    if finished is not None:
        return finished

    found: dict[str, dict[str, dict[str, list[float]]]] = {method: {} for method in [*METHODS, "pixels"]}
    for setting, numbers in settings.items():
        for method in found:
            measured = output.piece(seed, f"{setting}, {method}", partial(_measured, method, numbers, data, seed))
            found[method][setting] = measured
            output.say(f"{setting}, {method}: {found[method][setting]['accuracy'][-1]:.1f} %")

    def column(setting: str) -> str:
        return f"{setting}: test accuracy (%)"

    scores: Scores = {}
    intervals: dict[str, dict[str, float]] = {}
    for method, its in found.items():
        scores[method] = {column(setting): [curve["accuracy"][-1]] for setting, curve in its.items()}
        intervals[method] = {column(setting): curve["interval"][-1] for setting, curve in its.items()}
    budget = f"{TEST_STEPS} gradient steps on a test task; for training " + "; ".join(
        f"{setting}: {n['iterations']} steps on {n['tasks']} tasks of {n['ways']} x ({n['shots']} + {n['queries']}) images"
        for setting, n in settings.items()
    )
    more = {
        "interval_95_over_tasks": intervals,
        "curves": found,
        "paper": {column(setting): PAPER[setting] for setting in settings},
        "paper_data": "Omniglot, 64 filters, 60,000 steps on 32 (5-way) or 16 (20-way) tasks",
    }
    return output.finish(scores, BASELINES, budget, _figure(found, data), more)


def _measured(method: str, numbers: dict[str, int], data: Characters, seed: int) -> dict[str, list[float]]:
    """Train a method and test it: its accuracy in percent after each number of steps, and half the width of its 95% interval."""
    if method == "pixels":
        return _tested(data, numbers, seed, _nearest)
    chosen = METHODS[method]
    model = seeded(seed, lambda: network(chosen["masked"], numbers["ways"], OPTIONS["filters"]))
    maml = MAML(model, chosen["inner_lr"], OPTIONS["inner_steps"], chosen["adapt"], chosen["first_order"])
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return maml(F.cross_entropy, *few_shot_tasks(data.train, numbers["tasks"], *_sizes(numbers), generator))

    descend(model.parameters(), OPTIONS["lr"], numbers["iterations"], drawn)

    def logits(support: tuple[Tensor, Tensor], x: Tensor) -> list[Tensor]:
        parameters = maml.adapt(F.cross_entropy, support, steps=0)
        made = [maml.predict(parameters, x)]
        for _ in range(TEST_STEPS):
            parameters = maml.adapt(F.cross_entropy, support, steps=1, parameters=parameters)
            made.append(maml.predict(parameters, x))
        return made

    return _tested(data, numbers, seed, logits)


def _sizes(numbers: dict[str, int]) -> tuple[int, int, int]:
    return numbers["ways"], numbers["shots"], numbers["queries"]


def _nearest(support: tuple[Tensor, Tensor], x: Tensor) -> list[Tensor]:
    """Minus the distance to the nearest image of each class."""
    images, labels = support
    distance = torch.cdist(x.flatten(2), images.flatten(2))
    ways = int(labels.max()) + 1
    return [torch.stack([-distance[:, :, labels[0] == label].amin(2) for label in range(ways)], 2)]


@torch.no_grad()
def _tested(data: Characters, numbers: dict[str, int], seed: int, logits: Any) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    ways, shots, _ = _sizes(numbers)
    right: list[Tensor] = []
    together = 100 // ways  # so that a batch has a few hundred images
    for begin in range(0, numbers["test_tasks"], together):
        tasks = min(together, numbers["test_tasks"] - begin)
        support, (x, y) = few_shot_tasks(data.test, tasks, ways, shots, TEST_QUERIES, generator)
        right.append(torch.stack([(made.argmax(2) == y).double().mean(1) for made in logits(support, x)], 1))
    accuracy = 100 * torch.cat(right)  # [tasks, steps]
    interval = 1.96 * accuracy.std(0) / math.sqrt(len(accuracy))
    return {"accuracy": accuracy.mean(0).tolist(), "interval": interval.tolist()}


def _figure(found: dict[str, dict[str, dict[str, list[float]]]], data: Characters) -> Any:
    settings = list(found["masks"])
    figure, axes = new_figure(min(2, len(settings)) + 1, rows=-(-len(settings) // 2))
    columns = min(2, len(settings)) + 1
    places = [number for number in range(len(axes)) if number % columns < columns - 1]
    steps = list(range(TEST_STEPS + 1))
    for place, setting in zip(places, settings):
        panel = axes[place]
        for method, its in found.items():
            accuracy = its[setting]["accuracy"]
            plot_seeds(panel, method, LABELS[method], steps, [accuracy if len(accuracy) > 1 else accuracy * len(steps)])
        panel.axhline(PAPER[setting], color="#000000", linewidth=0.8, linestyle=(0, (1, 3)), label="the paper's MAML, on Omniglot")
        panel.set(xlabel="gradient steps on the support set", ylabel="test accuracy (%)", xticks=steps, ylim=(0, 102))
        panel.set_title(setting, fontsize=10)
    lines = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    figure.legend(lines.values(), lines, fontsize=8, loc="outside upper center", ncols=3)
    for panel, images, title in zip(axes[columns - 1 :: columns], (data.train, data.test), ("training", "test")):
        some = images[:8, :5].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        panel.imshow(some, cmap="gray_r")
        panel.set_title(f"{title}: 5 drawings each of 8 characters", fontsize=10)
        panel.set_axis_off()
    return figure
