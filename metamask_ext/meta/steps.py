"""Inner steps that are computed again in the backward instead of being remembered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import get_device_states, set_device_states

Gradients = Callable[[list[Tensor], bool], list[Tensor]]
"""``gradients(parameters, create_graph)``: of the inner loss."""

GradientsOf = Callable[[list[Tensor], bool, slice], list[Tensor]]
"""``gradients(parameters, create_graph, part)``: of the inner loss of the tasks of that part, of whom all parameters are."""

Rates = Sequence["float | Tensor"]

_Random = tuple[Tensor, list[int], list[Tensor]] | None
"""The states of the generators; None where no step draws numbers."""

ALL = slice(None)
"""The part that holds every task."""

KEPT = 2
"""States of the parameters that a backward keeps at once, the first one included. A third would save a third of the time that 20
steps are computed again, and cost as much memory as all masks."""


def recomputed_steps(
    gradients: GradientsOf, rates: Rates, steps: int, parameters: Sequence[Tensor], others: Sequence[Tensor]
) -> list[Tensor]:
    """``parameters`` after ``steps`` inner steps, in a graph whose memory does not grow with ``steps``, nor that of its backward.

    The backward keeps ``KEPT`` states of the parameters and the graph of one step. If each step is computed again at most ``r``
    times, that is enough for ``binomial(KEPT + r, r)`` steps. Source: A. Griewank and A. Walther, Algorithm 799: revolve, ACM
    Transactions on Mathematical Software 26 (2000), pages 19 to 45, section 2. It goes through all steps for one half of the tasks,
    then for the other: both need half of that memory. Where steps draw random numbers, which the halves would not draw alike, all
    tasks stay together. Random numbers and autocast are the forward's.

    Args:
        gradients: of one step's loss, by task; they may depend on ``others``, which get gradients.
        rates: of each of the parameters.
        steps: how many, at least 1.
        parameters: what the steps change.
        others: every other tensor that requires grad and that ``gradients`` reads.
    """
    tensors = [rate for rate in rates if isinstance(rate, Tensor)]
    learned = torch.stack(tensors) if tensors else None
    taken: list[Tensor | None] = []

    def take(cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        # The engine would keep what it gives a backward until that returns: as much as all masks.
        taken.extend(cotangents)
        return tuple(None if of is None else of.new_zeros(()).expand(of.shape) for of in cotangents)

    apply: Callable[..., tuple[Tensor, ...]] = _Steps.apply
    made = list(apply(gradients, rates, steps, len(parameters), taken, learned, *parameters, *others))
    if made[0].grad_fn is not None:
        made[0].grad_fn.register_prehook(take)
    return made


def updated(parameters: Sequence[Tensor], grads: Sequence[Tensor], rates: Rates) -> list[Tensor]:
    """``parameters - rates * grads``."""
    return [
        tensor - rate * grad if isinstance(rate, Tensor) else torch.add(tensor, grad, alpha=-rate)
        for tensor, grad, rate in zip(parameters, grads, rates)
    ]


if TYPE_CHECKING:

    class _Context(FunctionCtx):
        """The node of :class:`_Steps`."""

        saved_tensors: tuple[Tensor, ...]
        gradients: GradientsOf
        rates: Rates
        steps: int
        count: int
        taken: list[Tensor | None]
        autocast: tuple[str, torch.dtype, bool]
        random: _Random


class _Steps(Function):
    @staticmethod
    def forward(
        ctx: _Context,
        gradients: GradientsOf,
        rates: Rates,
        steps: int,
        count: int,
        taken: list[Tensor | None],
        learned: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.count, ctx.steps, ctx.taken = count, steps, taken
        # Not the tensors of the graph outside, which would be kept by it
        ctx.gradients, ctx.rates = gradients, [rate.detach() if isinstance(rate, Tensor) else rate for rate in rates]
        device = tensors[0].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        random = _random_states(tensors)
        state = _copies(tensors[:count])
        for _ in range(steps):
            _advance(state, gradients(state, False, ALL), ctx.rates)
        ctx.random = None if _are_equal(random, _random_states(tensors)) else random
        return tuple(state)

    @staticmethod
    def backward(ctx: _Context, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a meta-gradient whose inner steps are computed again (checkpoint=True) cannot be differentiated again"
            )
        state, others = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        cotangents = [torch.zeros_like(tensor) if of is None else of for of, tensor in zip(ctx.taken, state)]
        ctx.taken.clear()
        reverse = _Reverse(ctx.rates, others)
        parts = [ALL] if ctx.random is not None else _halves(len(state[0]))
        # Copies: a view would keep the whole.
        of_parts = [[of[part].clone() for of in cotangents] for part in parts] if len(parts) > 1 else [cotangents]
        del cotangents
        with torch.autocast(ctx.autocast[0], ctx.autocast[1], enabled=ctx.autocast[2]):
            for part, of_part in zip(parts, of_parts):
                reverse.begin(partial(_of_part, ctx.gradients, part), of_part, owned=len(parts) > 1)
                reverse(0, ctx.steps, [tensor[part] for tensor in state], ctx.random, KEPT - 1)
        return (
            None,  # gradients
            None,  # rates
            None,  # steps
            None,  # count
            None,  # taken
            reverse.of_rates,
            *(of[0] if len(of) == 1 else torch.cat(of) for of in zip(*of_parts)),
            *reverse.of_others,
        )


def _of_part(gradients: GradientsOf, part: slice, state: list[Tensor], create_graph: bool) -> list[Tensor]:
    return gradients(state, create_graph, part)


def _halves(tasks: int) -> list[slice]:
    return [ALL] if tasks < 2 else [slice(0, tasks // 2), slice(tasks // 2, tasks)]


class _Reverse:
    """Pulls the cotangents back through the steps, and adds up what rates and other tensors get."""

    gradients: Gradients
    cotangents: list[Tensor]
    owned: bool
    """True where ``cotangents`` are tensors of this object, which it may change."""

    def __init__(self, rates: Rates, others: Sequence[Tensor]):
        self.rates, self.others = rates, others
        self.of_others: list[Tensor | None] = [None] * len(others)
        learned = [rate for rate in rates if isinstance(rate, Tensor)]
        self.of_rates = torch.zeros_like(torch.stack(learned)) if learned else None

    def begin(self, gradients: Gradients, cotangents: list[Tensor], owned: bool) -> None:
        """Take these cotangents after the last step, in whose places those before the first will stand."""
        self.gradients, self.cotangents, self.owned = gradients, cotangents, owned

    def __call__(self, first: int, last: int, state: Sequence[Tensor], random: _Random, spare: int) -> None:
        """From after step ``last - 1`` to before step ``first``, where the parameters are ``state``; ``spare`` more may be kept.

        ``random``: the generators' states before step ``first``.
        """
        while last - first > 1:
            middle = last - 1 if spare == 0 else first + _left(last - first, spare + 1)
            at_middle = _copies(state)
            with _replayed(random):
                for _ in range(first, middle):
                    _advance(at_middle, self.gradients(at_middle, False), self.rates)
                random_at_middle = None if random is None else _random_states(state)
            self(middle, last, at_middle, random_at_middle, max(spare - 1, 0))
            last = middle
        self._pull_back(state, random)

    def _pull_back(self, state: Sequence[Tensor], random: _Random) -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in state]
        with torch.enable_grad(), _replayed(random):
            grads = self.gradients(leaves, True)
        factor, cotangents = 1.0, self.cotangents
        if not isinstance(self.rates[0], Tensor):
            factor = -self.rates[0]
        if self.of_rates is not None:
            cotangents = [-rate * cotangent for rate, cotangent in zip(self.rates, cotangents)]
            self.of_rates -= torch.stack([(cotangent * grad).sum() for cotangent, grad in zip(self.cotangents, grads)])
        # Of the gradients only their graph is needed from here on.
        pairs = [(get_gradient_edge(grad), of) for grad, of in zip(grads, cotangents) if grad.requires_grad]
        del grads, cotangents
        if not pairs:
            return
        outputs, given = zip(*pairs)
        del pairs
        found: list[Tensor | None] = list(torch.autograd.grad(outputs, [*leaves, *self.others], given, allow_unused=True))
        del given
        for position in range(len(leaves)):
            grad, found[position] = found[position], None
            if grad is not None:
                if self.owned:
                    self.cotangents[position].add_(grad, alpha=factor)
                else:
                    self.cotangents[position] = torch.add(self.cotangents[position], grad, alpha=factor)
        self.owned = True
        for position, grad in enumerate(found[len(leaves) :]):
            if grad is not None:
                total = self.of_others[position]
                self.of_others[position] = factor * grad if total is None else torch.add(total, grad, alpha=factor)


def _random_states(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int], list[Tensor]]:
    return torch.get_rng_state(), *get_device_states(*tensors)


def _are_equal(a: tuple[Tensor, list[int], list[Tensor]], b: tuple[Tensor, list[int], list[Tensor]]) -> bool:
    return torch.equal(a[0], b[0]) and all(map(torch.equal, a[2], b[2]))


@contextmanager
def _replayed(random: _Random) -> Iterator[None]:
    """A block that draws what was drawn after :func:`_random_states`."""
    if random is None:
        yield
        return
    cpu, devices, states = random
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        yield


def _copies(state: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in state]


def _advance(state: Sequence[Tensor], grads: Sequence[Tensor], rates: Rates) -> None:
    """In place, so that the old state and the new need not be there together."""
    for tensor, grad, rate in zip(state, grads, rates):
        if isinstance(rate, Tensor):
            tensor.sub_(rate * grad)
        else:
            tensor.add_(grad, alpha=-rate)


def _left(steps: int, states: int) -> int:
    """After how many of ``steps`` a further state is best kept, of ``states``: binomial(states + r, r) steps, split in two."""
    again = 0
    while math.comb(states + again, states) < steps:
        again += 1
    return max(1, steps - math.comb(states - 1 + again, states - 1))
