"""The base of masked layers that compute with a weight and a bias: their output for one task, for several, and for mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..ops.checks import check_layer_input
from ..ops.dispatch import check_input_dtype
from ..torch_private import disable_dynamo
from .context import LIVE, Key, active_key, only_key
from .given import GivenTasks, Logits, given_to
from .masked_layer import MaskedLayer
from .selection import GivenMasks, ObservedSuperposition, TaskBatch, along, check_samples
from .task_masks import TaskMasks


class WeightLayer(MaskedLayer):
    """A masked layer with a weight ``W`` and perhaps a bias, which calls an op with them and the masks of what is active."""

    is_matrix = True
    """True if the layer is a product of its input's rows, or patches, with the weight as a matrix: :meth:`MaskBank.infer_task`
    then finds the derivatives of all tasks at once."""

    def _shared(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias that all tasks share."""
        return self.weight, self.bias

    def _parameter(self, name: str) -> Tensor | None:
        return self._shared()[name == "bias"]

    def _task_dict(self) -> TaskMasks:
        masks: TaskMasks = self._modules["masks"]
        return masks

    def _active(self) -> Logits | Key | GivenTasks | None:
        # As the base's, without its calls: it is what a small layer's forward waits for.
        masks: TaskMasks = self._modules["masks"]
        key: Key
        if torch.compiler.is_dynamo_compiling():
            given: Logits | GivenTasks | None = given_to(self)
            if given is not None:
                return given
            # What is read here becomes a guard: first what changes least.
            if not masks._single or LIVE.selections:
                return _pair_in_eager(self)
            (key,) = masks._slots
            if key not in masks._parameters:
                return None
        elif len(masks._slots) == 1:
            key = only_key(self, next(iter(masks._slots)))
        else:
            key = active_key(self)
        if isinstance(key, str):
            logits = masks._parameters.get(key)
            if logits is not None:
                bias_masks: TaskMasks | None = self._modules.get("bias_masks")
                return logits, None if bias_masks is None else bias_masks._parameters[key]
        return key

    def _forward_selected(self, input: Tensor, active: Key | GivenTasks | None) -> Tensor:
        """The output where the active masks are no logits of one task."""
        if active is None:
            return _forward_in_eager(self, input)
        if not isinstance(input, Tensor) or input.is_nested or input.layout is not torch.strided:
            check_layer_input(input, self._shared()[0].device)
        if isinstance(active, str):
            return self._one_task(input, active)
        if isinstance(active, TaskBatch):
            return self._forward_batch(input, active)
        if isinstance(active, GivenTasks):
            return self._forward_given_tasks(input, active)
        if isinstance(active, GivenMasks):
            return self._forward_given(input, active)
        shared, _ = self._shared()
        check_layer_input(input, shared.device)
        check_input_dtype(input, shared)
        weight = self._read("weight", active)
        assert weight is not None
        output = self._plain(input, weight, self._read("bias", active))
        return active.observe(self, input, output) if self.is_matrix and isinstance(active, ObservedSuperposition) else output

    def _forward_batch(self, input: Tensor, batch: TaskBatch) -> Tensor:
        output: Tensor = batch.run(self, input, self.sample_dim, self._forward_known)
        return output

    def _forward_known(self, input: Tensor, batch: TaskBatch) -> Tensor:
        keys = batch.keys
        if len(keys) == 1:
            return self._one_task(input, keys[0])
        weight, bias = self._shared()
        if not keys:
            return self._plain(input, weight, bias)  # of no sample
        return along(batch.dim, partial(self._forward_tasks, batch=batch), input)

    def _forward_given_tasks(self, input: Tensor, given: GivenTasks) -> Tensor:
        masks, bias_masks, slots = given.masks, given.bias_masks, given.slots
        if slots is not None:
            check_samples(self, input, self.sample_dim, slots.shape[0], given.dim, given.guessed and given.several)
        if slots is None or not given.several:
            return self._with_one(input, given.packed, masks[0], None if bias_masks is None else bias_masks[0])
        run = self._packed if given.packed else self._mixed_task
        return along(given.dim, partial(run, slots=slots, masks=masks, bias_masks=bias_masks), input)

    def _forward_tasks(self, input: Tensor, batch: TaskBatch) -> Tensor:
        """The output for an input whose first dimension is that of samples of several tasks."""
        keys, device = batch.keys, self._shared()[0].device
        packed = tuple(self._task_dict()._is_bits(key) for key in keys)
        if not any(packed) or all(packed):
            run = self._packed if packed[0] else self._mixed_task
            return run(input, batch.positions(device), *self._masks_of(keys))
        rows, slots, other_rows, other_slots, back = batch.split(packed, device)
        bits = [key for key, is_packed in zip(keys, packed) if is_packed]
        logits = [key for key, is_packed in zip(keys, packed) if not is_packed]
        parts = [
            self._packed(input.index_select(0, rows), slots, *self._masks_of(bits)),
            self._mixed_task(input.index_select(0, other_rows), other_slots, *self._masks_of(logits)),
        ]
        return torch.cat(parts).index_select(0, back)

    def _masks_of(self, keys: Sequence[str]) -> tuple[list[Tensor], list[Tensor] | None]:
        masks, bias_masks = self._task_dict(), self.bias_masks
        of_bias = None if bias_masks is None else [bias_masks._tensor(key) for key in keys]
        return [masks._tensor(key) for key in keys], of_bias

    def _forward_given(self, input: Tensor, given: GivenMasks) -> Tensor:
        masks = given.masks.get(self)
        if masks is None:
            return self._forward_selected(input, given.selected)
        mask, bias_mask = cast(Logits, masks)
        if given.slots is None:
            return self._masked(input, mask, bias_mask)
        given.check_size(self, self._samples(input))
        return self._stacked_tasks(input, given.slots, mask, bias_mask)

    def _one_task(self, input: Tensor, key: str) -> Tensor:
        masks, bias_masks = self._task_dict(), self.bias_masks
        mask, bias_mask = masks._tensor(key), None if bias_masks is None else bias_masks._tensor(key)
        return self._with_one(input, masks._is_bits(key), mask, bias_mask)

    def _with_one(self, input: Tensor, packed: bool, mask: Tensor, bias_mask: Tensor | None) -> Tensor:
        """The output with these logits, or bits, for all samples."""
        if not packed:
            return self._masked(input, mask, bias_mask)
        batched = input.dim() > self.sample_dim
        rows = input if batched else input[None]
        slots = torch.zeros(len(rows), dtype=torch.int64, device=input.device)
        output = self._packed(rows, slots, [mask], None if bias_mask is None else [bias_mask])
        return output if batched else output[0].clone()

    def _samples(self, input: Tensor) -> int:
        return input.shape[0] if input.dim() > self.sample_dim else 1

    sample_dim: int
    """The dimensions of the input of one sample."""

    def _masked(self, input: Tensor, mask_logits: Tensor, bias_mask_logits: Tensor | None) -> Tensor:
        """The output with these logits."""
        raise NotImplementedError

    def _plain(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of torch's layer with these parameters."""
        raise NotImplementedError

    def _mixed_task(self, input: Tensor, slots: Tensor, masks: list[Tensor], bias_masks: list[Tensor] | None) -> Tensor:
        """The output with the logits ``masks[slots[b]]`` for sample ``b``."""
        raise NotImplementedError

    def _stacked_tasks(self, input: Tensor, slots: Tensor, masks: Tensor, bias_masks: Tensor | None) -> Tensor:
        """The same with logits ``[T, *shape]`` where every task has as many samples, in the order of a meta-learner."""
        return self._mixed_task(input, slots, [masks], None if bias_masks is None else [bias_masks])

    def _packed(self, input: Tensor, slots: Tensor, masks: list[Tensor], bias_masks: list[Tensor] | None) -> Tensor:
        """The output with the bits ``masks[slots[b]]`` for sample ``b``."""
        raise NotImplementedError


@disable_dynamo
def _pair_in_eager(layer: WeightLayer) -> Logits | None:
    """For torch.compile, which cannot read a context variable: one graph break, and the masks are inputs of what follows."""
    active = layer._active()
    return active if isinstance(active, tuple) else None


@disable_dynamo
def _forward_in_eager(layer: WeightLayer, input: Tensor) -> Tensor:
    """For torch.compile, where a layer's masks are many, or bits that may have to be fetched."""
    output: Tensor = layer.forward(input)
    return output
