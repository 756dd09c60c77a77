"""The raw ops of the family, typed, and their fake kernels: see :mod:`metamask_ext.ops.weight.raw`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metamask_ext._build import BACKEND

from ..checks import check_pixels
from ..geometry import Pair, check_windows

if TYPE_CHECKING:

    def im2col(input: Tensor, kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
        """See :func:`metamask_ext.ops.geometry.im2col`; float32 and float64, on the CPU."""

    def col2im(grad: Tensor, size: Sequence[int], kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
        """The gradient of the images, of ``size`` ``[N, C, H, W]``, from that of their :func:`im2col`."""

elif BACKEND != "reference":
    im2col = torch.ops.metamask.im2col.default
    col2im = torch.ops.metamask.col2im.default

if BACKEND != "reference":

    @torch.library.register_fake("metamask::im2col")
    def _(input, kernel, stride, padding, dilation):
        check_pixels("input", input)
        if input.dim() != 4:
            raise ValueError(f"input must be [N, C, H, W], got shape {list(input.shape)}")
        return input.new_empty(check_windows(input.shape, kernel, stride, padding, dilation))

    @torch.library.register_fake("metamask::col2im")
    def _(grad, size, kernel, stride, padding, dilation):
        check_pixels("grad", grad)
        if len(size) != 4 or min(size) < 0:
            raise ValueError(f"size must be that of images, [N, C, H, W], got {list(size)}")
        rows = check_windows(size, kernel, stride, padding, dilation)
        if grad.shape != rows:
            raise ValueError(f"grad must be [N, places, values] = {list(rows)}, got {list(grad.shape)}")
        return grad.new_empty(size)
