"""The three ways to learn several tasks that the experiments compare, with the same data and the same number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..continual import TaskLoop, read_metrics
from .tracking import track

Model = TypeVar("Model", bound=nn.Module)
Data = Mapping[str, tuple[Tensor, Tensor]]


def descend(parameters: Iterable[Tensor], lr: float, iterations: int, loss: Callable[[], Tensor]) -> None:
    """Minimise ``loss()``, which draws its own data, by Adam with a cosine schedule from ``lr`` to 0."""
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for step in range(1, iterations + 1):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
        track(step, loss=value.detach())


@dataclass
class Comparison:
    """One seed's outcome: test scores by method and task, learning curves ``(steps, mean test score)``."""

    scores: dict[str, dict[str, float]]
    curves: dict[str, tuple[list[int], list[float]]]


def seeded(seed: int, make: Callable[[], Model]) -> Model:
    """The model that ``make`` draws from ``seed``; the global random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def compare(
    masked: nn.Module,
    plain: Callable[[], nn.Module],
    train: Data,
    test: Data,
    loss: Callable[[Any, Tensor], Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
    *,
    rounds: int,
    evaluate_every: int,
    seed: int,
    out: Path,
    mask_options: Mapping[str, Any],
    **options: Any,
) -> Comparison:
    """Train shared weights with masks, one shared net without masks, and a net for each task alone.

    The first two take the same draws of tasks and so the same steps; the net of a task alone takes exactly the steps that the
    masked model took on that task, with the same data.

    Args:
        masked: the masked model; it is trained.
        plain: makes a model without masks.
        train, test: the data of each task.
        loss: what is minimised.
        score: ``score(prediction, target)``, a scalar, on the test data.
        rounds: of the first two.
        evaluate_every: rounds between points of their curves: the mean test score over the tasks seen so far.
        out: folder for the loops' folders.
        mask_options: options of ``TaskLoop`` for the masked model only.
        options: options of every ``TaskLoop``.
    """

    def evaluate(loop: TaskLoop) -> dict[str, float]:
        return {"test": sum(test_score(loop, name) for name in loop.steps_of) / len(loop.steps_of)}

    def test_score(loop: TaskLoop, name: str) -> float:
        loop.model.eval()
        x, y = test[name]
        with torch.no_grad(), loop.using(name):
            return float(score(loop.model(x), y))

    scores: dict[str, dict[str, float]] = {}
    curves: dict[str, tuple[list[int], list[float]]] = {}
    steps_of: dict[str, int] = {}
    for method, model, own in (
        ("masked", masked, dict(mask_options)),
        ("shared", seeded(seed, plain), {"per_task_masks": False}),
    ):
        folder = out / method
        loop = TaskLoop(
            model,
            train,
            loss,
            seed=seed,
            out=folder,
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            tensorboard=False,
            label=method,
            **own,
            **options,
        ).run(rounds)
        scores[method] = {name: test_score(loop, name) for name in loop.steps_of}
        points = [(line["step"], line["test"]) for line in read_metrics(folder) if "test" in line]
        curves[method] = [step for step, _ in points], [value for _, value in points]
        steps_of = loop.steps_of
    scores["independent"] = {}
    for index, (name, steps) in enumerate(sorted(steps_of.items())):
        model = seeded(seed + 1000 * (index + 1), plain)
        folder = out / "independent" / name
        loop = TaskLoop(
            model,
            {name: train[name]},
            loss,
            per_task_masks=False,
            seed=seed,
            out=folder,
            tensorboard=False,
            label=f"alone: {name}",
            **options,
        ).run(steps // options["steps"])
        scores["independent"][name] = test_score(loop, name)
    return Comparison(scores, curves)
