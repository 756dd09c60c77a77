"""The raw ops of the family, typed, and their fake kernels: see :mod:`metamask_ext.ops.weight.raw`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metamask_ext._build import BACKEND

from ..geometry import Pair, output_size

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
        height, width = output_size(input.shape, kernel, stride, padding, dilation)
        return input.new_empty((input.shape[0], height * width, input.shape[1] * kernel[0] * kernel[1]))

    @torch.library.register_fake("metamask::col2im")
    def _(grad, size, kernel, stride, padding, dilation):
        return grad.new_empty(size)
