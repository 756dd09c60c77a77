"""Models whose modules take a sequence first, [L, B, E], with three tasks."""

from __future__ import annotations

from support.models import randomize_masks
from torch import nn

import metamask_ext as mm
from metamask_ext.nn import MaskedLinear


def with_tasks(model):
    for task in "abc":
        mm.add_task(model, task)
    mm.remove_task(model, "default")
    return randomize_masks(model.double())


class Recurrent(nn.Module):
    """Projects a whole sequence at once, as recurrent layers do, and mixes its steps."""

    def __init__(self, batch_first=False):
        super().__init__()
        self.batch_first = batch_first
        self.gates, self.out = MaskedLinear(4, 6), MaskedLinear(6, 4)

    def forward(self, x):
        gates = self.gates(x).tanh()
        return self.out(gates.cumsum(1 if self.batch_first else 0))


class Turned(nn.Module):
    """Takes a batch first, turns it for a module that does not, and turns it back."""

    def __init__(self, inner):
        super().__init__()
        self.before, self.inner, self.after = MaskedLinear(4, 4), inner, MaskedLinear(4, 2)

    def forward(self, x):
        return self.after(self.inner(self.before(x).transpose(0, 1)).transpose(0, 1).mean(1))
