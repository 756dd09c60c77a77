"""mae: patches and masking by hand, crops, attention under masks, and the quick run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.experiments import check_claims, check_resumes, check_written, quick_run
from torch import nn

import metamask_ext
from metamask_ext.experiments.catalogue import OptionError, run
from metamask_ext.experiments.engine import photographs
from metamask_ext.experiments.papers.mae.autoencoder import (
    Block,
    MaskedAutoencoder,
    draw_kept,
    masked_error,
    to_images,
    to_patches,
)
from metamask_ext.experiments.papers.mae.images import MARGIN, Images
from metamask_ext.experiments.papers.mae.settings import NetSettings
from metamask_ext.nn import MaskedLinear

# The quick run is made once, so by one worker.
pytestmark = pytest.mark.xdist_group("mae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mae")


@pytest.fixture(scope="module")
def metrics(folder):
    return quick_run("mae", folder)


def test_patches_by_hand():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    patches = to_patches(image, 2)
    assert patches.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    colours = torch.randn(3, 3, 8, 12)
    assert torch.equal(to_images(to_patches(colours, 4), 4, (3, 8, 12)), colours)


def test_kept_patches():
    """A quarter of each image's, all different, each as often as any other."""
    kept = draw_kept(2000, 16, 0.75, torch.Generator().manual_seed(0))
    assert kept.shape == (2000, 4) and all(len({*row}) == 4 for row in kept.tolist())
    # Of 2,000 images a patch is kept in 500: standard deviation 19
    counts = kept.flatten().bincount(minlength=16)
    assert bool(((counts - 500).abs() < 90).all())
    with pytest.raises(ValueError, match="share must be at least 0 and less than 1, got 1"):
        draw_kept(1, 4, 1, torch.Generator())


def test_masked_error_by_hand():
    """Only patches that were not seen count."""
    patches, predicted = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    predicted[0, 0], predicted[0, 1], predicted[1, 2] = 9, torch.tensor([1.0, 3.0]), 2
    kept = torch.tensor([[0], [1]])
    # The masked: (1 + 9) / 2 and 0 of the first image, 0 and 4 of the second.
    assert float(masked_error(predicted, patches, kept)) == pytest.approx((5 + 0 + 0 + 4) / 4)


def test_what_is_masked_is_not_seen():
    torch.manual_seed(0)
    model = MaskedAutoencoder((1, 8, 8), NetSettings(patch=4, width=8, depth=1, heads=2, decoder_width=8, decoder_depth=1))
    patches, kept = torch.randn(2, 4, 16), torch.tensor([[2], [0]])
    other = torch.randn(2, 4, 16).scatter(
        1, kept[..., None].expand(-1, -1, 16), patches.gather(1, kept[..., None].expand(-1, -1, 16))
    )
    torch.testing.assert_close(model(patches, kept), model(other, kept))
    with pytest.raises(ValueError, match="images must be of whole patches of 4 pixels, got 8 x 9"):
        MaskedAutoencoder((1, 8, 9), NetSettings())


def test_attention_is_torchs_and_is_masked():
    """A block is ``nn.TransformerEncoderLayer`` with the norm first; converted, all four of its matrices have masks."""
    torch.manual_seed(0)
    block = Block(8, 2).double()
    layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, batch_first=True, norm_first=True).double()
    names = {
        "self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "linear1.": "up.", "linear2.": "down.",
        "norm1.": "first.", "norm2.": "second.",
    }  # fmt: skip
    state = block.state_dict()
    layer.load_state_dict({theirs + kind: state[ours + kind] for theirs, ours in names.items() for kind in ("weight", "bias")})
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), layer(x))
    metamask_ext.convert(block, gate="hard", mask_init=0.01)
    assert all(isinstance(layer, MaskedLinear) for layer in (block.qkv, block.out, block.up, block.down))
    torch.testing.assert_close(block(x), layer(x))
    with torch.no_grad():
        block.qkv.mask_logits.fill_(-1)
    assert not torch.allclose(block(x), layer(x))


def test_crops_are_of_disjoint_halves():
    pytest.importorskip("skimage")
    (train, labels), (test, test_labels) = photographs.crops(12, 40, 20)
    assert train.shape == (40, 3, 12, 12) and test.shape == (20, 3, 12, 12) and 0 <= float(train.min()) < float(train.max()) <= 1
    assert labels.bincount().tolist() == [4] * 10 and test_labels.bincount().tolist() == [2] * 10
    assert torch.equal(photographs.crops(12, 40, 20)[0][0], train)


def test_crops_and_flips():
    images = torch.arange(2 * 8 * 8.0).view(2, 1, 8, 8)
    data = Images((images, torch.tensor([0, 1])), (images[:, :, :4, :4], torch.tensor([0, 1])), flips=True, mean=0.0, std=1.0)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(60):
        crop = data.cropped(images, generator)
        for place in range(2):
            flipped = bool(crop[place, 0, 0, 0] > crop[place, 0, 0, 1])
            straight = crop[place, 0].flip(1) if flipped else crop[place, 0]
            top, left = divmod(int(straight[0, 0]) - 64 * place, 8)
            assert torch.equal(straight, images[place, 0, top : top + 4, left : left + 4])
            seen.add((top, left, flipped))
    assert {top for top, _, _ in seen} == set(range(2 * MARGIN + 1)) and {flipped for _, _, flipped in seen} == {False, True}


def test_claims(metrics):
    check_claims(metrics)


def test_written(metrics, folder):
    check_written(folder / "mae", metrics, ["mae.png", "mae-images.png"])


def test_killed_run_continues(metrics, folder: Path):
    """Also where an encoder was deleted: it is trained again, to the same numbers."""
    (folder / "mae" / "seed-0" / "encoder-digits.pt").unlink()
    check_resumes(folder / "mae", metrics, "probe-digits-100.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["cifar"]}, r"'data' must be among digits, crops, got \['cifar'\]"),
        ({"further": ["mirrored"]}, r"'further' must be among turned, inverted, got \['mirrored'\]"),
        ({"labels": [1000, 100]}, r"'labels' must ascend, got \[1000, 100\]"),
    ],
)
def test_refused(tmp_path, changes, message):
    with pytest.raises(OptionError, match=message):
        run("mae", tmp_path / "out", quick=True, **changes)
