"""Tensors of the same values in every layout of memory, and every op with its tensor arguments: for the sweep of strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from support.step_checks import SETTINGS, state_of
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import metamask_ext as mm
from metamask_ext.ops.conv2d import raw as conv2d_raw
from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.mixed_task import raw as mixed_task_raw
from metamask_ext.ops.packed import raw as packed_raw
from metamask_ext.ops.packed import reference as packed_reference
from metamask_ext.ops.weight import raw as weight_raw
from metamask_ext.ops.weight.raw import Rule

GATE = (0, 0.5)


def _gaps(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory whose values spoil every result: NaN, a slot that is no task's, bits that no mask has."""
    poison = float("nan") if like.is_floating_point() else -1 if like.dtype == torch.int64 else 0x5A
    return torch.full(tuple(shape), poison, dtype=like.dtype, device=like.device)


def sliced(tensor: Tensor) -> Tensor:
    """Every second element of each row."""
    memory = _gaps((*tensor.shape[:-1], 2 * tensor.shape[-1]), tensor)
    memory[..., ::2] = tensor
    return memory[..., ::2]


def sliced_rows(tensor: Tensor) -> Tensor:
    """Every second row; a single row keeps a stride that no contiguous tensor has."""
    memory = _gaps((2 * len(tensor), *tensor.shape[1:]), tensor)
    memory[::2] = tensor
    return memory[::2]


def column(tensor: Tensor) -> Tensor:
    """Column 1 of 3, where a row of the wider tensor holds an element of this one."""
    memory = _gaps((*tensor.shape, 3), tensor)
    memory[..., 1] = tensor
    return memory[..., 1]


def expanded_rows(tensor: Tensor) -> Tensor:
    """The first row for all: stride 0. The values are others."""
    return tensor[:1].clone().expand(tensor.shape)


def expanded_columns(tensor: Tensor) -> Tensor:
    """The first column for all: stride 0. The values are others."""
    return tensor[..., :1].clone().expand(tensor.shape)


def transposed(tensor: Tensor) -> Tensor:
    """The last two dimensions the other way round in memory."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else column(tensor)


def reversed_order(tensor: Tensor) -> Tensor:
    """All dimensions the other way round in memory."""
    order = tuple(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else column(tensor)


def offset(tensor: Tensor) -> Tensor:
    """Contiguous, one element behind a buffer's begin: no vector is aligned."""
    memory = _gaps((tensor.numel() + 1,), tensor)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


def sliced_with_offset(tensor: Tensor) -> Tensor:
    memory = _gaps((*tensor.shape[:-1], 2 * tensor.shape[-1]), tensor)
    memory[..., 1::2] = tensor
    return memory[..., 1::2]


def negated(tensor: Tensor) -> Tensor:
    """A view that torch negates lazily, as the imaginary part of a conjugate is."""
    return torch._neg_view(-tensor) if tensor.is_floating_point() else sliced(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    layout.__name__: layout
    for layout in (
        *(sliced, sliced_rows, column, expanded_rows, expanded_columns, transposed),
        *(reversed_order, channels_last, offset, sliced_with_offset, negated),
    )
}


def contiguous(tree):
    """The same values, each tensor in memory of its own."""
    return tree_map(
        lambda leaf: leaf.clone(memory_format=torch.contiguous_format).resolve_neg() if isinstance(leaf, Tensor) else leaf, tree
    )


def laid_out(tree, layout: Callable[[Tensor], Tensor]):
    return tree_map(lambda leaf: layout(leaf) if isinstance(leaf, Tensor) else leaf, tree)


class Sizes(NamedTuple):
    batch: int
    rows: int
    inputs: int
    outputs: int
    tasks: int


# Whole vectors in every type; remainders everywhere; one of each and one row, where a stride says nothing; many rows a task
SIZES = {
    "whole": Sizes(6, 1, 64, 24, 3),
    "ragged": Sizes(5, 3, 17, 9, 4),
    "ones": Sizes(1, 1, 1, 1, 1),
    "row": Sizes(1, 1, 32, 1, 1),
    "many": Sizes(70, 1, 20, 8, 3),
}

Arguments = dict[str, object]
Case = tuple[Callable[..., object], Arguments]


class Make:
    """Random tensors of one case."""

    def __init__(
        self, sizes: Sizes, dtype: torch.dtype, mask_dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.sizes, self.dtype, self.mask_dtype, self.device = sizes, dtype, mask_dtype or dtype, device
        self.generator = torch.Generator().manual_seed(3)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, dtype or self.dtype)

    def dtype_of(self, name: str) -> torch.dtype:
        """That of the logits, and of what belongs to them, by the argument's name."""
        return self.mask_dtype if "mask" in name else self.dtype

    def slots(self) -> Tensor:
        return torch.tensor([(i * i + 1) % self.sizes.tasks for i in range(self.sizes.batch)], device=self.device)

    def weights(self, *names: str) -> Arguments:
        return {name: self.random(self.sizes.outputs, self.sizes.inputs, dtype=self.dtype_of(name)) for name in names}

    def biases(self, *names: str) -> Arguments:
        return {name: self.random(self.sizes.outputs, dtype=self.dtype_of(name)) for name in names}

    def input(self) -> Tensor:
        return self.random(self.sizes.batch, self.sizes.rows, self.sizes.inputs)

    def grad(self) -> Tensor:
        return self.random(self.sizes.batch, self.sizes.rows, self.sizes.outputs)

    def matrices(self) -> Arguments:
        """Input and gradient without a dimension between."""
        return {
            "grad": self.random(self.sizes.batch, self.sizes.outputs),
            "input": self.random(self.sizes.batch, self.sizes.inputs),
        }

    def masks(self, *shape: int) -> list[Tensor]:
        return [self.random(*shape, dtype=self.mask_dtype) for _ in range(self.sizes.tasks)]

    def packed(self, *shape: int) -> list[Tensor]:
        return [packed_reference.pack_mask(mask, 0.0) for mask in self.masks(*shape)]


def _stack(masks: list[Tensor], stacked: bool) -> list[Tensor]:
    return [torch.stack(masks)] if stacked else masks


def _masked_weight(make: Make) -> Case:
    return (lambda **of: weight_raw.masked_weight(*of.values(), *GATE)), make.weights("weight", "mask_logits")


def _masked_weight_backward(make: Make) -> Case:
    arguments = make.weights("grad", "weight", "mask_logits")
    return (lambda **of: weight_raw.masked_weight_backward(*of.values(), *GATE)), arguments


def _masked_weight_double_backward(make: Make) -> Case:
    arguments = make.weights("cotangent_weight", "cotangent_mask", "grad", "weight", "mask_logits")
    return (lambda **of: weight_raw.masked_weight_double_backward(*of.values(), *GATE)), arguments


def _lists(make: Make, *names: str) -> Arguments:
    outputs, inputs = make.sizes.outputs, make.sizes.inputs
    shapes = ((outputs, inputs), (outputs,), (2, 1, 3, 3))
    return {name: [make.random(*shape, dtype=make.dtype_of(name)) for shape in shapes] for name in names}


def _masked_weight_list(make: Make) -> Case:
    return (lambda **of: weight_raw.masked_weight_list(*of.values(), *GATE)), _lists(make, "weight", "mask_logits")


def _masked_weight_list_backward(make: Make) -> Case:
    return (lambda **of: weight_raw.masked_weight_list_backward(*of.values(), *GATE)), _lists(make, "grad", "weight", "mask_logits")


def _masked_weight_list_double_backward(make: Make) -> Case:
    arguments = _lists(make, "cotangent_weight", "cotangent_mask", "grad", "weight", "mask_logits")
    return (lambda **of: weight_raw.masked_weight_list_double_backward(*of.values(), *GATE)), arguments


def _linear_arguments(make: Make) -> Arguments:
    return {"input": make.input(), **make.weights("weight", "mask_logits"), **make.biases("bias", "bias_mask_logits")}


def _masked_linear(make: Make) -> Case:
    return (lambda **of: linear_raw.masked_linear(*of.values(), *GATE)), _linear_arguments(make)


def _masked_linear_plain_bias(make: Make) -> Case:
    """The bias without logits, and a matrix as the input."""
    arguments = {"input": make.matrices()["input"], **make.weights("weight", "mask_logits"), **make.biases("bias")}
    return (lambda **of: linear_raw.masked_linear(*of.values(), None, *GATE)), arguments


def _masked_linear_bfloat16(make: Make) -> Case:
    """As under autocast: the product in another type than the parameters."""
    arguments = {"input": make.matrices()["input"], **make.weights("weight", "mask_logits"), **make.biases("bias")}
    dtype = make.dtype if make.dtype == torch.float64 else torch.bfloat16
    return (lambda **of: linear_raw.masked_linear(*of.values(), None, *GATE, dtype)), arguments


def _masked_linear_backward(make: Make) -> Case:
    arguments = {"grad": make.grad(), **_linear_arguments(make)}
    return (lambda **of: linear_raw.masked_linear_backward(*of.values(), *GATE)), arguments


def _masked_linear_backward_bfloat16(make: Make) -> Case:
    """As under autocast, and the bias without logits."""
    arguments = {**make.matrices(), **make.weights("weight", "mask_logits"), **make.biases("bias")}
    if make.dtype != torch.float64:
        arguments["grad"] = arguments["grad"].bfloat16()
    needs = (True, True, True, True, False)
    return (lambda **of: linear_raw.masked_linear_backward(*of.values(), None, *GATE, needs)), arguments


def _weight_step(make: Make, rule: Rule, updates: tuple[bool, bool]) -> Case:
    """The arguments that no step changes; what a step changes is contiguous, and part of the result."""
    names = ("weight", "mask_logits")
    updated = make.weights(*(name for name, update in zip(names, updates) if update))

    def run(grad, **of):
        mine = contiguous(updated)
        ordered = [{**of, **mine}[name] for name in names]
        states = [state_of(rule, p) if update else None for p, update in zip(ordered, updates)]
        got = weight_raw.UPDATES[rule](grad, *ordered, *GATE, (True, True), updates, states, SETTINGS[rule][:2])
        return got, list(mine.values()), states

    return run, make.weights("grad", *(name for name in names if name not in updated))


def _linear_step(make: Make, rule: Rule, updates: tuple[bool, bool, bool, bool]) -> Case:
    """As :func:`_weight_step`, of all four parameters."""
    every = {**make.weights("weight", "mask_logits"), **make.biases("bias", "bias_mask_logits")}
    updated = {name: tensor for (name, tensor), update in zip(every.items(), updates) if update}

    def run(grad, input, **of):
        mine = contiguous(updated)
        ordered = [{**of, **mine}[name] for name in every]
        states = [state_of(rule, p) if update else None for p, update in zip(ordered, updates)]
        got = linear_raw.UPDATES[rule](grad, input, *ordered, *GATE, (True,) * 5, updates, states, SETTINGS[rule])
        return got, list(mine.values()), states

    kept = {name: tensor for name, tensor in every.items() if name not in updated}
    return run, {"grad": make.grad(), "input": make.input(), **kept}


def _task_arguments(make: Make, stacked: bool) -> Arguments:
    outputs, inputs = make.sizes.outputs, make.sizes.inputs
    return {
        "input": make.input(),
        "slots": make.slots(),
        **make.weights("weight"),
        "masks": _stack(make.masks(outputs, inputs), stacked),
        **make.biases("bias"),
        "bias_masks": _stack(make.masks(outputs), stacked),
    }


def _task_masked_linear(make: Make, stacked: bool) -> Case:
    return (lambda **of: mixed_task_raw.task_masked_linear(*of.values(), *GATE)), _task_arguments(make, stacked)


def _task_masked_linear_plain_bias(make: Make) -> Case:
    arguments = _task_arguments(make, True)
    del arguments["bias_masks"]
    return (lambda **of: mixed_task_raw.task_masked_linear(*of.values(), [], *GATE)), arguments


def _task_masked_linear_backward(make: Make, stacked: bool) -> Case:
    arguments = {"grad": make.grad(), **_task_arguments(make, stacked)}
    return (lambda **of: mixed_task_raw.task_masked_linear_backward(*of.values(), *GATE)), arguments


def _task_masked_linear_double_backward(make: Make, stacked: bool) -> Case:
    outputs, inputs = make.sizes.outputs, make.sizes.inputs
    arguments = {
        "cotangent_input": make.input(),
        **make.weights("cotangent_weight"),
        "cotangent_masks": _stack(make.masks(outputs, inputs), stacked),
        **make.biases("cotangent_bias"),
        "cotangent_bias_masks": _stack(make.masks(outputs), stacked),
        "grad": make.grad(),
        **_task_arguments(make, stacked),
    }
    return (lambda **of: mixed_task_raw.task_masked_linear_double_backward(*of.values(), *GATE)), arguments


def _pack_mask(make: Make) -> Case:
    return (lambda mask_logits: packed_raw.pack_mask(mask_logits, 0.0)), make.weights("mask_logits")


def _unpack_mask(make: Make) -> Case:
    shape = (make.sizes.outputs, make.sizes.inputs)
    return (lambda packed: packed_raw.unpack_mask(packed, shape)), {"packed": make.packed(*shape)[0]}


def _packed_arguments(make: Make, stacked: bool) -> Arguments:
    outputs, inputs = make.sizes.outputs, make.sizes.inputs
    return {
        "input": make.input(),
        "slots": make.slots(),
        **make.weights("weight"),
        "packed": _stack(make.packed(outputs, inputs), stacked),
        **make.biases("bias"),
        "packed_bias": _stack(make.packed(outputs), stacked),
    }


def _packed_masked_linear(make: Make, stacked: bool) -> Case:
    return (lambda **of: packed_raw.packed_masked_linear(*of.values(), 1)), _packed_arguments(make, stacked)


def _packed_masked_linear_plain_bias(make: Make) -> Case:
    arguments = _packed_arguments(make, False)
    del arguments["packed_bias"]
    return (lambda **of: packed_raw.packed_masked_linear(*of.values(), None, 1)), arguments


def _packed_masked_linear_backward(make: Make, stacked: bool) -> Case:
    arguments = {"grad": make.grad(), **_packed_arguments(make, stacked)}
    return (lambda **of: packed_raw.packed_masked_linear_backward(*of.values(), 1)), arguments


def _packed_superposition_gradient(make: Make, stacked: bool) -> Case:
    masks = _stack(make.packed(make.sizes.outputs, make.sizes.inputs), stacked)
    arguments = {"grad": make.grad(), "input": make.input(), **make.weights("weight"), "packed": masks}
    return (lambda **of: packed_raw.packed_superposition_gradient(*of.values(), 1)), arguments


def _im2col(make: Make) -> Case:
    images = make.random(make.sizes.batch, make.sizes.tasks, 5, 4)
    return (lambda input: conv2d_raw.im2col(input, (3, 2), (2, 1), (1, 0), (1, 2))), {"input": images}


def _col2im(make: Make) -> Case:
    size = (make.sizes.batch, make.sizes.tasks, 5, 4)
    geometry = (3, 2), (2, 1), (1, 0), (1, 2)
    grad = make.random(make.sizes.batch, 3 * 2, make.sizes.tasks * 6)
    return (lambda grad: conv2d_raw.col2im(grad, size, *geometry)), {"grad": grad}


def _both(case: Callable[[Make, bool], Case], name: str) -> dict[str, Callable[[Make], Case]]:
    return {f"{name} stacked": lambda make: case(make, True), f"{name} list": lambda make: case(make, False)}


RAW: dict[str, Callable[[Make], Case]] = {
    "masked_weight": _masked_weight,
    "masked_weight_backward": _masked_weight_backward,
    "masked_weight_double_backward": _masked_weight_double_backward,
    "masked_weight_backward_sgd_ weight": lambda make: _weight_step(make, "sgd", (True, False)),
    "masked_weight_backward_sgd_ mask": lambda make: _weight_step(make, "sgd", (False, True)),
    "masked_weight_backward_sgd_ both": lambda make: _weight_step(make, "sgd", (True, True)),
    "masked_weight_backward_adamw_ weight": lambda make: _weight_step(make, "adamw", (True, False)),
    "masked_weight_list": _masked_weight_list,
    "masked_weight_list_backward": _masked_weight_list_backward,
    "masked_weight_list_double_backward": _masked_weight_list_double_backward,
    "masked_linear": _masked_linear,
    "masked_linear plain bias": _masked_linear_plain_bias,
    "masked_linear bfloat16": _masked_linear_bfloat16,
    "masked_linear_backward": _masked_linear_backward,
    "masked_linear_backward bfloat16": _masked_linear_backward_bfloat16,
    "masked_linear_backward_sgd_ weight, bias mask": lambda make: _linear_step(make, "sgd", (True, False, False, True)),
    "masked_linear_backward_sgd_ mask, bias": lambda make: _linear_step(make, "sgd", (False, True, True, False)),
    "masked_linear_backward_sgd_ all": lambda make: _linear_step(make, "sgd", (True,) * 4),
    "masked_linear_backward_adamw_ weight, bias mask": lambda make: _linear_step(make, "adamw", (True, False, False, True)),
    "masked_linear_backward_adamw_ all": lambda make: _linear_step(make, "adamw", (True,) * 4),
    **_both(_task_masked_linear, "task_masked_linear"),
    "task_masked_linear plain bias": _task_masked_linear_plain_bias,
    **_both(_task_masked_linear_backward, "task_masked_linear_backward"),
    **_both(_task_masked_linear_double_backward, "task_masked_linear_double_backward"),
    "pack_mask": _pack_mask,
    "unpack_mask": _unpack_mask,
    **_both(_packed_masked_linear, "packed_masked_linear"),
    "packed_masked_linear plain bias": _packed_masked_linear_plain_bias,
    **_both(_packed_masked_linear_backward, "packed_masked_linear_backward"),
    **_both(_packed_superposition_gradient, "packed_superposition_gradient"),
    "im2col": _im2col,
    "col2im": _col2im,
}


def _conv_weights(make: Make, *names: str) -> Arguments:
    return {name: make.random(make.sizes.outputs, 2, 3, 3, dtype=make.dtype_of(name)) for name in names}


def _images(make: Make) -> Tensor:
    return make.random(make.sizes.batch, 2, 4, 5)


def _packed_conv(make: Make) -> list[Tensor]:
    return [torch.stack(make.packed(make.sizes.outputs, 18))]


# Public functions; of those with a derivative the gradients are part of the result.
PUBLIC: dict[str, Callable[[Make], Case]] = {
    "masked_weight": lambda make: (mm.masked_weight, make.weights("weight", "mask_logits")),
    "masked_weight of a sequence": lambda make: (mm.masked_weight, _lists(make, "weight", "mask_logits")),
    "masked_linear": lambda make: (mm.masked_linear, _linear_arguments(make)),
    "masked_linear plain bias": lambda make: (mm.masked_linear, dict(list(_linear_arguments(make).items())[:-1])),
    "masked_conv2d": lambda make: (
        mm.masked_conv2d,
        {"input": _images(make), **_conv_weights(make, "weight", "mask_logits"), **make.biases("bias", "bias_mask_logits")},
    ),
    "masked_conv2d few places": lambda make: (
        mm.masked_conv2d,
        {
            "input": make.random(1, 2, 3, 3),
            **_conv_weights(make, "weight", "mask_logits"),
            **make.biases("bias", "bias_mask_logits"),
        },
    ),
    "task_masked_linear": lambda make: (
        lambda masks, bias_masks, **of: mm.task_masked_linear(masks=masks[0], bias_masks=bias_masks[0], **of),
        _task_arguments(make, True),
    ),
    "task_masked_linear list": lambda make: (mm.task_masked_linear, _task_arguments(make, False)),
    "task_masked_conv2d": lambda make: (
        mm.task_masked_conv2d,
        {
            "input": _images(make),
            "slots": make.slots(),
            **_conv_weights(make, "weight"),
            "masks": make.masks(make.sizes.outputs, 2, 3, 3),
            **make.biases("bias"),
            "bias_masks": make.masks(make.sizes.outputs),
        },
    ),
    "pack_mask": lambda make: (mm.pack_mask, {"mask_logits": make.random(make.sizes.outputs, 2, 3, 3)}),
    "unpack_mask": lambda make: (
        lambda packed: mm.unpack_mask(packed, (make.sizes.outputs, 2, 3, 3)),
        {"packed": make.packed(make.sizes.outputs, 18)[0]},
    ),
    "packed_masked_linear": lambda make: (mm.packed_masked_linear, _packed_arguments(make, False)),
    "packed_masked_conv2d": lambda make: (
        lambda packed, packed_bias, **of: mm.packed_masked_conv2d(packed=packed[0], packed_bias=packed_bias[0], **of),
        {
            "input": _images(make),
            "slots": make.slots(),
            **_conv_weights(make, "weight"),
            "packed": _packed_conv(make),
            **make.biases("bias"),
            "packed_bias": [torch.stack(make.packed(make.sizes.outputs))],
        },
    ),
}


def with_gradients(run: Callable[..., object], arguments: Arguments, layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The result, and its gradients along a cotangent that has ``layout``, by all arguments that can have one."""
    arguments = tree_map(
        lambda leaf: leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, arguments
    )
    with torch.no_grad():
        plain = tree_leaves(run(**arguments))
    outputs = tree_leaves(run(**arguments))
    if not any(output.requires_grad for output in outputs):
        return outputs
    generator = torch.Generator().manual_seed(4)
    cotangents = [
        layout(torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)) for output in outputs
    ]
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return [*plain, *outputs, *torch.autograd.grad(outputs, leaves, cotangents)]
