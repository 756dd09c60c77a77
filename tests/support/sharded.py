"""Two processes that train one model under fully_shard."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import metamask_ext as mm


def masked_mlp(**options) -> nn.Module:
    torch.manual_seed(0)
    return mm.convert(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), mask_init="normal", **options)


def data() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def loss(output: Tensor) -> Tensor:
    return output.float().square().mean()


def _work(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results: dict[str, object] = {"policy": _train(fully_shard(masked_mlp(), mp_policy=policy), data())}
    frozen = masked_mlp().bfloat16()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("masks" in name)
    results["frozen"] = _train(fully_shard(frozen), data().bfloat16())
    for name, shard in (("whole", lambda model: model), ("layers", lambda model: model[0])):
        model = masked_mlp().bfloat16()
        try:
            fully_shard(shard(model))
            model(data().bfloat16())
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    if rank == 0:
        torch.save(results, f"{folder}/results")
    dist.destroy_process_group()


def _train(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.5)
    for _ in range(3):
        loss(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.full_tensor().detach() for name, tensor in model.state_dict().items()}


def run() -> dict[str, object]:
    """What rank 0 has found: the trained states, and the messages of what was refused."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (folder,), 2)
        return torch.load(Path(folder) / "results")
