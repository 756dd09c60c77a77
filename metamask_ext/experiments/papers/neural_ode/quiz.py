"""The benefits and drawbacks of neural ODEs that the quiz names, each as a number; each function is a job."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from ...engine.jobs import Json
from ...engine.training import seeded
from .field import Counted
from .settings import Settings

SOLVERS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
TOLERANCE = 1e-6
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
EXACT = 1e-12
STARTS = 32


class _Held:
    """Bytes that autograd holds for a backward: now, and the most so far."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def measure(self, function: object) -> int:
        assert callable(function)
        with torch.autograd.graph.saved_tensors_hooks(partial(_Entry, self), lambda entry: entry.tensor):
            function()
        return self.most


class _Entry:
    """A tensor that autograd holds, until the graph lets it go."""

    def __init__(self, held: _Held, tensor: Tensor):
        # Detached: an output that kept its graph would be kept by it.
        self.held, self.tensor, self.size = held, tensor.detach(), tensor.numel() * tensor.element_size()
        held.now += self.size
        held.most = max(held.most, held.now)

    def __del__(self) -> None:
        self.held.now -= self.size


def _net(seed: int) -> nn.Sequential:
    return seeded(seed, lambda: nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))).double()


def _start(seed: int, count: int = 8) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memory(seed: int, settings: Settings) -> Json:
    """The most bytes that autograd holds over forward and backward, by the number of steps: through the solver, and the adjoint."""
    net, y0, t = _net(seed), _start(seed), torch.tensor([0.0, 1.0], dtype=torch.float64)
    field = Counted(lambda t, y: net(y))

    def through(solve: object, steps: int) -> None:
        assert callable(solve)
        solve(field, y0, t, method="euler", options={"step_size": 1 / steps})[-1].square().sum().backward()

    adjoint = partial(odeint_adjoint, adjoint_params=tuple(net.parameters()))
    kinds = {"backprop": odeint, "adjoint": adjoint}
    return {name: [_Held().measure(partial(through, solve, steps)) for steps in settings.lengths] for name, solve in kinds.items()}


def solvers(seed: int, settings: Settings) -> Json:
    """Solvers as black boxes: their errors at one tolerance, at ``t = 1``; errors and evaluations of one by its tolerance, at 5."""
    net, y0 = _net(seed), _start(seed)
    field = Counted(lambda t, y: 2 * net(y))

    def solved(method: str, tolerance: float, end: float) -> Tensor:
        field.evaluations = 0
        t = torch.tensor([0.0, end], dtype=torch.float64)
        with torch.no_grad():
            return odeint(field, y0, t, method=method, rtol=tolerance, atol=tolerance)[-1]

    near, far = solved("dopri8", EXACT, 1), solved("dopri8", EXACT, 5)
    by_solver = {method: float((solved(method, TOLERANCE, 1) - near).abs().max()) for method in SOLVERS}
    by_tolerance = [(float((solved("dopri5", tolerance, 5) - far).abs().max()), field.evaluations) for tolerance in TOLERANCES]
    return {
        "scale": max(1.0, float(near.abs().max())),
        "by solver": by_solver,
        "errors": [error for error, _ in by_tolerance],
        "evaluations": [count for _, count in by_tolerance],
    }


def gradient(seed: int, settings: Settings) -> Json:
    """The relative difference of the adjoint's gradient and that through the solver, in float64."""
    net, y0, t = _net(seed), _start(seed), torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = []
    for solve in (odeint, partial(odeint_adjoint, adjoint_params=tuple(net.parameters()))):
        field = Counted(lambda t, y: net(y))
        loss = solve(field, y0, t, rtol=1e-7, atol=1e-9)[-1].square().sum()
        found.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(net.parameters()))]))
    return {"difference": float((found[1] - found[0]).norm() / found[0].norm())}


def batch(seed: int, settings: Settings) -> Json:
    """Evaluations of one solve of many starts together, beside those of each alone: a van der Pol oscillator."""
    radius = torch.linspace(0.1, 4, STARTS, dtype=torch.float64)[:, None]
    starts = radius * nn.functional.normalize(_start(seed, STARTS), dim=1)

    def oscillator(t: Tensor, y: Tensor) -> Tensor:
        x, v = y.unbind(-1)
        return torch.stack([v, 2 * (1 - x * x) * v - x], -1)

    def evaluations(y0: Tensor) -> int:
        field = Counted(oscillator)
        odeint(field, y0, torch.tensor([0.0, 5.0], dtype=torch.float64), rtol=1e-6, atol=1e-6)
        return field.evaluations

    alone = [evaluations(start[None]) for start in starts]
    return {"together": evaluations(starts), "largest alone": max(alone), "mean alone": sum(alone) / len(alone)}


def uniqueness(seed: int, settings: Settings) -> Json:
    """``y' = sqrt|y|`` from 0 has the solutions 0 and ``t^2 / 4``; a tanh net, with finite weights, has one."""
    t = torch.linspace(0, 4, 41, dtype=torch.float64)
    root = Counted(lambda t, y: y.abs().sqrt())
    ends = [float(odeint(root, torch.tensor([start], dtype=torch.float64), t, rtol=1e-9, atol=1e-12)[-1]) for start in (0.0, 1e-20)]
    # Both are solutions: the derivative of t^2 / 4 is t / 2, the root of t^2 / 4.
    residual = float((t / 2 - (t.square() / 4).sqrt()).abs().max())
    net, y0 = _net(seed), _start(seed, 1)
    near = [odeint(Counted(lambda t, y: net(y)), y0 + shift, t[[0, -1]], rtol=1e-9, atol=1e-12)[-1] for shift in (0.0, 1e-8)]
    return {
        "from zero": ends[0],
        "from nearly zero": ends[1],
        "residual": residual,
        "tanh": float((near[1] - near[0]).norm().detach()),
    }


def quiz(seed: int, settings: Settings) -> Json:
    """All of these."""
    parts = {"memory": memory, "solvers": solvers, "gradient": gradient, "batch": batch, "uniqueness": uniqueness}
    return {name: part(seed, settings) for name, part in parts.items()}


def flow(seed: int, settings: Settings) -> Json:
    """A continuous normalizing flow on two circles, beside a Gaussian (arXiv:1806.07366, section 4).

    ``dz/dt = U tanh(W z + a t + b)`` and ``d log p / dt = -trace(d f / d z) = -sum_k (1 - tanh^2)_k (U^T * W)_k``, exactly.
    """
    from sklearn.datasets import make_circles

    own, points = settings.flow, []
    for part in range(2):
        circles, _ = make_circles(2000, noise=0.06, factor=0.5, random_state=2 * seed + part)
        points.append(torch.from_numpy(circles).float())
    train, test = points
    generator = torch.Generator().manual_seed(seed)
    first, time = (torch.randn(own.width, size, generator=generator) for size in (2, 1))
    leaves = {
        "w": first,
        "a": time[:, 0],
        "b": torch.zeros(own.width),
        "u": 0.1 * torch.randn(2, own.width, generator=generator),
    }
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}

    def field(t: Tensor, state: Tensor) -> Tensor:
        on = torch.tanh(state[:, :2] @ leaves["w"].T + leaves["a"] * t + leaves["b"])
        trace = (1 - on.square()) @ (leaves["u"].T * leaves["w"]).sum(1)
        return torch.cat([on @ leaves["u"].T, -trace[:, None]], 1)

    ends = torch.tensor([1.0, 0.0])

    def log_density(x: Tensor, **options: object) -> Tensor:
        """From the data at ``t = 1`` back to the Gaussian at 0."""
        moved = odeint(field, torch.cat([x, x.new_zeros(len(x), 1)], 1), ends, **options)[-1]
        return _gaussian(moved[:, :2]) - moved[:, 2]

    optimizer = torch.optim.Adam(leaves.values(), own.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, own.steps)
    for _ in range(own.steps):
        some = train[torch.randint(len(train), (own.batch,), generator=generator)]
        optimizer.zero_grad()
        (-log_density(some, method="rk4", options={"step_size": 1 / own.parts}).mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        exact = {"rtol": 1e-5, "atol": 1e-5}
        moved = odeint(field, torch.cat([test, test.new_zeros(len(test), 1)], 1), ends, **exact)[-1]
        back = odeint(field, moved, ends.flip(0), **exact)[-1]
        side = torch.linspace(-3, 3, 201)
        grid = torch.cartesian_prod(side, side)
        density = log_density(grid, **exact).exp()
        mean, covariance = train.mean(0), train.T.cov()
        gaussian = torch.distributions.MultivariateNormal(mean, covariance).log_prob(test).mean()
        return {
            "flow": float(log_density(test, **exact).mean()),
            "gaussian": float(gaussian),
            "round trip": float((back[:, :2] - test).abs().max()),
            "integral": float(density.sum() * (side[1] - side[0]) ** 2),
            "density": density.view(201, 201)[50:151:2, 50:151:2].tolist(),
        }


def _gaussian(z: Tensor) -> Tensor:
    """The log density of the standard normal distribution in the plane."""
    return -z.square().sum(1) / 2 - math.log(2 * math.pi)
