"""Trains the methods of ``magnet``; each function is a job."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.data import RotatedImages

from ...engine.data import digits
from ...engine.jobs import Json
from ...engine.training import descend, seeded
from .loss import Clusters, magnet_loss
from .settings import LossSettings, Settings

SHOWN = 400
"""Test digits of the figure."""


def network(settings: Settings) -> nn.Sequential:
    """Two 3x3 convolutions with pooling and a linear layer, ``[n, 1, 14, 14]`` to embeddings ``[n, embedding]``."""
    first, second = settings.filters, 2 * settings.filters
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(9 * second, settings.embedding),
    )  # fmt: skip


def even_odd(name: str, seed: int, settings: Settings) -> Json:
    """Learn an embedding from the labels even and odd; the error on these, the accuracy of the digit by its nearest neighbours, and
    the accuracy of both with the embedding before training."""
    (images, labels), (test, test_labels) = digits().train, digits().test
    x, x_test = (F.avg_pool2d(part, 2) for part in (images, test))
    model = seeded(seed, partial(network, settings))
    classify = {"magnet": _magnet, "softmax": _softmax, "triplet": _triplet}[name](model, x, labels % 2, seed, settings)
    known, found = _embedded(model, x), _embedded(model, x_test)
    return {
        "error": 100 - _percent(classify(known, found), test_labels % 2),
        "digit": _percent(_nearest(known, labels, found, settings.neighbours), test_labels),
        "picture": _plane(found[:SHOWN]).tolist(),
        "labels": test_labels[:SHOWN].tolist(),
    }


Classify = Callable[[Tensor, Tensor], Tensor]
"""Even or odd for test embeddings, given those of the training digits."""


def _magnet(model: nn.Module, x: Tensor, classes: Tensor, seed: int, settings: Settings) -> Classify:
    clusters = Clusters(classes, settings.loss, torch.Generator().manual_seed(seed))
    _learn_clusters(model, x, clusters, settings.steps, settings.lr, settings.loss)
    clusters.refresh(_embedded(model, x))
    return lambda known, found: clusters.classify(found)


def _learn_clusters(model: nn.Module, x: Tensor, clusters: Clusters, steps: int, lr: float, own: LossSettings) -> None:
    """Minimise the magnet loss; the clusters follow the embedding now and then."""
    done = 0

    def loss() -> Tensor:
        nonlocal done
        if done % own.refresh == 0:
            clusters.refresh(_embedded(model, x))
        done += 1
        chosen, rows = clusters.draw()
        embeddings = model(x[rows.flatten()]).unflatten(0, rows.shape)
        value, losses = magnet_loss(embeddings, clusters.of_class[chosen], own.alpha)
        clusters.note(chosen, losses)
        return value

    descend(model.parameters(), lr, steps, loss, "magnet loss")


def _softmax(model: nn.Module, x: Tensor, classes: Tensor, seed: int, settings: Settings) -> Classify:
    head = seeded(seed, partial(nn.Linear, settings.embedding, 2))
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        rows = torch.randint(len(x), (settings.loss.m * settings.loss.d,), generator=generator)
        return F.cross_entropy(head(model(x[rows])), classes[rows])

    descend([*model.parameters(), *head.parameters()], settings.lr, settings.steps, loss, "cross-entropy")
    return lambda known, found: head(found).argmax(1)


def _triplet(model: nn.Module, x: Tensor, classes: Tensor, seed: int, settings: Settings) -> Classify:
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import TripletMarginMiner

    miner, function = TripletMarginMiner(margin=0.2, type_of_triplets="semihard"), TripletMarginLoss(margin=0.2)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        rows = torch.randint(len(x), (settings.loss.m * settings.loss.d,), generator=generator)
        embeddings = model(x[rows])
        return function(embeddings, classes[rows], miner(embeddings, classes[rows]))

    descend(model.parameters(), settings.lr, settings.steps, loss, "triplet loss")

    def classify(known: Tensor, found: Tensor) -> Tensor:
        # The loss compares directions only.
        return _nearest(F.normalize(known), classes, F.normalize(found), settings.neighbours)

    return classify


def rotations(seed: int, settings: Settings) -> Json:
    """Ours: clusters of tasks. Learn them from digits of named rotations; how many test images are given their rotation, each from
    itself alone."""
    shown = RotatedImages(settings.tasks, 360 / settings.tasks)
    generator = torch.Generator().manual_seed(seed)
    (images, _), (test, _) = digits().train, digits().test
    order = torch.randperm(len(images), generator=generator)[: settings.task_samples]
    tasks = torch.arange(settings.tasks).repeat_interleave(len(order))
    x = F.avg_pool2d(shown(images[order].repeat(settings.tasks, 1, 1, 1), tasks), 2)
    model = seeded(seed, partial(network, settings))
    clusters = Clusters(tasks, settings.task_loss, generator)
    _learn_clusters(model, x, clusters, settings.task_steps, settings.lr, settings.task_loss)
    clusters.refresh(_embedded(model, x))
    wanted = torch.arange(len(test)) % settings.tasks
    found = clusters.classify(_embedded(model, F.avg_pool2d(shown(test, wanted), 2)))
    off = (found - wanted).remainder(settings.tasks)
    off = torch.minimum(off, settings.tasks - off)
    return {"right": _percent(found, wanted), "neighbours": 100 * float((off <= 1).double().mean())}


def _nearest(known: Tensor, labels: Tensor, found: Tensor, neighbours: int) -> Tensor:
    """The most frequent label among the nearest known embeddings."""
    return labels[torch.cdist(found, known).topk(neighbours, largest=False).indices].mode(1).values


def _embedded(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(some) for some in x.split(1000)])


def _plane(embeddings: Tensor) -> Tensor:
    """The two directions of largest variance, ``[n, 2]``."""
    centred = embeddings - embeddings.mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T


def _percent(found: Tensor, wanted: Tensor) -> float:
    return 100 * float((found == wanted).double().mean())
