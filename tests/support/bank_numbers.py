"""Numbers of banks by autograd alone, with which the bank's own are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metamask_ext import MaskBank


def entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


def entropy_gradients(bank: MaskBank, x: Tensor, names: Sequence[str]) -> Tensor:
    """``dH_b/dalpha_t`` sample by sample, by autograd through the superposition."""
    rows = []
    for sample in x:
        alphas = torch.full((len(names),), 1 / len(names), dtype=torch.float64, requires_grad=True)
        with bank.superpose(dict(zip(names, alphas.unbind()))):
            value = entropy(bank.model(sample[None])).sum()
        rows.append(torch.autograd.grad(value, alphas)[0])
    return torch.stack(rows)
