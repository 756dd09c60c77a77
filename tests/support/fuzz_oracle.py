"""The results that an op must have: the references of the package in float64, and the error that rounding may leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from support.fuzz_cases import Arguments, Case
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metamask_ext.ops import geometry
from metamask_ext.ops.linear import reference as linear
from metamask_ext.ops.mixed_task import reference as mixed_task
from metamask_ext.ops.packed import reference as packed
from metamask_ext.ops.vjp import pull_back
from metamask_ext.ops.weight import reference as weight

LOGITS = ("mask_logits", "masks", "bias_mask_logits", "bias_masks")
STEPS = {
    "masked_weight_backward_sgd_": (1, 3),
    "masked_linear_backward_sgd_": (2, 6),
    "masked_weight_backward_adamw_": (1, 3),
    "masked_linear_backward_adamw_": (2, 6),
}
"""The places of the first parameter, and of the first momentum buffer or of AdamW's state."""
ROUNDED = 1e-14
"""Of the steepest gate: torch differentiates some references, and its derivative of a sigmoid that rounds to 1 is 0."""
LOST = (1e-6, 1e-14)
"""Of the steepest gate, in float32 and float64: the second derivative holds 1 - 2 s."""
FLUSHED = (1e-36, 1e-306)
"""Of the steepest gate, in float32 and float64: the kernels take exp(x) as 0 below 1.6e-38 and 3e-308."""
EPSILON = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 2.5e-2, torch.float16: 4e-3}
"""Of the sum of the terms' sizes: what the coarsest dtype among the arguments may leave."""
FLOOR = {torch.float64: 1e-290, torch.float32: 1e-35, torch.bfloat16: 1e-35, torch.float16: 1e-6}


def names(op: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.metamask, op).default._schema.arguments]


def flat(result: Any) -> list[Tensor | None]:
    """All tensors of a result; None stays."""
    return [part for one in result for part in flat(one)] if isinstance(result, (list, tuple)) else [result]


def changed(case: Case) -> list[Tensor | None]:
    """The tensors that the op updates in place: parameters, then their momentum buffers or state."""
    if case.op not in STEPS:
        return []
    first, buffers = STEPS[case.op]
    state = case.arguments[buffers] if case.op.endswith("_adamw_") else case.arguments[buffers : 2 * buffers - first]
    kept = state if isinstance(state, list) else []
    return [one if isinstance(one, Tensor) else None for one in (*case.arguments[first:buffers], *kept)]


def _linear_backward(grad, input, weight, mask, bias, bias_mask, gate_id, gate_param, output_mask):
    def forward(*primals):
        return linear.masked_linear(*primals, gate_id, gate_param)

    grads = pull_back(forward, (input, weight, mask, bias, bias_mask), grad)
    return [grad if needed else None for grad, needed in zip(grads, output_mask)]


def _step(parameter, gradient, buffer, settings):
    """A parameter and its buffer after ``v = momentum * v + g + weight_decay * p``, ``p = p - lr * v``."""
    lr, decay, momentum = settings
    velocity = gradient + decay * parameter + (0 if buffer is None else momentum * buffer)
    return parameter - lr * velocity, None if buffer is None else velocity


def _steps(grads, parameters, buffers, output_mask, updates, settings):
    """The gradients that are left, and the parameters and buffers afterwards."""
    moved = [
        _step(parameter, grad, buffer, its) if update else (parameter, buffer)
        for parameter, grad, buffer, update, its in zip(parameters, grads, buffers, updates, settings)
    ]
    left = [grad if need and not update else None for grad, need, update in zip(grads, output_mask, updates)]
    return [*left, *(parameter for parameter, _ in moved), *(buffer for _, buffer in moved)]


def _weight_sgd(grad, w, m, v_w, v_m, gate_id, gate_param, output_mask, updates, *settings):
    grads = weight.masked_weight_backward(grad, w, m, gate_id, gate_param)
    return _steps(grads, (w, m), (v_w, v_m), output_mask, updates, settings)


def _linear_sgd(grad, input, w, m, b, bm, v_w, v_m, v_b, v_bm, gate_id, gate_param, output_mask, updates, settings):
    dx, *grads = _linear_backward(grad, input, w, m, b, bm, gate_id, gate_param, (True,) * 5)
    each = [settings[first : first + 3] for first in range(0, 12, 3)]
    rest = _steps(grads, (w, m, b, bm), (v_w, v_m, v_b, v_bm), output_mask[1:], updates, each)
    return [dx if output_mask[0] else None, *rest]


def _adamw_step(parameter, gradient, state, settings):
    """A parameter and its state after a step of AdamW."""
    lr, beta1, beta2, eps, decay = settings
    mean, square, count = beta1 * state[0] + (1 - beta1) * gradient, beta2 * state[1] + (1 - beta2) * gradient**2, state[2] + 1
    root = (square / (1 - beta2**count)).sqrt() + eps
    return (1 - lr * decay) * parameter - lr * (mean / (1 - beta1**count)) / root, [mean, square, count]


def _adamw_sizes(parameter, gradient, state, settings):
    """The sizes of the terms: the root may be that of the old mean alone, and moves with the gradient."""
    lr, beta1, beta2, eps, decay = settings
    mean, square, count = beta1 * state[0] + (1 - beta1) * gradient, beta2 * state[1] + (1 - beta2) * gradient**2, state[2] + 1
    scale = 1 / (1 - beta2**count).sqrt()
    least = (beta2 * state[1]).sqrt() * scale + eps
    moved = lr * (mean / (1 - beta1**count)) / least * (1 + (1 - beta2) ** 0.5 * scale * gradient / least)
    return (1 + lr * decay) * parameter + moved, [mean, 2 * square, count]


def _adamw_steps(step, grads, parameters, state, output_mask, updates, settings):
    """As :func:`_steps`, with the state in one list."""
    moved, kept, left = list(parameters), [], list(state)
    for index, update in enumerate(updates):
        if update:
            moved[index], its = step(parameters[index], grads[index], left[:3], settings[5 * index : 5 * index + 5])
            kept += its
            del left[:3]
    rest = [grad if need and not update else None for grad, need, update in zip(grads, output_mask, updates)]
    return [*rest, *moved, *kept]


def _weight_adamw(step):
    def run(grad, w, m, state, gate_id, gate_param, output_mask, updates, settings):
        grads = weight.masked_weight_backward(grad, w, m, gate_id, gate_param)
        return _adamw_steps(step, grads, (w, m), state, output_mask, updates, settings)

    return run


def _linear_adamw(step):
    def run(grad, input, w, m, b, bm, state, gate_id, gate_param, output_mask, updates, settings):
        dx, *grads = _linear_backward(grad, input, w, m, b, bm, gate_id, gate_param, (True,) * 5)
        rest = _adamw_steps(step, grads, (w, m, b, bm), state, output_mask[1:], updates, settings)
        return [dx if output_mask[0] else None, *rest]

    return run


def _im2col(input, *steps):
    kernel, stride, padding, dilation = steps
    if input.numel():
        return geometry.im2col(input, kernel, stride, padding, dilation)
    size = geometry.check_windows(input.shape, *steps)
    return input.new_zeros(size)


def _col2im(grad, size, kernel, stride, padding, dilation):
    if 0 in size[:2] or 0 in size[2:]:
        return grad.new_zeros(size)
    return F.fold(grad.transpose(1, 2), size[2:], kernel, dilation, padding, stride)


def _without_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments[:-1])


REFERENCES: dict[str, Callable[..., Any]] = {
    "masked_weight": _without_dtype(weight.masked_weight),
    "masked_weight_backward": weight.masked_weight_backward,
    "masked_weight_double_backward": weight.masked_weight_double_backward,
    "masked_weight_backward_sgd_": _weight_sgd,
    "masked_weight_backward_adamw_": _weight_adamw(_adamw_step),
    "masked_weight_list": _without_dtype(weight.masked_weight_list),
    "masked_weight_list_backward": weight.masked_weight_list_backward,
    "masked_weight_list_double_backward": weight.masked_weight_list_double_backward,
    "masked_linear": _without_dtype(linear.masked_linear),
    "masked_linear_backward": _linear_backward,
    "masked_linear_backward_sgd_": _linear_sgd,
    "masked_linear_backward_adamw_": _linear_adamw(_adamw_step),
    "task_masked_linear": _without_dtype(mixed_task.task_masked_linear),
    "task_masked_linear_backward": mixed_task.task_masked_linear_backward,
    "task_masked_linear_double_backward": mixed_task.task_masked_linear_double_backward,
    "packed_masked_linear": _without_dtype(packed.packed_masked_linear),
    "packed_masked_linear_backward": packed.packed_masked_linear_backward,
    "packed_superposition_gradient": packed.packed_superposition_gradient,
    "pack_mask": packed.pack_mask,
    "unpack_mask": packed.unpack_mask,
    "im2col": _im2col,
    "col2im": _col2im,
}

OF_SIZES: dict[str, Callable[..., Any]] = {
    **REFERENCES,
    "masked_weight_backward_adamw_": _weight_adamw(_adamw_sizes),
    "masked_linear_backward_adamw_": _linear_adamw(_adamw_sizes),
}
"""The same for arguments whose results are the sizes of terms."""


def _float64(leaf: object) -> object:
    """The numbers of a tensor in memory of its own."""
    if not isinstance(leaf, Tensor):
        return leaf
    values = leaf.detach().resolve_neg()
    return values.double().clone() if values.is_floating_point() else values.contiguous()


def _sizes_of(case: Case, logits: Callable[[Tensor], Tensor]) -> Arguments:
    """Arguments whose results are sums of the sizes of the terms: no term is negative but by its logits."""

    def size(name: str, leaf: object) -> object:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return logits(leaf) if name in LOGITS else leaf.abs()

    return [tree_map(lambda leaf, its=name: size(its, leaf), argument) for name, argument in zip(names(case.op), case.arguments)]


class Expected:
    """The results of a case, taken from its arguments before the op changes them."""

    def __init__(self, case: Case) -> None:
        reference, op = REFERENCES[case.op], case.op
        given = Case(op, [tree_map(_float64, argument) for argument in case.arguments])
        self.results = flat(reference(*given.arguments))
        dtypes = {leaf.dtype for leaf in tree_leaves(case.arguments) if isinstance(leaf, Tensor) and leaf.is_floating_point()}
        dtypes |= {argument for argument in case.arguments if isinstance(argument, torch.dtype)}
        self.coarsest = max(dtypes, key=EPSILON.__getitem__, default=torch.float64)
        # The second derivative of the sigmoid is positive below 0, the first one even: of -|M| every term is counted with its size.
        of_sizes = OF_SIZES[op]
        sums = [flat(of_sizes(*_sizes_of(given, logits))) for logits in (lambda m: m, lambda m: -m.abs())]
        slope = -abs(dict(zip(names(op), given.arguments)).get("gate_param", 1.0))
        steepest = flat(of_sizes(*_sizes_of(given, lambda m: torch.full_like(m, slope))))
        lost = LOST[self.coarsest == torch.float64] if "double" in op else FLUSHED[self.coarsest == torch.float64]
        if op.startswith(("task_", "masked_linear_")):
            lost = max(lost, ROUNDED)
        sums.append([None if one is None else lost / EPSILON[self.coarsest] * one for one in steepest])
        if op in STEPS:  # a step subtracts
            kept = [tree_map(lambda leaf: leaf.abs() if isinstance(leaf, Tensor) else leaf, one) for one in changed(given)]
            sums.append([None] * (len(self.results) - len(kept)) + [None if one is None else 2 * one for one in kept])
        self.sizes = [
            None if result is None else sum(one.double().abs() for one in terms if one is not None)
            for result, *terms in zip(self.results, *sums)
        ]

    def difference(self, results: Sequence[Tensor | None]) -> str | None:
        """Describe how the results differ; None if they do not."""
        if len(results) != len(self.results):
            return f"{len(results)} results, expected {len(self.results)}"
        for index, (got, wanted, sizes) in enumerate(zip(results, self.results, self.sizes)):
            if (got is None) != (wanted is None):
                return f"result {index} is {got}, expected {wanted}"
            if got is not None:
                said = _difference(got, wanted, sizes, self.coarsest)
                if said:
                    return f"result {index} {said}"
        return None


def _difference(got: Tensor, wanted: Tensor, sizes: Tensor, coarsest: torch.dtype) -> str | None:
    if got.shape != wanted.shape:
        return f"has shape {list(got.shape)}, expected {list(wanted.shape)}"
    if not got.is_floating_point():
        return None if torch.equal(got, wanted.to(got.dtype)) else "has other bits"
    values, wanted = got.detach().resolve_neg().double(), wanted.double()
    largest = min(torch.finfo(got.dtype).max, torch.finfo(coarsest).max) / 8
    bound = EPSILON[coarsest] * sizes + max(FLOOR[got.dtype], FLOOR[coarsest])
    # Where terms overflow the dtype only NaN is compared, which must not vanish.
    wrong = (sizes < largest) & wanted.isfinite() & ~((values - wanted).abs() <= bound)
    wrong |= wanted.isnan() & values.isfinite()
    if not bool(wrong.any()):
        return None
    place = int(wrong.flatten().to(torch.uint8).argmax())
    numbers = f"{values.flatten()[place]:.9g}, expected {wanted.flatten()[place]:.9g} with terms of {sizes.flatten()[place]:.3g}"
    return f"has {numbers} at {place}, {int(wrong.sum())} of {got.numel()} are wrong"
