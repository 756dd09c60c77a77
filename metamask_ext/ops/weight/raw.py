"""The raw ops of the family, typed, and their fake (shape-only) kernels.

A raw op has no derivative: called with grad mode on and an input that requires grad it raises. Differentiate through
:mod:`metamask_ext.ops.weight.functional`. The names are the ops themselves, without a Python frame of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from metamask_ext._build import BACKEND

from ..checks import check_each_like, check_flags, check_like, check_pair, check_pairs, check_storage
from ..gate import check_gate
from ..geometry import check_sizes
from ..step_checks import adamw_updates, check_apart, sgd_updates

Rule = Literal["sgd", "adamw"]
"""The steps that a parameter may take inside a backward."""
SgdSettings = tuple[float, float, float]
"""Of a step of SGD: ``lr, weight_decay, momentum``."""
AdamWSettings = tuple[float, float, float, float, float]
"""Of a step of AdamW: ``lr, beta1, beta2, eps, weight_decay``."""


class AdamWState(NamedTuple):
    """AdamW's state of a parameter: the means of its gradient and of the gradient's square, and the number of steps."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


if TYPE_CHECKING:

    def masked_weight(
        weight: Tensor, mask_logits: Tensor, gate_id: int, gate_param: float, dtype: torch.dtype | None = None
    ) -> Tensor:
        """See :func:`metamask_ext.ops.weight.reference.masked_weight`."""

    def masked_weight_backward(
        grad: Tensor,
        weight: Tensor,
        mask_logits: Tensor,
        gate_id: int,
        gate_param: float,
        output_mask: Sequence[bool] = (True, True),
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :func:`metamask_ext.ops.weight.reference.masked_weight_backward`."""

    def masked_weight_double_backward(
        cotangent_weight: Tensor | None,
        cotangent_mask: Tensor | None,
        grad: Tensor,
        weight: Tensor,
        mask_logits: Tensor,
        gate_id: int,
        gate_param: float,
        output_mask: Sequence[bool] = (True, True, True),
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See :func:`metamask_ext.ops.weight.reference.masked_weight_double_backward`."""

    def masked_weight_list(
        weight: Sequence[Tensor],
        mask_logits: Sequence[Tensor],
        gate_id: int,
        gate_param: float,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """See :func:`metamask_ext.ops.weight.reference.masked_weight_list`."""

    def masked_weight_list_backward(
        grad: Sequence[Tensor],
        weight: Sequence[Tensor],
        mask_logits: Sequence[Tensor],
        gate_id: int,
        gate_param: float,
        output_mask: Sequence[bool] = (True, True),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See :func:`metamask_ext.ops.weight.reference.masked_weight_list_backward`."""

    def masked_weight_list_double_backward(
        cotangent_weight: Sequence[Tensor | None],
        cotangent_mask: Sequence[Tensor | None],
        grad: Sequence[Tensor],
        weight: Sequence[Tensor],
        mask_logits: Sequence[Tensor],
        gate_id: int,
        gate_param: float,
        output_mask: Sequence[bool] = (True, True, True),
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """See :func:`metamask_ext.ops.weight.reference.masked_weight_list_double_backward`."""

elif BACKEND != "reference":
    masked_weight = torch.ops.metamask.masked_weight.default
    masked_weight_backward = torch.ops.metamask.masked_weight_backward.default
    masked_weight_double_backward = torch.ops.metamask.masked_weight_double_backward.default
    masked_weight_list = torch.ops.metamask.masked_weight_list.default
    masked_weight_list_backward = torch.ops.metamask.masked_weight_list_backward.default
    masked_weight_list_double_backward = torch.ops.metamask.masked_weight_list_double_backward.default


def masked_weight_backward_sgd_(
    grad: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    gate_id: int,
    gate_param: float,
    output_mask: Sequence[bool],
    updates: Sequence[bool],
    momentum_buffers: Sequence[Tensor | None],
    settings: Sequence[SgdSettings],
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`masked_weight_backward`, but where ``updates`` says so a parameter takes a step of SGD and gives None.

    ``v = momentum * v + grad + weight_decay * p``, ``p = p - lr * v``, with ``v`` the momentum buffer; without one, momentum must
    be 0. ``updates``, ``momentum_buffers`` and ``settings`` are those of weight and mask_logits.
    """
    grads: tuple[Tensor | None, Tensor | None] = torch.ops.metamask.masked_weight_backward_sgd_.default(
        grad, weight, mask_logits, *momentum_buffers, gate_id, gate_param, output_mask, updates, settings[0], settings[1]
    )
    return grads


def masked_weight_backward_adamw_(
    grad: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    gate_id: int,
    gate_param: float,
    output_mask: Sequence[bool],
    updates: Sequence[bool],
    states: Sequence[AdamWState | None],
    settings: Sequence[AdamWSettings],
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`masked_weight_backward`, but where ``updates`` says so a parameter takes a step of AdamW and gives None. CPU only.

    ``a = beta1 * a + (1 - beta1) * grad``, ``b = beta2 * b + (1 - beta2) * grad**2`` and ``p = (1 - lr * weight_decay) * p - lr *
    (a / (1 - beta1**k)) / (sqrt(b / (1 - beta2**k)) + eps)``, with ``a`` and ``b`` the means of its state, and ``k`` its number of
    steps with this one. ``updates``, ``states`` and ``settings`` are those of weight and mask_logits.
    """
    grads: tuple[Tensor | None, Tensor | None] = torch.ops.metamask.masked_weight_backward_adamw_.default(
        *(grad, weight, mask_logits, state_of(updates, states), gate_id, gate_param, output_mask, updates),
        [number for its in settings for number in its],
    )
    return grads


UPDATES: dict[Rule, Callable[..., tuple[Tensor | None, Tensor | None]]] = {
    "sgd": masked_weight_backward_sgd_,
    "adamw": masked_weight_backward_adamw_,
}
"""The ops that take steps; their last arguments are ``updates``, what the optimiser keeps, and ``settings``."""


def state_of(updates: Sequence[bool], states: Sequence[AdamWState | None]) -> list[Tensor]:
    """The tensors of the parameters that take a step, one after another."""
    return [tensor for update, state in zip(updates, states) if update and state is not None for tensor in state]


if BACKEND != "reference":

    def _check(weight, mask_logits, gate_id, gate_param):
        check_gate(gate_id, gate_param)
        check_pair(weight, mask_logits)
        check_sizes("weight", weight.shape)

    def _check_list(weight, mask_logits, gate_id, gate_param):
        check_gate(gate_id, gate_param)
        check_pairs(weight, mask_logits)
        for index, one in enumerate(weight):
            check_sizes(f"weight[{index}]", one.shape)

    def _check_grads(grad, weight):
        check_each_like("grad", grad, weight)
        for index, one in enumerate(grad):
            if one.dtype != grad[0].dtype:
                raise TypeError(f"grad[{index}] must have the dtype of grad[0], {grad[0].dtype}, got {one.dtype}")

    @torch.library.register_fake("metamask::masked_weight")
    def _(weight, mask_logits, gate_id, gate_param, dtype=None):
        _check(weight, mask_logits, gate_id, gate_param)
        check_storage("dtype", dtype or weight.dtype, weight)
        return torch.empty_like(weight, dtype=dtype)

    @torch.library.register_fake("metamask::masked_weight_backward")
    def _(grad, weight, mask_logits, gate_id, gate_param, output_mask=(True, True)):
        check_flags("output_mask", output_mask, 2)
        _check(weight, mask_logits, gate_id, gate_param)
        check_like("grad", grad, weight)
        return _gradients(weight, mask_logits, output_mask)

    @torch.library.register_fake("metamask::masked_weight_backward_sgd_")
    def _(grad, weight, mask_logits, weight_buffer, mask_buffer, gate_id, gate_param, output_mask, updates, *settings):
        def updated():
            return sgd_updates((weight, mask_logits), updates, (weight_buffer, mask_buffer), settings)

        return _updated(grad, weight, mask_logits, gate_id, gate_param, output_mask, updates, updated)

    @torch.library.register_fake("metamask::masked_weight_backward_adamw_")
    def _(grad, weight, mask_logits, state, gate_id, gate_param, output_mask, updates, settings):
        def updated():
            return adamw_updates((weight, mask_logits), updates, state, settings)

        return _updated(grad, weight, mask_logits, gate_id, gate_param, output_mask, updates, updated)

    def _updated(grad, weight, mask_logits, gate_id, gate_param, output_mask, updates, updated):
        check_flags("output_mask", output_mask, 2)
        check_flags("updates", updates, 2)
        _check(weight, mask_logits, gate_id, gate_param)
        check_like("grad", grad, weight)
        parameters = updated()
        if updates[1] and mask_logits.numel() > 1 and mask_logits.stride() != torch.empty_like(weight).stride():
            raise ValueError(
                f"mask_logits must have the strides of weight to be updated in place, {list(weight.stride())}, "
                f"got {list(mask_logits.stride())}"
            )
        check_apart(parameters, {"grad": grad})
        return _gradients(weight, mask_logits, [need and not update for need, update in zip(output_mask, updates)])

    @torch.library.register_fake("metamask::masked_weight_double_backward")
    def _(cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate_id, gate_param, output_mask=(True, True, True)):
        check_flags("output_mask", output_mask, 3)
        _check(weight, mask_logits, gate_id, gate_param)
        check_like("grad", grad, weight)
        for name, cotangent in (("cotangent_weight", cotangent_weight), ("cotangent_mask", cotangent_mask)):
            if cotangent is not None:
                check_like(name, cotangent, weight)
        to_grad = torch.empty_like(weight, dtype=grad.dtype) if output_mask[0] else None
        return to_grad, *_gradients(weight, mask_logits, output_mask[1:])

    def _gradients(weight, mask_logits, output_mask):
        """Those of the logits are in the memory order of the weight too."""
        dtypes = (weight.dtype, mask_logits.dtype)
        return tuple(torch.empty_like(weight, dtype=dtype) if need else None for need, dtype in zip(output_mask, dtypes))

    @torch.library.register_fake("metamask::masked_weight_list")
    def _(weight, mask_logits, gate_id, gate_param, dtype=None):
        _check_list(weight, mask_logits, gate_id, gate_param)
        check_storage("dtype", dtype or weight[0].dtype, weight[0])
        return [torch.empty_like(one, dtype=dtype) for one in weight]

    @torch.library.register_fake("metamask::masked_weight_list_backward")
    def _(grad, weight, mask_logits, gate_id, gate_param, output_mask=(True, True)):
        check_flags("output_mask", output_mask, 2)
        _check_list(weight, mask_logits, gate_id, gate_param)
        _check_grads(grad, weight)
        return _list_gradients(weight, mask_logits, output_mask)

    @torch.library.register_fake("metamask::masked_weight_list_double_backward")
    def _(cotangent_weight, cotangent_mask, grad, weight, mask_logits, gate_id, gate_param, output_mask=(True, True, True)):
        check_flags("output_mask", output_mask, 3)
        _check_list(weight, mask_logits, gate_id, gate_param)
        _check_grads(grad, weight)
        for name, cotangents in (("cotangent_weight", cotangent_weight), ("cotangent_mask", cotangent_mask)):
            if cotangents:
                check_each_like(name, cotangents, weight)
        to_grad = [torch.empty_like(one, dtype=grad[0].dtype) for one in weight] if output_mask[0] else []
        return to_grad, *_list_gradients(weight, mask_logits, output_mask[1:])

    def _list_gradients(weight, mask_logits, output_mask):
        dtypes = (weight[0].dtype, mask_logits[0].dtype)
        return tuple(
            [torch.empty_like(one, dtype=dtype) for one in weight] if need else [] for need, dtype in zip(output_mask, dtypes)
        )
