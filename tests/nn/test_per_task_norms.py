"""Normalisations of which every task has its own scale and shift: torch's, and those of transformers and timm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metamask_ext as mm
from metamask_ext.nn import MaskedLinear


class RootMeanSquare(nn.Module):
    """As LlamaRMSNorm and T5LayerNorm of transformers."""

    def __init__(self, hidden_size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        wide = hidden_states.to(torch.promote_types(dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(dtype)


class ChannelsLayerNorm(nn.LayerNorm):
    """As timm's LayerNorm2d, for features ``[B, C, H]``."""

    def forward(self, x):
        x = F.layer_norm(x.transpose(1, 2), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.transpose(1, 2)


NORMS = {
    "layer-norm": (lambda: nn.LayerNorm(4), (3, 4)),
    "layer-norm-of-vectors": (lambda: nn.LayerNorm(4, bias=False), (4,)),
    "rms-norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "root-mean-square": (lambda: RootMeanSquare(4), (3, 4)),
    "channels": (lambda: ChannelsLayerNorm(4), (4, 3)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
}


@pytest.mark.parametrize("name", NORMS)
def test_each_task_has_its_own(name):
    make, shape = NORMS[name]
    model = nn.ModuleDict({"norm": make(), "head": MaskedLinear(shape[-1], 2)}).double()
    model.forward = lambda x: model["head"](model["norm"](x))
    bank = mm.MaskBank(model, per_task="norm.*")
    mm.add_task(model, "b")
    x = torch.randn(4, *shape, dtype=torch.float64)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.startswith("norm"):
                parameter.normal_()
    names, wanted = ["b", "default", "default", "b"], []
    plain = make().double()
    for task, one in zip(names, x):
        own = {name: tensors[task] for name, tensors in model["norm"].per_task.items()}
        with mm.using_task(model, task):
            wanted.append(model["head"](torch.func.functional_call(plain, own, (one[None],))))
            torch.testing.assert_close(model.forward(one[None]), wanted[-1])
    with mm.using_task(model, names):
        y = model.forward(x)
    torch.testing.assert_close(y, torch.cat(wanted))
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model["norm"].parameters())
    with bank.superpose({"b": 1.0}), mm.using_task(model["head"], "b"):
        torch.testing.assert_close(model.forward(x[:1]), wanted[0])
    merged = mm.merge(model["norm"], "b")
    assert type(merged) is type(plain)
    with mm.using_task(model, "b"):
        torch.testing.assert_close(model["head"](merged(x[:1])), wanted[0])
