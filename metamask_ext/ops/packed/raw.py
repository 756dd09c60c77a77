"""The raw ops of the family, typed, and their fake kernels: see :mod:`metamask_ext.ops.weight.raw`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metamask_ext._build import BACKEND

from ..checks import (
    check_batch_grad,
    check_flags,
    check_mask_logits,
    check_packed_linear,
    check_shape,
    check_storage,
    check_superposition,
)
from ..geometry import packed_shape

if TYPE_CHECKING:

    def pack_mask(mask_logits: Tensor, threshold: float) -> Tensor:
        """See :func:`metamask_ext.ops.packed.reference.pack_mask`."""

    def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
        """See :func:`metamask_ext.ops.packed.reference.unpack_mask`."""

    def packed_masked_linear(
        input: Tensor,
        slots: Tensor,
        weight: Tensor,
        packed: Sequence[Tensor],
        bias: Tensor | None,
        packed_bias: Sequence[Tensor] | None,
        groups: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See :func:`metamask_ext.ops.packed.reference.packed_masked_linear`; the product is taken, and given, in ``dtype``."""

    def packed_masked_linear_backward(
        grad: Tensor,
        input: Tensor,
        slots: Tensor,
        weight: Tensor,
        packed: Sequence[Tensor],
        bias: Tensor | None,
        packed_bias: Sequence[Tensor] | None,
        groups: int,
        output_mask: Sequence[bool] = (True, True, True),
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of :func:`packed_masked_linear` for input, weight and bias; None where not needed."""

    def packed_superposition_gradient(grad: Tensor, input: Tensor, weight: Tensor, packed: Sequence[Tensor], groups: int) -> Tensor:
        """See :func:`metamask_ext.ops.packed.reference.packed_superposition_gradient`."""

elif BACKEND != "reference":
    from metamask_ext._C import packed_masked_linear  # noqa: F401  torch.ops boxes its lists, a third of the kernel's time

    pack_mask = torch.ops.metamask.pack_mask.default
    unpack_mask = torch.ops.metamask.unpack_mask.default
    packed_masked_linear_backward = torch.ops.metamask.packed_masked_linear_backward.default
    packed_superposition_gradient = torch.ops.metamask.packed_superposition_gradient.default


if BACKEND != "reference":

    @torch.library.register_fake("metamask::pack_mask")
    def _(mask_logits, threshold):
        check_mask_logits(mask_logits, threshold)
        return mask_logits.new_empty(packed_shape(mask_logits.shape), dtype=torch.uint8)

    @torch.library.register_fake("metamask::unpack_mask")
    def _(packed, shape):
        check_shape(packed, shape)
        return packed.new_empty(shape, dtype=torch.bool)

    @torch.library.register_fake("metamask::packed_masked_linear")
    def _(input, slots, weight, packed, bias, packed_bias, groups, dtype=None):
        check_packed_linear(input, slots, weight, packed, bias, packed_bias, groups)
        check_storage("input", input.dtype, weight)
        check_storage("dtype", dtype or weight.dtype, weight)
        return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=dtype or weight.dtype)

    @torch.library.register_fake("metamask::packed_masked_linear_backward")
    def _(grad, input, slots, weight, packed, bias, packed_bias, groups, output_mask=(True, True, True)):
        check_packed_linear(input, slots, weight, packed, bias, packed_bias, groups)
        check_storage("input", input.dtype, weight)
        check_batch_grad(grad, input, weight)
        check_flags("output_mask", output_mask, 3)
        return (
            input.new_empty(input.shape) if output_mask[0] else None,
            weight.new_empty(weight.shape) if output_mask[1] else None,
            bias.new_empty(bias.shape) if bias is not None and output_mask[2] else None,
        )

    @torch.library.register_fake("metamask::packed_superposition_gradient")
    def _(grad, input, weight, packed, groups):
        tasks = check_superposition(grad, input, weight, packed, groups)
        check_storage("input", input.dtype, weight)
        return grad.new_empty((input.shape[0], tasks))
