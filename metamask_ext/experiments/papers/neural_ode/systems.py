"""Ours: several systems in one masked field, every trajectory its own task in one solve; and spirals by a latent ODE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from metamask_ext.nn import MaskedLinear
from metamask_ext.nn.names import DEFAULT_TASK
from metamask_ext.nn.tasks import add_task, remove_task

from ...engine.jobs import Json
from ...engine.training import descend, seeded
from .field import Counted, TaskField
from .settings import Settings, SpiralSettings, SystemSettings

POINTS = 9
"""Observed times of a trajectory, from 0 to ``END``."""
END = 2.0
NEW = "new"


def dynamics(count: int, generator: torch.Generator) -> Tensor:
    """Draw systems ``y' = A_k y^3``, elementwise cubes, as ``A`` ``[count, 2, 2]``: damped turns of either direction."""
    turn = (0.7 + 1.3 * torch.rand(count, generator=generator)) * (2.0 * torch.randint(2, (count,), generator=generator) - 1)
    damping = 0.05 + 0.25 * torch.rand(count, generator=generator)
    return torch.stack([torch.stack([-damping, turn], 1), torch.stack([-turn, -damping], 1)], 1)


def trajectories(matrices: Tensor, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Solve each system from ``each`` random starts: times ``[POINTS]`` and states ``[POINTS, systems, each, 2]``."""
    times = torch.linspace(0, END, POINTS)
    angle = 2 * math.pi * torch.rand(len(matrices), each, generator=generator)
    radius = 0.5 + torch.rand(len(matrices), each, generator=generator)
    starts = radius[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    with torch.no_grad():
        return times, odeint(lambda t, y: y**3 @ matrices.transpose(1, 2), starts, times, rtol=1e-6, atol=1e-6)


def net(masked: bool, width: int) -> nn.Sequential:
    """A field with two hidden layers, ``[n, 2]`` to ``[n, 2]``."""
    linear = MaskedLinear if masked else nn.Linear
    return nn.Sequential(linear(2, width), nn.Tanh(), linear(width, width), nn.Tanh(), linear(width, 2))


def systems(seed: int, settings: Settings) -> Json:
    """Learn all systems in one masked field, every trajectory its own task in one solve; then a new system by its mask alone,
    beside
    a field from scratch, and a field that all share."""
    own, generator = settings.systems, torch.Generator().manual_seed(seed)
    matrices = dynamics(own.systems + 1, generator)
    times, train = trajectories(matrices, own.trajectories, generator)
    _, test = trajectories(matrices, own.trajectories, generator)
    names = [f"system-{place}" for place in range(own.systems)]
    rows = [name for name in names for _ in range(own.trajectories)]
    known, new = slice(own.systems), slice(own.systems, None)

    model = seeded(seed, partial(_with_tasks, names, own.width))
    field = TaskField(model, rows)
    _learn(field, field.adjoint_parameters(), times, train[:, known], own)
    per_solve = _evaluations(field, times, train[:, known], own)
    apart = 0
    for place, name in enumerate(names):
        apart += _evaluations(TaskField(model, name), times, train[:, place : place + 1], own)
    shared = seeded(seed, partial(net, False, own.width))
    _learn(Counted(lambda t, y: shared(y)), tuple(shared.parameters()), times, train[:, known], own)

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    add_task(model, NEW, {name: 1 / len(names) for name in names})
    by_mask = TaskField(model, NEW)
    _learn(by_mask, by_mask.adjoint_parameters(), times, train[:, new], own)
    scratch = seeded(seed + 1, partial(net, False, own.width))
    from_scratch = Counted(lambda t, y: scratch(y))
    _learn(from_scratch, tuple(scratch.parameters()), times, train[:, new], own)
    return {
        "masked": _error(TaskField(model, rows), times, test[:, known]),
        "shared": _error(Counted(lambda t, y: shared(y)), times, test[:, known]),
        "new, mask": _error(TaskField(model, NEW), times, test[:, new]),
        "new, scratch": _error(from_scratch, times, test[:, new]),
        "evaluations": {"together": per_solve, "apart": apart},
        "gradients": gradients(seed, settings),
    }


def _with_tasks(names: Sequence[str], width: int) -> nn.Sequential:
    model = net(True, width)
    for name in names:
        add_task(model, name)
    remove_task(model, DEFAULT_TASK)
    return model


def _learn(field: nn.Module, parameters: tuple[Tensor, ...], times: Tensor, data: Tensor, own: SystemSettings) -> None:
    """Fit the states at all times by the adjoint method, all trajectories in one solve."""
    masks = isinstance(field, TaskField)
    groups = [{"params": [each], "lr": own.mask_lr if masks and _is_mask(field, each) else own.lr} for each in parameters]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, own.steps)
    start, wanted = data[0].flatten(0, 1), data.flatten(1, 2)
    for _ in range(own.steps):
        optimizer.zero_grad()
        options = {"method": "rk4", "options": {"step_size": END / (POINTS - 1) / own.parts}}
        F.mse_loss(odeint_adjoint(field, start, times, adjoint_params=parameters, **options), wanted).backward()
        optimizer.step()
        schedule.step()


def _is_mask(field: nn.Module, tensor: Tensor) -> bool:
    return any(tensor is parameter for name, parameter in field.named_parameters() if "masks" in name)


def _evaluations(field: TaskField, times: Tensor, data: Tensor, own: SystemSettings) -> int:
    """Evaluations of one solve with its adjoint's backward."""
    before = field.evaluations
    parameters = field.adjoint_parameters()
    found = odeint_adjoint(field, data[0].flatten(0, 1), times, adjoint_params=parameters, rtol=1e-4, atol=1e-4)
    torch.autograd.grad(found.square().sum(), parameters)
    return field.evaluations - before


def _error(field: nn.Module, times: Tensor, data: Tensor) -> float:
    with torch.no_grad():
        found = odeint(field, data[0].flatten(0, 1), times, rtol=1e-5, atol=1e-5)
    return float(F.mse_loss(found, data.flatten(1, 2)))


def gradients(seed: int, settings: Settings) -> float:
    """The largest difference, in float64, of the adjoint's gradients from one solve of all systems and from a solve of each."""
    names, generator = ["a", "b", "c"], torch.Generator().manual_seed(seed)
    model = seeded(seed, partial(_with_tasks, names, 8)).double()
    starts = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    tasks = [names[place % 3] for place in range(9)]
    times = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    everything = list(model.parameters())

    def solved(task: str | Sequence[str], y0: Tensor) -> None:
        field = TaskField(model, task)
        options = {"method": "rk4", "options": {"step_size": 0.1}}
        odeint_adjoint(field, y0, times, adjoint_params=field.adjoint_parameters(), **options)[1:].square().sum().backward()

    solved(tasks, starts)
    together = [each.grad for each in everything]
    model.zero_grad()
    for place, name in enumerate(names):
        solved(name, starts[place::3])
    return max(float((a - b.grad).abs().max()) for a, b in zip(together, everything) if a is not None and b.grad is not None)


class LatentODE(nn.Module):
    """A recurrent encoder that reads the points backwards, a latent field, and a linear decoder (arXiv:1806.07366, section 5).

    The latent state is taken at its mean: an autoencoder, without the variational term.
    """

    def __init__(self, own: SpiralSettings):
        super().__init__()
        self.encoder, self.start = nn.GRU(2, own.hidden), nn.Linear(own.hidden, own.latent)
        self.field = nn.Sequential(nn.Linear(own.latent, own.field), nn.ELU(), nn.Linear(own.field, own.latent))
        self.decoder = nn.Sequential(nn.Linear(own.latent, own.field), nn.ReLU(), nn.Linear(own.field, 2))

    def forward(self, seen: Tensor, times: Tensor) -> Tensor:
        """Points ``[seen, n, 2]`` to those at ``times``, ``[times, n, 2]``."""
        _, state = self.encoder(seen.flip(0))
        path = odeint(lambda t, z: self.field(z), self.start(state[0]), times, method="rk4")
        return self.decoder(path)


class Recurrent(nn.Module):
    """Reads points and gives the next one; goes on by reading its own."""

    def __init__(self, own: SpiralSettings):
        super().__init__()
        self.cell, self.out = nn.GRU(2, own.hidden), nn.Linear(own.hidden, 2)

    def forward(self, seen: Tensor, later: int) -> Tensor:
        """Points ``[seen, n, 2]`` to the points after each, and ``later - 1`` more: ``[seen + later - 1, n, 2]``."""
        hidden, state = self.cell(seen)
        found = [seen[-1] + self.out(hidden[-1])]
        for _ in range(later - 1):
            hidden, state = self.cell(found[-1][None], state)
            found.append(found[-1] + self.out(hidden[0]))
        return torch.cat([seen[:-1] + self.out(self.cell(seen)[0][:-1]), torch.stack(found)])


def spirals(seed: int, settings: Settings) -> Json:
    """Errors on spirals: extrapolated by a latent ODE and a recurrent net, and by the first at times seen and between these."""
    own, generator = settings.spirals, torch.Generator().manual_seed(seed)
    total = own.seen + own.later
    times = torch.arange(2 * total - 1) / (2 * (own.seen - 1)) * 2  # half steps: the odd ones are never seen
    data = [_spirals(own.spirals, times, generator) for _ in range(2)]
    noisy, other = (true[::2] + own.noise * torch.randn(total, own.spirals, 2, generator=generator) for true in data)
    latent, recurrent = seeded(seed, partial(LatentODE, own)), seeded(seed, partial(Recurrent, own))
    seen = noisy[: own.seen]
    descend(
        latent.parameters(),
        own.lr,
        own.steps,
        lambda: F.mse_loss(latent(seen, times[: 2 * own.seen : 2]), seen),
        "loss, latent ODE",
    )
    descend(recurrent.parameters(), own.lr, own.steps, lambda: F.mse_loss(recurrent(seen, 1)[:-1], seen[1:]), "loss, recurrent net")
    with torch.no_grad():
        path = latent(other[: own.seen], times)
        after = recurrent(other[: own.seen], own.later)[own.seen - 1 :]
    true, last = data[1], 2 * own.seen - 1

    def error(found: Tensor, wanted: Tensor) -> float:
        return float((found - wanted).square().mean().sqrt())

    return {
        "latent": error(path[last + 1 :: 2], true[last + 1 :: 2]),
        "recurrent": error(after, true[last + 1 :: 2]),
        "seen times": error(path[:last:2], true[:last:2]),
        "times between": error(path[1:last:2], true[1:last:2]),
        "example": {
            "true": true[:, 0].tolist(),
            "points": other[: own.seen, 0].tolist(),
            "latent": path[:, 0].tolist(),
            "recurrent": after[:, 0].tolist(),
        },
    }


def _spirals(count: int, times: Tensor, generator: torch.Generator) -> Tensor:
    """Spirals ``r = a + b t`` of either direction from random angles, ``[times, count, 2]``."""
    start, way = 2 * math.pi * torch.rand(count, generator=generator), 2.0 * torch.randint(2, (count,), generator=generator) - 1
    inner = 0.3 + 0.4 * torch.rand(count, generator=generator)
    angle = start + way * 1.5 * math.pi * times[:, None] / 2
    radius = inner + 0.3 * times[:, None]
    return radius[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
