"""Runs of one rank under fully_shard, for tests/distributed."""

from __future__ import annotations

import tempfile

import torch
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
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import fully_shard

import metamask_ext as mm
from metamask_ext.continual import TaskLoop
from metamask_ext.nn import MaskedLayer, MaskedLinear


def shard(model, kind):
    if kind == "replicate":
        replicate(model)
    elif kind == "plain layers":
        fully_shard(model[3][2])
    else:
        for layer in model:
            if kind != "root" and isinstance(layer, MaskedLayer):
                fully_shard(layer, reshard_after_forward=kind == "layers")
        fully_shard(model)
    return model


def steps(rank, kind):
    model = shard(net(), kind)
    train(model, fused(model), rank)
    return difference(model, by_one_process(net())), moved(model, net())


def after_a_forward_for_evaluation(rank, kind):
    """torch leaves the gathered parameters in the root then."""
    model = shard(net(), kind)
    with torch.no_grad():
        model(batch(rank, 0)[0])
    train(model, fused(model), rank)
    return difference(model, by_one_process(net())), moved(model, net())


def with_evaluation_between(rank, kind):
    model = shard(net(), kind)
    optimizer = fused(model)
    for number in range(STEPS):
        with torch.no_grad():
            model(batch(rank, 0)[0])
            optimizer.state_dict()
        optimizer.zero_grad()
        optimizer.backward(loss_of(model, *batch(rank, number)))
    return difference(model, by_one_process(net())), moved(model, net())


def several_tasks(rank, kind):
    tasks = ("b", "b")
    model = shard(net(["b", "c"]), kind)
    train(model, fused(model), rank, None, tasks)
    return difference(model, by_one_process(net(["b", "c"]), tasks)), moved(model, net(["b", "c"]))


def step_by_step(rank, kind):
    model = shard(net(), kind)
    optimizer = fused(model)
    train(model, optimizer, rank, step=lambda value: (value.backward(), optimizer.step(), optimizer.zero_grad()))
    return difference(model, by_one_process(net())), moved(model, net())


def as_torchs(rank, kind):
    """If fully_shard itself leaves ranks apart, or weights behind, the numbers are those of torch's optimiser."""
    models = []
    for ours in (True, False):
        model = net()
        if kind == "one layer":
            fully_shard(model[0])
        else:
            fully_shard(model)
            model.set_reshard_after_backward(False)
        optimizer = fused(model) if ours else torchs(model.parameters())
        if ours:
            train(model, optimizer, rank)
        else:
            train(
                model,
                optimizer,
                rank,
                step=lambda value, optimizer=optimizer: (value.backward(), optimizer.step(), optimizer.zero_grad()),
            )
        if kind != "one layer":
            model.reshard()
        models.append(model)
    return moved(*models), moved(models[0], net())


def a_part(rank, kind):
    """The optimiser of one layer of a model that is sharded as a whole."""
    model, other = shard(net(), "root"), net()
    train(model, fused(model[4]), rank)
    return difference(model, by_one_process(other, parameters=other[4].parameters())), moved(model, net())


def _refused(call, model, before):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        if hasattr(model, "reshard"):
            model.reshard()
        return type(error).__name__, str(error), unchanged(model, before)
    return "nothing", "", False


def a_part_with_gathered_parameters(rank):
    model = shard(net(), "root")
    before = copies(model)
    with torch.no_grad():
        model(batch(rank, 0)[0])
    return _refused(lambda: fused(model[4]), model, before)


def sharded_after_the_optimiser(rank, kind):
    model = net()
    optimizer = fused(model)
    shard(model, kind)
    before = copies(model)
    value = loss_of(model, *batch(rank, 0))
    return _refused(lambda: optimizer.backward(value), model, before)


def load_bank(model):
    with tempfile.TemporaryDirectory() as folder:
        mm.MaskBank(net(["b"])).save(f"{folder}/bank")
        mm.MaskBank.load(f"{folder}/bank", model)


CHANGES = {
    "add_task to a layer": lambda model: mm.add_task(model[4], "z"),
    "remove_task": lambda model: mm.remove_task(model, "b"),
    "pack_task": lambda model: mm.MaskBank(model).pack("b"),
    "by hand": lambda model: model[4].masks.__setitem__("z", nn.Parameter(torch.zeros(4, 8))),
    "by hand, away": lambda model: model[4].masks.pop("b"),
    "convert": lambda model: mm.convert(model),
    "MaskBank.load": lambda model: load_bank(model),
    "TaskLoop": lambda model: TaskLoop(model, {"b": batch(0, 0)}, nn.functional.mse_loss),
}


def change(rank, name, gathered):
    model = shard(net(["b"]), "root")
    before = copies(model)
    if gathered:
        with torch.no_grad(), mm.using_task(model, "b"):
            model(batch(rank, 0)[0])
    return *_refused(lambda: CHANGES[name](model), model, before), mm.tasks(model)


def flattened(rank):
    """The largest difference from one process of the first, older FullyShardedDataParallel, with the original parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def model():
        torch.manual_seed(0)
        return nn.Sequential(MaskedLinear(4, 6), nn.ReLU(), MaskedLinear(6, 2))

    alone, wrapped = model(), FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    before = alone[0].weight.detach().clone()
    for each in (alone, wrapped):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    moved = (alone[0].weight - before).abs().max().item()
    return (wrapped(x) - alone(x)).abs().max().item(), moved
