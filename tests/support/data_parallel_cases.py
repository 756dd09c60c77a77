"""Runs of one rank under DistributedDataParallel and replicate, for tests/distributed."""

from __future__ import annotations

import copy
import gc
import tempfile

import torch
import torch.distributed as dist
from support.distributed_models import (
    STEPS,
    batch,
    by_one_process,
    copies,
    difference,
    fused,
    loss_of,
    moved,
    net,
    torchs,
    train,
    unchanged,
)
from support.ranks import RANKS
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import metamask_ext as mm
from metamask_ext.continual import TaskLoop
from metamask_ext.optim import FusedMaskedSGD

OPTIONS = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "bucket views": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 1e-4},
}


def wrapped_after_the_optimiser(rank, options):
    model = net()
    optimizer = fused(model)
    train(model, optimizer, rank, DistributedDataParallel(model, **options))
    return difference(model, by_one_process(net())), moved(model, net())


def wrapped_before_the_optimiser(rank, options):
    wrapper = DistributedDataParallel(net(), **options)
    train(wrapper.module, fused(wrapper.module), rank, wrapper)
    return difference(wrapper.module, by_one_process(net())), moved(wrapper.module, net())


def submodules_wrapped(rank, options):
    model = net()
    optimizer = fused(model)
    for index in (0, 3, 4):
        model[index] = DistributedDataParallel(model[index], **options)
    train(model, optimizer, rank)
    return difference(model, by_one_process(net())), moved(model, net())


def of_another_group(rank, options):
    model = net()
    wrapper = DistributedDataParallel(model, process_group=dist.new_group([0, 1]), **options)
    train(model, fused(model), rank, wrapper)
    return difference(model, by_one_process(net())), moved(model, net())


def copied(rank, options):
    wrapper = copy.deepcopy(DistributedDataParallel(net(), **options))
    train(wrapper.module, fused(wrapper.module), rank, wrapper)
    return difference(wrapper.module, by_one_process(net())), moved(wrapper.module, net())


def with_a_communication_hook(rank, options):
    model = net()
    wrapper = DistributedDataParallel(model, **options)
    wrapper.register_comm_hook(None, default_hooks.allreduce_hook)
    train(model, fused(model), rank, wrapper)
    return difference(model, by_one_process(net())), moved(model, net())


def with_gradient_hooks_of_saved_tensors(rank, options):
    model = net()
    wrapper = DistributedDataParallel(model, **options)

    def call(x):
        with torch.autograd.graph.save_on_cpu():
            return wrapper(x)

    train(model, fused(model), rank, call)
    return difference(model, by_one_process(net())), moved(model, net())


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def of_a_checkpoint(rank, options):
    model = Checkpointed(*net())
    optimizer = fused(model)
    train(model, optimizer, rank, DistributedDataParallel(model, static_graph=True))
    return difference(model, by_one_process(net())), moved(model, net())


def replicated(rank, options):
    model = net()
    optimizer = fused(model)
    replicate(model, **options)
    train(model, optimizer, rank)
    return difference(model, by_one_process(net())), moved(model, net())


def a_wrapped_and_a_bare_forward(rank, options):
    model = net()
    wrapper = DistributedDataParallel(model, **options)
    optimizer = fused(model)
    for number in range(STEPS):
        optimizer.backward(loss_of(wrapper, *batch(rank, number)) + loss_of(model, *batch(rank, number)))
    return difference(model, by_one_process(net(), scale=2.0)), moved(model, net())


def without_synchronisation(rank, options):
    """Gradients accumulate in no_sync and are averaged with those of the step."""
    model, other = net(), net()
    wrapper = DistributedDataParallel(model)
    optimizer, plain = fused(model), torchs(other.parameters())
    for number in range(STEPS):
        with wrapper.no_sync():
            loss_of(wrapper, *batch(rank, number)).backward()
        optimizer.backward(loss_of(wrapper, *batch(rank, number + 10)))
        plain.zero_grad()
        for each in range(RANKS):
            for count in (number, number + 10):
                (loss_of(other, *batch(each, count)) / RANKS).backward()
        plain.step()
    return difference(model, other), moved(model, net())


def a_step_without_synchronisation(rank, options):
    """As with torch's optimiser, each rank takes the step of its own gradients."""
    model, other = net(), net()
    optimizer, plain = fused(model), torchs(other.parameters())
    wrapper = DistributedDataParallel(model)
    for number in range(STEPS):
        with wrapper.no_sync():
            optimizer.backward(loss_of(wrapper, *batch(rank, number)))
        loss_of(other, *batch(rank, number)).backward()
        plain.step()
        plain.zero_grad()
    return moved(model, other), moved(model, net())


def another_task_on_each_rank(rank, options):
    tasks = ("default", "b")
    model = net(["b", "c"])
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    train(model, fused(model), rank, wrapper, tasks)
    return difference(model, by_one_process(net(["b", "c"]), tasks)), moved(model, net(["b", "c"]))


def beside_a_wrapped_model(rank):
    """A model of this process alone keeps its steps in the backward."""
    model, other = net(), net()
    wrapper = DistributedDataParallel(net())
    optimizer, plain = fused(model), torchs(other.parameters())
    nodes = optimizer._fused_nodes(loss_of(model, *batch(rank, 0)).grad_fn)
    train(model, optimizer, rank)
    train(other, None, rank, step=lambda value: (plain.zero_grad(), value.backward(), plain.step()))
    del wrapper
    return moved(model, other), len(nodes)


def given_the_wrapper(rank):
    FusedMaskedSGD(DistributedDataParallel(net()), 0.1)


# Adding tasks


def add_to_the_wrapper(rank, model, wrapper):
    mm.add_task(wrapper, "b")


def add_to_the_module(rank, model, wrapper):
    mm.add_task(model, "b", init="copy:default")


def add_to_a_layer(rank, model, wrapper):
    mm.add_task(model[3], "b")


def add_by_hand(rank, model, wrapper):
    model[4].masks["b"] = torch.zeros(4, 8)


def replace_by_hand(rank, model, wrapper):
    model[4].masks["default"] = nn.Parameter(torch.zeros(4, 8))


def load_a_state_with_another_task(rank, model, wrapper):
    wrapper.load_state_dict({f"module.{name}": value for name, value in net(["b"]).state_dict().items()})


def add_through_a_bank(rank, model, wrapper):
    mm.MaskBank(model).add_task("b")


def load_a_bank(rank, model, wrapper):
    with tempfile.TemporaryDirectory() as folder:
        mm.MaskBank(net(["b"])).save(f"{folder}/bank")
        mm.MaskBank.load(f"{folder}/bank", model)


def convert_the_rest(rank, model, wrapper):
    mm.convert(model)


def add_and_remove_wrapped(rank, change, kind):
    """The error of a change under a wrapper, and whether the model was left as it was."""
    model = net()
    if kind == "replicate":
        wrapper = replicate(model)
        wrapper(batch(rank, 0)[0])
    else:
        wrapper = DistributedDataParallel(model)
        if kind == "copied":
            wrapper = copy.deepcopy(wrapper)
            model = wrapper.module
    before, types = copies(model), [type(module) for module in model.modules()]
    try:
        change(rank, model, wrapper)
    except RuntimeError as error:
        whole = (
            unchanged(model, before) and [type(module) for module in model.modules()] == types and mm.tasks(model) == ["default"]
        )
        return str(error), whole
    return "nothing", mm.tasks(model)


def unwrapped_and_wrapped_again(rank):
    model = net()
    wrapper = DistributedDataParallel(model)
    model = wrapper.module
    del wrapper
    mm.add_task(model, "b", init="copy:default")
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    train(model, fused(model), rank, wrapper, ("b", "b"))
    return difference(model, by_one_process(net(["b"]), ("b", "b")))


def a_wrapper_in_a_cycle_is_let_go_of(rank):
    wrapper = DistributedDataParallel(net())
    model = wrapper.module
    wrapper.__dict__["itself"] = wrapper
    del wrapper
    gc.disable()
    try:
        mm.add_task(model, "b")
    finally:
        gc.enable()
    return mm.tasks(model)


def removed_and_packed(rank):
    model = net(["b", "c"])
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    mm.remove_task(wrapper, "b")
    mm.MaskBank(model).pack("c")
    train(model, fused(model), rank, wrapper, ("default", "default"))
    other = by_one_process(net(), ("default", "default"))
    return difference(model, other)


def a_bank_of_the_same_tasks(rank):
    """Its values go to the parameters that the wrapper knows."""
    model = net(["b"])
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    with tempfile.TemporaryDirectory() as folder:
        mm.MaskBank(net(["b"])).save(f"{folder}/bank")
        mm.MaskBank.load(f"{folder}/bank", model)
    train(model, fused(model), rank, wrapper, ("b", "b"))
    return difference(model, by_one_process(net(["b"]), ("b", "b")))


# TaskLoop

NAMES = ["a", "b"]


def _data(rank):
    """The data of one rank, or of all (None), from the same draws."""

    def draw(generator):
        x = torch.randn(RANKS, 6, 1, 4, 4, generator=generator)
        y = torch.randn(RANKS, 6, 4, generator=generator)
        return (x.flatten(0, 1), y.flatten(0, 1)) if rank is None else (x[rank], y[rank])

    return draw


def _loop(model, rank, **changes):
    return TaskLoop(model, {name: _data(rank) for name in NAMES}, nn.functional.mse_loss, steps=2, lr=0.1, **changes)


def loop(rank):
    model, other = net(NAMES), net(NAMES)
    _loop(DistributedDataParallel(model, find_unused_parameters=True), rank, momentum=0.9).run(4)
    _loop(other, None, momentum=0.9).run(4)
    return difference(model, other), moved(model, net(NAMES))


def loop_resumed(rank):
    model, other = net(NAMES), net(NAMES)
    with tempfile.TemporaryDirectory() as folder:
        for rounds in (2, 4):
            model = net(NAMES)
            _loop(DistributedDataParallel(model, find_unused_parameters=True), rank, out=folder).run(rounds)
    _loop(other, None).run(4)
    return difference(model, other)


def loop_without_masks_before_wrapping(rank):
    model = net()
    before = copies(model)
    try:
        _loop(DistributedDataParallel(model), rank)
    except RuntimeError as error:
        return str(error), unchanged(model, before)
    return "nothing", True


def loop_wrapped_before_it_runs(rank):
    model = net()
    started = _loop(model, rank)
    wrapper = DistributedDataParallel(model)
    before = copies(model)
    try:
        started.run(1)
    except RuntimeError as error:
        del wrapper
        return str(error), unchanged(model, before), started.run(1).round
    return "nothing", True, 0
