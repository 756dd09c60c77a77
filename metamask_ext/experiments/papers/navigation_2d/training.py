"""Trains and tests the policies of ``navigation-2d``; needs gymnasium."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metamask_ext.meta import MAML

from ...engine.jobs import Json
from ...engine.statistics import interval_over_tasks
from ...engine.tracking import track
from ...engine.training import seeded
from .policy_gradient import GaussianPolicy, adaptation, rollout, surrogate
from .settings import SHOWN_EPISODES, Settings


def measure(method: str, seed: int, settings: Settings) -> Json:
    """Train a method and test it."""
    if method == "straight":
        return _straight(seed, settings)
    chosen = settings.methods.get(method, settings.methods["maml"])
    policy = seeded(seed, lambda: GaussianPolicy(settings.hidden, chosen.masked))
    generator = torch.Generator().manual_seed(seed)
    if method == "pretrained":
        _pretrain(policy, generator, settings)
    elif method != "random":
        maml = chosen.maml(policy, settings.inner_steps)
        _meta_train(maml, generator, settings)
        return _test(maml, seed, settings)
    candidates = {rate: MAML(policy, rate, 1, "weights") for rate in settings.rates}
    tried = {rate: _test(maml, 1_000 + seed, settings)["returns"][-1] for rate, maml in candidates.items()}
    return _test(candidates[max(tried, key=lambda rate: tried[rate])], seed, settings)


def _meta_train(maml: MAML, generator: torch.Generator, settings: Settings) -> None:
    optimizer = torch.optim.Adam(maml.parameters(), settings.lr)
    for step in range(settings.steps):
        goals = _goals(settings.tasks, generator)
        before, after = adaptation(maml, goals, settings.episodes, 1, generator, settings.advantages)
        optimizer.zero_grad()
        maml(surrogate, before.samples(), after.samples()).backward()
        optimizer.step()
        track(step + 1, before=before.returns.mean(), after=after.returns.mean())


def _pretrain(policy: GaussianPolicy, generator: torch.Generator, settings: Settings) -> None:
    def act(x: Tensor) -> Tensor:
        return policy(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    optimizer = torch.optim.Adam(policy.parameters(), settings.lr)
    # As many episodes as meta-training has: it takes those before and after the update.
    for step in range(2 * settings.steps):
        goals = _goals(settings.tasks, generator)
        episodes = rollout(act, goals, settings.episodes, generator, settings.advantages)
        x, target = episodes.samples()
        optimizer.zero_grad()
        surrogate(act(x), target).backward()
        optimizer.step()
        track(step + 1, returns=episodes.returns.mean())


def _goals(tasks: int, generator: torch.Generator) -> Tensor:
    return torch.rand(tasks, 2, generator=generator) - 0.5


def _test(maml: MAML, seed: int, settings: Settings) -> Json:
    """The mean return of new goals after each update, half the width of its 95 % interval, and some paths to one goal."""
    test, episodes, advantages = settings.test, settings.episodes, settings.advantages
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    made = adaptation(maml, _goals(test.tasks, generator), episodes, test.updates, generator, advantages)
    shown = adaptation(maml, torch.tensor([test.goal]), episodes, test.updates, generator, advantages)
    return {
        **_summary([episodes.returns for episodes in made]),
        "inner_lr": maml.inner_lr,
        "paths": [episodes.positions[0, :SHOWN_EPISODES].tolist() for episodes in shown],
    }


def _summary(returns: list[Tensor]) -> dict[str, list[float]]:
    means = [each.double().mean(1) for each in returns]
    return {
        "returns": [float(mean.mean()) for mean in means],
        "interval": [float(interval_over_tasks(mean)) for mean in means],
    }


def _straight(seed: int, settings: Settings) -> Json:
    """The longest step towards the goal in each coordinate, on the goals of the tests."""
    test = settings.test
    goals = _goals(test.tasks, torch.Generator().manual_seed(1_000_000 + seed))

    def policy(x: Tensor) -> Tensor:
        # Cut by the environment; no noise.
        return torch.cat([10 * (goals[:, None] - x), torch.full_like(x, -math.inf)], -1)

    made = rollout(policy, goals, 1, torch.Generator(), settings.advantages)
    return _summary([made.returns] * (test.updates + 1))
