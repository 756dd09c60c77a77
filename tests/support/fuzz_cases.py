"""Random arguments that fit each op: sizes with remainders and zeros, every dtype, layouts of memory, None."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from support.strides import LAYOUTS
from torch import Tensor

from metamask_ext.ops.gate import HARD, SIGMOID
from metamask_ext.ops.packed.reference import pack_mask

PARAMETERS = (
    *((dtype, dtype) for dtype in (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)
"""Dtypes of a weight and of its logits that go together, the usual ones more often."""
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129)
LARGE = (257, 511, 640, 1030)
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 1e38, -1e38, 88.0, -88.0, 104.0, -745.0, 1e-310)

Arguments = list[object]


class Case(NamedTuple):
    op: str
    arguments: Arguments


class Make:
    """Choices of one case. Its numbers depend on the seed and the case's number alone."""

    def __init__(self, seed: int, index: int) -> None:
        self.chance = random.Random(f"{seed} {index}")
        self.generator = torch.Generator().manual_seed(self.chance.randrange(2**31))
        self.weight, self.logits = self.chance.choice(PARAMETERS)
        self.special = 0.0

    def is_so(self, probability: float) -> bool:
        return self.chance.random() < probability

    def size(self) -> int:
        return self.chance.choice(LARGE if self.is_so(0.04) else SIZES)

    def flags(self, count: int) -> list[bool]:
        return [self.is_so(0.8) for _ in range(count)]

    def product(self) -> torch.dtype:
        """A dtype in which a product with the weight can be taken."""
        return torch.float64 if self.weight == torch.float64 else self.chance.choice((torch.float32, *SIXTEEN_BITS))

    def dtype(self) -> torch.dtype | None:
        return self.product() if self.is_so(0.5) else None

    def gate(self) -> list[object]:
        if self.is_so(0.6):
            return [SIGMOID, self.chance.choice((1.0, 0.5, 2.0, 0.02, 10.0, 1e-3, 37.5))]
        return [HARD, self.chance.choice((0.0, 0.5, -1.0, 1e-3))]

    def random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)
        if self.special and tensor.numel():
            places = torch.rand(tensor.shape, generator=self.generator) < self.special
            chosen = torch.randint(len(SPECIAL), tensor.shape, generator=self.generator)
            tensor = torch.where(places, torch.tensor(SPECIAL, dtype=torch.float64)[chosen], tensor)
        return tensor.to(dtype)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The tensor in another layout of memory; an expanded one has other values."""
        return self.chance.choice(list(LAYOUTS.values()))(tensor) if tensor.dim() and self.is_so(0.5) else tensor

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.laid_out(self.random(shape, dtype))

    def maybe(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        return self.tensor(shape, dtype) if self.is_so(0.7) else None

    def stacked(self, tensors: list[Tensor]) -> list[Tensor]:
        """One tensor for all tasks, or a list."""
        if tensors and self.is_so(0.5):
            return [self.laid_out(torch.stack(tensors))]
        return [self.laid_out(tensor) for tensor in tensors]

    def bits(self, shape: Sequence[int], tasks: int) -> list[Tensor]:
        return self.stacked([pack_mask(self.random(shape, torch.float32), 0.0) for _ in range(tasks)])


def _shape(make: Make) -> list[int]:
    shape = [make.size() for _ in range(make.chance.choice((0, 1, 2, 2, 3, 4)))]
    return [min(size, 9) for size in shape] if len(shape) > 2 else shape


def _pair(make: Make, shape: Sequence[int]) -> list[Tensor]:
    return [make.tensor(shape, make.weight), make.tensor(shape, make.logits)]


def _with_specials(make: Make) -> None:
    make.special = make.chance.choice((0.0, 0.0, 0.02, 0.3))


def masked_weight(make: Make) -> Arguments:
    _with_specials(make)
    return [*_pair(make, _shape(make)), *make.gate(), make.dtype()]


def masked_weight_backward(make: Make) -> Arguments:
    shape = _shape(make)
    return [make.tensor(shape, make.product()), *_pair(make, shape), *make.gate(), make.flags(2)]


def masked_weight_double_backward(make: Make) -> Arguments:
    shape = _shape(make)
    cotangents = [make.maybe(shape, make.product()) for _ in range(2)]
    return [*cotangents, make.tensor(shape, make.product()), *_pair(make, shape), *make.gate(), make.flags(3)]


def _settings(make: Make) -> list[float]:
    return [make.chance.choice((0.1, 1.0)), make.chance.choice((0.0, 0.01)), make.chance.choice((0.0, 0.9))]


def _steps(
    make: Make, shapes: list[Sequence[int]], dtypes: list[torch.dtype]
) -> tuple[list[Tensor], list[bool], list[Tensor | None], list]:
    """Parameters, which of them take a step, their momentum buffers and settings."""
    updates, settings = [make.is_so(0.6) for _ in shapes], [_settings(make) for _ in shapes]
    parameters = [
        make.random(shape, dtype) if update else make.tensor(shape, dtype) for shape, dtype, update in zip(shapes, dtypes, updates)
    ]
    buffers = [
        make.random(shape, dtype) if update and its[2] else None
        for shape, dtype, update, its in zip(shapes, dtypes, updates, settings)
    ]
    return parameters, updates, buffers, settings


def masked_weight_backward_sgd_(make: Make) -> Arguments:
    shape = _shape(make)
    parameters, updates, buffers, settings = _steps(make, [shape, shape], [make.weight, make.logits])
    if updates[1]:  # a step walks through both in one order
        parameters[0] = make.random(shape, make.weight)
    return [make.tensor(shape, make.product()), *parameters, *buffers, *make.gate(), make.flags(2), updates, *settings]


def _adamw_steps(
    make: Make, shapes: list[Sequence[int]], dtypes: list[torch.dtype]
) -> tuple[list[Tensor], list[bool], list[Tensor], list[float]]:
    """The same for AdamW: the tensors that are kept of those which take a step, and the numbers of all."""
    parameters, updates, _, settings = _steps(make, shapes, dtypes)
    state: list[Tensor] = []
    for shape, dtype, update in zip(shapes, dtypes, updates):
        if update:
            count = torch.tensor(
                make.chance.choice((0.0, 1.0, 9.0, 1000.0)), dtype=make.chance.choice((torch.float32, torch.float64))
            )
            state += [make.random(shape, dtype), make.random(shape, dtype).square_().add_(0.5), count]
    numbers = []
    for lr, decay, _ in settings:
        numbers += [
            lr,
            make.chance.choice((0.0, 0.5, 0.9)),
            make.chance.choice((0.5, 0.999)),
            make.chance.choice((0.0, 1e-8)),
            decay,
        ]
    return parameters, updates, state, numbers


def masked_weight_backward_adamw_(make: Make) -> Arguments:
    shape = _shape(make)
    parameters, updates, state, numbers = _adamw_steps(make, [shape, shape], [make.weight, make.logits])
    if updates[1]:
        parameters[0] = make.random(shape, make.weight)
    return [make.tensor(shape, make.product()), *parameters, state, *make.gate(), make.flags(2), updates, numbers]


def _lists(make: Make) -> tuple[list[list[int]], list[Tensor], list[Tensor]]:
    shapes = [_shape(make) for _ in range(make.chance.choice((1, 2, 5)))]
    return shapes, [make.tensor(shape, make.weight) for shape in shapes], [make.tensor(shape, make.logits) for shape in shapes]


def masked_weight_list(make: Make) -> Arguments:
    _with_specials(make)
    return [*_lists(make)[1:], *make.gate(), make.dtype()]


def masked_weight_list_backward(make: Make) -> Arguments:
    shapes, weight, logits = _lists(make)
    product = make.product()
    return [[make.tensor(shape, product) for shape in shapes], weight, logits, *make.gate(), make.flags(2)]


def masked_weight_list_double_backward(make: Make) -> Arguments:
    shapes, weight, logits = _lists(make)
    product = make.product()
    cotangents = [[make.maybe(shape, make.product()) for shape in shapes] if make.is_so(0.8) else [] for _ in range(2)]
    grads = [make.tensor(shape, product) for shape in shapes]
    return [*cotangents, grads, weight, logits, *make.gate(), make.flags(3)]


def _lead(make: Make) -> list[int]:
    """The sizes before the columns of an input."""
    if make.is_so(0.7):
        return [make.chance.choice((0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 70))]
    return [make.chance.choice((0, 1, 2, 3, 4)) for _ in range(make.chance.choice((0, 2, 3)))]


def _bias(make: Make, out: int) -> list[Tensor | None]:
    bias = make.maybe([out], make.weight)
    return [bias, None if bias is None else make.maybe([out], make.logits)]


def masked_linear(make: Make) -> Arguments:
    out, columns, lead = make.size(), make.size(), _lead(make)
    return [
        make.tensor([*lead, columns], make.product()),
        *_pair(make, [out, columns]),
        *_bias(make, out),
        *make.gate(),
        make.dtype(),
    ]


def masked_linear_backward(make: Make) -> Arguments:
    out, columns, lead = make.size(), make.size(), _lead(make)
    rows = [make.tensor([*lead, out], make.product()), make.tensor([*lead, columns], make.product())]
    return [*rows, *_pair(make, [out, columns]), *_bias(make, out), *make.gate(), make.flags(5)]


def masked_linear_backward_sgd_(make: Make) -> Arguments:
    out, columns, lead = make.size(), make.size(), _lead(make)
    shapes: list[Sequence[int]] = [[out, columns], [out, columns], [out], [out]]
    parameters, updates, buffers, settings = _steps(make, shapes, [make.weight, make.logits] * 2)
    given: list[Tensor | None] = list(parameters)
    if not (updates[2] or updates[3]) and make.is_so(0.5):
        given[2:] = [None, None]
    rows = [make.tensor([*lead, out], make.product()), make.tensor([*lead, columns], make.product())]
    numbers = [number for its in settings for number in its]
    return [*rows, *given, *buffers, *make.gate(), make.flags(5), updates, numbers]


def masked_linear_backward_adamw_(make: Make) -> Arguments:
    out, columns, lead = make.size(), make.size(), _lead(make)
    shapes: list[Sequence[int]] = [[out, columns], [out, columns], [out], [out]]
    parameters, updates, state, numbers = _adamw_steps(make, shapes, [make.weight, make.logits] * 2)
    given: list[Tensor | None] = list(parameters)
    if not (updates[2] or updates[3]) and make.is_so(0.5):
        given[2:] = [None, None]
    rows = [make.tensor([*lead, out], make.product()), make.tensor([*lead, columns], make.product())]
    return [*rows, *given, state, *make.gate(), make.flags(5), updates, numbers]


class Batch(NamedTuple):
    """Sizes of a mixed-task batch, and its slots."""

    lead: list[int]
    tasks: int
    groups: int
    out: int
    columns: int
    slots: Tensor


def _batch(make: Make) -> Batch:
    groups = make.chance.choice((1, 1, 1, 2, 3, 5))
    samples = make.chance.choice((0, 1, 2, 3, 5, 8, 17, 40))
    lead = [samples] if make.is_so(0.6) else [samples, make.chance.choice((0, 1, 2, 7))]
    tasks = make.chance.choice((1, 2, 3, 7))
    slots = torch.randint(tasks, (samples,), generator=make.generator)
    if make.is_so(0.3):
        slots = slots.sort().values
    return Batch(lead, tasks, groups, groups * min(make.size(), 200), make.size(), make.laid_out(slots))


def _task_arguments(make: Make, batch: Batch) -> Arguments:
    shape = [batch.out, batch.columns]
    masks = make.stacked([make.random(shape, make.logits) for _ in range(batch.tasks)])
    bias = make.maybe([batch.out], make.weight)
    bias_masks: list[Tensor] = []
    if bias is not None and make.is_so(0.6):
        bias_masks = make.stacked([make.random([batch.out], make.logits) for _ in range(batch.tasks)])
    input = make.tensor([*batch.lead, batch.groups * batch.columns], make.product())
    return [input, batch.slots, make.tensor(shape, make.weight), masks, bias, bias_masks, *make.gate(), batch.groups]


def task_masked_linear(make: Make) -> Arguments:
    return [*_task_arguments(make, _batch(make)), make.dtype()]


def task_masked_linear_backward(make: Make) -> Arguments:
    batch = _batch(make)
    return [make.tensor([*batch.lead, batch.out], make.product()), *_task_arguments(make, batch), make.flags(5)]


def task_masked_linear_double_backward(make: Make) -> Arguments:
    batch = _batch(make)
    given = _task_arguments(make, batch)
    input, _, weight, masks, bias, bias_masks = given[:6]

    def like(tensor: Tensor) -> Tensor | None:
        return make.maybe(tensor.shape, make.product())

    cotangents = [
        like(input),
        like(weight),
        [like(mask) for mask in masks] if make.is_so(0.8) else [],
        None if bias is None else like(bias),
        [like(mask) for mask in bias_masks] if make.is_so(0.8) else [],
    ]
    return [*cotangents, make.tensor([*batch.lead, batch.out], make.product()), *given, make.flags(6)]


def pack(make: Make) -> Arguments:
    return [make.tensor(_shape(make) or [3], make.weight), make.chance.choice((0.0, 0.5, -1.0, 1e-3, float("inf"), -float("inf")))]


def unpack(make: Make) -> Arguments:
    shape = _shape(make) or [3]
    return [make.laid_out(pack_mask(make.random(shape, torch.float32), 0.0)), shape]


def _packed_arguments(make: Make, batch: Batch) -> Arguments:
    shape = [batch.out, batch.columns]
    bias = make.maybe([batch.out], make.weight)
    bias_bits = make.bits([batch.out], batch.tasks) if bias is not None and make.is_so(0.6) else None
    input = make.tensor([*batch.lead, batch.groups * batch.columns], make.product())
    bits = make.bits(shape, batch.tasks)
    return [input, batch.slots, make.tensor(shape, make.weight), bits, bias, bias_bits, batch.groups]


def packed_masked_linear(make: Make) -> Arguments:
    return [*_packed_arguments(make, _batch(make)), make.dtype()]


def packed_masked_linear_backward(make: Make) -> Arguments:
    batch = _batch(make)
    return [make.tensor([*batch.lead, batch.out], make.product()), *_packed_arguments(make, batch), make.flags(3)]


def packed_superposition_gradient(make: Make) -> Arguments:
    batch = _batch(make)
    grad = make.tensor([*batch.lead, batch.out], make.product())
    input, _, weight, bits, *_ = _packed_arguments(make, batch)
    return [grad, input, weight, bits, batch.groups]


def _windows(make: Make) -> tuple[list[int], list[list[int]]]:
    """Sizes of images that are not smaller than the kernel, and the convolution's geometry."""
    kernel = [make.chance.choice((1, 2, 3, 5)), make.chance.choice((1, 2, 3))]
    stride, padding = ([make.chance.choice(values) for _ in range(2)] for values in ((1, 2, 3, 20), (0, 1, 2, 5)))
    dilation = [make.chance.choice((1, 2, 3)) for _ in range(2)]
    pixels = [max(d * (k - 1) + 1 - 2 * p, 0) + make.chance.choice((0, 1, 2, 9)) for d, k, p in zip(dilation, kernel, padding)]
    return [make.chance.choice((0, 1, 2, 3)), make.chance.choice((0, 1, 2, 5)), *pixels], [kernel, stride, padding, dilation]


def im2col(make: Make) -> Arguments:
    size, geometry = _windows(make)
    return [make.tensor(size, make.chance.choice((torch.float32, torch.float64))), *geometry]


def col2im(make: Make) -> Arguments:
    size, (kernel, *rest) = _windows(make)
    places = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size[2:], kernel, *rest)]
    shape = [size[0], places[0] * places[1], size[1] * kernel[0] * kernel[1]]
    return [make.tensor(shape, make.chance.choice((torch.float32, torch.float64))), size, kernel, *rest]


CASES: dict[str, Callable[[Make], Arguments]] = {
    **{
        make.__name__: make
        for make in (
            *(masked_weight, masked_weight_backward, masked_weight_double_backward, masked_weight_backward_sgd_),
            *(masked_weight_list, masked_weight_list_backward, masked_weight_list_double_backward),
            *(masked_linear, masked_linear_backward, masked_linear_backward_sgd_),
            *(masked_weight_backward_adamw_, masked_linear_backward_adamw_),
            *(task_masked_linear, task_masked_linear_backward, task_masked_linear_double_backward),
            *(packed_masked_linear, packed_masked_linear_backward, packed_superposition_gradient, im2col, col2im),
        )
    },
    "pack_mask": pack,
    "unpack_mask": unpack,
}


def fitting(make: Make) -> Case:
    op = make.chance.choice(list(CASES))
    return Case(op, CASES[op](make))
