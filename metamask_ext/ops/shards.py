"""Linear layers over DTensors: every process runs the kernels on its own shards, as torch's tensor parallelism splits them.

Source: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053), section 3: a weight that is split by rows gives a part of the output's
features, one that is split by columns a part of the sum over the input's. A mask lies as its weight does, so that
``theta = W * g(M)`` of a shard needs nothing from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_OF_ONE_PROCESS = (nn.Parameter, Tensor)


def is_distributed(tensor: object) -> bool:
    """True for a DTensor. Its module takes longer to import than all of torch that is needed here."""
    return type(tensor) not in _OF_ONE_PROCESS and hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, which every process of its mesh asks for at once; another tensor as it is."""
    if not is_distributed(tensor):
        return tensor
    full: Tensor = cast("DTensor", tensor).full_tensor()
    return full


class _Split(NamedTuple):
    """The placements of a linear layer's tensors, and of their gradients, along one dimension of a mesh."""

    input: Placement
    input_grad: Placement
    weight_grad: Placement
    bias: Placement
    bias_grad: Placement
    output: Placement


def _split(weight: Placement, input: Placement, last: int) -> _Split:
    """``last``: the dimension of the input's features."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if type(weight) is Shard and weight.dim == 0:
        return _Split(Replicate(), Partial(), weight, weight, weight, Shard(last))
    if type(weight) is Shard and weight.dim == 1:
        # The sum over the processes adds the bias as often as it is added here: once.
        return _Split(Shard(last), Shard(last), weight, Replicate(), Partial(), Partial())
    if type(weight) is not Replicate:
        raise ValueError(f"weight must be sharded by its rows or its columns, or replicated, got {weight}")
    if type(input) is Shard and input.dim != last:
        return _Split(input, input, Partial(), weight, Partial(), input)
    return _Split(*[Replicate()] * 6)


def masked_linear_of_shards(
    function: Callable[[Tensor, Tensor, list[Tensor], Tensor | None, list[Tensor] | None, Tensor | None], Tensor],
    input: Tensor,
    weight: Tensor,
    masks: Sequence[Tensor],
    bias: Tensor | None,
    bias_masks: Sequence[Tensor] | None,
    slots: Tensor | None = None,
) -> Tensor:
    """The DTensor whose shards ``function(input, weight, masks, bias, bias_masks, slots)`` computes from those of the arguments.

    Args:
        function: a masked linear layer of tensors of this process.
        input: ``[..., in]``, a DTensor of any placements; it is redistributed to those that the weight's ask for.
        weight: ``[out, in]``, a DTensor: sharded by its rows (column-wise parallel) or columns (row-wise), or replicated.
        masks: of the shape and the placements of ``weight``.
        bias, bias_masks: ``[out]``: sharded where the rows of ``weight`` are, else replicated.
        slots: int64 ``[B]``, the same in every process; or None.

    Returns:
        ``[..., out]``: sharded along its last dimension, a partial sum, or as the input, respectively.

    Raises:
        TypeError: ``input`` is no DTensor, or ``weight`` is one and a mask or bias is not.
        ValueError: placements or meshes that do not fit each other.
    """
    from torch.distributed.tensor import DTensor, Replicate

    x = _checked("input", input, weight)
    w = _checked("weight", weight, weight)
    mesh, last = w.device_mesh, x.dim() - 1
    if x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"input must be [..., in] with in = {w.shape[1]} as in weight {list(w.shape)}, got {list(x.shape)}")
    splits = [_split(of_weight, of_input, last) for of_weight, of_input in zip(w.placements, x.placements)]
    of_bias = tuple(split.bias for split in splits)
    weight_grads, bias_grads = [split.weight_grad for split in splits], [split.bias_grad for split in splits]
    own_masks = [_local(_placed("masks", mask, w, w.placements), weight_grads) for mask in masks]
    own_bias: Tensor | None = None
    own_bias_masks: list[Tensor] | None = None
    if bias is not None:
        own_bias = _local(_placed("bias", bias, w, of_bias), bias_grads)
        if any(split.output.is_partial() for split in splits):
            first = all(mesh.get_local_rank(i) == 0 for i, split in enumerate(splits) if split.output.is_partial())
            own_bias = own_bias * float(first)
        if bias_masks is not None:
            own_bias_masks = [_local(_placed("bias_masks", mask, w, of_bias), bias_grads) for mask in bias_masks]
    if slots is not None:
        samples = [split.input if split.input.is_shard(0) and last > 0 else Replicate() for split in splits]
        everywhere = DTensor.from_local(slots, mesh, [Replicate()] * mesh.ndim, run_check=False)
        slots = everywhere.redistribute(placements=samples).to_local()
    x = x.redistribute(placements=[split.input for split in splits])
    output = function(
        _local(x, [split.input_grad for split in splits]), _local(w, weight_grads), own_masks, own_bias, own_bias_masks, slots
    )
    shape = torch.Size((*x.shape[:-1], w.shape[0]))
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    outputs = [split.output for split in splits]
    return DTensor.from_local(output, mesh, outputs, run_check=False, shape=shape, stride=strides)


def masked_weight_of_shards(function: Callable[[Tensor, Tensor], Tensor], weight: Tensor, mask_logits: Tensor) -> Tensor:
    """The DTensor ``theta`` whose shards ``function(weight, mask_logits)`` computes, placed as ``weight``; errors as above."""
    from torch.distributed.tensor import DTensor

    w = _checked("weight", weight, weight)
    mask = _placed("mask_logits", mask_logits, w, w.placements)
    theta = function(w.to_local(), mask.to_local())
    return DTensor.from_local(theta, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride())


def _local(tensor: DTensor, gradient: Sequence[Placement]) -> Tensor:
    """This process's shard, whose gradient lies as ``gradient`` says."""
    # A redistribution to where it is: its backward brings the gradient to the placements of the tensor.
    return tensor.redistribute(placements=tensor.placements).to_local(grad_placements=gradient)


def _checked(name: str, tensor: Tensor, weight: Tensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    if not isinstance(weight, DTensor):
        raise TypeError(f"{name} is a DTensor and weight is none: distribute the layer too (parallelize_module)")
    if not isinstance(tensor, DTensor):
        got = f"a tensor of shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(
            f"{name} must be a DTensor as weight is, got {got}. Call the module that parallelize_module or fully_shard was called "
            "on, whose hooks convert what they are given, or give DTensor.from_local(...)"
        )
    if tensor.device_mesh != weight.device_mesh:
        raise ValueError(f"{name} must be on the mesh of weight, {weight.device_mesh}, got {tensor.device_mesh}")
    return tensor


def _placed(name: str, tensor: Tensor, weight: DTensor, placements: Sequence[Placement]) -> DTensor:
    found = _checked(name, tensor, weight)
    if found.placements != tuple(placements):
        raise ValueError(f"{name} must be placed as {tuple(placements)} beside weight {weight.placements}, got {found.placements}")
    return found
