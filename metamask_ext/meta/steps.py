"""Inner steps that are computed again in the backward instead of being remembered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

Step = Callable[[list[Tensor], bool], list[Tensor]]
"""``step(parameters, create_graph)``: the parameters after one inner step."""

KEPT = 3
"""States of the parameters that a backward holds at once. With 3, 20 steps are each computed at most three times more."""


def recomputed_steps(step: Step, steps: int, parameters: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """``parameters`` after ``steps`` inner steps; the memory of its graph and of its backward does not grow with ``steps``.

    The backward holds at most ``KEPT`` states of the parameters and the graph of one step. With ``r`` recomputations of each step
    that is enough for ``binomial(KEPT + r, r)`` steps. Source: A. Griewank and A. Walther, Algorithm 799: revolve, ACM Transactions
    on Mathematical Software 26 (2000), pages 19 to 45, section 2. Random numbers and autocast are those of the forward.

    Args:
        step: one step; it may depend on ``others``, which get gradients.
        steps: how many.
        parameters: what the steps change.
        others: every other tensor that ``step`` reads and that requires grad.
    """
    return list(_Steps.apply(step, steps, len(parameters), *parameters, *others))


class _Steps(Function):
    @staticmethod
    def forward(ctx, step, steps, count, *tensors):
        ctx.step, ctx.count = step, count
        ctx.save_for_backward(*tensors)
        device = tensors[0].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.random = []
        state = list(tensors[:count])
        for _ in range(steps):
            ctx.random.append((torch.get_rng_state(), *get_device_states(*state)))
            state = step(state, False)
        # A step may give back what it got; a Function's outputs must be its own.
        return tuple(tensor.detach() if steps else tensor.clone() for tensor in state)

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        parameters, others = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        reverse = _Reverse(ctx, others)
        with torch.autocast(ctx.autocast[0], ctx.autocast[1], enabled=ctx.autocast[2]):
            grads = reverse(0, len(ctx.random), list(parameters), list(cotangents), KEPT - 1)
        return (
            None,  # step
            None,  # steps
            None,  # count
            *grads,
            *reverse.totals,
        )


class _Reverse:
    """Pulls cotangents back through the steps, and adds up what the other tensors get."""

    def __init__(self, ctx: Any, others: Sequence[Tensor]):
        self.step, self.random = ctx.step, ctx.random
        self.others = [other for other in others if other.requires_grad]
        self.positions = [index for index, other in enumerate(others) if other.requires_grad]
        self.totals: list[Tensor | None] = [None] * len(others)

    def __call__(self, first: int, last: int, state: list[Tensor], cotangents: list[Tensor], spare: int) -> list[Tensor]:
        """From the cotangents after step ``last - 1`` those before step ``first``, where the parameters are ``state``.

        ``spare`` further states may be kept meanwhile.
        """
        while last - first > 1:
            middle = last - 1 if spare == 0 else first + _left(last - first, spare + 1)
            at_middle = state
            for index in range(first, middle):
                at_middle = self._again(index, at_middle, False)
            cotangents = self(middle, last, at_middle, cotangents, max(spare - 1, 0))
            last = middle
        return self._pull_back(first, state, cotangents) if last > first else cotangents

    def _again(self, index: int, state: list[Tensor], create_graph: bool) -> list[Tensor]:
        cpu, devices, states = self.random[index]
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            torch.set_rng_state(cpu)
            set_device_states(devices, states)
            return self.step(state, create_graph)

    def _pull_back(self, index: int, state: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in state]
        with torch.enable_grad():
            after = self._again(index, leaves, True)
        found = torch.autograd.grad(after, [*leaves, *self.others], cotangents, allow_unused=True)
        for position, grad in zip(self.positions, found[len(leaves) :]):
            if grad is not None:
                total = self.totals[position]
                self.totals[position] = grad if total is None else total + grad
        return list(found[: len(leaves)])


def _left(steps: int, states: int) -> int:
    """After how many of ``steps`` a second state is best kept, of ``states`` in all: binomial(s + r, s) steps split in two."""
    again = 0
    while math.comb(states + again, states) < steps:
        again += 1
    return max(1, steps - math.comb(states - 1 + again, states - 1))
