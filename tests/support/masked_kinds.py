"""Modules of every kind that gets masks, with calls for a batch of samples, and what plain torch computes for one task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from support.models import randomize_masks
from torch import Tensor, nn

import metamask_ext as mm
from metamask_ext.nn import MaskedLayer

SAMPLES = 4
MIXED = ["b", "default", "c", "b"]


class Conv1D(nn.Module):
    """As GPT-2's linear layer in transformers, with the weight ``[in, out]``."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


class Positions(nn.Module):
    """Adds position embeddings, a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.position_embeddings = nn.Parameter(torch.randn(1, 3, 4))
        self.project = nn.Linear(4, 4)

    def forward(self, x):
        return self.project(x + self.position_embeddings)


class Experts(nn.Module):
    """As the experts of transformers' mixtures."""

    def __init__(self, experts: int = 3, hidden: int = 4, inner: int = 5):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        final = torch.zeros_like(hidden_states)
        for expert in range(len(self.gate_up_proj)):
            token, place = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, -1)
            states = F.linear(F.silu(gate) * up, self.down_proj[expert]) * top_k_weights[token, place, None]
            final = final.index_add(0, token, states)
        return final


class Router(nn.Module):
    def __init__(self, experts: int = 3, hidden: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden))

    def forward(self, hidden_states):
        scores, index = F.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight).softmax(-1).topk(2, -1)
        return scores, index


class Mixture(nn.Module):
    """As the sparse blocks of transformers: it flattens its samples."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = Router(), Experts()

    def forward(self, hidden_states):
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        weights, index = self.gate(flat)
        return self.experts(flat, index, weights).reshape(hidden_states.shape)


class Attention(nn.Module):
    """Self-attention, or attention to a memory, in a model whose first dimension is the batch."""

    def __init__(self, memory: bool = False, masks: str = "", weights: bool = False, **options: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.memory, self.masks, self.weights = memory, masks, weights
        self.batch_first = bool(options.get("batch_first", False))

    def forward(self, x):
        memory = F.pad(x, (0, 1, 0, 1)) if self.memory else x
        options: dict[str, Any] = {"need_weights": self.weights}
        if "padding" in self.masks:
            options["key_padding_mask"] = memory.sum(-1) > 1.5
        if "square" in self.masks:
            options["attn_mask"] = torch.ones(x.shape[1], memory.shape[1], dtype=torch.bool).triu(1)
        if "sample" in self.masks:
            options["attn_mask"] = x.sum((1, 2)).repeat_interleave(2)[:, None, None].expand(-1, x.shape[1], memory.shape[1])
        if not self.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        query = x
        y, weights = self.attention(query, memory if self.memory else query, memory if self.memory else query, **options)
        y = y if self.batch_first else y.transpose(0, 1)
        return y if weights is None else torch.cat([y, weights], -1)


@dataclass
class Case:
    """A plain module, the call of it for a batch of samples, and the ways in which it is masked."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    parameters: tuple[str, ...] = ()
    """Of the module, for :func:`metamask_ext.mask_parameter`; none: :func:`metamask_ext.convert` masks it."""
    include: str | None = None
    tokens: int = 0
    """Inputs are integers below this."""
    options: dict[str, Any] = field(default_factory=dict)

    def plain(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        module = self.make()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        return module.to(dtype).eval()

    def mask(self, module: nn.Module, **options: Any) -> nn.Module:
        for name in self.parameters:
            mm.mask_parameter(module, name, **options)
        return module if self.parameters else mm.convert(module, include=self.include, **options)

    def model(self, **options: Any) -> nn.Module:
        """Three tasks of random masks."""
        model = self.mask(self.plain(), **options)
        for task in "bc":
            mm.add_task(model, task)
        return randomize_masks(model)

    def input(self, samples: int = SAMPLES, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.tokens:
            return torch.randint(self.tokens, (samples, *self.shape), generator=generator)
        return torch.randn(samples, *self.shape, dtype=torch.float64, generator=generator).to(dtype)

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x, **self.options)


def thetas(model: nn.Module, task: str) -> dict[str, Tensor]:
    """``W * sigmoid(M)`` of every masked parameter, by its name in the plain model, by torch alone."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, MaskedLayer):
            for name, parameter in layer._parameters.items():
                masks = layer._modules.get("masks" if name == "weight" else f"{name}_masks")
                if parameter is not None and masks is not None:
                    found[f"{path}.{name}" if path else name] = parameter * masks[task].sigmoid().to(parameter.dtype)
    return found


def by_torch(case: Case, model: nn.Module, task: str, x: Tensor) -> Tensor:
    """The output of the plain module with the task's thetas in the places of its parameters."""
    own = {name: parameter for name, parameter in model.named_parameters() if "masks." not in name}
    return torch.func.functional_call(
        case.plain(x.dtype if x.is_floating_point() else torch.float64), {**own, **thetas(model, task)}, (x,), case.options
    )


CASES = {
    "conv1d": Case(lambda: nn.Conv1d(2, 3, 3), (2, 6)),
    "conv1d-strided": Case(lambda: nn.Conv1d(4, 6, 2, stride=2, padding=1, dilation=2, groups=2), (4, 7)),
    "conv1d-same-reflect": Case(lambda: nn.Conv1d(2, 3, 3, padding="same", padding_mode="reflect", bias=False), (2, 6)),
    "conv1d-same-dilated": Case(lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2), (2, 7)),
    "conv1d-valid-circular": Case(lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 6)),
    "conv3d": Case(lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), groups=2), (2, 3, 4, 3)),
    "conv3d-replicate": Case(lambda: nn.Conv3d(1, 2, 3, padding=1, padding_mode="replicate", bias=False), (1, 3, 3, 3)),
    "transposed1d": Case(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 4)),
    "transposed2d": Case(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 3, 3)),
    "transposed2d-size": Case(
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, bias=False), (2, 3, 3), options={"output_size": [8, 7]}
    ),
    "transposed3d": Case(lambda: nn.ConvTranspose3d(2, 2, 2, dilation=2), (2, 2, 3, 2)),
    "embedding": Case(lambda: nn.Embedding(7, 5), (3,), include="*", tokens=7),
    "embedding-padding": Case(lambda: nn.Embedding(5, 3, padding_idx=1, scale_grad_by_freq=True), (2, 3), include="*", tokens=5),
    "conv1D": Case(lambda: Conv1D(5, 4), (3, 4)),
    "attention": Case(Attention, (3, 4)),
    "attention-first": Case(lambda: Attention(batch_first=True, weights=True), (3, 4)),
    "attention-memory": Case(lambda: Attention(True, kdim=5, vdim=5, add_bias_kv=True, masks="padding", weights=True), (3, 4)),
    "attention-causal": Case(lambda: Attention(masks="square", bias=False), (3, 4)),
    "attention-sample-masks": Case(lambda: Attention(True, kdim=5, vdim=5, masks="sample", batch_first=True), (3, 4)),
    "experts": Case(Mixture, (3, 4)),
    "positions": Case(Positions, (3, 4), parameters=("position_embeddings", "project.bias")),
    "linear-weight-alone": Case(lambda: nn.Linear(4, 3), (4,), parameters=("weight",)),
    "layer-norm": Case(lambda: nn.LayerNorm(4), (3, 4), parameters=("bias", "weight")),
}
