"""The images of ``mae``: digits, and crops of photographs; cropped and flipped anew for each batch, as the source does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...engine import data, photographs

MARGIN = 2
"""Training images are this much larger on each side than what a batch gets of them."""
CROPS = 32
TRAIN_CROPS, TEST_CROPS = 4000, 1000


@dataclass(frozen=True)
class Images:
    """Images with labels, less the mean and over the standard deviation of all training pixels, as they are, of the data set.

    Attributes:
        train: ``[n, C, H + 2 * MARGIN, W + 2 * MARGIN]`` and ``[n]``.
        test: ``[n, C, H, W]`` and ``[n]``.
        flips: whether an image turned left to right is still of its class.
        mean, std: of the pixels in [0, 1].
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    flips: bool
    mean: float
    std: float

    @classmethod
    def of(cls, name: str, task: str = "") -> Images:
        """``digits`` or ``crops``, as a task shows them: ``turned`` by 90 degrees, ``inverted`` (black on white), or as they
        are."""
        if name == "crops":
            size = CROPS + 2 * MARGIN
            train, test = photographs.crops(size, TRAIN_CROPS, TEST_CROPS)
            middle = slice(MARGIN, MARGIN + CROPS)
            test = test[0][:, :, middle, middle], test[1]
        else:
            found = data.digits()
            show = {"": lambda x: x, "turned": lambda x: x.rot90(1, (2, 3)), "inverted": lambda x: 1 - x}[task]
            train = show(F.pad(found.train[0], [MARGIN] * 4)), found.train[1]
            test = show(found.test[0]), found.test[1]
        pixels = train[0] if name == "crops" else data.digits().train[0]
        mean, std = float(pixels.mean()), float(pixels.std())
        (x, y), (x_test, y_test) = train, test
        return cls(((x - mean) / std, y), ((x_test - mean) / std, y_test), name == "crops", mean, std)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what a net gets."""
        channels, height, width = self.test[0].shape[1:]
        return channels, height, width

    def labelled(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw training images with their labels, as many of each class; all of them if ``count`` is no less."""
        images, labels = self.train
        if count >= len(labels):
            return images, labels
        order = torch.randperm(len(labels), generator=generator)
        each = count // 10
        chosen = torch.cat([order[labels[order] == label][:each] for label in range(10)])
        return images[chosen], labels[chosen]

    def cropped(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Crop training images ``[B, C, H + 2 * MARGIN, ...]`` at random places, and flip half of them where that may be."""
        channels, height, width = self.shape
        count = len(images)
        top, left = torch.randint(2 * MARGIN + 1, (2, count, 1), generator=generator)
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        if self.flips:
            turned = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(turned, columns.flip(1), columns)
        each = torch.arange(count)[:, None, None, None]
        return images[each, torch.arange(channels)[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]
