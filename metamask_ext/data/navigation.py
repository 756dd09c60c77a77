"""Walks to a goal in the plane, as gymnasium environments: Finn, Abbeel and Levine, arXiv:1703.03400, section 5.3.

gymnasium comes with ``pip install "metamask_ext[experiments]"``.
"""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from ._checks import check_at_least_one

HORIZON = 100
LONGEST_STEP = 0.1
GOAL_RADIUS = 0.01
GOALS = (-0.5, 0.5)

Array = NDArray[np.float32]

_OBSERVATION = Box(-np.inf, np.inf, (2,), np.float32)
_ACTION = Box(-LONGEST_STEP, LONGEST_STEP, (2,), np.float32)


def _move(position: Array, action: ArrayLike, goal: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Take a step of ``[..., 2]``; return the new position, the reward and whether the goal was reached."""
    position = (position + np.clip(np.asarray(action, np.float32), -LONGEST_STEP, LONGEST_STEP)).astype(np.float32)
    squared = np.square(goal - position).sum(-1)
    return position, -squared, squared < GOAL_RADIUS**2


def _goals(given: object, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Return the goals of ``reset``'s options, or draw them."""
    if given is None:
        return random.uniform(*GOALS, shape).astype(np.float32)
    goals = np.asarray(given, np.float32)
    if goals.shape != shape:
        raise ValueError(f"goal must have shape {list(shape)}, got {list(goals.shape)}")
    return goals


class NavigationEnv(gymnasium.Env[Array, Array]):
    """A point that starts at the origin and walks to a goal.

    The observation is its position, the action a step, cut to 0.1 in each coordinate. The reward is minus the squared distance from
    the goal, which the observation does not tell. An episode terminates within 0.01 of the goal and is truncated after 100 steps.

    ``reset(options={"goal": [x, y]})`` sets the goal; else it is drawn uniformly in [-0.5, 0.5]^2.
    """

    observation_space = _OBSERVATION
    action_space = _ACTION

    def reset(self, *, seed: int | None = None, options: dict[str, object] | None = None) -> tuple[Array, dict[str, object]]:
        super().reset(seed=seed)
        self._goal = _goals((options or {}).get("goal"), (2,), self.np_random)
        self._position, self._steps = np.zeros(2, np.float32), 0
        return self._position.copy(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, object]]:
        self._position, reward, reached = _move(self._position, action, self._goal)
        self._steps += 1
        return self._position.copy(), float(reward), bool(reached), self._steps == HORIZON, {}


class NavigationVectorEnv(VectorEnv[Array, Array, NDArray[np.generic]]):
    """``num_envs`` of :class:`NavigationEnv` as arrays, each with its own goal: ``reset(options={"goal": [num_envs, 2]})``.

    Environments are not reset one by one: one that has ended stays where it is, its reward 0, until all are reset.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012  gymnasium reads it from the class

    def __init__(self, num_envs: int):
        check_at_least_one(num_envs=num_envs)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _OBSERVATION, _ACTION
        self.observation_space, self.action_space = batch_space(_OBSERVATION, num_envs), batch_space(_ACTION, num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, object] | None = None) -> tuple[Array, dict[str, object]]:
        super().reset(seed=seed)
        self._goal = _goals((options or {}).get("goal"), (self.num_envs, 2), self.np_random)
        self._position = np.zeros((self.num_envs, 2), np.float32)
        self._ended, self._steps = np.zeros(self.num_envs, np.bool_), 0
        return self._position.copy(), {}

    def step(self, actions: Array) -> tuple[Array, Array, NDArray[np.bool_], NDArray[np.bool_], dict[str, object]]:
        position, reward, reached = _move(self._position, actions, self._goal)
        self._position = np.where(self._ended[:, None], self._position, position)
        reward = np.where(self._ended, np.float32(0), reward)
        self._ended = self._ended | reached
        self._steps += 1
        truncated = ~self._ended & (self._steps >= HORIZON)
        return self._position.copy(), reward, self._ended.copy(), truncated, {}
