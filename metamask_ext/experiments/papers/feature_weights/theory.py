"""Parts a to d of the homework: the minimum-norm solution, and one true feature with one alias of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...engine.jobs import Json

RATE, ITERATIONS = 0.01, 500_000
STARTS = ((1.0, 1.0), (0.5, 1.5), (1.5, 0.5), (0.6, -1.2))


def min_norm(features: Tensor, y: Tensor) -> Tensor:
    """``beta = A^T (A A^T)^-1 y``: of all ``beta`` with ``A beta = y`` that of least norm (part a), differentiable.

    Args:
        features: ``A`` ``[n, d]`` of rank n.
        y: ``[n, T]``, a column for each task.
    """
    return features.mT @ torch.linalg.solve(features @ features.mT, y)


def aliased_solution(weights: Tensor) -> Tensor:
    """``beta = c / (c_0^2 + c_1^2)``: the minimum-norm solution for one point with ``phi_t(x) = phi_a(x) = y`` (part b)."""
    return weights / weights.square().sum()


def aliased_error(weights: Tensor) -> Tensor:
    """``E[(phi_t - beta_0 c_0 phi_t - beta_1 c_1 phi_a)^2] / 2`` of that solution, ``phi_t`` and ``phi_a`` orthonormal (part c)."""
    learned = aliased_solution(weights) * weights
    return 0.5 * ((1 - learned[0]) ** 2 + learned[1] ** 2)


def aliased_gradient(c0: float, c1: float) -> tuple[float, float]:
    """Of ``aliased_error``: ``4 c_0 c_1^3 (-c_1, c_0) / (c_0^2 + c_1^2)^3`` (part c). It is orthogonal to ``c``: small
    steps keep the norm, and ``c_1`` falls to zero."""
    factor = 4 * c0 * c1**3 / (c0 * c0 + c1 * c1) ** 3
    return -factor * c1, factor * c0


def aliased_pair() -> Json:
    """The checks of parts a to c, as largest differences, and the gradient descent of part d from several starts."""
    generator = torch.Generator().manual_seed(0)
    features, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 20), (8, 3)))
    of_solution = (min_norm(features, y) - torch.linalg.pinv(features) @ y).abs().max()

    of_pair = of_gradient = 0.0
    for weights in torch.randn(100, 2, generator=generator, dtype=torch.float64).requires_grad_():
        solved = min_norm(weights[None], torch.ones(1, 1, dtype=torch.float64))[:, 0]
        of_pair = max(of_pair, float((solved - aliased_solution(weights)).detach().abs().max()))
        (grad,) = torch.autograd.grad(aliased_error(weights), weights)
        formula = torch.tensor(aliased_gradient(*weights.tolist()), dtype=torch.float64)
        # Relative: the gradient grows without bound near the origin.
        of_gradient = max(of_gradient, float((grad - formula).norm() / formula.norm()))
    return {
        "difference from the pseudo-inverse (a)": float(of_solution),
        "difference from the formula (b)": of_pair,
        "relative difference of the gradient from autograd (c)": of_gradient,
        "rate": RATE,
        "paths": [_descend(*start) for start in STARTS],
    }


def _descend(c0: float, c1: float) -> Json:
    """Gradient descent on ``aliased_error`` (part d); the path at iterations on a log scale."""
    norm = math.hypot(c0, c1)
    shown = {round(10 ** (k / 10)) for k in range(1 + round(10 * math.log10(ITERATIONS)))} | {0, ITERATIONS}
    path: dict[str, list[float]] = {"iteration": [], "c0": [], "c1": []}
    for iteration in range(ITERATIONS + 1):
        if iteration in shown:
            for name, value in (("iteration", iteration), ("c0", c0), ("c1", c1)):
                path[name].append(value)
        d0, d1 = aliased_gradient(c0, c1)
        c0, c1 = c0 - RATE * d0, c1 - RATE * d1
    return {"norm of the start": norm, **path, "beta": aliased_solution(torch.tensor([path["c0"][-1], path["c1"][-1]])).tolist()}
