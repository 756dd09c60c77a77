"""A masked autoencoder: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377, section 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .settings import NetSettings

DEVIATION = 0.02
"""Standard deviation of the initial CLS token, mask token and positions."""


def to_patches(images: Tensor, size: int) -> Tensor:
    """Cut ``[B, C, H, W]`` into patches ``[B, N, C * size * size]``, row by row, ``N = (H / size) * (W / size)``."""
    return F.unfold(images, size, stride=size).transpose(1, 2)


def to_images(patches: Tensor, size: int, shape: tuple[int, int, int]) -> Tensor:
    """Put patches ``[B, N, C * size * size]`` together to images ``[B, *shape]``: the inverse of :func:`to_patches`."""
    return F.fold(patches.transpose(1, 2), shape[1:], size, stride=size)


def draw_kept(batch: int, patches: int, share: float, generator: torch.Generator) -> Tensor:
    """Draw the patches of each image that the encoder sees, each subset with the same probability.

    "Random sampling ... without replacement, following a uniform distribution" (section 3, "Masking"), by sorting noise as in
    "Simple implementation".

    Args:
        batch, patches: numbers ``B`` and ``N``.
        share: of the patches that are masked; ``N - floor(share * N)`` are kept, at least one.

    Returns:
        int64 ``[B, kept]``, indices in ``0..N - 1``, different within an image.

    Raises:
        ValueError: ``share`` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be at least 0 and less than 1, got {share}")
    return torch.rand(batch, patches, generator=generator).argsort(1)[:, : patches - int(share * patches)]


def masked_error(predicted: Tensor, patches: Tensor, kept: Tensor) -> Tensor:
    """Mean squared error in pixels of the masked patches only (section 3, "Reconstruction target").

    ``sum_{b, n masked} mean_d (predicted - patches)^2 / number of masked patches``; 0-dimensional.

    Args:
        predicted, patches: ``[B, N, D]``.
        kept: int64 ``[B, kept]``, the patches that are not masked.
    """
    masked = torch.ones(patches.shape[:2], dtype=torch.bool).scatter_(1, kept, False)
    return (predicted - patches).square().mean(2)[masked].mean()


class Block(nn.Module):
    """A transformer block, ``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with GELU; ``[B, n, width]``.

    Queries, keys and values come from one Linear, ``qkv``: :func:`metamask_ext.convert` masks it, as it does not
    ``torch.nn.MultiheadAttention.in_proj_weight``.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.first(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts.unbind())
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Encoder(nn.Module):
    """Patches ``[B, N, D]``, or those of them that are kept, to tokens ``[B, 1 + kept, width]``; the first is CLS."""

    def __init__(self, patches: int, size: int, net: NetSettings):
        super().__init__()
        self.embed = nn.Linear(size, net.width)
        self.cls = nn.Parameter(DEVIATION * torch.randn(net.width))
        self.positions = nn.Parameter(DEVIATION * torch.randn(1 + patches, net.width))
        self.blocks = nn.Sequential(*(Block(net.width, net.heads) for _ in range(net.depth)))
        self.norm = nn.LayerNorm(net.width)

    def forward(self, patches: Tensor, kept: Tensor | None = None) -> Tensor:
        tokens = self.embed(patches) + self.positions[1:]
        if kept is not None:
            tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
        first = (self.cls + self.positions[0]).expand(len(tokens), 1, -1)
        return self.norm(self.blocks(torch.cat([first, tokens], 1)))


class Decoder(nn.Module):
    """The encoder's tokens ``[B, 1 + kept, width]`` to all patches ``[B, N, D]``: a mask token stands where none was seen."""

    def __init__(self, patches: int, size: int, net: NetSettings):
        super().__init__()
        width = net.decoder_width
        self.embed = nn.Linear(net.width, width)
        self.mask = nn.Parameter(DEVIATION * torch.randn(width))
        self.positions = nn.Parameter(DEVIATION * torch.randn(1 + patches, width))
        self.blocks = nn.Sequential(*(Block(width, net.heads) for _ in range(net.decoder_depth)))
        self.norm, self.pixels = nn.LayerNorm(width), nn.Linear(width, size)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        tokens = self.embed(tokens)
        places = kept[..., None].expand(-1, -1, tokens.shape[2])
        whole = self.mask.expand(len(tokens), len(self.positions) - 1, -1).scatter(1, places, tokens[:, 1:])
        decoded = self.norm(self.blocks(torch.cat([tokens[:, :1], whole], 1) + self.positions))
        return self.pixels(decoded[:, 1:])


class MaskedAutoencoder(nn.Module):
    """Reconstructs all patches of images from those that are kept.

    Args:
        shape: channels, height and width of the images.
        net: sizes of the parts.
    """

    def __init__(self, shape: tuple[int, int, int], net: NetSettings):
        super().__init__()
        channels, height, width = shape
        if height % net.patch or width % net.patch:
            raise ValueError(f"images must be of whole patches of {net.patch} pixels, got {height} x {width}")
        self.patch, self.shape = net.patch, shape
        count, size = (height // net.patch) * (width // net.patch), channels * net.patch**2
        self.encoder, self.decoder = Encoder(count, size, net), Decoder(count, size, net)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # as in the paper (appendix A.1)
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, patches: Tensor, kept: Tensor) -> Tensor:
        return self.decoder(self.encoder(patches, kept), kept)
