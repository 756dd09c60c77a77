"""Every raw op with its arguments and its float64 result, for stages S1, S2 and S5."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metamask_ext.ops.gate import SIGMOID
from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.linear import reference as linear_reference
from metamask_ext.ops.mixed_task import raw as mixed_task_raw
from metamask_ext.ops.mixed_task import reference as mixed_task_reference
from metamask_ext.ops.packed import raw as packed_raw
from metamask_ext.ops.packed import reference as packed_reference
from metamask_ext.ops.weight import raw as weight_raw
from metamask_ext.ops.weight import reference as weight_reference

from .device import Sizes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GATE = (SIGMOID, 1.0)
SETTINGS = ((0.1, 0.01, 0.9), (0.2, 0.02, 0.8), (0.3, 0.03, 0.7), (0.4, 0.04, 0.6))
"""Rate, decay and momentum of weight, logits, bias and bias logits."""

UNITS = 8
"""One element may be off by so many units in the last place of the largest result, times the root of the number of additions."""

TF32_UNIT = 2.0**-11
Arguments = tuple[Any, ...]


class Inputs:
    """Random arguments of one dtype on one device; ``offset``: each begins one element after an aligned address."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: str, offset: bool, seed: int = 0) -> None:
        self.sizes, self.dtype, self._device, self._offset = sizes, dtype, device, offset
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return self._place(torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype))

    def slots(self, samples: int) -> Tensor:
        slots = torch.randint(0, self.sizes.tasks, (samples,), generator=self._generator)
        return slots.to(self._device)

    def bits(self, *shape: int) -> Tensor:
        packed = [packed_reference.pack_mask(torch.randn(shape, generator=self._generator), 0.0) for _ in range(self.sizes.tasks)]
        return self._place(torch.stack(packed))

    def _place(self, tensor: Tensor) -> Tensor:
        if not self._offset:
            return tensor.to(self._device)
        buffer = torch.full((tensor.numel() + 1,), 255 if tensor.dtype == torch.uint8 else torch.nan, dtype=tensor.dtype)
        buffer = buffer.to(self._device)
        buffer[1:] = tensor.flatten().to(self._device)
        return buffer[1:].view(tensor.shape)


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        make: its arguments.
        call: the op on them; all tensors that it makes or changes.
        exact: the same by the specification, on float64 arguments on the CPU.
        terms: how many products are added up to one element, at most.
    """

    name: str
    make: Callable[[Inputs], Arguments]
    call: Callable[..., Any]
    exact: Callable[..., Any]
    terms: Callable[[Sizes], int] = lambda sizes: 1


def share_of_tolerance(op: Op, arguments: Arguments, sizes: Sizes, unit: float | None = None) -> float:
    """Calls the op, and returns its largest error over what is allowed; more than 1 is wrong."""
    exact = leaves(op.exact(*tree_map(_double, arguments)))
    got = leaves(op.call(*arguments))
    assert len(got) == len(exact), f"{len(got)} results, expected {len(exact)}"
    return max(_share(one, wanted, op.terms(sizes), unit) for one, wanted in zip(got, exact))


def leaves(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _double(leaf: object) -> object:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().cpu().to(torch.float64 if leaf.is_floating_point() else leaf.dtype, copy=True)


def _share(got: Tensor, wanted: Tensor, terms: int, unit: float | None) -> float:
    assert got.shape == wanted.shape, f"shape {list(got.shape)}, expected {list(wanted.shape)}"
    if not got.is_floating_point():
        return 0.0 if torch.equal(got.cpu(), wanted) else float("inf")
    allowed = (unit or UNITS * torch.finfo(got.dtype).eps) * terms**0.5 * wanted.abs().max().item() + 1e-30
    share = ((got.detach().double().cpu() - wanted).abs().max() / allowed).item()
    return share if share == share else float("inf")  # a NaN is as wrong as can be


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that torch allocates is NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def _weight(count: int) -> Callable[[Inputs], Arguments]:
    """``count`` tensors of the weight's kind, the logits last."""
    return lambda r: (*(r.normal(r.sizes.out, r.sizes.columns) for _ in range(count)), *GATE)


def _weight_list(count: int) -> Callable[[Inputs], Arguments]:
    def make(r: Inputs) -> Arguments:
        shapes = ((r.sizes.out, r.sizes.columns), (r.sizes.out,), (3, 2, 3, 3))
        return (*([r.normal(*shape) for shape in shapes] for _ in range(count)), *GATE)

    return make


def _weight_step(r: Inputs) -> Arguments:
    shape = (r.sizes.out, r.sizes.columns)
    return tuple(r.normal(*shape) for _ in range(5))


def _call_weight_step(grad: Tensor, w: Tensor, m: Tensor, vw: Tensor, vm: Tensor) -> list[Tensor]:
    weight_raw.masked_weight_backward_sgd_(grad, w, m, *GATE, (True, True), (True, True), (vw, vm), SETTINGS[:2])
    return [w, m, vw, vm]


def _exact_weight_step(grad: Tensor, w: Tensor, m: Tensor, vw: Tensor, vm: Tensor) -> list[Tensor]:
    return _descended([w, m], weight_reference.masked_weight_backward(grad, w, m, *GATE), [vw, vm])


def _descended(parameters: list[Tensor], grads: Any, buffers: list[Tensor]) -> list[Tensor]:
    v = [its[2] * b + g + its[1] * p for p, g, b, its in zip(parameters, grads, buffers, SETTINGS)]
    return [p - its[0] * one for p, one, its in zip(parameters, v, SETTINGS)] + v


def _linear(with_grad: bool, large: bool = False) -> Callable[[Inputs], Arguments]:
    def make(r: Inputs) -> Arguments:
        batch, columns, out = r.sizes.large_batch if large else r.sizes.batch, r.sizes.columns, r.sizes.out
        shapes = ((batch, columns), (out, columns), (out, columns), (out,), (out,))
        grad = (r.normal(batch, out),) if with_grad else ()
        return (*grad, *(r.normal(*shape) for shape in shapes), *GATE)

    return make


def _exact_linear_backward(grad: Tensor, *arguments: Any) -> Any:
    tensors = [tensor.requires_grad_() for tensor in arguments[:5]]
    return torch.autograd.grad(linear_reference.masked_linear(*tensors, *GATE), tensors, grad)


def _linear_step(r: Inputs) -> Arguments:
    arguments = _linear(True)(r)[:6]
    return (*arguments, *(torch.full_like(tensor, 0.25) for tensor in arguments[2:]))


def _call_linear_step(*arguments: Tensor) -> list[Tensor]:
    grad, x, *parameters = arguments[:6]
    every, each = (True,) * 5, (True,) * 4
    dx = linear_raw.masked_linear_backward_sgd_(grad, x, *parameters, *GATE, every, each, arguments[6:], SETTINGS)[0]
    assert dx is not None
    return [dx, *parameters, *arguments[6:]]


def _exact_linear_step(*arguments: Tensor) -> list[Tensor]:
    dx, *grads = _exact_linear_backward(*arguments[:6])
    return [dx, *_descended([tensor.detach() for tensor in arguments[2:6]], grads, list(arguments[6:]))]


def _by_task(prefix: str, listed: bool = False) -> Callable[[Inputs], Arguments]:
    """``prefix``: ``"d"`` with a gradient, ``"c"`` with cotangents too."""

    def make(r: Inputs) -> Arguments:
        samples, columns, out, tasks = r.sizes.batch, r.sizes.columns, r.sizes.out, r.sizes.tasks

        def differentiated() -> list[Any]:
            masks, bias_masks = r.normal(tasks, out, columns), r.normal(tasks, out)
            both = (list(masks), list(bias_masks)) if listed else ([masks], [bias_masks])
            return [r.normal(samples, columns), r.normal(out, columns), both[0], r.normal(out), both[1]]

        before = [*(differentiated() if "c" in prefix else ()), *([r.normal(samples, out)] if prefix else ())]
        x, *rest = differentiated()
        return (*before, x, r.slots(samples), *rest, *GATE)

    return make


def _packed(prefix: bool, slots: bool = True) -> Callable[[Inputs], Arguments]:
    def make(r: Inputs) -> Arguments:
        samples, columns, out = r.sizes.batch, r.sizes.columns, r.sizes.out
        grad = (r.normal(samples, out),) if prefix else ()
        x, w, packed = r.normal(samples, columns), r.normal(out, columns), [r.bits(out, columns)]
        if not slots:
            return (*grad, x, w, packed, 1)
        return (*grad, x, r.slots(samples), w, packed, r.normal(out), [r.bits(out)], 1)

    return make


def _longest(sizes: Sizes) -> int:
    return max(sizes.columns, sizes.out, sizes.batch)


def _both(sizes: Sizes) -> int:
    return sizes.columns * sizes.out


BY_TASK, PACKED = "task_masked_linear", "packed_masked_linear"
OPS = (
    Op("masked_weight", _weight(2), weight_raw.masked_weight, weight_reference.masked_weight),
    Op("masked_weight backward", _weight(3), weight_raw.masked_weight_backward, weight_reference.masked_weight_backward),
    Op(
        "masked_weight double backward",
        _weight(5),
        weight_raw.masked_weight_double_backward,
        weight_reference.masked_weight_double_backward,
    ),
    Op("masked_weight_list", _weight_list(2), weight_raw.masked_weight_list, weight_reference.masked_weight_list),
    Op(
        "masked_weight_list backward",
        _weight_list(3),
        weight_raw.masked_weight_list_backward,
        weight_reference.masked_weight_list_backward,
    ),
    Op(
        "masked_weight_list double backward",
        _weight_list(5),
        weight_raw.masked_weight_list_double_backward,
        weight_reference.masked_weight_list_double_backward,
    ),
    Op("masked_weight step", _weight_step, _call_weight_step, _exact_weight_step),
    Op("masked_linear", _linear(False), linear_raw.masked_linear, linear_reference.masked_linear, _longest),
    Op("masked_linear backward", _linear(True), linear_raw.masked_linear_backward, _exact_linear_backward, _longest),
    Op("masked_linear large", _linear(False, True), linear_raw.masked_linear, linear_reference.masked_linear, _longest),
    Op("masked_linear large backward", _linear(True, True), linear_raw.masked_linear_backward, _exact_linear_backward, _longest),
    Op("masked_linear step", _linear_step, _call_linear_step, _exact_linear_step, _longest),
    Op(BY_TASK, _by_task(""), mixed_task_raw.task_masked_linear, mixed_task_reference.task_masked_linear, _longest),
    Op(
        f"{BY_TASK} backward",
        _by_task("d"),
        mixed_task_raw.task_masked_linear_backward,
        mixed_task_reference.task_masked_linear_backward,
        _longest,
    ),
    Op(
        f"{BY_TASK} double backward",
        _by_task("cd"),
        mixed_task_raw.task_masked_linear_double_backward,
        mixed_task_reference.task_masked_linear_double_backward,
        _longest,
    ),
    Op(f"{BY_TASK} list", _by_task("", True), mixed_task_raw.task_masked_linear, mixed_task_reference.task_masked_linear, _longest),
    Op(
        f"{BY_TASK} list backward",
        _by_task("d", True),
        mixed_task_raw.task_masked_linear_backward,
        mixed_task_reference.task_masked_linear_backward,
        _longest,
    ),
    Op(PACKED, _packed(False), packed_raw.packed_masked_linear, packed_reference.packed_masked_linear, _longest),
    Op(
        f"{PACKED} backward",
        _packed(True),
        packed_raw.packed_masked_linear_backward,
        lambda *arguments: packed_reference.packed_masked_linear_backward(*arguments, (True, True, True)),
        _longest,
    ),
    Op(
        "packed_superposition_gradient",
        _packed(True, slots=False),
        packed_raw.packed_superposition_gradient,
        packed_reference.packed_superposition_gradient,
        _both,
    ),
    Op(
        "pack_mask",
        lambda r: (r.normal(r.sizes.out, r.sizes.columns - 3), 0.25),
        packed_raw.pack_mask,
        packed_reference.pack_mask,
    ),
    Op(
        "unpack_mask",
        lambda r: (r.bits(r.sizes.out, r.sizes.columns)[0], (r.sizes.out, r.sizes.columns)),
        packed_raw.unpack_mask,
        packed_reference.unpack_mask,
    ),
)
BY_NAME = {op.name: op for op in OPS}
