"""The ways in which each method learns a task not seen in training, from few samples or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from metamask_ext.meta import MAML
from metamask_ext.ops.weight.functional import masked_weight

from ..engine.training import descend
from .methods import MASKED, Independent, Loop, Meta, Method, fresh
from .networks import Nets, Parameters, gate_options, gates, shared_parameters, stacked_masks
from .problem import Problem
from .settings import NewTaskSettings

LOOK_UP, SUPERPOSITION, MASK_ONLY, EVERYTHING = "look-up", "superposition", "mask only", "everything"
INNER_STEPS, FROM_SCRATCH = "inner steps", "from scratch"
WAYS = (LOOK_UP, SUPERPOSITION, MASK_ONLY, INNER_STEPS, EVERYTHING, FROM_SCRATCH)
"""Look-up: the mask of the trained task that fits best. Superposition: a linear combination of the gates of the trained tasks. Mask
only: from the mean of the trained masks. Everything: all weights too, from where the method left them."""
Scores = list[list[float | None]]
"""For each of the rates tried, and each number of samples, the mean score over the new tasks; None: it was not finite."""


@dataclass(frozen=True)
class Way:
    """The parameters that are learned for a new task, and the plain net that they stand for.

    Attributes:
        start: where they begin, ``[1, ...]`` or, where the tasks begin differently, ``[N, ...]``, by name.
        theta: gives the parameters of plain nets ``[R, ...]`` for the learned ones ``[R, ...]``.
    """

    start: Parameters
    theta: Callable[[Parameters], Parameters]


class Masks:
    """The shared weights and the masks ``[T, ...]`` of a trained model, by the name of the weight or bias."""

    def __init__(self, model: nn.Module, names: list[str]):
        self.masks, self.gates = stacked_masks(model, names), gates(model, names)
        self.shared, self.options = shared_parameters(model), gate_options(model)

    def theta(self, masks: Parameters, shared: Parameters) -> Parameters:
        """Parameters of plain nets for logits ``[R, ...]`` and weights ``[R, ...]`` or ``[1, ...]``."""
        rows = len(next(iter(masks.values())))
        wide = {name: stack.expand(rows, *stack.shape[1:]) for name, stack in shared.items()}
        return wide | {name: masked_weight(wide[name], logits, **self.options) for name, logits in masks.items()}

    def ways(self) -> dict[str, Way]:
        shared = {name: tensor[None] for name, tensor in self.shared.items()}
        mean = {f"mask of {name}": masks.mean(0, keepdim=True) for name, masks in self.masks.items()}
        count = len(next(iter(self.masks.values())))

        def superposed(learned: Parameters) -> Parameters:
            alpha = learned["coefficients"]
            wide = {name: stack.expand(len(alpha), *stack.shape[1:]) for name, stack in shared.items()}
            return wide | {name: shared[name] * torch.tensordot(alpha, gate, 1) for name, gate in self.gates.items()}

        def logits(learned: Parameters) -> Parameters:
            return {name: learned[f"mask of {name}"] for name in self.masks}

        def everything(learned: Parameters) -> Parameters:
            return self.theta(logits(learned), {name: learned[name] for name in shared})

        return {
            SUPERPOSITION: Way({"coefficients": torch.full((1, count), 1 / count)}, superposed),
            MASK_ONLY: Way(mean, lambda learned: self.theta(logits(learned), shared)),
            EVERYTHING: Way(mean | shared, everything),
        }


def new_task_scores(
    name: str,
    problem: Problem,
    trained: Method,
    new: NewTaskSettings,
    rates: Mapping[str, list[list[float]]] | None = None,
) -> dict[str, Scores]:
    """The scores of the new tasks by each way that the method has, for each number of samples.

    Args:
        rates: for each way ``[k][number of samples]``: ``k`` rates for each number; None: all of those in ``new``.
    """
    counts = [count for count in new.samples if count <= problem.new_train.x.shape[1]]
    if rates is None:
        rates = {way: [[rate] * len(counts) for rate in grid] for way, grid in new.rates.items()}
    nets = Nets(problem)
    ways: dict[str, Way] = {}
    found: dict[str, Scores] = {}
    if isinstance(trained, Meta):
        found[INNER_STEPS] = _inner_steps(problem, trained, nets, counts, rates[INNER_STEPS])
    if isinstance(trained, Independent) or (name == "shared" and len(problem.names) == 1):
        ways[FROM_SCRATCH] = Way(fresh(problem, trained.seed + 500_000, len(problem.new_train.x)), lambda learned: learned)
    if isinstance(trained, Loop) and name in MASKED:
        masks = Masks(trained.model, problem.names)
        found[LOOK_UP] = _look_up(problem, nets, masks, counts)
        ways = masks.ways()
        if name == "lottery":  # its weights stay as they were drawn
            del ways[EVERYTHING]
    elif trained.model is not None:
        start = {key: tensor[None] for key, tensor in shared_parameters(trained.model).items()}
        ways[EVERYTHING] = Way(start, lambda learned: learned)
    for key, way in ways.items():
        found[key] = _fit(problem, nets, way, counts, rates[key], new, f"loss, new tasks, {key}")
    return found


def _fit(
    problem: Problem, nets: Nets, way: Way, counts: list[int], rates: list[list[float]], new: NewTaskSettings, label: str
) -> Scores:
    """Learn every new task from every number of samples at every rate, all at once, by Adam.

    A step takes the next ``batch`` samples, from the first again after the last. Adam does not see the scale of a gradient: with a
    rate of 1, ``start + rate * delta`` moves by ``rate``, so each row has its own.
    """
    train, tasks = problem.new_train, len(problem.new_train.x)
    task = torch.arange(tasks).repeat(len(rates) * len(counts))
    samples = torch.tensor(counts).repeat_interleave(tasks).repeat(len(rates))[:, None]
    begin = {key: start.expand(tasks, *start.shape[1:])[task] for key, start in way.start.items()}
    rate = torch.tensor(rates).to(next(iter(begin.values()))).flatten().repeat_interleave(tasks)
    delta = {key: torch.zeros_like(start).requires_grad_() for key, start in begin.items()}
    position = torch.arange(new.batch)
    done = 0

    def theta() -> Parameters:
        learned = {key: begin[key] + rate.view(-1, *[1] * (begin[key].dim() - 1)) * delta[key] for key in begin}
        return way.theta(learned)

    def loss() -> Tensor:
        nonlocal done
        chosen = (position + done) % samples
        done += new.batch
        prediction = nets(theta(), train.x[task[:, None], chosen])
        return torch.vmap(problem.loss)(prediction, train.y[task[:, None], chosen]).sum()

    descend(delta.values(), 1.0, new.steps, loss, label)
    with torch.no_grad():
        return _means(problem, nets, theta(), len(rates), len(counts))


def _means(problem: Problem, nets: Nets, theta: Parameters, rates: int, counts: int) -> Scores:
    """The mean score over the new tasks, which are the last of the dimensions ``[rates, counts, tasks]`` of the rows."""
    tasks = len(problem.new_test.x)
    found: Scores = []
    for rate in range(rates):
        found.append([])
        for count in range(counts):
            first = (rate * counts + count) * tasks
            rows = {name: stack[first : first + tasks] for name, stack in theta.items()}
            try:
                each = problem.scores(problem.new_test, partial(nets.one, rows), range(tasks))
            except FloatingPointError:
                found[-1].append(None)
            else:
                found[-1].append(sum(each) / tasks)
    return found


def _inner_steps(problem: Problem, trained: Meta, nets: Nets, counts: list[int], rates: list[list[float]]) -> Scores:
    """The inner steps of MAML at its own rate times these."""
    maml, train = trained.maml, problem.new_train
    found: Scores = []
    for factors in rates:
        found.append([])
        for count, factor in zip(counts, factors):
            own = MAML(maml.model, float(maml.inner_lr) * factor, maml.inner_steps, "weights")
            with torch.no_grad():
                adapted = own.adapt(problem.loss, (train.x[:, :count], train.y[:, :count]))
                found[-1] += _means(problem, nets, adapted, 1, 1)[0]
    return found


@torch.no_grad()
def _look_up(problem: Problem, nets: Nets, masks: Masks, counts: list[int]) -> Scores:
    """Take the mask of the trained task that fits the samples best."""
    train, tasks = problem.new_train, len(problem.new_train.x)
    theta = masks.theta(masks.masks, {name: tensor[None] for name, tensor in masks.shared.items()})
    known = len(problem.names)
    loss = torch.vmap(problem.loss)
    losses = torch.empty(len(counts), known, tasks)
    for mask in range(known):
        prediction = nets.one(theta, mask, train.x.flatten(0, 1)).unflatten(0, train.x.shape[:2])
        for place, count in enumerate(counts):
            losses[place, mask] = loss(prediction[:, :count], train.y[:, :count])
    chosen = losses.argmin(1).flatten()
    return _means(problem, nets, {name: stack[chosen] for name, stack in theta.items()}, 1, len(counts))
