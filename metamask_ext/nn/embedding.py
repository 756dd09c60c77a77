"""A table of embeddings with a mask for each task."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from ..ops.gate import compute_dtype
from ..ops.packed.functional import unpack_mask
from ..ops.weight.functional import masked_weight
from .each_task import Call
from .grouped import GroupedLayer
from .masked_layer import masked_value
from .selection import GivenMasks, ObservedSuperposition, Superposition, TaskBatch
from .task_masks import MaskInit


class MaskedEmbedding(GroupedLayer, nn.Embedding):
    """``y = W[x] * g(M[x])``: a :class:`torch.nn.Embedding` with a mask for each task.

    Rows of weight and mask are gathered, and multiplied then: ``theta`` is never there as a whole. :func:`metamask_ext.convert`
    makes one only of embeddings that ``include`` names.

    In a mixed-task batch the first dimension of the indices must be the batch's. Indices of one dimension may be positions, which
    all samples share; they need ``using_task(..., batch_dim=0)``, which says that they are a sample each. Indices ``[1, ...]``,
    which all samples share, give each sample its own rows: ``[B, ..., D]``.

    Args:
        num_embeddings, embedding_dim, padding_idx, norm_type, scale_grad_by_freq, device, dtype: as for
            :class:`torch.nn.Embedding`.
        max_norm: None. It would rescale the shared weight in place, in the forward of one task.
        sparse: False.
        _weight, _freeze: as for :class:`torch.nn.Embedding`.
        gate, temperature, threshold, mask_init, mask_dtype: as for :class:`MaskedLinear`.

    Shapes: input ``[...]``, integers; output ``[..., embedding_dim]``; ``weight`` and each of ``masks``
    ``[num_embeddings, embedding_dim]``.

    Raises:
        ValueError: ``max_norm`` or ``sparse`` is given.
    """

    plain_type = nn.Embedding
    stacks_tasks = True
    _masked_names = ("weight",)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        gate: str = "sigmoid",
        temperature: float = 1.0,
        threshold: float = 0.0,
        mask_init: MaskInit = "normal",
        mask_dtype: torch.dtype | None = None,
    ):
        if max_norm is not None:
            raise ValueError(
                f"max_norm must be None, got {max_norm}: the forward of one task would rescale the weight that all tasks share"
            )
        if sparse:
            raise ValueError("sparse must be False: gradients of masks are dense")
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        self._init_masked(gate, temperature, threshold, mask_init, mask_dtype)

    def _divided(self, batch: TaskBatch, *inputs: Any, **options: Any) -> tuple[TaskBatch, Call]:
        input = self._only_tensor(*inputs, **options)
        if batch.differs:
            if input.dim() == 1 and not batch.stated:
                raise RuntimeError(
                    f"{type(self).__name__} was called with {len(input)} indices in a mixed-task batch: they may be positions, "
                    "which all samples share. Give them as [1, L], or say using_task(..., batch_dim=0) where each is of a sample"
                )
            if input.dim() > batch.dim and input.shape[batch.dim] == 1 != batch.size:
                sizes = [*input.shape]
                sizes[batch.dim] = batch.size
                return batch, Call([input.expand(sizes)], {}, {0: batch.dim}, batch.dim)
        batch = batch.fitting(self, input, 0)
        return batch, Call(inputs, options, {0: batch.dim}, batch.dim)

    def _run(self, input: Tensor) -> Tensor:
        active = self._active()
        if isinstance(active, tuple):
            return self._gathered(input, active[0])
        if isinstance(active, GivenMasks):
            given = active.masks.get(self)
            if given is not None:
                return self._gathered(input, given[0])
            active = active.selected
        masks = self._task_dict()
        if isinstance(active, str):
            return self._gathered(input, masks._tensor(active))
        if isinstance(active, Superposition) and not isinstance(active, ObservedSuperposition):
            rows = self._rows(input, self._table())
            wide = rows.to(compute_dtype(rows.dtype))
            return active.mix(self._gated(wide, input, masks._tensor(key), wide.dtype) for key in active.keys).to(rows.dtype)
        theta = masked_value(self, "weight")
        assert theta is not None
        return self._rows(input, theta)

    def _gathered(self, input: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return self._gated(self._rows(input, self._table()), input, mask, mask.dtype)

    def _gated(self, rows: Tensor, input: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """``rows``, those of the weight, with the same of a mask: logits in ``dtype``, or bits."""
        if mask.dtype == torch.uint8:
            bits = mask[input.flatten()]
            return rows * unpack_mask(bits, (input.numel(), self.embedding_dim)).view(rows.shape)
        return masked_weight(rows, self._rows(input, mask).to(dtype), **self._gate())

    def _table(self) -> Tensor:
        table = self._parameter("weight")
        assert table is not None
        return table

    def _rows(self, input: Tensor, table: Tensor) -> Tensor:
        return F.embedding(input, table, self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, False)
