"""Masked convolutions of other dimensions than two, and transposed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import check_layer_input
from ..ops.conv2d.functional import masked_conv2d
from ..ops.dispatch import check_input_dtype
from ..ops.mixed_task.functional import task_masked_conv2d
from ..ops.packed.functional import packed_masked_conv2d
from ..torch_private import fx_trace, traced_call
from .grouped import GroupedLayer
from .masked_layer import MaskedLayer, masked_value
from .task_masks import MaskInit
from .weight_layer import WeightLayer


class _Options(MaskedLayer):
    """A masked convolution: torch's arguments, then those of the masks.

    Args:
        gate, temperature, threshold, mask_init, mask_dtype: as for :class:`MaskedLinear`.
        arguments: those of torch's layer.
    """

    def __init__(
        self,
        *arguments: Any,
        gate: str = "sigmoid",
        temperature: float = 1.0,
        threshold: float = 0.0,
        mask_init: MaskInit = "normal",
        mask_dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__(*arguments, **options)
        self._init_masked(gate, temperature, threshold, mask_init, mask_dtype)


class MaskedConv1d(_Options, WeightLayer, nn.Conv1d):
    """``y = conv1d(x, W * g(M)) + b * g(M_b)``: a :class:`torch.nn.Conv1d` with a mask for each task.

    It is a convolution of images with one row, by the kernels of :class:`MaskedConv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as for
            :class:`torch.nn.Conv1d`.
        gate, temperature, threshold, mask_init, mask_dtype: as for :class:`MaskedLinear`.

    Shapes: input ``[N, C_in, L]`` or ``[C_in, L]``; ``weight`` and each of ``masks`` ``[C_out, C_in / groups, K]``, ``bias`` and
    each of ``bias_masks`` ``[C_out]``.
    """

    plain_type = nn.Conv1d
    sample_dim = 2
    is_matrix = False

    def forward(self, input: Tensor) -> Tensor:
        if fx_trace._is_fx_tracing_flag and (traced := traced_call(self, input)) is not None:
            return traced
        active = self._active()
        if isinstance(active, tuple):
            return self._masked(input, *active)
        return self._forward_selected(input, active)

    def _as_images(self, input: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """The input as images of one row, padded where the op does not do it, and the op's arguments that follow the parameters."""
        if not isinstance(input, Tensor) or input.dim() not in (2, 3):
            check_layer_input(input, self._shared()[0].device)
            raise ValueError(f"input must be [N, C_in, L] or [C_in, L], got shape {list(input.shape)}")
        padding: str | tuple[int, int] = self.padding if isinstance(self.padding, str) else (0, self.padding[0])
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return input.unsqueeze(-2), ((1, self.stride[0]), padding, (1, self.dilation[0]), self.groups)

    def _masked(self, input: Tensor, mask_logits: Tensor, bias_mask_logits: Tensor | None) -> Tensor:
        weight, bias = self._shared()
        images, geometry = self._as_images(input)
        rows = weight.unsqueeze(-2), mask_logits.unsqueeze(-2)
        return masked_conv2d(images, *rows, bias, bias_mask_logits, *geometry, **self._gate()).squeeze(-2)

    def _plain(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        images, geometry = self._as_images(input)
        return F.conv2d(images, weight.unsqueeze(-2), bias, *geometry).squeeze(-2)

    def _mixed_task(self, input: Tensor, slots: Tensor, masks: list[Tensor], bias_masks: list[Tensor] | None) -> Tensor:
        weight, bias = self._shared()
        images, geometry = self._as_images(input)
        rows = [mask.unsqueeze(-2) for mask in masks]
        y = task_masked_conv2d(images, slots, weight.unsqueeze(-2), rows, bias, bias_masks, *geometry, **self._gate())
        return y.squeeze(-2)

    def _packed(self, input: Tensor, slots: Tensor, masks: list[Tensor], bias_masks: list[Tensor] | None) -> Tensor:
        weight, bias = self._shared()
        images, geometry = self._as_images(input)
        return packed_masked_conv2d(images, slots, weight.unsqueeze(-2), masks, bias, bias_masks, *geometry).squeeze(-2)


class _ByWeight(_Options, GroupedLayer):
    """A convolution by torch's own op, with the theta of the task that is active."""

    stacks_tasks = True

    def _theta_and_bias(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = masked_value(self, "weight")
        assert weight is not None
        check_layer_input(input, weight.device)
        check_input_dtype(input, weight)
        return weight, masked_value(self, "bias")


class MaskedConv3d(_ByWeight, nn.Conv3d):
    """``y = conv3d(x, W * g(M)) + b * g(M_b)``: a :class:`torch.nn.Conv3d` with a mask for each task.

    ``theta`` comes from :func:`metamask_ext.masked_weight`, the convolution from torch. In a mixed-task batch it runs for one task
    after another.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as for
            :class:`torch.nn.Conv3d`.
        gate, temperature, threshold, mask_init, mask_dtype: as for :class:`MaskedLinear`.

    Shapes: input ``[N, C_in, D, H, W]`` or ``[C_in, D, H, W]``; ``weight`` and each of ``masks``
    ``[C_out, C_in / groups, kD, kH, kW]``, ``bias`` and each of ``bias_masks`` ``[C_out]``.
    """

    plain_type = nn.Conv3d
    sample_dim = 4

    def _run(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, *self._theta_and_bias(input))
        return output


class _Transposed(_ByWeight):
    """A transposed convolution."""

    _op: Callable[..., Tensor]
    if TYPE_CHECKING:
        stride: Any  # of torch's layer beside this class
        padding: Any
        kernel_size: Any
        dilation: Any
        groups: int
        _output_padding: Callable[..., list[int]]

    def _run(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight, bias = self._theta_and_bias(input)
        sizes = self.stride, self.padding, self.kernel_size, weight.dim() - 2, self.dilation
        output_padding = self._output_padding(input, output_size, *sizes)
        output: Tensor = self._op(input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation)
        return output


class MaskedConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """A :class:`torch.nn.ConvTranspose1d` with a mask for each task; as :class:`MaskedConvTranspose2d`, of one dimension."""

    plain_type = nn.ConvTranspose1d
    _op = staticmethod(F.conv_transpose1d)
    sample_dim = 2


class MaskedConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """``y = conv_transpose2d(x, W * g(M)) + b * g(M_b)``: a :class:`torch.nn.ConvTranspose2d` with a mask for each task.

    As :class:`MaskedConv3d` by torch's op, and in a mixed-task batch for one task after another. ``forward`` takes ``output_size``
    as torch's does.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, device,
            dtype: as for :class:`torch.nn.ConvTranspose2d`.
        gate, temperature, threshold, mask_init, mask_dtype: as for :class:`MaskedLinear`.

    Shapes: input ``[N, C_in, H, W]`` or ``[C_in, H, W]``; ``weight`` and each of ``masks`` ``[C_in, C_out / groups, kH, kW]``,
    ``bias`` and each of ``bias_masks`` ``[C_out]``.
    """

    plain_type = nn.ConvTranspose2d
    _op = staticmethod(F.conv_transpose2d)
    sample_dim = 3


class MaskedConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """A :class:`torch.nn.ConvTranspose3d` with a mask for each task; as :class:`MaskedConvTranspose2d`, of three dimensions."""

    plain_type = nn.ConvTranspose3d
    _op = staticmethod(F.conv_transpose3d)
    sample_dim = 4
