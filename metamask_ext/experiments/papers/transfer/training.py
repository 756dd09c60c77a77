"""Pretrains a net on characters and retrains parts of it on digits; each function is a job."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metamask_ext
from metamask_ext.bank import MaskBank
from metamask_ext.files.checkpoint import load_checkpoint, save_checkpoint, take_over_state_dict
from metamask_ext.nn import MaskedConv2d
from metamask_ext.nn.names import DEFAULT_TASK
from metamask_ext.nn.tasks import add_task
from metamask_ext.nn.using_task import using_task

from ...engine.data import characters, digits
from ...engine.jobs import Json
from ...engine.training import descend, seeded
from ..fewshot import network
from .settings import Settings

CLASSES = 10
BLOCK = 3
"""Modules of a block: a convolution, its batch norm, ReLU."""
MASK_INIT = 0.01
"""Every weight is on at first, and a few steps may turn it off (Mallya et al., Piggyback, arXiv:1801.06519, section 3)."""
TASK = "digits"
Samples = tuple[Tensor, Tensor]


def pretrain(folder: Path, seed: int, settings: Settings) -> Json:
    """Train a net to tell the training characters apart, and keep it in ``folder``: its accuracy on other drawings of them."""
    model = _pretrained(seed, settings)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(_path(folder), {"model": model.state_dict()})
    return {"accuracy": _percent(model, *_source(settings)[1]), "classes": len(characters().train)}


def _path(folder: Path) -> Path:
    return folder / "pretrained.pt"


def _source(settings: Settings) -> tuple[Samples, Samples]:
    """Drawings for training and for the test; the label is the character."""
    drawn = characters().train.float()[:, :, None] / 255  # [characters, drawings, 1, 28, 28]
    parts = drawn[:, : settings.source.drawings], drawn[:, settings.source.drawings :]
    train, test = ((part.flatten(0, 1), torch.arange(len(part)).repeat_interleave(part.shape[1])) for part in parts)
    return train, test


def _pretrained(seed: int, settings: Settings) -> nn.Sequential:
    source, generator = settings.source, torch.Generator().manual_seed(seed)
    (images, labels), _ = _source(settings)
    model = _untrained(seed, settings)
    descend(
        model.parameters(), source.lr, source.steps, lambda: _loss(model, images, labels, source.batch, generator), "source loss"
    )
    return model


def _untrained(seed: int, settings: Settings, classes: int | None = None) -> nn.Sequential:
    return seeded(seed, partial(network, False, classes or len(characters().train), settings.filters))


def transfer(folder: Path, seed: int, method: str, count: int, rates: Iterable[float], settings: Settings) -> Json:
    """Learn digits from ``count`` of them at each of the rates: the accuracy on test digits, and afterwards on the characters of
    the
    source with their own classifier; for masks also the bytes that the task takes."""
    generator = torch.Generator().manual_seed(seed)
    (images, labels), test = digits().train, digits().test
    order = torch.randperm(len(labels), generator=generator)
    each = [order[labels[order] == digit] for digit in range(CLASSES)]
    rows = torch.cat([of_digit[: max(1, count // CLASSES)] for of_digit in each])
    data = images[rows], labels[rows]
    found = [_learned(folder, seed, method, data, test, rate, settings) for rate in rates]
    return {key: [one[key] for one in found] for key in found[0]}


def _learned(
    folder: Path, seed: int, method: str, data: Samples, test: Samples, rate: float, settings: Settings
) -> dict[str, float]:
    if method == "scratch":
        model = _untrained(seed + 1, settings, CLASSES)
        _fit(model, model.parameters(), data, rate, seed, settings)
        return {"accuracy": _percent(model, *test)}
    body, source_head = _parts(_load(folder, seed, settings))
    head = seeded(seed + 1, partial(nn.Linear, source_head.in_features, CLASSES))
    model = nn.Sequential(*body, head)
    if method == "masks":
        return _by_masks(body, head, source_head, data, test, rate, seed, settings)
    trained = {"classifier": [], "last block": list(body)[-1 - BLOCK :], "all": list(body)}[method]
    for module in body:
        # A frozen batch norm in training mode would still move its statistics.
        module.requires_grad_(module in trained).train(module in trained)
    learned = chain(head.parameters(), *(module.parameters() for module in trained))
    _fit(model, learned, data, rate, seed, settings, [*trained, head])
    numbers = sum(parameter.numel() for module in [*trained, head] for parameter in module.parameters())
    return {"accuracy": _percent(model, *test), "source": _source_accuracy(body, source_head, settings), "bytes": 4 * numbers}


def _by_masks(
    body: nn.Sequential,
    head: nn.Linear,
    source_head: nn.Module,
    data: Samples,
    test: Samples,
    rate: float,
    seed: int,
    settings: Settings,
) -> dict[str, float]:
    """Learn hard masks over the frozen body, batch norms included, and a classifier; the task is served from its bits."""
    model = nn.Sequential(*body, head)
    body.requires_grad_(False).eval()
    metamask_ext.convert(body, gate="hard", mask_init=MASK_INIT)
    add_task(body, TASK)
    masks = [module.masks[TASK].requires_grad_() for module in body.modules() if isinstance(module, MaskedConv2d)]
    with using_task(body, TASK):
        _fit(model, [*masks, *head.parameters()], data, rate, seed, settings, [head])
        bank = MaskBank(body)
        bank.pack(TASK)
        accuracy = _percent(model, *test)
    with using_task(body, DEFAULT_TASK):
        source = _source_accuracy(body, source_head, settings)
    size = sum(parameter.numel() for parameter in head.parameters())
    of_masks = float(bank.bytes_per_task(TASK))
    return {"accuracy": accuracy, "source": source, "bytes": of_masks + 4 * size, "bytes of the masks": of_masks}


def _parts(model: nn.Sequential) -> tuple[nn.Sequential, nn.Linear]:
    """The body of a net, and its classifier."""
    *body, head = model
    assert isinstance(head, nn.Linear)
    return nn.Sequential(*body), head


def _load(folder: Path, seed: int, settings: Settings) -> nn.Sequential:
    path, model = _path(folder), _untrained(seed, settings)
    if not path.exists():  # its file was deleted; the result is the same
        return _pretrained(seed, settings)
    take_over_state_dict(path, load_checkpoint(path).get("model"), model)
    return model


def _fit(
    model: nn.Sequential,
    parameters: Iterable[Tensor],
    data: Samples,
    rate: float,
    seed: int,
    settings: Settings,
    training: Iterable[nn.Module] | None = None,
) -> None:
    """Train on digits; of ``model`` only ``training`` is in training mode (None: all of it)."""
    generator = torch.Generator().manual_seed(seed)
    model.train(training is None)
    for module in training or ():
        module.train()
    x, labels = data
    frozen = 0 if training is None else next(place for place, module in enumerate(model) if module.training)
    has_masks = any(isinstance(module, MaskedConv2d) for module in model)
    if frozen and not has_masks:  # what no step changes is computed once
        with torch.no_grad():
            x = model[:frozen](x)
    rest = model[0 if has_masks else frozen :]
    descend(parameters, rate, settings.steps, lambda: _loss(rest, x, labels, settings.batch, generator))
    model.eval()


def _loss(model: nn.Module, x: Tensor, labels: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    rows = torch.randint(len(labels), (batch,), generator=generator)
    return F.cross_entropy(model(x[rows]), labels[rows])


def _source_accuracy(body: nn.Sequential, head: nn.Module, settings: Settings) -> float:
    return _percent(nn.Sequential(*body, head), *_source(settings)[1])


def _percent(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(some).argmax(1) for some in images.split(500)])
    return 100 * float((found == labels).double().mean())
