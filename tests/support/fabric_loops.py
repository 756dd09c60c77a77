"""A TaskLoop on Lightning Fabric, in the processes that torchrun has started, or alone; it can kill one of them.

    python -m support.fabric_loops FOLDER STRATEGY PRECISION [VICTIM ROUND]

writes the model's tensors and the metrics of a run of ROUNDS rounds in FOLDER to FOLDER/result.pt.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from metamask_ext.continual import TaskLoop, read_metrics
from metamask_ext.nn import MaskedLinear

ROUNDS = 6


def _shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in model.modules():
        if isinstance(layer, MaskedLinear):
            fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def fabric_of(strategy, precision):
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    world = int(os.environ.get("WORLD_SIZE", "1"))
    made = {
        "alone": lambda: "auto",
        "ddp": lambda: DDPStrategy(find_unused_parameters=True),
        "fsdp": lambda: ModelParallelStrategy(_shard, data_parallel_size=world, tensor_parallel_size=1),
    }[strategy]()
    fabric = Fabric(accelerator="cpu", devices=world, strategy=made, precision=precision)
    fabric.launch()
    return fabric


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(MaskedLinear(3, 5), nn.Tanh(), MaskedLinear(5, 2, bias=False)).to(dtype)


def loop(out, fabric=None, dtype=torch.float32, **changes):
    generator = torch.Generator().manual_seed(1)
    tasks = {f"t.{k}": tuple(torch.randn(16, size, generator=generator, dtype=dtype) for size in (3, 2)) for k in range(3)}
    settings = {"steps": 2, "lr": 0.05, "mask_lr": 0.2, "momentum": 0.9, "batch_size": 8, "seed": 5, "tensorboard": False}
    return TaskLoop(net(dtype), tasks, F.mse_loss, out=out, fabric=fabric, checkpoint_seconds=0.0, **{**settings, **changes})


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(folder, strategy, precision, victim="-1", at="0"):
    torch.set_num_threads(1)
    # Fabric's own 64-true converts outputs to float32, and knows no sharding.
    fabric = fabric_of(strategy, "32-true" if precision == "double" else precision)
    dtype = torch.float64 if precision == "double" else torch.float32

    def evaluate(loop):
        if loop.round == int(at) and fabric.global_rank == int(victim):
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.ones(1, 3, dtype=dtype)
        with loop.using(next(iter(loop.steps_of))):
            return {"output": float(loop.model(x).double().sum()), "noise": float(torch.rand(()))}

    made = loop(Path(folder) / "run", fabric, dtype, evaluate=evaluate)
    made.run(ROUNDS)
    tensors = {name: whole(tensor).detach().clone() for name, tensor in made.model.state_dict().items()}
    if fabric.global_rank == 0:
        result = {"model": tensors, "metrics": read_metrics(Path(folder) / "run"), "resumed": made.resumed, "slots": made.steps_of}
        torch.save(result, Path(folder) / "result.pt")
    if torch.distributed.is_initialized():
        fabric.barrier()
        os._exit(0)  # a thread of gloo's may abort a process that ends


if __name__ == "__main__":
    main(*sys.argv[1:])
