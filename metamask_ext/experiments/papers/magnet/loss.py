"""The magnet loss and the clusters that its batches are drawn from: Rippel et al., arXiv:1511.05939, sections 3.1 and 3.2."""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import LossSettings

LEAST_VARIANCE = 1e-6
"""Keeps the loss finite where every cluster of a batch is a point."""
KEPT = 0.9
"""Share of a cluster's running loss that stays when a new one comes."""


def magnet_loss(embeddings: Tensor, classes: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The stochastic magnet objective on a batch of ``M`` clusters of ``D`` samples (equation 8 of the paper).

    ``mean_{m, d} {-log(exp(-|r_md - mu_m|^2 / (2 s) - alpha) / sum_{m': c(m') != c(m)} exp(-|r_md - mu_m'|^2 / (2 s)))}_+`` with
    ``mu_m = mean_d r_md`` and ``s = sum_{m, d} |r_md - mu_m|^2 / (M D - 1)``, the variance of all samples from the means of their
    clusters. The exponent has ``2 s``: ``s`` is a square already.

    Args:
        embeddings: floating point ``[M, D, E]``.
        classes: int64 ``[M]``, of at least two values; labels are all that the loss sees beside the embeddings.
        alpha: the margin between a cluster and those of other classes.

    Returns:
        The loss, 0-dimensional, and the mean loss of each cluster, ``[M]``, without gradient.

    Raises:
        ValueError: a shape is another, or some cluster has no other class beside it.
    """
    if embeddings.dim() != 3 or classes.shape != embeddings.shape[:1] or embeddings.shape[0] * embeddings.shape[1] < 2:
        got = f"{list(embeddings.shape)} and {list(classes.shape)}"
        raise ValueError(f"embeddings must be [M, D, E] with at least two samples, and classes [M], got {got}")
    other = classes[:, None] != classes
    if not bool(other.any(1).all()):
        raise ValueError(f"classes must be of at least two values, got {classes.tolist()}")
    means = embeddings.mean(1)
    distances = (embeddings[:, :, None] - means).square().sum(3)  # [M, D, M]
    own = distances.diagonal(dim1=0, dim2=2).T  # [M, D]
    variance = (own.sum() / (own.numel() - 1)).clamp_min(LEAST_VARIANCE)
    scaled = -distances / (2 * variance)
    impostors = scaled.masked_fill(~other[:, None], -torch.inf).logsumexp(2)
    losses = (own / (2 * variance) + alpha + impostors).clamp_min(0)
    return losses.mean(), losses.detach().mean(1)


class Clusters:
    """The clusters of each class by k-means++ (scikit-learn's KMeans), refreshed now and then, and batches drawn from them.

    Args:
        classes: of all samples, int64 ``[n]``.
        settings: of the loss.
        generator: of the batches.

    Attributes:
        means: ``[clusters, E]``; ``of_class``: the class of each, ``[clusters]``.
    """

    def __init__(self, classes: Tensor, settings: LossSettings, generator: torch.Generator):
        self.classes, self.settings, self.generator = classes, settings, generator
        self.means, self.of_class = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        self._members: list[Tensor] = []
        self._losses = torch.zeros(0)

    def refresh(self, embeddings: Tensor) -> None:
        """Cluster the samples of each class anew, by their embeddings ``[n, E]``."""
        from sklearn.cluster import KMeans

        means: list[Tensor] = []
        of_class: list[int] = []
        self._members = []
        for label in self.classes.unique().tolist():
            rows = (self.classes == label).nonzero()[:, 0]
            seed = int(torch.randint(2**31 - 1, (), generator=self.generator))
            found = KMeans(min(self.settings.k, len(rows)), n_init=1, random_state=seed).fit(embeddings[rows].numpy())
            assigned = torch.from_numpy(found.labels_)
            for cluster in range(len(found.cluster_centers_)):
                members = rows[assigned == cluster]
                if len(members):  # fewer distinct points than clusters leave some empty
                    self._members.append(members)
                    means.append(embeddings[members].mean(0))
                    of_class.append(label)
        self.means, self.of_class = torch.stack(means), torch.tensor(of_class)
        self._losses = torch.ones(len(means))

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw a batch: clusters ``[M]``, and rows of their samples ``[M, D]``, with replacement.

        The seed is drawn in proportion to the clusters' running losses; the others are the nearest clusters of other classes
        (section 3.2).
        """
        weights = self._losses + 1e-6
        seed = int(torch.multinomial(weights, 1, generator=self.generator))
        distance = (self.means - self.means[seed]).square().sum(1)
        distance[self.of_class == self.of_class[seed]] = torch.inf
        others = min(self.settings.m - 1, int(distance.isfinite().sum()))
        chosen = torch.cat([torch.tensor([seed]), distance.topk(others, largest=False).indices])
        members = [self._members[cluster] for cluster in chosen.tolist()]
        places = [torch.randint(len(rows), (self.settings.d,), generator=self.generator) for rows in members]
        return chosen, torch.stack([rows[place] for rows, place in zip(members, places)])

    def note(self, chosen: Tensor, losses: Tensor) -> None:
        """Take the losses ``[M]`` of the clusters of a batch into their running losses."""
        self._losses[chosen] = KEPT * self._losses[chosen] + (1 - KEPT) * losses

    def classify(self, embeddings: Tensor) -> Tensor:
        """The class of the nearest cluster of each embedding ``[n, E]``."""
        return self.of_class[torch.cdist(embeddings, self.means).argmin(1)]
