"""navigation-2d: the environments, the policy gradient, and the claim on the quick run."""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from support.experiments import check_claims, check_resumes, check_written, quick_run

from metamask_ext.data.navigation import HORIZON, NavigationEnv, NavigationVectorEnv
from metamask_ext.experiments.catalogue import run
from metamask_ext.experiments.papers.navigation_2d.policy_gradient import Episodes, GaussianPolicy, adaptation, rollout, surrogate
from metamask_ext.experiments.papers.navigation_2d.settings import AdvantageSettings
from metamask_ext.meta import MAML

# The quick run is made once, so by one worker.
pytestmark = pytest.mark.xdist_group("navigation-2d")

ADVANTAGES = AdvantageSettings()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("navigation-2d")


@pytest.fixture(scope="module")
def metrics(folder):
    return quick_run("navigation-2d", folder)


def test_is_a_gymnasium_environment():
    with warnings.catch_warnings():
        # It has no registered name, and its observations no bounds.
        warnings.filterwarnings("ignore", module="gymnasium")
        check_env(NavigationEnv(), skip_render_check=True)


def test_step():
    env = NavigationEnv()
    position, _ = env.reset(options={"goal": [0.25, 0.0]})
    assert position.tolist() == [0, 0]
    position, reward, terminated, truncated, _ = env.step(np.array([0.1, 0.05], np.float32))
    np.testing.assert_allclose(position, [0.1, 0.05], rtol=1e-6)
    assert reward == pytest.approx(-(0.15**2 + 0.05**2), rel=1e-5) and not terminated and not truncated
    position, *_ = env.step(np.array([7.0, -7.0], np.float32))
    np.testing.assert_allclose(position, [0.2, -0.05], rtol=1e-6)
    _, reward, terminated, _, _ = env.step(np.array([0.045, 0.05], np.float32))
    assert terminated and reward == pytest.approx(-(0.005**2), rel=1e-3)


def test_truncation():
    env = NavigationEnv()
    env.reset(seed=3)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(HORIZON)]
    assert ends[:-1] == [(False, False)] * (HORIZON - 1) and ends[-1] == (False, True)


def test_vector_is_many_single_ones():
    random = np.random.default_rng(0)
    goals = random.uniform(-0.5, 0.5, (6, 2)).astype(np.float32)
    goals[0] = [0.05, 0.0]
    vector, singles = NavigationVectorEnv(6), [NavigationEnv() for _ in range(6)]
    observed, _ = vector.reset(options={"goal": goals})
    for env, goal in zip(singles, goals):
        env.reset(options={"goal": goal})
    ended = np.zeros(6, bool)
    for step in range(HORIZON):
        actions = random.uniform(-0.15, 0.15, (6, 2)).astype(np.float32)
        actions[0] = goals[0] if step == 0 else actions[0]
        before = observed
        observed, rewards, terminated, truncated, _ = vector.step(actions)
        for index, env in enumerate(singles):
            if ended[index]:
                assert rewards[index] == 0 and terminated[index] and not truncated[index]
                np.testing.assert_array_equal(observed[index], before[index])
                continue
            position, reward, single_terminated, single_truncated, _ = env.step(actions[index])
            np.testing.assert_array_equal(observed[index], position)
            assert (rewards[index], terminated[index], truncated[index]) == (
                np.float32(reward),
                single_terminated,
                single_truncated,
            )
            ended[index] = single_terminated
    assert ended[0] and not ended.all()


def test_goals_are_drawn_from_the_seed():
    first, second, other = (NavigationVectorEnv(50) for _ in range(3))
    first.reset(seed=1), second.reset(seed=1), other.reset(seed=2)
    np.testing.assert_array_equal(first._goal, second._goal)
    assert not np.array_equal(first._goal, other._goal) and np.abs(first._goal).max() <= 0.5 and first._goal.std() > 0.2


def test_refused():
    with pytest.raises(ValueError, match=r"goal must have shape \[2\], got \[3\]"):
        NavigationEnv().reset(options={"goal": [0, 0, 0]})
    with pytest.raises(ValueError, match=r"goal must have shape \[4, 2\], got \[2\]"):
        NavigationVectorEnv(4).reset(options={"goal": [0, 0]})
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        NavigationVectorEnv(0)


def _episodes(tasks: int = 2, episodes: int = 3) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    goals = torch.tensor([[0.3, 0.2], [0.1, 0.0]])[:tasks]
    # Towards the goal with noise: some episodes end early.
    return rollout(
        lambda x: torch.cat([3 * (goals[:, None] - x), torch.full_like(x, -3.0)], -1), goals, episodes, generator, ADVANTAGES
    )


def test_rollout():
    made = _episodes()
    assert made.positions.shape == made.actions.shape == (2, 3, HORIZON, 2) and made.rewards.shape == (2, 3, HORIZON)
    assert float(made.positions[:, :, 0].abs().max()) == 0
    moved = made.positions[:, :, :-1] + 0.1 * made.actions[:, :, :-1].clamp(-1, 1)
    on = made.alive[:, :, 1:, None]
    torch.testing.assert_close(on * made.positions[:, :, 1:], on * moved, rtol=0, atol=1e-6)
    assert 0 < float(made.alive.mean()) < 1 and bool((made.alive.diff(dim=2) <= 0).all())
    assert float((made.rewards * (1 - made.alive)).abs().max()) == 0
    squared = (torch.tensor([[0.3, 0.2], [0.1, 0.0]])[:, None, None] - made.positions[:, :, 1:]).square().sum(-1)
    torch.testing.assert_close(
        made.rewards[:, :, :-1] * made.alive[:, :, :-1], -squared * made.alive[:, :, :-1], rtol=1e-4, atol=1e-6
    )


def test_advantages_are_those_of_a_loop(monkeypatch):
    """Generalised advantages by their definition, a sum over later errors; then scaled for each task."""
    made = _episodes()
    values = torch.randn(made.rewards.shape, generator=torch.Generator().manual_seed(1)) * made.alive
    monkeypatch.setattr(Episodes, "_baseline", lambda self, returns: values)
    _, (_, advantages) = made.samples()
    for task in range(2):
        raw = {}
        for episode in range(3):
            length = int(made.alive[task, episode].sum())
            value = [*values[task, episode, :length].tolist(), 0.0]
            reward = made.rewards[task, episode].tolist()
            error = [reward[t] + ADVANTAGES.discount * value[t + 1] - value[t] for t in range(length)]
            decay = ADVANTAGES.discount * ADVANTAGES.gae_lambda
            for t in range(length):
                raw[episode, t] = sum(decay ** (later - t) * error[later] for later in range(t, length))
        mean = sum(raw.values()) / len(raw)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in raw.values()) / len(raw))
        expected = torch.zeros(3, HORIZON)
        for (episode, t), value in raw.items():
            expected[episode, t] = (value - mean) / deviation
        torch.testing.assert_close(advantages[task].reshape(3, HORIZON), expected, rtol=1e-3, atol=1e-4)


def test_baseline_explains_what_it_can():
    """Returns that are linear in position and time are fitted exactly, task by task."""
    made = _episodes()
    time = torch.arange(HORIZON) / HORIZON
    linear = (1.0 + made.positions @ torch.tensor([2.0, -1.0]) + 3 * time**2) * made.alive
    torch.testing.assert_close(made._baseline(linear), linear, rtol=0, atol=1e-3)


def test_surrogate_is_the_density_of_torch():
    generator = torch.Generator().manual_seed(0)
    mean, log_std, actions = (torch.randn(7, 2, generator=generator) for _ in range(3))
    advantages = torch.randn(7, generator=generator)
    density = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(1)
    torch.testing.assert_close(surrogate(torch.cat([mean, log_std], 1), (actions, advantages)), -(density * advantages).mean())


@pytest.mark.parametrize("masked", [False, True])
def test_updates_of_a_task_depend_on_it_alone(masked):
    """Tasks that are run at once learn what each would alone: the same actions, and so the same episodes."""
    policy = GaussianPolicy(8, masked)
    maml = MAML(policy, 0.1, 1, "masks" if masked else "weights")
    goals = torch.tensor([[0.4, 0.4]]).repeat(3, 1)
    made = adaptation(maml, goals, 5, 1, torch.Generator().manual_seed(0), ADVANTAGES)
    parameters = maml.adapt(surrogate, made[0].samples())
    for task in range(3):
        x, target = made[0].samples()
        alone = maml.adapt(surrogate, (x[task : task + 1], tuple(each[task : task + 1] for each in target)))
        for name, tensor in alone.items():
            torch.testing.assert_close(tensor[0], parameters[name][task], rtol=1e-4, atol=1e-5)


def test_claims(metrics):
    check_claims(metrics)
    assert 0 < metrics["interval_95_over_tasks"]["maml"]["return, 1 update"] < 3


def test_written(metrics, folder):
    check_written(folder / "navigation-2d", metrics, ["navigation-2d.png"])
    assert sorted(path.name for path in (folder / "navigation-2d" / "seed-0").iterdir()) == [
        "maml.json",
        "masks.json",
        "pretrained.json",
        "random.json",
        "straight.json",
    ]


def test_killed_run_continues(metrics, folder):
    check_resumes(folder / "navigation-2d", metrics, "straight.json")


def test_without_gymnasium(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"gymnasium is not installed: pip install \"metamask_ext\[experiments\]\""):
        run("navigation-2d", tmp_path / "out", 0, quick=True)
    assert not (tmp_path / "out").exists()
