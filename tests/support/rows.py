"""What the rows of the table in docs/guide/distributed.md share: a small model in float64, its data, the steps of one process."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn

from metamask_ext import add_task, using_task
from metamask_ext.nn import MaskedLinear
from metamask_ext.nn.paths import plain_path
from metamask_ext.optim import FusedMaskedAdamW, FusedMaskedSGD

OPTIMIZERS = {
    "SGD": (FusedMaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    # A small eps would turn roundings of small gradients into large differences.
    "AdamW": (FusedMaskedAdamW, torch.optim.AdamW, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.01}),
}
SAMPLES, STEPS = 4, 3
NAMES = ("default", "b", "c")


def net(tasks=NAMES[1:]):
    """Sizes that two and four processes cannot share evenly; ``tasks`` beside ``default``."""
    torch.manual_seed(0)
    layers = [MaskedLinear(6, 7), nn.Tanh(), MaskedLinear(7, 5), nn.Tanh(), MaskedLinear(5, 3, bias=False)]
    model = nn.Sequential(*layers).double()
    for task in tasks:
        add_task(model, task)
    return model


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x, y = (torch.randn(SAMPLES, size, generator=generator, dtype=torch.float64) for size in (6, 3))
    return x, y


def one_task(rank, step):
    return "b"


def another_task_on_each_rank(rank, step):
    """Some step uses a task on one rank only, some use one on several; ``c`` is used by none at first."""
    return NAMES[(rank + step) % (2 if step < 2 else 3)]


def mixed(rank, step):
    """A task for each sample, some of them on some ranks only."""
    return [NAMES[(rank + step * sample) % 3] for sample in range(SAMPLES)]


CHOICES = {"one task": one_task, "a task for each rank": another_task_on_each_rank, "mixed batches": mixed}


def loss_of(call, model, rank, step, choose=one_task):
    x, y = batch(rank, step)
    task = None if choose is None else choose(rank, step)
    with nullcontext() if task is None else using_task(model, task):
        return (call(x) - y).square().mean()


def fused(model, name, **options):
    ours, _, settings = OPTIMIZERS[name]
    return ours(model, **settings, mask_weight_decay=settings["weight_decay"], **options)


def torchs(model, name):
    _, theirs, settings = OPTIMIZERS[name]
    return theirs(model.parameters(), **settings)


def train(model, call, rank, optimizer, choose=one_task, steps=range(STEPS)):
    for step in steps:
        optimizer.backward(loss_of(call, model, rank, step, choose))


def train_alone(model, optimizer, choose=one_task, steps=range(STEPS), world=None, each=lambda model: None):
    """The same steps in one process, of the mean over the data of all ranks; ``each`` sees the gradients."""
    world = world or dist.get_world_size()
    for step in steps:
        optimizer.zero_grad()
        for rank in range(world):
            (loss_of(model, model, rank, step, choose) / world).backward()
        each(model)
        optimizer.step()
    return model


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def parameters(model):
    return {plain_path(model, name): whole(parameter) for name, parameter in model.named_parameters()}


def assert_same(model, other, tolerance=1e-6, moved_from=None):
    """``model``, of all ranks, is ``other``, of one process; and moved."""
    ours, theirs = parameters(model), parameters(other)
    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    for name, tensor in ours.items():
        of_first = tensor.clone()
        dist.broadcast(of_first, 0)
        assert torch.equal(of_first, tensor), f"{name} differs between ranks"
        difference = (tensor - theirs[name]).abs().max().item()
        assert difference < tolerance, f"{name} differs from one process by {difference}"
    if moved_from is not None:
        before = parameters(moved_from)
        assert max((tensor - before[name]).abs().max().item() for name, tensor in ours.items() if name in before) > 1e-3


def refused(kind, match, call):
    """``call`` raises in words; every rank."""
    try:
        call()
    except kind as error:
        assert match in str(error), str(error)
    else:
        raise AssertionError(f"nothing was raised; wanted {kind.__name__}: {match}")
