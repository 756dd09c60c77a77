"""Layers that share one weight between tasks and own one mask for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from ..ops.conv2d.functional import masked_conv2d
from ..ops.geometry import check_steps
from ..ops.linear.functional import masked_linear
from ..ops.mixed_task.functional import task_masked_conv2d, task_masked_linear
from ..ops.packed.functional import packed_masked_conv2d, packed_masked_linear
from ..ops.weight.functional import masked_weight
from ..torch_private import fx_trace, traced_call
from .task_masks import MaskInit
from .weight_layer import WeightLayer

ConvArguments = tuple[tuple[int, int], str | int | tuple[int, int], tuple[int, int], int]
"""``stride, padding, dilation, groups``."""


class MaskedLinear(WeightLayer, nn.Linear):
    """``y = x @ (W * g(M)).T + b * g(M_b)``: a :class:`torch.nn.Linear` with a mask for each task.

    Source: Blum and Law, EE5239 proposal, eq. 3 and section 3.1 (the bias is masked too). The gates are those of
    :func:`metamask_ext.masked_weight`.

    Args:
        in_features, out_features, bias, device, dtype: as for :class:`torch.nn.Linear`.
        gate: ``"sigmoid"`` or ``"hard"``.
        temperature: of the sigmoid gate, in logits, greater than 0; an attribute that may be changed (annealing).
        threshold: of the hard gate, in logits; an attribute likewise.
        mask_init: how a new task's logits begin: ``"normal"`` (mean 0, standard deviation 1; the proposal's "randomly
            initialize"), a number for all of them, or a function that fills a tensor in place.
        mask_dtype: of the masks. None: float64 for a float64 weight, else float32, also where the weight has 16 bits and after
            ``.bfloat16()`` and ``.to(dtype)``: a logit of 4 in bfloat16 cannot move by less than 0.016, and an optimiser's steps
            would be lost. Gate and gradient of such a mask are float32 too. The dtype of a 16-bit weight: masks have 16 bits as
            long as the weight does.

    Shapes: input ``[..., in_features]``, output ``[..., out_features]``, ``weight`` and each of ``masks``
    ``[out_features, in_features]``, ``bias`` and each of ``bias_masks`` ``[out_features]``. The layer begins with one task,
    ``"default"``.

    Raises:
        ValueError: an unknown gate, a temperature that is not positive, an unknown ``mask_init``.
        TypeError: a ``mask_dtype`` that the weight cannot have beside it.
        RuntimeError: called with several tasks and none active.
    """

    plain_type = nn.Linear
    sample_dim = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gate: str = "sigmoid",
        temperature: float = 1.0,
        threshold: float = 0.0,
        mask_init: MaskInit = "normal",
        mask_dtype: torch.dtype | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_masked(gate, temperature, threshold, mask_init, mask_dtype)

    def forward(self, input: Tensor) -> Tensor:
        if fx_trace._is_fx_tracing_flag and (traced := traced_call(self, input)) is not None:
            return traced
        active = self._active()
        if isinstance(active, tuple):
            return self._masked(input, *active)
        return self._forward_selected(input, active)

    def _masked(self, input: Tensor, mask_logits: Tensor, bias_mask_logits: Tensor | None) -> Tensor:
        weight, bias = self._shared()
        return masked_linear(
            input,
            weight,
            mask_logits,
            bias,
            bias_mask_logits,
            gate=self.gate,
            temperature=self.temperature,
            threshold=self.threshold,
        )

    def _plain(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)

    def _mixed_task(self, input: Tensor, slots: Tensor, masks: list[Tensor], bias_masks: list[Tensor] | None) -> Tensor:
        weight, bias = self._shared()
        return task_masked_linear(input, slots, weight, masks, bias, bias_masks, **self._gate())

    def _packed(self, input: Tensor, slots: Tensor, masks: list[Tensor], bias_masks: list[Tensor] | None) -> Tensor:
        weight, bias = self._shared()
        return packed_masked_linear(input, slots, weight, masks, bias, bias_masks)


class MaskedConv2d(WeightLayer, nn.Conv2d):
    """``y = conv2d(x, W * g(M)) + b * g(M_b)``: a :class:`torch.nn.Conv2d` with a mask for each task.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as for
            :class:`torch.nn.Conv2d`.
        gate, temperature, threshold, mask_init, mask_dtype: as for :class:`MaskedLinear`.

    Shapes: input ``[N, C_in, H, W]`` or ``[C_in, H, W]``; ``weight`` and each of ``masks`` ``[C_out, C_in / groups, kH, kW]``,
    ``bias`` and each of ``bias_masks`` ``[C_out]``.
    """

    plain_type = nn.Conv2d
    sample_dim = 3
    if TYPE_CHECKING:
        stride: tuple[int, int]  # torch's class says tuple[int, ...], for convolutions of any dimension
        padding: str | tuple[int, int]
        dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        gate: str = "sigmoid",
        temperature: float = 1.0,
        threshold: float = 0.0,
        mask_init: MaskInit = "normal",
        mask_dtype: torch.dtype | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_masked(gate, temperature, threshold, mask_init, mask_dtype)

    def forward(self, input: Tensor) -> Tensor:
        if fx_trace._is_fx_tracing_flag and (traced := traced_call(self, input)) is not None:
            return traced
        active = self._active()
        if isinstance(active, tuple):
            return self._masked(input, *active)
        return self._forward_selected(input, active)

    def _padded(self, input: Tensor) -> tuple[Tensor, ConvArguments]:
        """The input, padded where conv2d does not do it, and the arguments of conv2d that follow the parameters."""
        padding: str | int | tuple[int, int] = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return input, (self.stride, padding, self.dilation, self.groups)

    def _masked(self, input: Tensor, mask_logits: Tensor, bias_mask_logits: Tensor | None) -> Tensor:
        weight, bias = self._shared()
        input, geometry = self._padded(input)
        return masked_conv2d(
            input,
            weight,
            mask_logits,
            bias,
            bias_mask_logits,
            *geometry,
            gate=self.gate,
            temperature=self.temperature,
            threshold=self.threshold,
        )

    def _plain(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, (stride, padding, dilation, groups) = self._padded(input)
        check_steps(stride, padding, dilation)
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    def _mixed_task(self, input: Tensor, slots: Tensor, masks: list[Tensor], bias_masks: list[Tensor] | None) -> Tensor:
        weight, bias = self._shared()
        input, geometry = self._padded(input)
        return task_masked_conv2d(input, slots, weight, masks, bias, bias_masks, *geometry, **self._gate())

    def _stacked_tasks(self, input: Tensor, slots: Tensor, masks: Tensor, bias_masks: Tensor | None) -> Tensor:
        # The tasks of a sample lie beside each other: they are groups of channels of one image. The masks are there for each task
        # anyhow, so theta may be too; patches, which _mixed_task takes, are larger and slower.
        weight, bias = self._shared()
        input, (stride, padding, dilation, groups) = self._padded(input)
        check_steps(stride, padding, dilation)
        tasks, channels = len(masks), input.shape[1]
        theta = masked_weight(weight.expand_as(masks), masks, **self._gate())
        if bias is not None:
            bias = bias.expand(tasks, -1)
            bias = bias if bias_masks is None else masked_weight(bias, bias_masks, **self._gate())
            bias = bias.flatten()
        images = input.reshape(-1, tasks * channels, *input.shape[2:])
        y = F.conv2d(images, theta.flatten(0, 1), bias, stride, padding, dilation, tasks * groups)
        return y.reshape(len(input), -1, *y.shape[2:])

    def _packed(self, input: Tensor, slots: Tensor, masks: list[Tensor], bias_masks: list[Tensor] | None) -> Tensor:
        weight, bias = self._shared()
        input, geometry = self._padded(input)
        return packed_masked_conv2d(input, slots, weight, masks, bias, bias_masks, *geometry)
