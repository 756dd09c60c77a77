"""Argument checks of every family, worded with the argument's name, what came and what was wanted.

The ops word the same checks in the same way (csrc/ops): these run where plain torch runs, or where an op has refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metamask_ext import torch_private

from .gate import SIXTEEN_BITS
from .geometry import MOST_ELEMENTS, check_rows, check_sizes, check_tasks, packed_bytes, packed_shape
from .shards import whole

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of weights and logits."""


def check_mask_dtype(weight: Tensor, mask_logits: Tensor, weight_name: str, mask_name: str) -> None:
    """Refuse logits that are not in the dtype of ``weight``, nor float32 beside one of 16 bits."""
    if mask_logits.dtype == weight.dtype or (mask_logits.dtype == torch.float32 and weight.dtype in SIXTEEN_BITS):
        return
    wanted = f"or float32 beside {weight.dtype}" if weight.dtype in SIXTEEN_BITS else str(weight.dtype)
    raise TypeError(f"{mask_name} must have the dtype of {weight_name}, {wanted}, got {mask_logits.dtype}")


def check_pair(weight: Tensor, mask_logits: Tensor, weight_name: str = "weight", mask_name: str = "mask_logits") -> None:
    """Refuse a weight and its logits that do not belong together.

    Raises:
        TypeError: not tensors, not floating point of 16 bits or more, or of two dtypes other than 16 bits and float32 logits.
        ValueError: of two shapes or on two devices.
    """
    for name, tensor in ((weight_name, weight), (mask_name, mask_logits)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"{weight_name} must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    check_mask_dtype(weight, mask_logits, weight_name, mask_name)
    if mask_logits.shape != weight.shape:
        raise ValueError(f"{mask_name} must have the shape of {weight_name}, {list(weight.shape)}, got {list(mask_logits.shape)}")
    if mask_logits.device != weight.device:
        raise ValueError(f"{mask_name} must be on the device of {weight_name}, {weight.device}, got {mask_logits.device}")


def check_pairs(weight: Sequence[Tensor], mask_logits: Sequence[Tensor]) -> None:
    """Refuse weights and logits that are not as many, or not each of one dtype and device; errors as :func:`check_pair`."""
    if not isinstance(mask_logits, Sequence):
        raise TypeError(f"mask_logits must be a sequence of tensors as weight is, got {type(mask_logits).__name__}")
    if len(weight) == 0:
        raise ValueError("weight must have at least one tensor, got none")
    if len(mask_logits) != len(weight):
        raise ValueError(f"expected {len(weight)} mask_logits tensors, one per weight, got {len(mask_logits)}")
    first = weight[0]
    for index, (one, mask) in enumerate(zip(weight, mask_logits)):
        name = f"weight[{index}]"
        check_pair(one, mask, name, f"mask_logits[{index}]")
        if one.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of weight[0], {first.dtype}, got {one.dtype}")
        _check_one_dtype(mask_logits, index, "mask_logits")
        if one.device != first.device:
            raise ValueError(f"{name} must be on the device of weight[0], {first.device}, got {one.device}")


def check_storage(name: str, dtype: torch.dtype, weight: Tensor) -> None:
    """Refuse a dtype that is not computed with that of ``weight``: float64 goes with float64, and only there."""
    if dtype not in DTYPES or (dtype == torch.float64) != (weight.dtype == torch.float64):
        wanted = "float64 as weight is" if weight.dtype == torch.float64 else "float32, bfloat16 or float16"
        raise TypeError(f"{name} must be {wanted}, got {dtype}")


def check_flags(name: str, flags: Sequence[bool], count: int) -> None:
    if len(flags) != count:
        raise ValueError(f"{name} must be {count} flags, got {len(flags)}")


def check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_pixels(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")


def _check_one_dtype(masks: Sequence[Tensor], index: int, name: str) -> None:
    """Refuse logits of 16 bits among those of float32; the functions widen them before (:func:`dispatch.of_one_dtype`)."""
    first, one = masks[0].dtype, masks[index].dtype
    if one != first:
        raise TypeError(f"{name}[{index}] must have the dtype of {name}[0], {first}, got {one}")


def check_input(input: Tensor, weight: Tensor) -> None:
    """Refuse an input that is no tensor, or on another device than ``weight``."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if input.device != weight.device:
        raise ValueError(f"input must be on the device of weight, {weight.device}, got {input.device}")


def check_bias(weight: Tensor, bias: Tensor | None, bias_mask_logits: Tensor | None) -> None:
    """Refuse a bias that is not ``[out]``, and logits that do not belong to it."""
    if bias is None:
        if bias_mask_logits is not None:
            raise ValueError("bias_mask_logits needs a bias, got bias=None")
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, got {type(bias).__name__}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [out] = {list(weight.shape[:1])}, got {list(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"bias must be on the device of weight, {weight.device}, got {bias.device}")
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias must have the dtype of weight, {weight.dtype}, got {bias.dtype}")
    if bias_mask_logits is not None:
        check_pair(bias, bias_mask_logits, "bias", "bias_mask_logits")


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None, bias_mask_logits: Tensor | None) -> None:
    """Refuse an input, bias or bias logits that do not fit ``weight`` ``[out, in]``; errors as :func:`check_pair`."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")
    check_input(input, weight)
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input must be [..., in] with in = {weight.shape[1]} as in weight {list(weight.shape)}, got {list(input.shape)}"
        )
    check_rows(input.shape, weight.shape[0])
    check_bias(weight, bias, bias_mask_logits)


def check_conv2d(input: Tensor, weight: Tensor, groups: int) -> None:
    """Refuse a weight that is not ``[C_out, C_in / groups, kH, kW]``, and an input that does not fit it."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dim() != 4:
        raise ValueError(f"weight must be [C_out, C_in / groups, kH, kW], got shape {list(weight.shape)}")
    check_input(input, weight)
    if input.dim() not in (3, 4) or input.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"input must be [N, C_in, H, W] or [C_in, H, W] with C_in = {weight.shape[1] * groups} as in weight "
            f"{list(weight.shape)} with groups={groups}, got {list(input.shape)}"
        )


def check_like(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Refuse a gradient or cotangent of ``weight`` in another shape, or in a dtype that it is not computed with."""
    check_tensor(name, tensor)
    check_storage(name, tensor.dtype, weight)
    if tensor.shape != weight.shape:
        raise ValueError(f"{name} must have the shape of weight, {list(weight.shape)}, got {list(tensor.shape)}")
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {tensor.device}")


def check_each_like(name: str, tensors: Sequence[Tensor | None], weight: Sequence[Tensor]) -> None:
    if len(tensors) != len(weight):
        raise ValueError(f"expected {len(weight)} {name} tensors, one per weight, got {len(tensors)}")
    for index, (tensor, one) in enumerate(zip(tensors, weight)):
        if tensor is not None:
            check_like(f"{name}[{index}]", tensor, one)


def as_list(name: str, masks: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The masks as the ops take them: one tensor for all tasks, or a tensor a task."""
    if isinstance(masks, Tensor):
        return [masks]
    if not isinstance(masks, Sequence):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(masks).__name__}")
    return list(masks)


def is_stacked(masks: Sequence[Tensor], weight: Tensor) -> bool:
    """True if ``masks`` is one tensor for all tasks."""
    return len(masks) == 1 and isinstance(masks[0], Tensor) and masks[0].dim() == weight.dim() + 1


def count_tasks(masks: Sequence[Tensor], weight: Tensor) -> int:
    return masks[0].shape[0] if is_stacked(masks, weight) else len(masks)


def check_masks(masks: Sequence[Tensor], weight: Tensor, name: str = "masks", weight_name: str = "weight") -> None:
    """Refuse masks that do not belong to ``weight``.

    Raises:
        TypeError: not tensors, not floating point of 16 bits or more, or of a dtype that does not go with that of ``weight``.
        ValueError: of another shape or device.
    """
    check_pair(weight, weight, weight_name, weight_name)
    if not is_stacked(masks, weight):
        for index, mask in enumerate(masks):
            check_pair(weight, mask, weight_name, f"{name}[{index}]")
            _check_one_dtype(masks, index, name)
        return
    (mask,) = masks
    check_mask_dtype(weight, mask, weight_name, name)
    if mask.shape[1:] != weight.shape:
        raise ValueError(f"{name} must be T masks of the shape of {weight_name}, {list(weight.shape)}, got {list(mask.shape)}")
    check_sizes(name, mask.shape)
    check_tasks(name, mask.shape[0])
    if mask.device != weight.device:
        raise ValueError(f"{name} must be on the device of {weight_name}, {weight.device}, got {mask.device}")


def check_slots(slots: Tensor, input: Tensor, weight: Tensor) -> None:
    """Refuse slots that are not int64 ``[B]`` on the device of ``weight``.

    Their values: :func:`check_slot_values`.
    """
    if not isinstance(slots, Tensor):
        raise TypeError(f"slots must be a tensor, got {type(slots).__name__}")
    if slots.dtype != torch.int64:
        raise TypeError(f"slots must be int64, got {slots.dtype}")
    if slots.shape != input.shape[:1]:
        raise ValueError(f"slots must be [B] = {list(input.shape[:1])} as in input {list(input.shape)}, got {list(slots.shape)}")
    if slots.device != weight.device:
        raise ValueError(f"slots must be on the device of weight, {weight.device}, got {slots.device}")


def check_slot_values(slots: Tensor, tasks: int) -> None:
    """Refuse a slot outside ``[0, tasks)``: the first one, by its position.

    Values that cannot be seen (while compiling, under a vmap over them, on a GPU) are checked by the op that uses them.
    """
    if torch.compiler.is_compiling() or slots.device.type != "cpu":
        return
    seen = torch_private.concrete(slots)
    if seen is None:
        return
    if seen.stride() == (0,):  # one slot for a batch of any size
        seen = seen[:1]
    bad = (seen < 0) | (seen >= tasks)
    if bool(bad.any()):
        position = int(bad.to(torch.uint8).argmax())
        raise ValueError(f"slots must be in [0, {tasks}), got {int(seen[position])} at position {position}")


def check_task_bias(weight: Tensor, masks: Sequence[Tensor], bias: Tensor | None, bias_masks: Sequence[Tensor] | None) -> None:
    """Refuse a bias that is not ``[out]``, and masks that do not belong to it, or are of another number of tasks."""
    if bias is None:
        if bias_masks is not None:
            raise ValueError("bias_masks needs a bias, got bias=None")
        return
    check_bias(weight, bias, None)
    if bias_masks is not None:
        check_masks(bias_masks, bias, "bias_masks", "bias")
        tasks, theirs = count_tasks(masks, weight), count_tasks(bias_masks, bias)
        if theirs != tasks:
            raise ValueError(f"bias_masks must have as many tasks as masks, {tasks}, got {theirs}")


def check_task_linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    masks: Sequence[Tensor],
    bias: Tensor | None,
    bias_masks: Sequence[Tensor] | None,
    groups: int = 1,
) -> None:
    """Refuse arguments of :func:`task_masked_linear` that do not fit, all but the values of ``slots``."""
    check_masks(masks, weight)
    check_sizes("weight", weight.shape)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the rows of weight, {weight.shape[0]}, got {groups}")
    check_batch_input(input, weight, groups)
    check_slots(slots, input, weight)
    check_task_bias(weight, masks, bias, bias_masks)


def check_mask_logits(mask_logits: Tensor, threshold: float) -> None:
    """Refuse what :func:`pack_mask` cannot pack."""
    if not isinstance(mask_logits, Tensor):
        raise TypeError(f"mask_logits must be a tensor, got {type(mask_logits).__name__}")
    if mask_logits.dtype not in DTYPES:
        raise TypeError(f"mask_logits must be float64, float32, bfloat16 or float16, got {mask_logits.dtype}")
    if mask_logits.dim() == 0:
        raise ValueError("mask_logits must be [out, ...] or [n], got a scalar")
    check_sizes("mask_logits", mask_logits.shape)
    if not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a number, got {threshold!r}")
    if threshold != threshold:
        raise ValueError("threshold must be a number, got nan")


def has_values(tensor: Tensor) -> bool:
    """True if a check may look at numbers: not under torch.compile, in torch.func's transforms, on ``meta`` or of a fake tensor."""
    return not (torch.compiler.is_compiling() or torch_private.in_transform() or tensor.is_meta or torch_private.is_fake(tensor))


def nan_flag(tensor: Tensor) -> Tensor:
    """True if a number of ``tensor`` is NaN, as a tensor of one: a GPU is not waited for. NaN is the largest for ``amax``."""
    tensor = whole(tensor.detach())  # every process has to come to the same result
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=tensor.device)
    return tensor.detach().amax().isnan()


def first_true(flags: Sequence[Tensor]) -> int | None:
    """The position of the first flag that is set, None without one: one transfer from each device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, flag in enumerate(flags):
        by_device.setdefault(flag.device, []).append(index)
    found: list[int] = []
    for indices in by_device.values():
        values = torch.stack([flags[index] for index in indices]).tolist()
        found += [index for index, value in zip(indices, values) if value]
    return min(found, default=None)


def check_shape(packed: Tensor, shape: Sequence[int]) -> None:
    """Refuse a packed mask that is not that of a mask of ``shape``."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"packed must be a tensor, got {type(packed).__name__}")
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, as pack_mask gives it, got {packed.dtype}")
    if len(shape) == 0 or any(n < 0 for n in shape):
        raise ValueError(f"shape must be [out, ...] or [n], got {list(shape)}")
    check_sizes("shape", shape)
    if tuple(packed.shape) != packed_shape(shape):
        raise ValueError(f"packed must be {list(packed_shape(shape))} for the shape {list(shape)}, got {list(packed.shape)}")


def _check_packed_masks(name: str, packed: Sequence[Tensor], task: tuple[int, ...], words: str, weight: Tensor) -> int:
    """Refuse masks of another dtype, shape or device than wanted; the number of tasks."""
    for tensor in packed:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(tensor).__name__} in it")
    stacked = len(packed) == 1 and packed[0].dim() == len(task) + 1
    for index, tensor in enumerate(packed):
        which = name if stacked else f"{name}[{index}]"
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{which} must be uint8, as pack_mask gives it, got {tensor.dtype}")
        if tuple(tensor.shape[1:] if stacked else tensor.shape) != task:
            start = "[tasks, " if stacked else "["
            raise ValueError(f"{which} must be {start}{words}], a task's being {list(task)}, got {list(tensor.shape)}")
        if stacked:
            check_sizes(name, tensor.shape)
            check_tasks(name, tensor.shape[0])
        if tensor.device != weight.device:
            raise ValueError(f"{which} must be on the device of weight, {weight.device}, got {tensor.device}")
    return packed[0].shape[0] if stacked else len(packed)


def check_packed_weight(weight: Tensor, packed: Sequence[Tensor], groups: int) -> int:
    """Refuse a weight that is not ``[out, in]``, or masks that are not its own; the number of tasks."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    check_sizes("weight", weight.shape)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must be at least 1 and divide out = {weight.shape[0]}, got {groups}")
    return _check_packed_masks("packed", packed, packed_shape(weight.shape), "out, ceil(in / 8)", weight)


def check_batch_input(input: Tensor, weight: Tensor, groups: int) -> None:
    """Refuse the input of a mixed-task batch that does not fit the weight."""
    check_input(input, weight)
    wanted = groups * weight.shape[1]
    if groups * max(weight.shape[1], 1) > MOST_ELEMENTS:
        raise ValueError(
            f"groups times the columns of weight must be at most 2**48, got groups={groups} and weight {list(weight.shape)}"
        )
    if input.dim() < 2 or input.shape[-1] != wanted:
        raise ValueError(
            f"input must be [B, ..., in] with in = {wanted} as in weight {list(weight.shape)} with groups={groups}, "
            f"got {list(input.shape)}"
        )
    check_rows(input.shape, weight.shape[0])


def check_batch_grad(grad: Tensor, input: Tensor, weight: Tensor) -> None:
    """Refuse a gradient of the output, ``[B, ..., out]``, that does not fit."""
    if not isinstance(grad, Tensor):
        raise TypeError(f"grad must be a tensor, got {type(grad).__name__}")
    check_storage("grad", grad.dtype, weight)
    wanted_shape = (*input.shape[:-1], weight.shape[0])
    if grad.shape != wanted_shape:
        raise ValueError(f"grad must be [B, ..., out] = {list(wanted_shape)}, got {list(grad.shape)}")
    if grad.device != weight.device:
        raise ValueError(f"grad must be on the device of weight, {weight.device}, got {grad.device}")


def check_packed_bias(weight: Tensor, bias: Tensor | None, packed_bias: Sequence[Tensor] | None, tasks: int) -> None:
    """Refuse a bias that is not ``[out]``, and masks that do not belong to it."""
    if bias is None:
        if packed_bias is not None:
            raise ValueError("packed_bias needs a bias, got bias=None")
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, got {type(bias).__name__}")
    if packed_bias is not None:
        its = _check_packed_masks("packed_bias", packed_bias, (packed_bytes(weight.shape[0]),), "ceil(out / 8)", weight)
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias must have the dtype of weight, {weight.dtype}, got {bias.dtype}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [out] = {list(weight.shape[:1])}, got {list(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"bias must be on the device of weight, {weight.device}, got {bias.device}")
    if packed_bias is not None and its != tasks:
        raise ValueError(f"packed_bias must have the tasks of packed, {tasks}, got {its}")


def check_packed_linear(
    input: Tensor,
    slots: Tensor,
    weight: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    packed_bias: Sequence[Tensor] | None,
    groups: int,
) -> int:
    """Refuse arguments of :func:`packed_masked_linear` that do not fit, all but the values of ``slots``; the number of tasks."""
    tasks = check_packed_weight(weight, packed, groups)
    check_batch_input(input, weight, groups)
    check_slots(slots, input, weight)
    if tasks == 0 and len(slots) > 0:
        raise ValueError("packed must hold at least one task, got none")
    check_packed_bias(weight, bias, packed_bias, tasks)
    return tasks


def check_superposition(grad: Tensor, input: Tensor, weight: Tensor, packed: Sequence[Tensor], groups: int) -> int:
    """Refuse arguments of :func:`superposition_gradient` that do not fit; the number of tasks."""
    check_dense(grad=grad, input=input, weight=weight, packed=packed)
    tasks = check_packed_weight(weight, packed, groups)
    check_batch_input(input, weight, groups)
    check_batch_grad(grad, input, weight)
    check_sizes("the result", (input.shape[0], tasks))
    return tasks


def check_dense(**arguments: object) -> None:
    """Refuse tensors, also in sequences, that the kernels cannot read: sparse, nested and quantised ones, and oneDNN's own layout.

    Raises:
        TypeError: names the argument, its layout, and the function that makes it a dense tensor.
    """
    for name, given in arguments.items():
        for index, tensor in enumerate(given if isinstance(given, (list, tuple)) else [given]):
            if not isinstance(tensor, Tensor):
                continue
            which = f"{name}[{index}]" if isinstance(given, (list, tuple)) else name
            if tensor.is_nested:
                got, instead = "a nested one", "pad it (torch.nested.to_padded_tensor), or give its parts one by one"
            elif tensor.is_quantized:
                got, instead = f"a quantised one, {tensor.dtype}", f"use {which}.dequantize()"
            elif (stored := stored_as(tensor)) is not None:
                got, instead = f"a quantised one, {type(tensor).__name__} ({stored})", f"use {which}.dequantize()"
            elif tensor.layout is not torch.strided:
                got, instead = f"one of layout {tensor.layout}", f"use {which}.to_dense()"
            else:
                continue
            raise TypeError(f"{which} must be a dense tensor, got {got}: {instead}")


def stored_as(tensor: Tensor) -> torch.dtype | None:
    """The dtype of the integers, or floating-point numbers of 8 bits, in which a tensor of another dtype keeps its values.

    So do torchao's quantised weights: they say that they are float32, and are made of tensors of int8. None for others.
    """
    if torch.compiler.is_compiling() or not torch_private.is_made_of_tensors(tensor) or tensor.is_nested:
        return None
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # what tensors made of others have
    for part in (getattr(tensor, name) for name in names):
        stored = stored_as(part)
        if stored is None and (part.dtype.itemsize < 2 or not part.is_floating_point()):
            stored = part.dtype
        if stored is not None:
            return stored
    return None


def check_layer_input(input: object, device: torch.device) -> None:
    """Refuse an input of a layer that is no dense tensor of floating point on its device."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    check_dense(input=input)
    if input.dtype not in DTYPES:
        raise TypeError(f"input must be float64, float32, bfloat16 or float16, got {input.dtype}")
    if input.device != device:
        raise ValueError(f"input must be on the device of the layer, {device}, got {input.device}")
