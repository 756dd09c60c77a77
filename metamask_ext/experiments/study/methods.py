"""The seven ways to learn several tasks that the study compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor, nn

from metamask_ext.continual import LoopConfig, TaskLoop
from metamask_ext.meta import MAML, TaskParameters
from metamask_ext.nn import MaskedConv2d, MaskedLinear
from metamask_ext.nn.tasks import masked_layers

from ..engine.settings import OptionError, as_json
from ..engine.tracking import track
from ..engine.training import descend, seeded
from .networks import Nets, Parameters
from .problem import Problem, in_parts
from .settings import ComparedSettings, Config, FrozenConfig, MetaConfig, PlainConfig


class Gate(TypedDict):
    """Options of a masked layer."""

    gate: str


MASKED: dict[str, Gate] = {"masked": {"gate": "sigmoid"}, "hard": {"gate": "hard"}, "lottery": {"gate": "hard"}}
"""The methods with a mask for each task, and the options of their layers."""
METHODS = ("masked", "hard", "lottery", "shared", "independent", "maml", "sequence")
FORGETTING = ("masked", "hard", "lottery", "maml", "sequence")
"""The methods for which tasks in order are another training: one net for all, in order, is ``sequence``; nets of their own forget
nothing."""


class Method:
    """One way to learn the tasks of a problem.

    Args:
        problem: the tasks.
        settings: of the experiment.
        seed: of the initial values and the order of tasks and samples.
    """

    model: nn.Module | None = None

    def __init__(self, problem: Problem, settings: ComparedSettings, seed: int):
        self.problem, self.seed = problem, seed
        self.steps, self.study = settings.steps, settings.study

    def train(self, after_task: Callable[[int], None] | None = None) -> None:
        """Train on all tasks; with ``after_task`` one after another, which is then called with the number of those learned."""
        raise NotImplementedError

    def scores(self, tasks: Sequence[int]) -> list[float]:
        """The score of each of these tasks on its test data."""
        raise NotImplementedError

    def some_steps(self) -> int:
        """Take a few steps, to be timed; their number."""
        raise NotImplementedError

    def _share(self, parts: int) -> int:
        """All the steps over ``parts``. OptionError if that is none."""
        if self.steps < parts:
            raise OptionError(f"steps must be at least {parts} for {len(self.problem.train.x)} tasks, got {self.steps}")
        return self.steps // parts


class Loop(Method):
    """``masked``, ``hard``, ``lottery``: shared weights and masks of each task, by :class:`metamask_ext.continual.TaskLoop`;
    ``shared``: the same without masks; ``sequence``: as ``shared``, one task after another."""

    def __init__(self, name: str, problem: Problem, settings: ComparedSettings, config: Config, seed: int):
        super().__init__(problem, settings, seed)
        self.name, self.config, self.in_order, self.taken = name, config, name == "sequence", 0
        self.model: nn.Module = seeded(seed, self._made)
        self.loop = self._loop(None, None, 1)

    def _made(self) -> nn.Module:
        if self.name not in MASKED:
            return self.problem.plain()
        options = MASKED[self.name]
        model = self.problem.network(partial(MaskedLinear, **options), partial(MaskedConv2d, **options))
        if isinstance(self.config, FrozenConfig):
            for _, layer in masked_layers(model):
                for parameter in [layer.weight, *([] if layer.bias is None else [layer.bias])]:
                    parameter.requires_grad_(False).mul_(self.config.scale)
        return model

    def _loop(self, order: list[str] | None, evaluate: Callable[[TaskLoop], dict[str, float]] | None, every: int) -> TaskLoop:
        problem, study = self.problem, self.study
        rates = {key: value for key, value in as_json(self.config).items() if key != "scale"}
        return TaskLoop(
            self.model,
            {name: (x, y) for name, x, y in zip(problem.names, problem.train.x, problem.train.y)},
            self._tracked_loss,
            LoopConfig(
                steps=study.round_steps,
                **rates,
                weight_decay=study.weight_decay,
                optimizer=study.optimizer,
                batch_size=study.batch,
                per_task_masks=self.name in MASKED,
                order=order,
                seed=self.seed,
                evaluate=evaluate,
                evaluate_every=every,
                label=self.name,
            ),
        )

    def _tracked_loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        value = self.problem.loss(prediction, y)
        self.taken += 1
        track(self.taken, loss=value.detach())
        return value

    def train(self, after_task: Callable[[int], None] | None = None) -> None:
        names, length = self.problem.names, self.study.round_steps
        each, rounds = self._share(length * len(names)), self.steps // length
        order, evaluate = None, None
        if after_task or self.in_order:
            rounds = each * len(names)
            order = [name for name in names for _ in range(each)]
        if after_task:

            def evaluate(loop: TaskLoop) -> dict[str, float]:
                after_task(loop.round // each)
                return {}

        self.loop = self._loop(order, evaluate, each)
        self.loop.run(rounds)
        unseen = [name for name in names if name not in self.loop.steps_of]
        if unseen:
            raise OptionError(f"steps must be enough to draw all tasks, got {self.steps}: {rounds} rounds never drew {unseen[0]!r}")

    def scores(self, tasks: Sequence[int]) -> list[float]:
        names = self.problem.names
        self.model.eval()

        def predict(place: int, x: Tensor) -> Tensor:
            with self.loop.using(names[tasks[place]]):
                return in_parts(self.model, x)

        found = self.problem.scores(self.problem.test, predict, tasks)
        self.model.train()
        return found

    def some_steps(self) -> int:
        self.loop.run(self.loop.round + 1)
        return self.loop.config.steps


class Independent(Method):
    """A net for each task: all at once, by Adam, each with the steps of one task; at a constant rate, as the loop's."""

    def __init__(self, problem: Problem, settings: ComparedSettings, config: PlainConfig, seed: int):
        super().__init__(problem, settings, seed)
        self.config = config
        self.nets = Nets(problem)
        self.parameters = fresh(problem, seed, len(problem.train.x))

    def train(self, after_task: Callable[[int], None] | None = None) -> None:
        train, generator = self.problem.train, torch.Generator().manual_seed(self.seed)
        tasks = torch.arange(len(train.x))[:, None]
        leaves = {name: stack.requires_grad_() for name, stack in self.parameters.items()}
        decay = self.study.weight_decay / 2

        def loss() -> Tensor:
            chosen = torch.randint(train.x.shape[1], (len(tasks), self.study.batch), generator=generator)
            prediction = self.nets(leaves, train.x[tasks, chosen])
            penalty = sum(stack.square().sum() for stack in leaves.values())
            return torch.vmap(self.problem.loss)(prediction, train.y[tasks, chosen]).sum() + decay * penalty

        descend(leaves.values(), self.config.lr, self._share(len(train.x)), loss, constant=True)
        self.parameters = {name: stack.detach() for name, stack in leaves.items()}

    def scores(self, tasks: Sequence[int]) -> list[float]:
        return self.problem.scores(self.problem.test, lambda place, x: self.nets.one(self.parameters, tasks[place], x), tasks)


class Meta(Method):
    """``maml``: a plain net from which a few gradient steps lead to each task (:class:`metamask_ext.meta.MAML`)."""

    def __init__(self, problem: Problem, settings: ComparedSettings, config: MetaConfig, seed: int):
        super().__init__(problem, settings, seed)
        self.config = config
        options = self.study.maml
        self.model: nn.Module = seeded(seed, problem.plain)
        self.maml = MAML(self.model, config.inner_lr, options.inner_steps, "weights", options.first_order)
        self.generator = torch.Generator().manual_seed(seed)

    def train(self, after_task: Callable[[int], None] | None = None) -> None:
        tasks, at_once = len(self.problem.train.x), self.study.maml.tasks
        if after_task is None:
            self._descend(self._share(at_once), range(tasks))
            return
        for task in range(tasks):
            self._descend(self._share(at_once * tasks), range(task, task + 1))
            after_task(task + 1)

    def _descend(self, steps: int, tasks: range) -> None:
        """Meta-train on tasks drawn from these; half of a batch is the support set, half the queries."""
        train, half = self.problem.train, max(self.study.batch // 2, 1)
        drawn = self.study.maml.tasks

        def loss() -> Tensor:
            task = torch.randint(tasks.start, tasks.stop, (drawn, 1), generator=self.generator)
            chosen = torch.randint(train.x.shape[1], (drawn, 2 * half), generator=self.generator)
            x, y = train.x[task, chosen], train.y[task, chosen]
            return self.maml(self.problem.loss, (x[:, :half], y[:, :half]), (x[:, half:], y[:, half:]))

        descend(self.model.parameters(), self.config.lr, steps, loss, constant=True)

    def scores(self, tasks: Sequence[int]) -> list[float]:
        train, samples = self.problem.train, self.study.maml.samples
        chosen = list(tasks)
        with torch.no_grad():
            adapted = self.maml.adapt(self.problem.loss, (train.x[chosen, :samples], train.y[chosen, :samples]))

        def predict(place: int, x: Tensor) -> Tensor:
            own = TaskParameters({name: stack[place : place + 1] for name, stack in adapted.items()})
            return in_parts(lambda part: self.maml.predict(own, part[None])[0], x)

        return self.problem.scores(self.problem.test, predict, tasks)

    def some_steps(self) -> int:
        self._descend(3, range(len(self.problem.train.x)))
        return 3


def fresh(problem: Problem, seed: int, count: int) -> Parameters:
    """The parameters of ``count`` plain nets, each with random ones of its own."""
    made = [dict(seeded(seed + 1000 * (index + 1), problem.plain).named_parameters()) for index in range(count)]
    return {name: torch.stack([each[name].detach() for each in made]) for name in made[0]}


def method(name: str, problem: Problem, settings: ComparedSettings, config: Config, seed: int) -> Method:
    """The method of that name, one of ``METHODS``."""
    if isinstance(config, MetaConfig):
        return Meta(problem, settings, config, seed)
    if name == "independent" and isinstance(config, PlainConfig):
        return Independent(problem, settings, config, seed)
    return Loop(name, problem, settings, config, seed)
