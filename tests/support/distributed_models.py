"""A model, its data by rank, and what one process computes of the data of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from support.ranks import RANKS
from torch import nn

from metamask_ext import add_task, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear
from metamask_ext.optim import FusedMaskedAdamW, FusedMaskedSGD

OPTIMIZERS = {
    "SGD": (FusedMaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    # A small eps would turn roundings of small gradients into large differences.
    "AdamW": (FusedMaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "eps": 1e-2, "weight_decay": 0.0}),
}
STEPS = 3
_used = ["SGD"]


def net(tasks=()):
    torch.manual_seed(0)
    model = nn.Sequential(
        MaskedConv2d(1, 4, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Sequential(MaskedLinear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()),
        MaskedLinear(8, 4, bias=False),
    )
    for task in tasks:
        add_task(model, task, init="copy:default")
    return model


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(5, 1, 4, 4, generator=generator), torch.randn(5, 4, generator=generator)


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def train(model, optimizer, rank, call=None, tasks=None, step=None):
    """``STEPS`` steps by ``optimizer.backward``, or by ``step(loss)``; ``tasks``: that of each rank."""
    for number in range(STEPS):
        if tasks is None:
            value = loss_of(call or model, *batch(rank, number))
        else:
            with using_task(model, tasks[rank]):
                value = loss_of(call or model, *batch(rank, number))
        (step or optimizer.backward)(value)


def by_one_process(model, tasks=None, parameters=None, scale=1.0):
    """The same steps of torch's optimiser on the mean of the losses of all ranks."""
    optimizer = torchs(model.parameters() if parameters is None else parameters)
    for number in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            if tasks is None:
                value = loss_of(model, *batch(rank, number))
            else:
                with using_task(model, tasks[rank]):
                    value = loss_of(model, *batch(rank, number))
            (scale * value / RANKS).backward()
        optimizer.step()
    return model


def use(rank, name):
    """From now on this rank's runs are of that optimiser."""
    _used[0] = name


def fused(model):
    ours, _, settings = OPTIMIZERS[_used[0]]
    return ours(model, **settings)


def torchs(parameters):
    _, theirs, settings = OPTIMIZERS[_used[0]]
    return theirs(parameters, **settings)


def whole(parameter):
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


def difference(model, other):
    """The largest difference between the parameters of two models, and between this rank's and rank 0's."""
    largest = 0.0
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours = whole(ours)
        of_rank_0 = ours.clone()
        dist.broadcast(of_rank_0, 0)
        largest = max(largest, (ours - theirs).abs().max().item(), (ours - of_rank_0).abs().max().item())
    return largest


def moved(model, other):
    return max((whole(a) - whole(b)).abs().max().item() for a, b in zip(model.parameters(), other.parameters()))


def copies(model):
    return [whole(p).clone() for p in model.parameters()]


def unchanged(model, before):
    parameters = list(model.parameters())
    return len(parameters) == len(before) and all(torch.equal(whole(p), b) for p, b in zip(parameters, before))
