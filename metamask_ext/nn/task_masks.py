"""The masks of one weight, and the dtype that logits have beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.gate import SIXTEEN_BITS
from .task_dict import TaskDict

MaskInit = str | float | Callable[[Tensor], object]


class TaskMasks(TaskDict):
    """The masks of a layer's weight, or of its bias: logits, parameters; or bits, uint8 buffers.

    A conversion of the module to 16 bits leaves logits in float32 unless the layer wants 16 bits, and bits as they are.
    """

    _wanted: torch.dtype | None = None
    """The layer's ``mask_dtype``."""

    def __init__(self, mask_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._wanted = mask_dtype

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> TaskDict:
        def apply(mask: Tensor) -> Tensor:
            result = function(mask)
            dtype = self._dtype_after(mask.dtype, result.dtype)
            if dtype == result.dtype:
                return result
            # What remains of the conversion: the device, and the order in memory.
            if dtype == mask.dtype and (mask.device, mask.stride()) == (result.device, result.stride()):
                return mask
            return torch.empty_like(result, dtype=dtype).copy_(mask)

        return super()._apply(apply, recurse)

    def _dtype_after(self, before: torch.dtype, after: torch.dtype) -> torch.dtype:
        """The dtype of a mask where a conversion gives ``after``."""
        if not before.is_floating_point:
            return before
        narrowed = after != before and after.is_floating_point and after not in (torch.float32, torch.float64)
        return torch.float32 if narrowed and self._wanted not in SIXTEEN_BITS else after


def logits_dtype(weight: torch.dtype, mask_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the logits beside a weight: float64 for float64, else float32, or the weight's 16 bits where they are wanted."""
    if weight == torch.float64:
        return weight
    return weight if weight in SIXTEEN_BITS and mask_dtype in SIXTEEN_BITS else torch.float32


def check_mask_dtype(mask_dtype: torch.dtype | None, weight: torch.dtype, name: str = "") -> None:
    """TypeError unless masks of ``mask_dtype`` can stand beside a weight of this dtype; ``name``: the layer's, for the message."""
    if mask_dtype is not None and mask_dtype not in (weight, logits_dtype(weight, None)):
        wanted = "torch.float64" if weight == torch.float64 else "torch.float32"
        wanted += f" or {weight}" if weight in SIXTEEN_BITS else ""
        of = f"the {weight} weight of {name!r}" if name else f"a {weight} weight"
        raise TypeError(f"mask_dtype must be None or {wanted} beside {of}, got {mask_dtype!r}")


def check_mask_init(mask_init: MaskInit) -> None:
    if not (mask_init == "normal" or callable(mask_init)):
        try:
            float(mask_init)
        except (TypeError, ValueError):
            raise ValueError(f"mask_init must be 'normal', a number or a function, got {mask_init!r}") from None
