"""Shapes that several families compute: of packed masks, and of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


MOST_ELEMENTS = 2**48
"""The most elements of an argument or a result, an empty one too: its strides, bytes and rows then fit 64 bits."""
MOST_TASKS = 2**24
MOST_STEP = 2**31 - 1
"""The most that a convolution's kernel, stride, padding and dilation may be."""


def _too_many(sizes: Sequence[int]) -> bool:
    """More than 2**48 elements, a size of 0 counted as 1. Sizes that are symbols (torch.compile) are not looked at."""
    if torch.compiler.is_compiling() or not all(type(size) is int for size in sizes):
        return False
    return prod(max(size, 1) for size in sizes) > MOST_ELEMENTS


def check_sizes(name: str, sizes: Sequence[int]) -> None:
    if _too_many(sizes):
        raise ValueError(f"{name} must have at most 2**48 elements, with 1 for each size of 0, got {list(sizes)}")


def check_rows(input: Sequence[int], out: int) -> None:
    """Refuse the sizes of an input ``[..., in]``, or of its output with a weight of ``out`` rows, that are too large."""
    check_sizes("input", input)
    if _too_many((*input[:-1], out)):
        raise ValueError(
            f"the output must have at most 2**48 elements, with 1 for each size of 0, got input {list(input)} with out = {out}"
        )


def check_tasks(name: str, tasks: int) -> None:
    if tasks > MOST_TASKS:
        raise ValueError(f"{name} must hold at most 2**24 tasks, got {tasks}")


def packed_bytes(bits: int) -> int:
    """The bytes that a row of ``bits`` takes."""
    return (bits + 7) // 8


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the packed form of a mask: a vector is one row, of anything else the first dimension are rows."""
    return (packed_bytes(shape[0]),) if len(shape) == 1 else (shape[0], packed_bytes(prod(shape[1:])))


def pair(name: str, value: int | Pair, least: int) -> Pair:
    """``value`` as two integers; ValueError if they are not, below ``least`` or above 2**31 - 1."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or min(both) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, or two, got {value!r}")
    check_most(name, value)
    return both


def check_most(name: str, value: str | int | Pair) -> None:
    """Refuse a stride, padding or dilation above 2**31 - 1, with which torch's sizes overflow (its unfold gives garbage)."""
    if not isinstance(value, str) and max((value,) if isinstance(value, int) else value, default=0) > MOST_STEP:
        raise ValueError(f"{name} must be at most {MOST_STEP}, got {value!r}")


def check_steps(stride: int | Pair, padding: str | int | Pair, dilation: int | Pair) -> None:
    """:func:`check_most` of the arguments of torch's convolution."""
    check_most("stride", stride)
    check_most("padding", padding)
    check_most("dilation", dilation)


def check_windows(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int]:
    """``[N, places, values]`` of a convolution's patches over images of ``size`` ``[N, C, H, W]``.

    Raises:
        ValueError: an argument is out of range, the images are smaller than the kernel, or a size is too large.
    """
    for name, values, least in (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or min(values) < least:
            raise ValueError(f"{name} must be two integers of at least {least}, got {list(values)}")
        if max(values) > MOST_STEP:
            raise ValueError(f"{name} must be at most {MOST_STEP}, got {list(values)}")
    check_sizes("images", size)
    height, width = output_size(size, kernel, (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))
    if height < 1 or width < 1:
        raise ValueError(
            f"input must not be smaller than the kernel {list(kernel)} with dilation {list(dilation)}, got {list(size)}"
        )
    check_sizes("the rows of all places", (size[0], height, width, size[1], *kernel))
    return size[0], height * width, size[1] * kernel[0] * kernel[1]


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
            f"input must not be smaller than the kernel {list(kernel)} with dilation {list(dilations)}, got {list(images.shape)}"
        )
    return padded, geometry, size


def im2col(images: Tensor, kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The patches that a convolution multiplies: ``[N, H' * W', C * kH * kW]``, a row for each place of ``[N, C, H, W]``."""
    return F.unfold(images, tuple(kernel), dilation, padding, stride).transpose(1, 2)
