"""The rows of tensor parallelism: each runs on every rank, and asserts there."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from support import rows
from support.rows import OPTIMIZERS, assert_same, fused, loss_of, net, parameters, refused, torchs
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import metamask_ext as mm
from metamask_ext.nn import MaskedConv2d

PLANS = {
    "columns": {"0": ColwiseParallel(output_layouts=Replicate())},
    "rows": {"2": RowwiseParallel(input_layouts=Replicate())},
    # Local tensors between the two would have to be shared evenly.
    "columns, then rows": {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()},
    "without a bias": {"4": RowwiseParallel(input_layouts=Replicate())},
}


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def parallel(model, plan):
    return parallelize_module(model, mesh(), copy.copy(PLANS[plan]))


def same_everywhere(choose):
    """In tensor parallelism all ranks run one batch."""
    return lambda rank, step: choose(0, step)


def train(model, optimizer, choose, steps=range(rows.STEPS), step=None):
    for number in steps:
        (step or optimizer.backward)(loss_of(model, model, 0, number, choose))


def train_alone(model, optimizer, choose, steps=range(rows.STEPS)):
    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    train(model, optimizer, choose, steps, step)


def chosen(rank, optimizer, choice, plan):
    choose = {
        "one task": rows.one_task,
        "a task for each step": lambda rank, step: rows.NAMES[step % 3],
        "mixed batches": rows.mixed,
    }[choice]
    model, alone = parallel(net(), plan), net()
    assert model.state_dict().keys() == alone.state_dict().keys()
    train(model, fused(model, optimizer), choose)
    train_alone(alone, torchs(alone, optimizer), choose)
    assert_same(model, alone, moved_from=net())


def outputs_and_input_gradients(rank, optimizer):
    for choose in (rows.one_task, rows.mixed):
        model, alone = parallel(net(), "columns, then rows"), net()
        x = rows.batch(0, 0)[0].requires_grad_()
        other = x.detach().clone().requires_grad_()
        with mm.using_task(model, choose(0, 1)), mm.using_task(alone, choose(0, 1)):
            got, wanted = model(x), alone(other)
        torch.testing.assert_close(got, wanted)
        got.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(x.grad, other.grad)


def local_tensors_between(rank, optimizer):
    """As the styles are by default, where sizes are shared evenly."""

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(mm.nn.MaskedLinear(6, 8), nn.Tanh(), mm.nn.MaskedLinear(8, 3)).double()
        for task in rows.NAMES[1:]:
            mm.add_task(model, task)
        return model

    model, alone = parallelize_module(made(), mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()}), made()
    train(model, fused(model, optimizer), rows.mixed)
    train_alone(alone, torchs(alone, optimizer), rows.mixed)
    assert_same(model, alone, moved_from=made())


def hard_gates(rank, optimizer):
    model, alone = net(), net()
    for each in (model, alone):
        for layer in each[::2]:
            layer.gate = "hard"
    model = parallel(model, "columns, then rows")
    train(model, fused(model, optimizer), rows.mixed)
    train_alone(alone, torchs(alone, optimizer), rows.mixed)
    assert_same(model, alone)


def added(rank, optimizer, init):
    """Tasks are added to a distributed model: masks of rank 0, placed as the weights."""
    model, alone = parallel(net(), "columns, then rows"), net()
    ours, theirs = fused(model, optimizer), torchs(alone, optimizer)
    torch.manual_seed(5 + rank)
    mm.add_task(model, "new", init=init)
    torch.manual_seed(5)
    mm.add_task(alone, "new", init=init)
    assert model[0].masks["new"].placements == model[0].weight.placements == (Shard(0),)
    assert model[2].masks["new"].placements == model[2].weight.placements == (Shard(1),)
    assert model[2].bias_masks["new"].placements == (Replicate(),)
    theirs = torchs(alone, optimizer)
    train(model, ours, lambda rank, step: "new")
    train_alone(alone, theirs, lambda rank, step: "new")
    assert_same(model, alone, moved_from=net())
    mm.remove_task(model, "b")
    assert mm.tasks(model) == ["default", "c", "new"]
    refused(RuntimeError, "the processes differ in their tasks", lambda: mm.add_task(model, f"of rank {rank}"))


def converted(rank, optimizer):
    """Plain layers that are distributed already are converted; a subclass has a forward of its own."""

    class Halved(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias) / 2

    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), Halved(7, 3)).double()

    plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
    before = mm.convert(parallelize_module(plain(), mesh(), plan))
    after, alone = parallelize_module(mm.convert(plain()), mesh(), plan), mm.convert(plain())
    for model in (before, after, alone):
        torch.manual_seed(1)
        mm.add_task(model, "b")
    for model in (before, after):
        train(model, fused(model, optimizer), rows.one_task)
    train_alone(alone, torchs(alone, optimizer), rows.one_task)
    assert_same(before, alone)
    assert_same(after, alone)


def superposed(rank, optimizer):
    model, alone = parallel(net(), "columns, then rows"), net()
    x = rows.batch(0, 0)[0]
    with mm.MaskBank(model).superpose({"b": 0.25, "c": 0.75}), mm.MaskBank(alone).superpose({"b": 0.25, "c": 0.75}):
        torch.testing.assert_close(model(x), alone(x))


def checkpointed(rank, optimizer):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, alone = parallel(Checkpointed(*net()), "columns, then rows"), net()
    train(model, fused(model, optimizer), rows.mixed)
    train_alone(alone, torchs(alone, optimizer), rows.mixed)
    assert_same(model, alone, moved_from=net())


def clipped(rank, optimizer):
    model, alone = parallel(net(), "columns, then rows"), net()
    ours, theirs = fused(model, optimizer), torchs(alone, optimizer)
    for step in range(rows.STEPS):
        for each, its in ((model, ours), (alone, theirs)):
            loss_of(each, each, 0, step, rows.mixed).backward()
            found = [parameter for parameter in each.parameters() if parameter.grad is not None]
            # One norm of DTensors and plain tensors together is not torch's to give.
            for kind in (True, False):
                nn.utils.clip_grad_norm_([p for p in found if hasattr(p, "device_mesh") is kind] or [found[0]], 1e9)
            its.step()
            its.zero_grad()
    assert_same(model, alone, moved_from=net())


def replicated(rank, optimizer):
    """``distribute_module`` without a partition: every parameter everywhere, the batch in shards."""
    model, alone = net(), net()
    for layer in model[::2]:
        distribute_module(layer, mesh())
    assert model[0].masks["b"].placements == (Replicate(),)
    x = rows.batch(0, 0)[0]
    from torch.distributed.tensor import distribute_tensor

    for choose in (rows.one_task, rows.mixed):
        with mm.using_task(model, choose(0, 1)), mm.using_task(alone, choose(0, 1)):
            got, wanted = model(distribute_tensor(x, mesh(), [Shard(0)])), alone(x)
        assert got.placements == (Shard(0),)
        torch.testing.assert_close(got.full_tensor(), wanted)
        got.full_tensor().square().sum().backward()
        wanted.square().sum().backward()
    for name, parameter in model.named_parameters():
        other = dict(alone.named_parameters())[name]
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad.full_tensor(), other.grad)


def refusals(rank, optimizer):
    """What cannot be distributed is refused before anything changes."""
    packed = net()
    mm.MaskBank(packed).pack("b")
    before = {name: tensor.clone() for name, tensor in parameters(packed).items()}
    for plan in ("columns", "rows"):
        refused(RuntimeError, "is packed, and a byte has the bits", lambda plan=plan: parallel(packed, plan))
        assert not any(hasattr(tensor, "device_mesh") for tensor in packed.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(packed).items())
    model = parallel(net(), "columns, then rows")
    refused(RuntimeError, "cannot be packed", lambda: mm.MaskBank(model).pack("b"))
    refused(RuntimeError, "cannot be merged", lambda: mm.merge(model, "b"))
    refused(RuntimeError, "DTensors", lambda: mm.MaskBank(model).save("/nowhere"))
    with mm.using_task(model, "b"):
        refused(TypeError, "input must be a DTensor", lambda: model[0].forward(rows.batch(0, 0)[0]))
    conv = distribute_module(MaskedConv2d(1, 2, 3), mesh())
    refused(TypeError, "a DTensor cannot be an argument", lambda: conv(torch.randn(1, 1, 4, 4)))
    head = nn.Linear(6, 3)
    heads = nn.Sequential(mm.nn.MaskedLinear(6, 6), head)
    mm.MaskBank(heads, per_task="1.*")
    before = dict(heads[1].named_parameters())
    for style in (ColwiseParallel(), RowwiseParallel()):
        refused(RuntimeError, "leave it out of the plan", lambda style=style: parallelize_module(heads, mesh(), {"1": style}))
        assert all(parameter is before[name] for name, parameter in heads[1].named_parameters())
    differing = net(("b", "c") if rank == 0 else ("c", "b"))
    refused(RuntimeError, "the processes differ in their tasks", lambda: parallel(differing, "columns"))


def checkpoint_with_other_tasks(rank, optimizer, folder):
    """``torch.distributed.checkpoint`` from a distributed model into others, with tasks that they lack."""
    model = parallel(net(), "columns, then rows")
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    wraps = {"plain": lambda model: model, "rows": lambda model: parallel(model, "rows"), "sharded": fully_shard}
    for wrap in wraps.values():
        lacking = wrap(net(("b",)))
        state = get_model_state_dict(lacking)
        dcp.load(state, checkpoint_id=folder)
        refused(RuntimeError, "was saved with 3 tasks", lambda lacking=lacking, state=state: set_model_state_dict(lacking, state))
        torch.manual_seed(3)
        mm.add_task(lacking, "c")
        state = get_model_state_dict(lacking)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(lacking, state)
        assert_same(lacking, net())
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    plain = net(())
    plain.load_state_dict(full)  # made from the state
    assert_same(plain, net())


def beside_fully_shard(rank, optimizer):
    """Two by two: fully_shard over one dimension of the mesh, columns and rows over the other; a task is added."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    model, alone = net(), net()
    parallelize_module(model, both["model"], PLANS["columns, then rows"])
    for layer in model[::2]:
        fully_shard(layer, mesh=both["data"])
    fully_shard(model, mesh=both["data"])
    ours, theirs = fused(model, optimizer), torchs(alone, optimizer)
    group = rank // 2  # ranks of one part of the data run one batch
    rows.train(model, model, group, ours, rows.another_task_on_each_rank)
    rows.train_alone(alone, theirs, rows.another_task_on_each_rank, world=2)
    assert_same(model, alone, moved_from=net())
    torch.manual_seed(5 + rank)
    mm.add_task(model, "new")
    torch.manual_seed(5)
    mm.add_task(alone, "new")
    assert_same(model, alone)
    known = {parameter for each in theirs.param_groups for parameter in each["params"]}
    theirs.add_param_group({"params": [parameter for parameter in alone.parameters() if parameter not in known]})
    rows.train(model, model, group, ours, lambda rank, step: "new" if rank == 0 else "b")
    rows.train_alone(alone, theirs, lambda rank, step: "new" if rank == 0 else "b", world=2)
    assert_same(model, alone)


ROWS = [
    *((chosen, optimizer, choice, "columns, then rows") for optimizer in OPTIMIZERS for choice in ("one task", "mixed batches")),
    *((chosen, "SGD", "mixed batches", plan) for plan in PLANS if plan != "columns, then rows"),
    (chosen, "AdamW", "a task for each step", "columns, then rows"),
    *((added, "SGD", init) for init in ("random", "mean", "copy:b")),
    (added, "AdamW", "random"),
    (outputs_and_input_gradients, "SGD"),
    (local_tensors_between, "SGD"),
    (hard_gates, "AdamW"),
    (converted, "SGD"),
    (superposed, "SGD"),
    (checkpointed, "AdamW"),
    (clipped, "AdamW"),
    (replicated, "SGD"),
    (refusals, "SGD"),
]
OF_FOUR = [(beside_fully_shard, "AdamW")]
IN_A_FOLDER = [(checkpoint_with_other_tasks, "SGD")]
