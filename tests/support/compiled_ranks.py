"""A compiled model in DistributedDataParallel on a rank, and the same in one process."""

from __future__ import annotations

import copy

import torch
from support.compiled import COUNTED, Compiled
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import metamask_ext as mm
from metamask_ext.nn import MaskedLinear


def wrapped(rank, inside):
    """The largest difference of a gradient, task by task, and the raw ops; ``inside``: compiled in place, then wrapped."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    # Weights of 2^16 elements are the kernel's.
    model = nn.Sequential(MaskedLinear(256, 256), nn.Tanh(), MaskedLinear(256, 256), nn.Tanh(), MaskedLinear(256, 3)).double()
    mm.add_task(model, "b")
    alone = copy.deepcopy(model)
    compiled = Compiled(COUNTED)
    if inside:
        mm.compile(model, backend=compiled.backend, fullgraph=True)
    run = DistributedDataParallel(model, bucket_cap_mb=1, find_unused_parameters=True)
    if not inside:
        run = torch.compile(run, backend=compiled.backend)
    batches = torch.randn(2, 4, 256, dtype=torch.float64)
    worst = 0.0
    for task in ("default", "b", "b"):
        with mm.using_task(model, task), mm.using_task(alone, task):
            run(batches[rank]).square().sum().backward()
            sum(alone(batch).square().sum() / 2 for batch in batches).backward()
        for parameter, other in zip(model.parameters(), alone.parameters()):
            if other.grad is not None:
                worst = max(worst, (parameter.grad - other.grad).abs().max().item())
        run.zero_grad(), alone.zero_grad()
    return worst, sorted(compiled.ops)
