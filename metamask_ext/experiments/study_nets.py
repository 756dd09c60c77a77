"""Many plain nets of one form, run at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .study_problem import Problem, in_parts

Parameters = dict[str, Tensor]


class Nets:
    """The plain net of a problem with the parameters of many: each a stack ``[R, ...]`` by name."""

    def __init__(self, problem: Problem):
        self.plain = problem.plain().requires_grad_(False)
        # Under vmap convolutions become one of many groups, on a CPU slower than one after the other: 136 ms against 78 for 21
        # nets of ``mnist`` and 32 images each, forward and backward.
        self._one_by_one = any(isinstance(module, nn.Conv2d) for module in self.plain.modules())

    def __call__(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Outputs ``[R, n, ...]`` for ``x`` ``[R, n, ...]``, each net with its own."""
        if self._one_by_one:
            return torch.stack([self.one(parameters, row, part) for row, part in enumerate(x)])
        return torch.vmap(lambda own, part: functional_call(self.plain, own, (part,)))(parameters, x)

    def one(self, parameters: Parameters, row: int, x: Tensor) -> Tensor:
        """Outputs ``[n, ...]`` of net ``row`` for ``x`` ``[n, ...]``."""
        own = {name: stack[row] for name, stack in parameters.items()}
        return in_parts(lambda part: functional_call(self.plain, own, (part,)), x)
