"""REINFORCE with a linear baseline and generalised advantages, for many tasks at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from metamask_ext.data.navigation import HORIZON, LONGEST_STEP, NavigationVectorEnv
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedLinear

from .settings import AdvantageSettings


class GaussianPolicy(nn.Module):
    """Two hidden layers with tanh. ``[n, 2]`` positions to ``[n, 4]``: means and logarithms of standard deviations of the action,
    in units of the longest step; the latter do not depend on the position."""

    def __init__(self, hidden: int, masked: bool):
        super().__init__()
        linear = MaskedLinear if masked else nn.Linear
        self.net = nn.Sequential(linear(2, hidden), nn.Tanh(), linear(hidden, hidden), nn.Tanh(), linear(hidden, 2))
        self.log_std = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x), self.log_std.expand(len(x), 2)], 1)


@dataclass
class Episodes:
    """Of ``T`` tasks, ``E`` episodes and ``HORIZON`` steps.

    Attributes:
        positions, actions: ``[T, E, HORIZON, 2]``; actions in units of the longest step, before they are cut.
        rewards: ``[T, E, HORIZON]``.
        alive: the same, 1 until the goal is reached and 0 after.
        settings: of the advantages.
    """

    positions: Tensor
    actions: Tensor
    rewards: Tensor
    alive: Tensor
    settings: AdvantageSettings

    @property
    def returns(self) -> Tensor:
        """The sum of each episode's rewards, ``[T, E]``."""
        return self.rewards.sum(2)

    def samples(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``(x, (actions, advantages))`` as :func:`surrogate` and ``MAML`` take them, ``[T, E * HORIZON, ...]``."""
        return self.positions.flatten(1, 2), (self.actions.flatten(1, 2), self._advantages().flatten(1, 2))

    def _advantages(self) -> Tensor:
        """Generalised advantages (Schulman et al., arXiv:1506.02438, eq. 16) over a baseline that is fitted to each task's returns,
        scaled to mean 0 and deviation 1 for each task. 0 after the end."""
        returns = torch.zeros_like(self.rewards)
        running = torch.zeros_like(self.rewards[..., 0])
        for step in reversed(range(HORIZON)):
            running = self.rewards[..., step] + self.settings.discount * running
            returns[..., step] = running
        values = self._baseline(returns)
        following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
        errors = (self.rewards + self.settings.discount * following - values) * self.alive
        advantages = torch.zeros_like(errors)
        running = torch.zeros_like(errors[..., 0])
        for step in reversed(range(HORIZON)):
            running = errors[..., step] + self.settings.discount * self.settings.gae_lambda * running
            advantages[..., step] = running
        count = self.alive.sum((1, 2), keepdim=True)
        centred = (advantages - (advantages * self.alive).sum((1, 2), keepdim=True) / count) * self.alive
        return centred / (centred.square().sum((1, 2), keepdim=True) / count).sqrt().clamp(min=1e-8)

    def _baseline(self, returns: Tensor) -> Tensor:
        """Least squares of each task's returns on position and time (Duan et al., arXiv:1604.06778, section 4), 0 after the end."""
        time = (torch.arange(HORIZON) / HORIZON).expand_as(returns)[..., None]
        features = torch.cat([self.positions, self.positions**2, time, time**2, time**3, torch.ones_like(time)], -1)
        features = (features * self.alive[..., None]).flatten(1, 2).double()
        target = (returns * self.alive).flatten(1, 2).double()[..., None]
        gram = features.mT @ features + 1e-8 * torch.eye(features.shape[-1], dtype=torch.float64)
        fitted = features @ torch.linalg.solve(gram, features.mT @ target)
        return fitted.to(returns.dtype).reshape(returns.shape)


def surrogate(prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """``-mean(log pi(a | x) * advantage)``, a scalar: its gradient is minus that of the expected return, up to the scale."""
    actions, advantages = target
    mean, log_std = prediction.chunk(2, -1)
    log_density = (-0.5 * ((actions - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    return -(log_density * advantages).mean()


@torch.no_grad()
def rollout(
    policy: Callable[[Tensor], Tensor],
    goals: Tensor,
    episodes: int,
    generator: torch.Generator,
    advantages: AdvantageSettings,
) -> Episodes:
    """Run ``episodes`` of each task at once.

    Args:
        policy: predictions ``[T, E, 4]`` for positions ``[T, E, 2]``.
        goals: ``[T, 2]``.
        advantages: of the :class:`Episodes`.
    """
    tasks = len(goals)
    env = NavigationVectorEnv(tasks * episodes)
    observed, _ = env.reset(options={"goal": goals.repeat_interleave(episodes, 0).numpy()})
    alive = torch.ones(tasks, episodes)
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for _ in range(HORIZON):
        position = torch.from_numpy(observed).reshape(tasks, episodes, 2)
        mean, log_std = policy(position).chunk(2, -1)
        action = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
        observed, reward, ended, _, _ = env.step((LONGEST_STEP * action).flatten(0, 1).numpy())
        steps.append((position, action, torch.from_numpy(reward).reshape(tasks, episodes), alive))
        alive = 1.0 - torch.from_numpy(ended).reshape(tasks, episodes).float()
    positions, actions, rewards, alives = (torch.stack(tensors, 2) for tensors in zip(*steps))
    return Episodes(positions, actions, rewards, alives, advantages)


@torch.no_grad()
def adaptation(
    maml: MAML, goals: Tensor, episodes: int, updates: int, generator: torch.Generator, advantages: AdvantageSettings
) -> list[Episodes]:
    """The episodes of each task before its policy is adapted, and after each of the updates on those before it."""
    tasks = len(goals)
    nothing = torch.zeros(tasks, 1, 2)
    parameters = maml.adapt(surrogate, (nothing, (nothing, nothing[..., 0])), steps=0)
    made = [rollout(partial(maml.predict, parameters), goals, episodes, generator, advantages)]
    for _ in range(updates):
        parameters = maml.adapt(surrogate, made[-1].samples(), steps=1, parameters=parameters)
        made.append(rollout(partial(maml.predict, parameters), goals, episodes, generator, advantages))
    return made
