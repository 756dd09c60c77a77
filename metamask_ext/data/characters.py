"""Characters of many alphabets for few-shot classification: Omniglot, or glyphs of a font."""

from __future__ import annotations

import io
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cached import download_whole, read_original
from ._download import try_download
from ._torchvision import import_torchvision
from .digits import default_root, shown_path

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font
    from torchvision.datasets import Omniglot

ARCHIVES = "images_background", "images_evaluation"
"""The names of Omniglot's archives."""
SIZE = 28
DRAWINGS = 20
TRAIN_CHARACTERS = 1200
"""Of Omniglot's 1,623, as in arXiv:1703.03400, section 5.2."""
TRAIN_SHARE = 0.75
"""Of the glyphs."""
ALIKE = 0.85
"""Two glyphs whose blurred bitmaps correlate by more count as one."""


@dataclass(frozen=True)
class Characters:
    """Drawings of characters, ``[characters, 20, 28, 28]`` uint8, ink 255.

    A character turned by 90, 180 or 270 degrees is another class: :func:`metamask_ext.data.few_shot_tasks` does that.

    Attributes:
        train, test: the drawings.
        source: their origin, in words.
        note: the reason why they are not Omniglot's; empty if they are.
    """

    train: Tensor
    test: Tensor
    source: str
    note: str = ""


def load_characters(root: str | Path | None = None, download: bool = True) -> Characters:
    """Load Omniglot if it is in ``root`` or one try to download it works; else :func:`glyphs`.

    Source: Lake, Salakhutdinov and Tenenbaum, Human-level concept learning through probabilistic program induction, Science 350
    (2015): 1,623 characters of 50 alphabets, 20 drawings each. 1,200 of them, always the same, are for training.

    Args:
        root: torchvision's root, with the archives of ``omniglot-py`` in it, which are used only if they are the originals, by
            their MD5 sums; None: ``METAMASK_DATA``, or ``~/.cache/metamask_ext``.
        download: whether to try; without an answer in a few seconds there is none.

    Raises:
        ImportError: the files are there and torchvision is not, or matplotlib is not; says what to install.
        OutputError: an archive is there and is damaged, or not Omniglot's: delete it, and it is downloaded again.
    """
    root = default_root() if root is None else Path(root)
    folder = root / "omniglot-py"
    there = _has_archives(folder)
    reason = f"no Omniglot in {shown_path(root)!r}"
    if not there and not download:
        return glyphs(note=f"{reason}, download off")
    try:
        omniglot = import_torchvision().datasets.Omniglot
    except ImportError as error:
        if there:
            raise ImportError(f"{str(root)!r} has Omniglot, and to read it: {error}") from error
        return glyphs(note=f"{reason}, torchvision is not installed")
    if not there and (failure := _download(omniglot, folder)) is not None and not _has_archives(folder):
        return glyphs(note=f"{reason}, download failed: {failure}")
    drawn = torch.cat([_drawings(folder / f"{name}.zip", omniglot.zips_md5[name]) for name in ARCHIVES])
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0))
    train = TRAIN_CHARACTERS * len(drawn) // 1623
    return Characters(drawn[order[:train]], drawn[order[train:]], "Omniglot (torchvision)")


def _has_archives(folder: Path) -> bool:
    return all((folder / f"{name}.zip").exists() for name in ARCHIVES)


def _download(omniglot: type[Omniglot], folder: Path) -> str | None:
    """Try torchvision's source, once; return the reason why it failed, or None."""
    from torchvision.datasets.utils import download_url

    def download(made: Path) -> None:
        for name in ARCHIVES:
            download_url(f"{omniglot.download_url_prefix}/{name}.zip", str(made), f"{name}.zip", omniglot.zips_md5[name])

    files = {f"{name}.zip": omniglot.zips_md5[name] for name in ARCHIVES}
    url = f"{omniglot.download_url_prefix}/{ARCHIVES[0]}.zip"
    return try_download(url, lambda: download_whole(folder, download, files, "Omniglot"))


def _drawings(archive: Path, md5: str) -> Tensor:
    """Scale the images of an archive, 105 x 105, ink 0, to ``[characters, drawings, 28, 28]``, ink 255.

    The archive itself is read: what was extracted of it has no checksum. Alphabets and characters are in alphabetical order.
    """
    import numpy
    from PIL import Image

    found: dict[str, list[Tensor]] = {}
    with zipfile.ZipFile(io.BytesIO(read_original(archive, md5, "Omniglot"))) as opened:
        for name in sorted(opened.namelist()):
            if name.endswith(".png"):
                pixels = 255 - torch.from_numpy(numpy.array(Image.open(io.BytesIO(opened.read(name))).convert("L"))).float()
                small = F.interpolate(pixels[None, None], (SIZE, SIZE), mode="area")
                found.setdefault(name.rpartition("/")[0], []).append(small[0, 0].round().to(torch.uint8))
    return torch.stack([torch.stack(drawings) for drawings in found.values()])


def glyphs(seed: int = 0, note: str = "") -> Characters:
    """Draw letters of DejaVu Sans, the font that comes with matplotlib, each 20 times under random affine distortion.

    All scripts of the font, without letters that Unicode composes of others (accents). Of letters that look alike, as they are or
    turned by a multiple of 90 degrees, only the first stays, and none that looks like itself turned: Latin, Greek and Cyrillic
    share shapes, and syllabics turn them.

    Args:
        seed: of the distortions, and of the split: three quarters of the letters are for training.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import get_data_path
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise ImportError('matplotlib is not installed: pip install "metamask_ext[experiments]"') from error
    font = FT2Font(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")))
    font.set_size(64, 72)
    bitmaps = _distinct(torch.stack([_bitmap(font, code) for code in sorted(font.get_charmap()) if _is_plain_letter(code)]))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(bitmaps), generator=generator)
    drawn = _distorted(bitmaps[order], DRAWINGS, generator)
    train = int(TRAIN_SHARE * len(drawn))
    return Characters(drawn[:train], drawn[train:], f"{len(drawn)} glyphs of DejaVu Sans (matplotlib)", note)


def _is_plain_letter(code: int) -> bool:
    return unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo") and not unicodedata.decomposition(chr(code))


def _bitmap(font: FT2Font, code: int) -> Tensor:
    """Draw a letter: ``[56, 56]`` in [0, 1], the letter in the middle, its longer side 40."""
    font.clear()
    font.set_text(chr(code))
    font.draw_glyphs_to_bitmap()
    ink = torch.from_numpy(font.get_image().copy()).float() / 255
    canvas = torch.zeros(2 * SIZE, 2 * SIZE)
    rows, columns = ink.amax(1).nonzero().flatten(), ink.amax(0).nonzero().flatten()
    if len(rows) == 0:
        return canvas
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(2, round(40 * side / max(ink.shape))) for side in ink.shape)
    scaled = F.interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
    top, left = SIZE - height // 2, SIZE - width // 2
    canvas[top : top + height, left : left + width] = scaled
    return canvas


def _distinct(bitmaps: Tensor) -> Tensor:
    """Keep the bitmaps that look like none before them, nor like themselves, turned by any multiple of 90 degrees."""
    blurred = F.avg_pool2d(bitmaps[:, None], 8, 4, 2)  # a grid that turns onto itself
    turned = torch.stack([torch.rot90(blurred, turns, (2, 3)).flatten(1) for turns in range(4)])
    turned = F.normalize(turned - turned.mean(2, keepdim=True), dim=2)
    kept: list[int] = []
    for number in range(len(bitmaps)):
        own = turned[0, number]
        if own.norm() == 0 or bool((turned[1:, number] @ own > ALIKE).any()):
            continue
        if not kept or float((turned[:, kept] @ own).max()) <= ALIKE:
            kept.append(number)
    return bitmaps[kept]


def _distorted(bitmaps: Tensor, drawings: int, generator: torch.Generator) -> Tensor:
    """Draw each bitmap several times, ``[n, drawings, 28, 28]`` uint8: turned by up to 15 degrees, sheared, stretched, moved."""

    def uniform(bound: float) -> Tensor:
        return bound * (2 * torch.rand(len(bitmaps) * drawings, generator=generator) - 1)

    angle, shear = uniform(torch.pi / 12), uniform(0.2)
    wide, high = (1 + uniform(0.2) for _ in range(2))
    cos, sin = angle.cos(), angle.sin()
    # Each row maps an output pixel to where it comes from.
    rows = torch.stack(
        [torch.stack([cos * wide, (shear * cos - sin) * high, uniform(0.1)], 1)]
        + [torch.stack([sin * wide, (shear * sin + cos) * high, uniform(0.1)], 1)],
        1,
    )
    images = bitmaps.repeat_interleave(drawings, 0)[:, None]
    drawn = F.avg_pool2d(
        F.grid_sample(images, F.affine_grid(rows, list(images.shape), align_corners=False), align_corners=False), 2
    )
    return (255 * drawn).round().to(torch.uint8).view(len(bitmaps), drawings, SIZE, SIZE)
