"""Crops of photographs, labelled by the photograph they are of: a stand-in for CIFAR where nothing is downloaded.

They test textures, not objects. Ten photographs that come with scikit-image; train and test are crops of disjoint halves of each.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("astronaut", "brick", "chelsea", "coffee", "grass", "hubble_deep_field", "ihc", "motorcycle", "retina", "rocket")
HEIGHT = 256
"""Photographs are scaled to this height before crops are taken."""
SOURCE = "crops of ten photographs (scikit-image), labelled by their photograph: textures, not objects"

Samples = tuple[Tensor, Tensor]


@cache
def crops(size: int, train: int, test: int) -> tuple[Samples, Samples]:
    """Draw crops, always the same ones: as many of each photograph, ``train`` of the left halves and ``test`` of the right ones.

    Returns:
        Two pairs of images, float32 ``[n, 3, size, size]`` in [0, 1], and labels, int64 ``[n]``, indices into ``NAMES``.

    Raises:
        ImportError: scikit-image is not installed.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[list[Tensor]] = [[], []]
    for photograph in _photographs():
        middle = photograph.shape[2] // 2
        halves = photograph[:, :, :middle], photograph[:, :, middle:]
        for place, (half, count) in enumerate(zip(halves, (train // len(NAMES), test // len(NAMES)))):
            corners = [torch.randint(length - size + 1, (count,), generator=generator).tolist() for length in half.shape[1:]]
            found[place] += [half[:, top : top + size, left : left + size] for top, left in zip(*corners)]
    pairs = [(torch.stack(some), torch.arange(len(NAMES)).repeat_interleave(len(some) // len(NAMES))) for some in found]
    return pairs[0], pairs[1]


def check_installed() -> None:
    """Raise ImportError, which says what to install, if scikit-image is missing: before the work, not in it."""
    try:
        import skimage  # noqa: F401
    except ImportError as error:
        raise ImportError('scikit-image is not installed: pip install "metamask_ext[experiments]"') from error


def _photographs() -> list[Tensor]:
    """The photographs, ``[3, HEIGHT, width]`` in [0, 1]."""
    check_installed()
    from skimage import data

    loaded = {
        "astronaut": data.astronaut,
        "brick": data.brick,
        "chelsea": data.chelsea,
        "coffee": data.coffee,
        "grass": data.grass,
        "hubble_deep_field": data.hubble_deep_field,
        "ihc": data.immunohistochemistry,
        "motorcycle": lambda: data.stereo_motorcycle()[0],
        "retina": data.retina,
        "rocket": data.rocket,
    }
    found = []
    for name in NAMES:
        pixels = torch.from_numpy(loaded[name]().copy()).float() / 255
        image = pixels.expand(3, -1, -1) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        width = round(HEIGHT * image.shape[2] / image.shape[1])
        found.append(F.interpolate(image[None], (HEIGHT, width), mode="area")[0])
    return found
