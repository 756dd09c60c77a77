"""The rows of fully_shard: each runs on every rank, and asserts there."""

from __future__ import annotations

import torch
import torch.distributed as dist
from support import rows
from support.rows import CHOICES, OPTIMIZERS, assert_same, fused, loss_of, net, parameters, refused, torchs, train, train_alone
from support.rows_ddp import alone_by_use
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import metamask_ext as mm
from metamask_ext.nn import MaskedLinear


def shard(model, kind="layers", **options):
    if kind == "layers":
        for layer in (module for module in list(model.modules()) if isinstance(module, MaskedLinear)):
            fully_shard(layer, **options)
    if kind == "two meshes":
        options["mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "shards"))
    return fully_shard(model, **options)


def chosen(rank, optimizer, choice, kind):
    model, alone = shard(net(), kind), net()
    train(model, model, rank, fused(model, optimizer), CHOICES[choice])
    train_alone(alone, torchs(alone, optimizer), CHOICES[choice])
    assert_same(model, alone, moved_from=net())


def with_torchs_optimiser(rank, optimizer):
    model, alone = shard(net()), net()
    ours = torchs(model, optimizer)
    choose = rows.another_task_on_each_rank
    for step in range(rows.STEPS):
        loss_of(model, model, rank, step, choose).backward()
        ours.step()
        ours.zero_grad()
    train_alone(alone, torchs(alone, optimizer), choose)
    assert_same(model, alone, moved_from=net())


def checkpointed(rank, optimizer, how):
    """Activation checkpoints around parts of the model: by torch's function, or by its wrapper."""
    choose = rows.another_task_on_each_rank

    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    def made(net):
        if how == "function":
            return Checkpointed(*net)
        return nn.Sequential(*(checkpoint_wrapper(layer) if isinstance(layer, MaskedLinear) else layer for layer in net))

    model, alone = shard(made(net())), net()
    train(model, model, rank, fused(model, optimizer), choose)
    train_alone(alone, torchs(alone, optimizer), choose)
    assert_same(model, alone, moved_from=net())


def accumulated(rank, optimizer):
    model, alone = shard(net()), net()
    ours, theirs = fused(model, optimizer), torchs(alone, optimizer)
    choose = rows.another_task_on_each_rank
    for step in range(rows.STEPS):
        for part in range(3):
            model.set_requires_gradient_sync(part == 2)
            loss_of(model, model, rank, step + part, choose).backward()
        ours.step()
        ours.zero_grad()
        theirs.zero_grad()
        for each in range(dist.get_world_size()):
            for part in range(3):
                (loss_of(alone, alone, each, step + part, choose) / dist.get_world_size()).backward()
        theirs.step()
    assert_same(model, alone, moved_from=net())


def clipped(rank, optimizer):
    model, alone = shard(net()), net()
    ours, choose = fused(model, optimizer), rows.another_task_on_each_rank
    for step in range(rows.STEPS):
        loss_of(model, model, rank, step, choose).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        ours.step()
        ours.zero_grad()
    clip = lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05)  # noqa: E731  # one line is what it is
    train_alone(alone, torchs(alone, optimizer), choose, each=clip)
    assert_same(model, alone, moved_from=net())


def in_mixed_precision(rank, optimizer):
    """Stored in float32, computed in bfloat16, with the tasks of each rank: as one process that computes in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, alone = shard(net().float(), mp_policy=policy), net().float()
    ours, theirs = fused(model, optimizer), torchs(alone, optimizer)
    for step in range(rows.STEPS):
        x, y = rows.batch(rank, step)
        with mm.using_task(model, rows.another_task_on_each_rank(rank, step)):
            ours.backward((model(x.float()).float() - y.float()).square().mean())
        theirs.zero_grad()
        for each in range(dist.get_world_size()):
            x, y = rows.batch(each, step)
            twin = net()
            for parameter, other in zip(twin.parameters(), alone.parameters()):
                parameter.data = other.detach().bfloat16()
            with mm.using_task(twin, rows.another_task_on_each_rank(each, step)):
                (twin(x.bfloat16()).float() - y.float()).square().mean().backward()
            for parameter, other in zip(twin.parameters(), alone.parameters()):
                if parameter.grad is not None:
                    mean = parameter.grad.float() / dist.get_world_size()
                    other.grad = mean if other.grad is None else other.grad + mean
        theirs.step()
    assert_same(model, alone, tolerance=1e-6, moved_from=net().float())


INITS = {"random": "random", "copy": "copy:b", "mean": "mean", "mapping": {"b": 0.5, "c": 0.25}}


def added(rank, optimizer, init, kind):
    """A task is added to a sharded model, and trained beside the others; the optimiser was there before."""
    model, alone = shard(net(), kind), net()
    ours, theirs = fused(model, optimizer), torchs(alone, optimizer)
    train(model, model, rank, ours, rows.another_task_on_each_rank, steps=[0])
    train_alone(alone, theirs, rows.another_task_on_each_rank, steps=[0])
    torch.manual_seed(5 + rank)  # the masks are those of rank 0
    mm.add_task(model, "new", init=INITS[init])
    torch.manual_seed(5)
    mm.add_task(alone, "new", init=INITS[init])
    assert_same(model, alone, moved_from=net())
    known = {parameter for group in theirs.param_groups for parameter in group["params"]}
    theirs.add_param_group({"params": [parameter for parameter in alone.parameters() if parameter not in known]})

    def choose(rank, step):
        return "new" if step % 2 or rank == 0 else "b"

    train(model, model, rank, ours, choose, steps=[1, 2, 3])
    train_alone(alone, theirs, choose, steps=[1, 2, 3])
    assert_same(model, alone, moved_from=net())
    assert mm.tasks(model) == [*rows.NAMES, "new"]
    assert model.state_dict().keys() == alone.state_dict().keys()


def heads_of_tasks(rank, optimizer):
    """A head for each task, sharded too: tasks that differ by rank, and a new one."""

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(MaskedLinear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        mm.MaskBank(model, per_task="2.*")
        for task in rows.NAMES[1:]:
            mm.add_task(model, task)
        return model

    model, alone = fully_shard(made()), made()
    ours, theirs = fused(model, optimizer), torchs(alone, optimizer)
    train(model, model, rank, ours, rows.another_task_on_each_rank)
    train_alone(alone, theirs, rows.another_task_on_each_rank)
    torch.manual_seed(5 + rank)
    mm.add_task(model, "new")
    torch.manual_seed(5)
    mm.add_task(alone, "new")
    assert_same(model, alone, moved_from=made())
    known = {parameter for group in theirs.param_groups for parameter in group["params"]}
    theirs.add_param_group({"params": [parameter for parameter in alone.parameters() if parameter not in known]})
    train(model, model, rank, ours, lambda rank, step: "new" if rank else "c")
    train_alone(alone, theirs, lambda rank, step: "new" if rank else "c")
    assert_same(model, alone)


def added_by_some(rank, optimizer):
    """The processes ask for different tasks: refused in all of them, and nothing has changed."""
    model = shard(net())
    before = {name: tensor.clone() for name, tensor in parameters(model).items()}
    refused(RuntimeError, "the processes differ in their tasks", lambda: mm.add_task(model, f"of rank {rank}"))
    refused(RuntimeError, "Give the module that fully_shard was called on", lambda: mm.add_task(shard(net(), "root")[0], "z"))
    refused(ValueError, "exists", lambda: mm.add_task(model, "b"))
    assert mm.tasks(model) == list(rows.NAMES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(model).items())
    train(model, model, rank, fused(model, optimizer), rows.another_task_on_each_rank)


def added_between_forward_and_backward(rank, optimizer):
    model, alone = shard(net()), net()
    ours, theirs = fused(model, optimizer), torchs(alone, optimizer)
    loss = loss_of(model, model, rank, 0)
    torch.manual_seed(5)
    mm.add_task(model, "new")
    ours.backward(loss)
    train_alone(alone, theirs, steps=[0])
    torch.manual_seed(5)
    mm.add_task(alone, "new")
    assert_same(model, alone, moved_from=net())


def no_task_on_one_rank(rank, optimizer):
    """One rank forgets the block: all raise, none waits."""
    model = shard(net(), "root")
    if rank == 0:
        refused(RuntimeError, "none is active", lambda: model(rows.batch(rank, 0)[0]))
    else:
        refused(RuntimeError, "in another process no task is active", lambda: loss_of(model, model, rank, 0))


def ranks_with_other_tasks(rank, optimizer):
    model = net(("b", "c") if rank == 0 else ("c", "b"))
    refused(RuntimeError, "the processes differ in their tasks", lambda: shard(model))


def evaluated(rank, optimizer):
    """Outputs without gradients, a task for each rank, between steps."""
    model, alone = shard(net()), net()
    for name in rows.NAMES:
        with torch.no_grad(), mm.using_task(model, name), mm.using_task(alone, name):
            torch.testing.assert_close(model.eval()(rows.batch(0, 0)[0]), alone(rows.batch(0, 0)[0]))
    with torch.no_grad():
        got = loss_of(model, model, rank, 0, rows.another_task_on_each_rank)
        torch.testing.assert_close(got, loss_of(alone, alone, rank, 0, rows.another_task_on_each_rank))
    train(model.train(), model, rank, fused(model, optimizer), rows.another_task_on_each_rank)
    train_alone(alone, torchs(alone, optimizer), rows.another_task_on_each_rank)
    assert_same(model, alone, moved_from=net())


def scaled_by_use(rank, optimizer):
    model, alone = shard(net()), net()
    train(model, model, rank, fused(model, optimizer, scale_masks_by_use=True), rows.another_task_on_each_rank)
    alone_by_use(alone, optimizer, rows.another_task_on_each_rank)
    assert_same(model, alone, moved_from=net())


def what_needs_whole_tensors(rank, optimizer):
    model = shard(net())
    refused(RuntimeError, "cannot be merged after the model was sharded", lambda: mm.merge(model, "b"))
    refused(RuntimeError, "cannot be packed after the model was sharded", lambda: mm.MaskBank(model).pack("b"))
    refused(RuntimeError, "after the model was sharded", lambda: mm.MaskBank(model).save("/nowhere"))


ROWS = [
    *((chosen, optimizer, choice, "layers") for optimizer in OPTIMIZERS for choice in CHOICES),
    (chosen, "AdamW", "a task for each rank", "root"),
    *((added, "SGD", init, "layers") for init in INITS),
    (added, "AdamW", "random", "root"),
    *((checkpointed, "AdamW", how) for how in ("function", "wrapper")),
    *((row, optimizer) for row in (in_mixed_precision, scaled_by_use) for optimizer in OPTIMIZERS),
    (with_torchs_optimiser, "AdamW"),
    (accumulated, "SGD"),
    (clipped, "AdamW"),
    (heads_of_tasks, "SGD"),
    (added_by_some, "SGD"),
    (added_between_forward_and_backward, "SGD"),
    (no_task_on_one_rank, "SGD"),
    (ranks_with_other_tasks, "SGD"),
    (evaluated, "SGD"),
    (what_needs_whole_tensors, "SGD"),
]
OF_FOUR = [
    (chosen, "AdamW", "a task for each rank", "two meshes"),
    (added, "SGD", "random", "two meshes"),
]
