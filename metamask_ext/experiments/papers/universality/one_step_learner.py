"""A network that one gradient step turns into any chosen learner: Finn and Levine, arXiv:1710.11622, section 4, appendices A-C."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.meta import MAML

from ...engine.jobs import Json
from .settings import ConstructionSettings

EPSILON = 1.0
"""Keeps the matrices of the construction invertible. The paper has it small; here nothing is approximated, so any will do."""


class OneStepLearner(nn.Module):
    """After one gradient step on ``(x, y)`` its output at ``x*`` is a chosen ``f(x, y, x*)``, for ``x``, ``x*`` in ``bins`` bins of
    [0, 1) and ``y > 0``; before, it is 0.

    ``z = (prod_i W_i) phi(x)`` with ``W_i = diag(W~_i, W-_i, w_i)`` and ``phi = (phi~, 0, theta_b)``: ``phi~`` is the one-hot
    bin of ``x``, in its upper half while ``theta_b = 0`` and in its lower half after. The head multiplexes (eq. 4): it is linear
    in ``z`` while the middle part ``z-`` is 0, so that the error at ``z-`` is a multiple of ``y`` (appendix B); afterwards it is
    a network with one hidden layer that sees ``z-`` only. The step writes into the blocks of ``W_i`` from ``phi~`` to ``z-``::

        z- = -alpha sum_i A_i e(y) k_i(x, x*)        A_i = (prod_j<i W-_j) (prod_j<i W-_j)^T,  B_i = prod_j>i W~_j  (eq. 3)
        k_i(x, x*) = phi~(x)^T B_i^T B_i phi~(x*)

    without terms in ``alpha^2``, because these blocks form no path with two of them. One factor ``i`` belongs to each pair
    ``(j, l)`` of bins: ``B_i = u u^T + epsilon I``, ``u = (e_j, e_l)``, makes ``k_i = 2 + 2 epsilon`` if ``x`` is in bin ``j`` and
    ``x*`` in bin ``l``, else 0 (appendix C); ``A_i = diag(e_jl) + epsilon I`` puts ``y`` at position ``(j, l)`` of ``z-``. The
    first and the last factor, whose ``A`` and ``B`` cannot be chosen, have ``B`` a multiple of ``I`` and so ``k = 0``.

    All activations are nonnegative before and after the step: the layers have ReLUs and act as if linear (appendix A).

    Args:
        table: ``f`` ``[bins, bins, values]`` at the bins of ``x`` and ``x*`` and at ``values`` of ``y``; float64 in what follows.
            Between the values ``f`` is linear in ``y``, from 0 at ``y = 0``.
        values: ascending, positive.
        inner_lr: ``alpha``; the loss must be the squared error, ``torch.nn.functional.mse_loss``.

    Raises:
        ValueError: a table of another shape, or values that are not positive and ascending.
    """

    def __init__(self, table: Tensor, values: Tensor, inner_lr: float):
        super().__init__()
        if table.dim() != 3 or table.shape[0] != table.shape[1] or table.shape[2] != len(values):
            raise ValueError(f"table must be [bins, bins, {len(values)}], got shape {list(table.shape)}")
        if not bool((values > 0).all() and (values.diff() > 0).all()):
            raise ValueError(f"values must be positive and ascending, got {values.tolist()}")
        table, values = table.double(), values.double()
        self.bins = table.shape[0]
        self.layers = nn.ParameterList(_factors(self.bins))
        self.switch = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.linear_head = nn.Linear(self.bins**2 + 1, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(self.linear_head.weight)
        self.hidden, self.output = _head(table.flatten(0, 1), values, inner_lr)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 1]`` for ``x`` ``[n, 1]`` in [0, 1)."""
        one_hot = (torch.floor(x * self.bins) == torch.arange(self.bins)).to(x.dtype)
        before = self.switch == 0
        zero = torch.zeros_like(one_hot)
        constant = x.new_zeros(len(x), self.bins**2)
        halves = torch.where(before, one_hot, zero), torch.where(before, zero, one_hot)
        z = torch.cat([*halves, constant, self.switch.expand(len(x), 1)], 1)
        for layer in reversed(self.layers):
            z = _relu(z @ layer.T)
        read = z[:, 2 * self.bins :]
        middle = read[:, :-1]
        unwritten = (middle == 0).all(1, keepdim=True)
        return torch.where(unwritten, self.linear_head(read), self.output(torch.relu(self.hidden(middle))))


def _relu(z: Tensor) -> Tensor:
    """ReLU whose derivative at 0, where the middle part is before the step, is 1; torch's is 0."""
    return torch.where(z >= 0, z, 0)


def _factors(bins: int) -> list[nn.Parameter]:
    """``W_1, ..., W_N``, the outermost first; ``N = bins^2 + 2``."""
    pairs = bins**2
    identity = torch.eye(2 * bins, dtype=torch.float64)
    # inner[i] = prod_j>i W~_j and outer[i] = prod_j<=i W-_j, whose squares are A_i+1 and from which the factors follow.
    inner, outer = [identity], [torch.ones(pairs, dtype=torch.float64)]
    for pair in range(pairs):
        u = identity[pair // bins] + identity[bins + pair % bins]
        inner.append(torch.outer(u, u) + EPSILON * identity)
        outer.append((torch.eye(pairs, dtype=torch.float64)[pair] + EPSILON).sqrt())
    inner = [identity, EPSILON * identity, *inner[1:], identity]
    outer = [*outer, outer[0], outer[0]]
    return [
        nn.Parameter(
            torch.block_diag(
                torch.linalg.solve(inner[i + 1], inner[i], left=False), torch.diag(outer[i + 1] / outer[i]), torch.ones(1, 1)
            )
        )
        for i in range(pairs + 2)
    ]


def _head(table: Tensor, values: Tensor, inner_lr: float) -> tuple[nn.Linear, nn.Linear]:
    """``z-`` to ``f``: the hidden layer undoes ``A`` and has a unit for each position and knot, the output adds slopes."""
    pairs, knots = table.shape
    # z- = scale * y * (e_jl + epsilon): the squared error's derivative is -2 y, the kernel 2 + 2 epsilon.
    scale = inner_lr * 2 * (2 + 2 * EPSILON)
    undo = (torch.eye(pairs).double() - EPSILON / (1 + pairs * EPSILON)) / scale
    starts = torch.cat([torch.zeros(1).double(), values[:-1]])
    slopes = torch.diff(table, prepend=torch.zeros(pairs, 1).double()) / torch.diff(values, prepend=torch.zeros(1).double())
    changes = torch.diff(slopes, prepend=torch.zeros(pairs, 1).double())
    hidden = nn.Linear(pairs, pairs * knots, dtype=torch.float64)
    output = nn.Linear(pairs * knots, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        hidden.weight.copy_(undo.repeat_interleave(knots, 0))
        hidden.bias.copy_(-starts.repeat(pairs))
        output.weight.copy_(changes.reshape(1, -1))
    return hidden, output


@torch.no_grad()
def construct(seed: int, settings: ConstructionSettings) -> Json:
    """Build :class:`OneStepLearner` for learners ``f(x, y, x*)``, take the step for every ``(x, y)`` with
    :class:`metamask_ext.meta.MAML` and compare the output at every ``x*`` with ``f``."""
    bins, lr = settings.bins, settings.inner_lr
    values = torch.tensor(settings.values, dtype=torch.float64)
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    x, y, x_star = torch.meshgrid(centres, values, centres, indexing="ij")
    generator = torch.Generator().manual_seed(seed)
    learners = {
        "a random table": torch.randn(x.shape, generator=generator, dtype=torch.float64),
        "y cos(2 pi (x - x*))": y * torch.cos(2 * math.pi * (x - x_star)),
        "y where x* is in the bin of x, else 0": y * (x == x_star),
    }
    made: Json = {}
    for name, chosen in learners.items():
        model = OneStepLearner(chosen.movedim(1, 2), values, lr)
        maml = MAML(model, lr, 1, adapt="weights")
        # A task for each (x, y), its queries all x*.
        parameters = maml.adapt(F.mse_loss, (x[:, :, 0].reshape(-1, 1, 1), y[:, :, 0].reshape(-1, 1, 1)))
        prediction = maml.predict(parameters, x_star.reshape(-1, bins, 1)).reshape(x.shape)
        made[name] = {
            "largest error": float((prediction - chosen).abs().max()),
            "largest value": float(chosen.abs().max()),
            "largest output before the step": float(model(centres[:, None]).abs().max()),
            "at the largest y": prediction[:, -1].tolist(),
        }
    return made
