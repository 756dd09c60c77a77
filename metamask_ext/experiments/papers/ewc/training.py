"""Learns the tasks of ``ewc`` one after another; each function is a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.continual import fisher_diagonal
from metamask_ext.data import PermutedImages
from metamask_ext.nn.names import DEFAULT_TASK
from metamask_ext.nn.tasks import add_task, remove_task

from ...engine.data import digits
from ...engine.jobs import Json
from ...engine.training import descend, seeded
from ...study.methods import Loop
from ...study.networks import gates
from ...study.problem import Layer, Problem, TaskData
from ...study.settings import AnchoredConfig, Config, FrozenConfig, MaskedAnchoredConfig, MaskedConfig, PlainConfig, StudySettings
from .settings import Settings

SIDE, CLASSES = 28, 10
POOLED = 4
"""Logistic regression reads means of squares of so many pixels' side, for a Hessian that is small enough to be computed whole."""
LOGISTIC_SAMPLES = 1000


@dataclass(frozen=True)
class LoopSettings:
    """The settings that the study's methods read."""

    tasks: int
    steps: int
    study: StudySettings


def curve(name: str, strength: float, seed: int, settings: Settings) -> Json:
    """Part A: accuracies of all tasks, ``[points][tasks]``, while a method learns one after another."""
    part, length = settings.curve, settings.steps // settings.points
    made = _method(name, _permuted(part.tasks, seed), [part.width] * 2, (0.0, 0.0), strength, seed, settings, length)
    found: list[list[float]] = []
    made.watch = lambda done: found.append(made.scores(range(part.tasks)))
    made.train()
    return {"accuracy": found}


def many(name: str, strength: float, seed: int, settings: Settings) -> Json:
    """Part B: after each task the accuracies of those learned so far."""
    part = settings.many
    plain = name == "sequence"
    data = _permuted(part.tasks, seed)
    made = _method(name, data, [part.width] * 2, part.dropout if plain else (0.0, 0.0), strength, seed, settings, 10)
    found: list[list[float]] = []
    made.train(lambda learned: found.append(made.scores(range(learned))))
    return {"accuracy": found}


def end_of(found: Json) -> float:
    """The mean accuracy of all tasks at the end of a curve: what a strength is chosen by."""
    return fmean(found["accuracy"][-1])


def overlap(square: int, strength: float, seed: int, settings: Settings) -> Json:
    """Part C: the overlap, by layer, of two tasks' Fisher information and of their masks over a frozen W."""
    part = settings.overlap
    data, widths = _square(square, seed), [part.width] * part.depth
    plain = _method("sequence+ewc", data, widths, (0.0, 0.0), strength, seed, settings, 10, part.steps)
    found: list[dict[str, Tensor]] = []

    def measure(learned: int) -> None:
        x = data.train.x[learned - 1][: settings.samples]
        found.append(fisher_diagonal(plain.model, x, draws=1, generator=torch.Generator().manual_seed(seed)))

    plain.train(measure)
    masked = _method("lottery", data, widths, (0.0, 0.0), strength, seed, settings, 10, part.steps)
    # The masks of both tasks begin alike: what they differ in was learned.
    add_task(masked.model, data.names[0], f"copy:{DEFAULT_TASK}")
    add_task(masked.model, data.names[1], f"copy:{DEFAULT_TASK}")
    remove_task(masked.model, DEFAULT_TASK)
    masked.train(lambda learned: None)  # in order, as the plain net
    learned = gates(masked.model, data.names)
    layers = [name for name in found[0] if name.endswith("weight")]
    return {
        "fisher": [overlap_of(*(fisher[name] for fisher in found)) for name in layers],
        "masks": [overlap_of(*learned[name]) for name in layers],
        "fisher accuracy": plain.scores([0, 1]),
        "masks accuracy": masked.scores([0, 1]),
    }


def overlap_of(first: Tensor, second: Tensor) -> float:
    """``1 - 1/2 sum_i (sqrt(a_i) - sqrt(b_i))^2``, with ``a`` and ``b`` the two tensors over their sums.

    1 where they are proportional, 0 where they share no entry: one minus the squared Frechet distance of two diagonal Fisher
    matrices of trace 1 (arXiv:1612.00796, supplement, section 4.3).
    """
    a, b = (tensor.double() / tensor.double().sum() for tensor in (first, second))
    return 1 - 0.5 * float((a.sqrt() - b.sqrt()).square().sum())


def logistic(seed: int, settings: Settings) -> Json:
    """The Fisher information of logistic regression on digits beside the Hessian of its loss, and beside squared batch gradients.

    Relative differences, sums of absolute differences over the sum of the Hessian's diagonal.
    """
    images, labels = (tensor[:LOGISTIC_SAMPLES] for tensor in digits().train)
    x = F.avg_pool2d(images, POOLED).flatten(1).double()
    model = seeded(seed, partial(nn.Linear, x.shape[1], CLASSES)).double()
    descend(model.parameters(), 1e-2, settings.steps, lambda: F.cross_entropy(model(x), labels), "loss of logistic regression")
    theta = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    size = model.weight.numel()

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, flat[:size].view_as(model.weight), flat[size:]), labels)

    hessian = torch.func.hessian(loss)(theta).diagonal()

    def beside(found: Mapping[str, Tensor]) -> float:
        flat = torch.cat([found["weight"].flatten(), found["bias"]])
        return float((flat - hessian).abs().sum() / hessian.sum())

    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator).split(settings.batch)
    squares = torch.stack([_gradient(model, x[some], labels[some]).square() for some in rows]).mean(0)
    return {
        "exact": beside(fisher_diagonal(model, x)),
        "one draw a sample": beside(fisher_diagonal(model, x, draws=1, generator=generator)),
        "squared batch gradients": float((squares - hessian).abs().sum() / hessian.sum()),
        "parameters": len(theta),
    }


def _gradient(model: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    gradients = torch.autograd.grad(F.cross_entropy(model(x), labels), [model.weight, model.bias])
    return torch.cat([gradient.flatten() for gradient in gradients])


def _method(
    name: str,
    data: Problem,
    widths: Sequence[int],
    dropout: tuple[float, float],
    strength: float,
    seed: int,
    settings: Settings,
    round_steps: int,
    steps: int | None = None,
) -> Loop:
    """A method of the common study on a net of these hidden layers."""
    configs: dict[str, Config] = {
        "sequence": PlainConfig(settings.lr),
        "sequence+l2": AnchoredConfig(settings.lr, strength, settings.samples),
        "sequence+ewc": AnchoredConfig(settings.lr, strength, settings.samples),
        "masked": MaskedConfig(settings.lr, settings.mask_lr),
        "masked+ewc": MaskedAnchoredConfig(settings.lr, settings.mask_lr, strength, settings.samples),
        "lottery": FrozenConfig(settings.mask_lr, 1.0),
    }
    tasks = len(data.train.x)
    study = StudySettings(tuning=False, optimizer="adam", round_steps=round_steps, batch=settings.batch, grid={})
    problem = Problem(
        data.train,
        data.test,
        data.test,
        data.test,
        partial(_network, widths, dropout),
        F.cross_entropy,
        _accuracy,
        None,
        "categorical",
    )
    return Loop(name, problem, LoopSettings(tasks, tasks * (steps or settings.steps), study), configs[name], seed)


def _network(widths: Sequence[int], dropout: tuple[float, float], linear: Layer, conv: Layer) -> nn.Sequential:
    """Linear layers with ReLU between them; ``[n, 784]`` to ``[n, 10]``."""
    of_inputs, of_hidden = dropout
    layers: list[nn.Module] = [nn.Dropout(of_inputs)] if of_inputs else []
    for inputs, outputs in pairwise([SIDE * SIDE, *widths]):
        layers += [linear(inputs, outputs), nn.ReLU(), *([nn.Dropout(of_hidden)] if of_hidden else [])]
    return nn.Sequential(*layers, linear(widths[-1], CLASSES))


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return 100 * (logits.argmax(-1) == labels).double().mean()


def _problem(permutations: Tensor) -> Problem:
    """Digits with their pixels in the order of each of ``permutations`` ``[T, 784]``; network and loss are those of ``_method``."""
    found = digits()
    mean, std = found.train[0].mean(), found.train[0].std()
    parts = []
    for images, labels in (found.train, found.test):
        flat = (images.flatten(1) - mean) / std
        parts.append(TaskData(torch.stack([flat[:, order] for order in permutations]), labels.expand(len(permutations), -1)))
    train, test = parts
    return Problem(train, test, test, test, partial(_network, [], (0.0, 0.0)), F.cross_entropy, _accuracy)


def _permuted(tasks: int, seed: int) -> Problem:
    return _problem(PermutedImages(tasks, seed=seed).permutations)


def _square(side: int, seed: int) -> Problem:
    """Two tasks: the digits as they are, and with the pixels of the middle square permuted."""
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    edge = (SIDE - side) // 2
    inside[edge : edge + side, edge : edge + side] = True
    places = inside.flatten().nonzero().flatten()
    order = torch.arange(SIDE * SIDE)
    order[places] = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
    return _problem(torch.stack([torch.arange(SIDE * SIDE), order]))
