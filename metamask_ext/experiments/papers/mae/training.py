"""Trains and tests the methods of ``mae``; each function is a job."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metamask_ext
from metamask_ext.bank import MaskBank
from metamask_ext.files.checkpoint import load_checkpoint, save_checkpoint, take_over_state_dict
from metamask_ext.nn import MaskedLinear
from metamask_ext.nn.names import DEFAULT_TASK
from metamask_ext.nn.tasks import add_task, remove_task
from metamask_ext.nn.using_task import using_task

from ...engine.jobs import Json
from ...engine.tracking import track
from ...engine.training import seeded
from .autoencoder import Encoder, MaskedAutoencoder, draw_kept, masked_error, to_images, to_patches
from .images import MARGIN, Images
from .settings import Settings, TrainSettings

CLASSES = 10
SHOWN = 8
"""Images of the figure."""
MASK_INIT = 0.01
"""Every weight is on at first, and a few steps may turn it off (Mallya et al., Piggyback, arXiv:1801.06519, section 3)."""
BATCH = 500
"""Images at a time in tests."""


def pretrain(folder: Path, seed: int, name: str, settings: Settings) -> Json:
    """Pretrain an autoencoder, and keep its encoder in ``folder``: the error on masked test patches, that of the mean training
    image there, and pictures of some test images, masked and reconstructed."""
    images = Images.of(name)
    model = _pretrained(images, seed, settings)
    path = _path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {"encoder": model.encoder.state_dict()})
    patches = to_patches(images.test[0], model.patch)
    kept = draw_kept(len(patches), patches.shape[1], settings.share, torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted = torch.cat([model(*some) for some in zip(patches.split(BATCH), kept.split(BATCH))])
    middle = slice(MARGIN, -MARGIN)
    mean = to_patches(images.train[0][:, :, middle, middle].mean(0, keepdim=True), model.patch).expand_as(patches)
    return {
        "error": float(masked_error(predicted, patches, kept)),
        "error of the mean image": float(masked_error(mean, patches, kept)),
        "pictures": _pictures(patches * images.std + images.mean, predicted * images.std + images.mean, kept, model),
    }


def _pretrained(images: Images, seed: int, settings: Settings) -> MaskedAutoencoder:
    model = seeded(seed, partial(MaskedAutoencoder, images.shape, settings.net))
    generator = torch.Generator().manual_seed(seed)
    batch = settings.pretraining.batch

    def loss() -> Tensor:
        rows = torch.randint(len(images.train[0]), (batch,), generator=generator)
        patches = to_patches(images.cropped(images.train[0][rows], generator), model.patch)
        kept = draw_kept(len(patches), patches.shape[1], settings.share, generator)
        return masked_error(model(patches, kept), patches, kept)

    _descend(model.parameters(), settings.pretraining, loss)
    return model


def _path(folder: Path, name: str) -> Path:
    return folder / f"encoder-{name}.pt"


def _encoder(folder: Path, images: Images, name: str, start: str, seed: int, settings: Settings) -> Encoder:
    """An encoder with random weights, or the pretrained one."""
    encoder = seeded(seed, partial(MaskedAutoencoder, images.shape, settings.net)).encoder
    path = _path(folder, name)
    if start == "pretrained" and path.exists():
        take_over_state_dict(path, load_checkpoint(path).get("encoder"), encoder)
    elif start == "pretrained":  # its file was deleted; the result is the same
        encoder = _pretrained(Images.of(name), seed, settings).encoder
    return encoder


def fine_tune(folder: Path, seed: int, name: str, task: str, start: str, count: int, settings: Settings) -> Json:
    """The test accuracy of an encoder and a head on CLS, both trained with ``count`` labels."""
    images = Images.of(name, task)
    encoder = _encoder(folder, images, name, start, seed, settings)
    head = seeded(seed, partial(nn.Linear, settings.net.width, CLASSES))
    _train(encoder, head, images, [*encoder.parameters(), *head.parameters()], count, settings.tuning, seed, settings)
    return {"accuracy": _percent(_logits(encoder, head, images, settings), images.test[1])}


def probe(folder: Path, seed: int, name: str, start: str, count: int, settings: Settings) -> Json:
    """The test accuracy of a layer norm and a linear layer on the detached CLS of an encoder that stays as it is."""
    images = Images.of(name)
    encoder = _encoder(folder, images, name, start, seed, settings)
    generator = torch.Generator().manual_seed(seed)
    given, labels = images.labelled(count, generator)
    middle = slice(MARGIN, -MARGIN)
    features, tested = (_cls(encoder, some, settings) for some in (given[:, :, middle, middle], images.test[0]))
    head = seeded(seed, lambda: nn.Sequential(nn.LayerNorm(settings.net.width), nn.Linear(settings.net.width, CLASSES)))

    def loss() -> Tensor:
        rows = torch.randint(len(labels), (settings.probe.batch,), generator=generator)
        return F.cross_entropy(head(features[rows]), labels[rows])

    _descend(head.parameters(), settings.probe, loss)
    return {"accuracy": _percent(head(tested), images.test[1])}


def masks(folder: Path, seed: int, settings: Settings) -> Json:
    """The test accuracy of each task by a hard mask over the frozen pretrained encoder, and a head on CLS; all tasks are served
    together, as a mixed-task batch, from one bit a weight."""
    plain = Images.of("digits")
    encoder = _encoder(folder, plain, "digits", "pretrained", seed, settings).requires_grad_(False)
    metamask_ext.convert(encoder, gate="hard", mask_init=MASK_INIT)
    heads = {}
    for task in settings.further:
        add_task(encoder, task)
        layers = [layer for layer in encoder.modules() if isinstance(layer, MaskedLinear)]
        logits = [mask for layer in layers for mask in (layer.masks[task], *([layer.bias_masks[task]] if layer.bias_masks else []))]
        heads[task] = seeded(seed, partial(nn.Linear, settings.net.width, CLASSES))
        learned = [*(mask.requires_grad_() for mask in logits), *heads[task].parameters()]
        with using_task(encoder, task):
            _train(encoder, heads[task], Images.of("digits", task), learned, settings.labels[-1], settings.masks, seed, settings)
    remove_task(encoder, DEFAULT_TASK)
    alone = torch.stack([_alone(encoder, heads[task], task, settings) for task in settings.further], 1)
    bank = MaskBank(encoder)
    for task in settings.further:
        bank.pack(task)
    together = _served(encoder, heads, settings)
    right = (together == Images.of("digits").test[1][:, None]).double().mean(0)
    parameters = sum(layer.weight.numel() + layer.bias.numel() for layer in layers)
    return {
        "accuracy": {task: 100 * float(share) for task, share in zip(settings.further, right)},
        "images of another class": int((together != alone).sum()),
        "bytes of a task": bank.bytes_per_task(settings.further[0]),
        "bytes of a fine-tuned encoder": 4 * parameters,
    }


@torch.no_grad()
def _alone(encoder: Encoder, head: nn.Module, task: str, settings: Settings) -> Tensor:
    """The classes of a task's test images, ``[n]``, the task by itself."""
    with using_task(encoder, task):
        return _logits(encoder, head, Images.of("digits", task), settings).argmax(1)


@torch.no_grad()
def _served(encoder: Encoder, heads: dict[str, nn.Linear], settings: Settings) -> Tensor:
    """The classes of the test images of all tasks, ``[n, tasks]``, in mixed-task batches."""
    images = torch.stack([Images.of("digits", task).test[0] for task in heads], 1)  # [n, tasks, 1, 28, 28]
    found = []
    for some in images.split(BATCH):
        with using_task(encoder, list(heads) * len(some)):
            cls = encoder(to_patches(some.flatten(0, 1), settings.net.patch))[:, 0]
        parts = cls.unflatten(0, (-1, len(heads))).unbind(1)
        found.append(torch.stack([head(part).argmax(1) for head, part in zip(heads.values(), parts)], 1))
    return torch.cat(found)


def _train(
    encoder: Encoder,
    head: nn.Module,
    images: Images,
    learned: Sequence[Tensor],
    count: int,
    train: TrainSettings,
    seed: int,
    settings: Settings,
) -> None:
    """Train with ``count`` labels, the images cropped anew in each step."""
    generator = torch.Generator().manual_seed(seed)
    given, labels = images.labelled(count, generator)

    def loss() -> Tensor:
        rows = torch.randint(len(labels), (train.batch,), generator=generator)
        tokens = encoder(to_patches(images.cropped(given[rows], generator), settings.net.patch))
        return F.cross_entropy(head(tokens[:, 0]), labels[rows])

    _descend(learned, train, loss)


def _descend(parameters: Iterable[Tensor], train: TrainSettings, loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.AdamW(parameters, train.lr, betas=(0.9, 0.95), weight_decay=train.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, train.steps)
    for step in range(1, train.steps + 1):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
        track(step, loss=value.detach())


def _cls(encoder: Encoder, images: Tensor, settings: Settings) -> Tensor:
    """The CLS token of whole images, ``[n, width]``."""
    with torch.no_grad():
        return torch.cat([encoder(to_patches(some, settings.net.patch))[:, 0] for some in images.split(BATCH)])


def _logits(encoder: Encoder, head: nn.Module, images: Images, settings: Settings) -> Tensor:
    return head(_cls(encoder, images.test[0], settings))


def _percent(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).double().mean())


def _pictures(patches: Tensor, predicted: Tensor, kept: Tensor, model: MaskedAutoencoder) -> str:
    """Three rows of a few test images, as a PNG in base64: original, masked, and with its masked patches reconstructed."""
    from matplotlib.image import imsave

    chosen = torch.arange(SHOWN) * (len(patches) // SHOWN)
    patches, predicted, kept = patches[chosen], predicted[chosen], kept[chosen]
    seen = torch.zeros(patches.shape[:2]).scatter_(1, kept, 1.0)[..., None]
    rows = [patches, seen * patches + (1 - seen) * 0.5, seen * patches + (1 - seen) * predicted]
    pictures = torch.cat([F.pad(to_images(row, model.patch, model.shape), [1] * 4, value=1.0) for row in rows])
    height, width = pictures.shape[2:]
    grid = pictures.expand(-1, 3, -1, -1).view(len(rows), SHOWN, 3, height, width).permute(0, 3, 1, 4, 2)
    file = io.BytesIO()
    imsave(file, grid.reshape(len(rows) * height, SHOWN * width, 3).clamp(0, 1).numpy(), format="png")
    return base64.b64encode(file.getvalue()).decode()
