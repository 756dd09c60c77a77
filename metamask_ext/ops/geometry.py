"""Shapes that several families compute: of packed masks, and of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def packed_bytes(bits: int) -> int:
    """The bytes that a row of ``bits`` takes."""
    return (bits + 7) // 8


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the packed form of a mask: a vector is one row, of anything else the first dimension are rows."""
    return (packed_bytes(shape[0]),) if len(shape) == 1 else (shape[0], packed_bytes(prod(shape[1:])))


def pair(name: str, value: int | Pair, least: int) -> Pair:
    """``value`` as two integers; ValueError if they are not, or below ``least``."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or min(both) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, or two, got {value!r}")
    return both


class Geometry(NamedTuple):
    """The steps of a convolution over an image: stride, zero padding and dilation, rows first."""

    stride: Pair
    padding: Pair
    dilation: Pair


def output_size(size: Sequence[int], kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> list[int]:
    """``[H', W']``, the size of a convolution's output, from the input's ``[N, C, H, W]``."""
    return [
        (length + 2 * pad - step * (width - 1) - 1) // by + 1
        for length, pad, step, width, by in zip(size[2:], padding, dilation, kernel, stride)
    ]


def resolve_geometry(
    images: Tensor, kernel: Sequence[int], stride: int | Pair, padding: str | int | Pair, dilation: int | Pair
) -> tuple[Tensor, Geometry, list[int]]:
    """The images and the geometry of a convolution as ``conv2d``'s arguments describe it, and its output's ``[H', W']``.

    Padding that is not the same on both sides (``"same"`` with an even kernel: the larger half comes last) is in the images.

    Raises:
        ValueError: an argument is no integer or pair of them, ``padding`` is no padding, or the output is empty.
    """
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    padded, margins = images, (0, 0)
    if padding == "same":
        if strides != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got {strides}")
        height, width = (step * (size - 1) for step, size in zip(dilations, kernel))
        margins = height // 2, width // 2
        if height % 2 or width % 2:
            padded = F.pad(images, (0, width % 2, 0, height % 2))
    elif isinstance(padding, str):
        if padding != "valid":
            raise ValueError(f"padding must be 'valid', 'same', an integer or two, got {padding!r}")
    else:
        margins = pair("padding", padding, 0)
    geometry = Geometry(strides, margins, dilations)
    size = output_size(padded.shape, kernel, *geometry)
    if min(size) < 1:
        raise ValueError(
            f"input must be at least as large as the kernel {list(kernel)} with its dilation {dilations}, got {list(images.shape)}"
        )
    return padded, geometry, size


def im2col(images: Tensor, kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The patches that a convolution multiplies: ``[N, H' * W', C * kH * kW]``, a row for each place of ``[N, C, H, W]``."""
    return F.unfold(images, tuple(kernel), dilation, padding, stride).transpose(1, 2)
