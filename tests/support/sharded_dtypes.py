"""Runs of one rank under fully_shard, of models with parameters of 16 bits, for tests/distributed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import metamask_ext as mm

STEPS, RATE = 3, 0.5


def masked_mlp(dtype: torch.dtype = torch.float32, frozen: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = mm.convert(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype), mask_init="normal")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("masks" in name or not frozen)
    return model


def data(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()


def _trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], RATE)
    for _ in range(STEPS):
        loss_of(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    # The settings of a layer are no sharded tensor.
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
        for name, tensor in model.state_dict().items()
    }


def with_a_policy(rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return _trained(fully_shard(masked_mlp(), mp_policy=policy), data(torch.float32))


def with_frozen_weights(rank):
    return _trained(fully_shard(masked_mlp(torch.bfloat16, frozen=True)), data())


def with_two_dtypes(rank, whole):
    model = masked_mlp(torch.bfloat16)
    fully_shard(model if whole else model[0])
    return model(data())
