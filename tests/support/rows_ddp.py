"""The rows of DistributedDataParallel: each runs on every rank, and asserts there."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from support import rows
from support.rows import CHOICES, OPTIMIZERS, assert_same, fused, loss_of, net, parameters, refused, torchs, train, train_alone
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import metamask_ext as mm

OPTIONS = {
    "unused parameters found": {"find_unused_parameters": True},
    "bucket views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "small buckets": {"find_unused_parameters": True, "bucket_cap_mb": 1e-5},
}


def chosen(rank, optimizer, choice, options):
    model = net()
    wrapper = DistributedDataParallel(model, **OPTIONS[options])
    train(model, wrapper, rank, fused(model, optimizer), CHOICES[choice])
    alone = net()
    train_alone(alone, torchs(alone, optimizer), CHOICES[choice])
    assert_same(model, alone, moved_from=net())


def inside_of_the_wrapper(rank, optimizer):
    """A model that opens the block in its own forward."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, task):
            with mm.using_task(self.net, task):
                return self.net(x)

    model = Model()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    ours = fused(model, optimizer)
    for step in range(rows.STEPS):
        x, y = rows.batch(rank, step)
        ours.backward((wrapper(x, rows.another_task_on_each_rank(rank, step)) - y).square().mean())
    alone = net()
    train_alone(alone, torchs(alone, optimizer), rows.another_task_on_each_rank)
    assert_same(model.net, alone, moved_from=net())


def accumulated(rank, optimizer):
    """Each step adds up three batches, of other tasks, and averages with the last."""
    model, alone = net(), net()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    ours, theirs = fused(model, optimizer), torchs(alone, optimizer)
    choose = rows.another_task_on_each_rank
    for step in range(rows.STEPS):
        with wrapper.no_sync():
            for part in (0, 1):
                loss_of(wrapper, model, rank, step + part, choose).backward()
        loss_of(wrapper, model, rank, step + 2, choose).backward()
        ours.step()
        ours.zero_grad()
        theirs.zero_grad()
        for each in range(dist.get_world_size()):
            for part in range(3):
                (loss_of(alone, alone, each, step + part, choose) / dist.get_world_size()).backward()
        theirs.step()
    assert_same(model, alone, moved_from=net())


def static_graph(rank, optimizer, choice):
    """The tasks are the same in all steps: one for each rank, or in a batch of several."""
    choose = {
        "a task for each rank": lambda rank, step: rows.NAMES[rank % 2],
        "mixed batches": lambda rank, step: rows.mixed(0, 1),
    }[choice]
    model, alone = net(), net()
    train(model, DistributedDataParallel(model, static_graph=True), rank, fused(model, optimizer), choose)
    train_alone(alone, torchs(alone, optimizer), choose)
    assert_same(model, alone, moved_from=net())


def static_graph_with_other_tasks(rank, optimizer):
    """Refused in the forward: torch takes a step of gradients that are not averaged where a task is used no more."""
    for later in (["b"] * rows.SAMPLES, "c"):
        model = net()
        wrapper, ours = DistributedDataParallel(model, static_graph=True), fused(model, optimizer)
        ours.backward(loss_of(wrapper, model, rank, 0, lambda rank, step: ["b", "default"] * (rows.SAMPLES // 2)))
        before = {name: tensor.clone() for name, tensor in parameters(model).items()}
        step = lambda later=later, wrapper=wrapper, model=model: loss_of(wrapper, model, rank, 1, lambda rank, step: later)  # noqa: E731
        refused(RuntimeError, "static_graph=True averages the gradients of what its first step used", step)
        assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(model).items())
        with torch.no_grad():
            step()  # an evaluation may use any
        copy.deepcopy(wrapper)


def checkpointed(rank, optimizer):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, alone = Checkpointed(*net()), net()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    train(model, wrapper, rank, fused(model, optimizer), rows.another_task_on_each_rank)
    train_alone(alone, torchs(alone, optimizer), rows.another_task_on_each_rank)
    assert_same(model, alone, moved_from=net())


def clipped(rank, optimizer):
    model, alone = net(), net()
    wrapper, ours = DistributedDataParallel(model, find_unused_parameters=True), fused(model, optimizer)
    for step in range(rows.STEPS):
        loss_of(wrapper, model, rank, step, rows.another_task_on_each_rank).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        ours.step()
        ours.zero_grad()
    clip = lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05)  # noqa: E731  # one line is what it is
    train_alone(alone, torchs(alone, optimizer), rows.another_task_on_each_rank, each=clip)
    assert_same(model, alone, moved_from=net())


def scaled_by_use(rank, optimizer):
    """The masks move as by the mean over the ranks that used their task, what is shared as by the mean over all."""
    model, alone = net(), net()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    train(model, wrapper, rank, fused(model, optimizer, scale_masks_by_use=True), rows.another_task_on_each_rank)
    alone_by_use(alone, optimizer, rows.another_task_on_each_rank)
    assert_same(model, alone, moved_from=net())


def alone_by_use(alone, optimizer, choose):
    """Steps of one process in which a mask's gradient is the mean over the ranks that used it."""
    step, world = [0], dist.get_world_size()

    def scale(model):
        for task in rows.NAMES:
            chosen = (choose(rank, step[0]) for rank in range(world))
            used = sum(task == name or (isinstance(name, list) and task in name) for name in chosen)
            for name, parameter in model.named_parameters():
                if used and name.endswith(f"masks.{task}"):
                    parameter.grad *= world / used
        step[0] += 1

    return train_alone(alone, torchs(alone, optimizer), choose, each=scale)


def the_scale_of_a_mask(rank, optimizer):
    """A mask that one of W ranks used gets 1 / W of the gradient that the rank alone has; the documented scale."""
    world = dist.get_world_size()

    def choose(rank, step):
        return "b" if rank == 0 else "c"

    model, alone = net(), net()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    loss_of(wrapper, model, rank, 0, choose).backward()
    loss_of(alone, alone, 0, 0, choose).backward()
    torch.testing.assert_close(model[0].masks["b"].grad * world, alone[0].masks["b"].grad)
    assert model[0].masks["default"].grad is None


def scaling_is_forgotten(rank, optimizer):
    """Gradients that were thrown away count for nothing; so does a forward without a backward."""
    model, alone = net(), net()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    ours = fused(model, optimizer, scale_masks_by_use=True)
    loss_of(wrapper, model, rank, 0, lambda rank, step: "b").backward()
    ours.zero_grad()
    with mm.using_task(model, "b"):
        model(rows.batch(rank, 0)[0])
    train(model, wrapper, rank, ours, rows.another_task_on_each_rank)
    alone_by_use(alone, optimizer, rows.another_task_on_each_rank)
    assert_same(model, alone, moved_from=net())


def scaling_inside_no_sync(rank, optimizer):
    model = net()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    ours, before = fused(model, optimizer, scale_masks_by_use=True), parameters(copy.deepcopy(model))
    with wrapper.no_sync():
        loss_of(wrapper, model, rank, 0).backward()
        refused(RuntimeError, "inside no_sync", ours.step)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(model).items())


def ranks_with_other_tasks(rank, optimizer):
    """Tasks in another order, or fewer, are refused before a parameter is copied."""
    for tasks in (("b", "c") if rank == 0 else ("c", "b"), ("b", "c") if rank == 0 else ("b",)):
        model = net(tasks)
        before = {name: tensor.clone() for name, tensor in parameters(model).items()}
        refused(RuntimeError, "the processes differ in their tasks", lambda model=model: DistributedDataParallel(model))
        assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(model).items())


ROWS = [
    *((chosen, optimizer, choice, "unused parameters found") for optimizer in OPTIMIZERS for choice in CHOICES),
    *((chosen, "SGD", "a task for each rank", options) for options in OPTIONS if options != "unused parameters found"),
    *((row, optimizer) for row in (accumulated, scaled_by_use) for optimizer in OPTIMIZERS),
    *((static_graph, "SGD", choice) for choice in ("a task for each rank", "mixed batches")),
    (static_graph_with_other_tasks, "SGD"),
    (inside_of_the_wrapper, "AdamW"),
    (checkpointed, "AdamW"),
    (clipped, "SGD"),
    (the_scale_of_a_mask, "SGD"),
    (scaling_is_forgotten, "SGD"),
    (scaling_inside_no_sync, "SGD"),
    (ranks_with_other_tasks, "SGD"),
]
