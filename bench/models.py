"""Problems of whole models' training steps: a ResNet-18, a ViT-tiny and a BERT-mini, with all their layers masked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from metamask_ext import convert
from metamask_ext.optim import FusedMaskedSGD

from .problem import LEARNING_RATE, METAMASK, SEED, Contender, Problem, Work

CLASSES = 10


class _Mask(nn.Module):
    """A mask as a parametrization: the way to mask an existing model in plain torch."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.mask = nn.Parameter(mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.sigmoid(self.mask)


class _Block(nn.Module):
    """A pre-norm transformer block whose projections are linear layers, so that all of them can be masked."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.norms[0](x)
        q, k, v = (project(y).view(batch, tokens, self.heads, -1).transpose(1, 2) for project in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(attended)
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class _Patches(nn.Module):
    """A ViT's input: a token for each patch of 16 x 16 pixels, and its place."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.project = nn.Conv2d(3, width, 16, 16)
        self.places = nn.Parameter(0.02 * torch.randn((size // 16) ** 2, width))

    def forward(self, images: Tensor) -> Tensor:
        return self.project(images).flatten(2).transpose(1, 2) + self.places


class _Words(nn.Module):
    """A BERT's input: a vector for each token and for its place."""

    def __init__(self, words: int, tokens: int, width: int):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(tokens, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens) + self.places


class _Transformer(nn.Module):
    def __init__(self, input: nn.Module, width: int, depth: int, heads: int):
        super().__init__()
        self.input, self.blocks = input, nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.input(x))).mean(1))


def resnet18_step(batch: int, size: int, fused: bool) -> Problem:
    """Times a training step of torchvision's ResNet-18 on images of ``size x size`` pixels."""
    from metamask_ext.data._torchvision import import_torchvision

    import_torchvision()
    from torchvision.models import resnet18

    torch.manual_seed(SEED)
    return _model_step(resnet18(num_classes=CLASSES), torch.randn(batch, 3, size, size), ("conv1", "fc"), fused)


def vit_tiny_step(batch: int, size: int, depth: int = 12) -> Problem:
    """Times a training step of a ViT-tiny (width 192, 12 blocks, 3 heads) on images of ``size x size`` pixels."""
    torch.manual_seed(SEED)
    model = _Transformer(_Patches(size, 192), 192, depth, 3)
    return _model_step(model, torch.randn(batch, 3, size, size), ("blocks.0.query", "head"), fused=True)


def bert_mini_step(batch: int, tokens: int, depth: int = 4) -> Problem:
    """Times a training step of a BERT-mini (width 256, 4 blocks, 4 heads) on sequences of ``tokens``; its embedding has no mask."""
    torch.manual_seed(SEED)
    model = _Transformer(_Words(1000, tokens, 256), 256, depth, 4)
    return _model_step(model, torch.randint(1000, (batch, tokens)), ("blocks.0.query", "head"), fused=True)


def _model_step(plain: nn.Module, inputs: Tensor, watched: tuple[str, str], fused: bool) -> Problem:
    """Makes the contenders of a step of SGD on ``plain`` as a classifier; two layers' weights are checked, by name."""
    labels = torch.randint(CLASSES, (len(inputs),))

    def dense() -> nn.Module:
        return copy.deepcopy(plain)

    def masked() -> nn.Module:
        return convert(copy.deepcopy(plain), mask_init=2.0)

    def eager() -> nn.Module:
        model = copy.deepcopy(plain)
        for module in list(model.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    parametrize.register_parametrization(module, name, _Mask(torch.full_like(parameter, 2.0)))
        return model

    def step(model: nn.Module, inputs: Tensor, fused: bool) -> Work:
        if fused:
            descent = FusedMaskedSGD(model, LEARNING_RATE)
            update: Callable[[Tensor], None] = descent.backward
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

            def update(loss: Tensor) -> None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        weights = [_shared_weight(model.get_submodule(name)) for name in watched]
        before = [weight.detach().clone() for weight in weights]

        def work() -> tuple[Tensor, ...]:
            loss = F.cross_entropy(model(inputs), labels)
            update(loss)
            return (loss.detach(), *(weight.detach() - start for weight, start in zip(weights, before)))

        return work

    names = ("loss", *(f"step of the weight of {name}" for name in watched))
    contenders = {}
    for name, make, reference in ((METAMASK, masked, eager), ("eager", eager, eager), ("dense", dense, dense)):

        def exact(make: Callable[[], nn.Module] = reference) -> tuple[Tensor, ...]:
            return step(make().double(), inputs.double() if inputs.is_floating_point() else inputs, False)()

        contenders[name] = Contender(step(make(), inputs, fused and name == METAMASK), exact, names)
    missing = {"compiled": "compiling a whole model takes minutes on this machine"}
    return Problem(contenders, 1, missing, tolerance=1e-2)


def _shared_weight(layer: nn.Module) -> Tensor:
    parameters = dict(layer.named_parameters())
    return parameters["parametrizations.weight.original"] if parametrize.is_parametrized(layer) else parameters["weight"]
