"""AdamW whose update of masked layers happens inside the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import StateDict

from metamask_ext.ops.weight.raw import AdamWSettings, AdamWState

from .fused import FusedOptimizer, is_dense

_PLAIN = ("amsgrad", "maximize", "differentiable", "capturable")


class FusedMaskedAdamW(FusedOptimizer, torch.optim.AdamW):
    """:class:`torch.optim.AdamW` (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019) for a model with masked
    layers, in one pass over ``W``, the used masks and what the optimiser keeps of them.

    ``optimizer.backward(loss)`` takes the place of ``loss.backward(); optimizer.step(); optimizer.zero_grad()``. For each parameter
    ``p`` with gradient ``g``, in its step number ``k``: ``a = beta1 * a + (1 - beta1) * g``, ``b = beta2 * b + (1 - beta2) * g**2``
    and ``p = (1 - lr * weight_decay) * p - lr * (a / (1 - beta1**k)) / (sqrt(b / (1 - beta2**k)) + eps)``. The numbers are those of
    ``torch.optim.AdamW`` with two parameter groups: what all tasks share, with ``weight_decay``, and the masks, with
    ``mask_weight_decay``. ``a``, ``b`` and ``k`` of a task's mask (``exp_avg``, ``exp_avg_sq`` and ``step`` in a state dict) begin
    with the first step that uses the task, and stay as they are while others are trained.

    On a CPU a masked layer's backward takes the step itself where :class:`FusedMaskedSGD` would, and no gradient of the layer's
    parameters is stored. Every other parameter gets an ordinary gradient, and all of a group one call of torch's fused AdamW; so do
    all parameters on CUDA.

    ``a`` and ``b`` have the dtype of their parameter, as torch's: float32 for float32 masks beside 16-bit weights. A step is
    computed in float32 (float64 for float64) and rounded once. 16-bit weights lose small steps so, and a ``b`` in bfloat16 does not
    fall where ``beta2`` is above 0.998: to train these too, keep them in float32, under autocast.

    ``loss.backward()`` and ``step()``, ``param_groups``, schedulers, state dicts and wrappers work as with :class:`FusedMaskedSGD`.
    Which kernel of torch's runs is chosen in each step: ``fused`` and ``foreach`` of a group are overwritten.

    Args:
        model: has at least one masked layer.
        lr: learning rate.
        betas: of the means of the gradient and of its square.
        eps: is added to the root.
        weight_decay: of what all tasks share (``W``, biases, plain layers).
        mask_weight_decay: of the masks.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` has no masked layer, or holds a DistributedDataParallel (give the module that it wraps), a number is
            negative, or a beta is not below 1.
        RuntimeError: ``model`` is a part of one that ``fully_shard`` holds, with gathered parameters; or FullyShardedDataParallel
            holds it.
    """

    _rule = "adamw"
    _no_step = (0.0,) * 5
    _options = ("lr", "betas", "eps", "weight_decay")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        mask_weight_decay: float = 0.0,
    ):
        groups = self._groups_of(model, weight_decay, mask_weight_decay, lr=lr, eps=eps)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {betas!r}")
        super().__init__(groups, lr=lr, betas=(float(betas[0]), float(betas[1])), eps=eps)
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self.register_step_pre_hook(_choose_kernels)
        self.register_step_post_hook(_count_versions)

    def load_state_dict(self, state_dict: StateDict) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:  # torch's other kernels keep it elsewhere, or in the default dtype
                state["step"] = state["step"].to(parameter.device, torch.float32)

    def _can_take(self, parameter: Tensor, group: StateDict) -> bool:
        return parameter.device.type == "cpu" and group["decoupled_weight_decay"] and not any(group[option] for option in _PLAIN)

    def _numbers(self, group: StateDict) -> AdamWSettings:
        beta1, beta2 = group["betas"]
        return float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"])

    def _kept(self, parameter: Tensor, group: StateDict) -> AdamWState:
        state = self.state[parameter]
        step: Tensor | None = state.get("step")
        if step is None:
            step = state["step"] = torch.zeros((), dtype=torch.float32)
        return AdamWState(self._in_order(parameter, "exp_avg"), self._in_order(parameter, "exp_avg_sq"), step)

    def _choose(self) -> None:
        """Choose torch's kernels: the fused one walks through memory, whatever the strides of what it is given."""
        for group in self._groups:
            fused = not group["differentiable"] and all(map(self._fits, group["params"]))
            group["fused"] = fused
            group["foreach"] = not fused and not group["differentiable"] and not isinstance(group["lr"], Tensor)

    def _fits(self, parameter: Tensor) -> bool:
        gradient = parameter.grad
        if gradient is None:
            return True
        if not is_dense(parameter) or gradient.layout != torch.strided or gradient.stride() != parameter.stride():
            return False
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if name in self.state.get(parameter, ()):
                self._in_order(parameter, name)
        return parameter.device.type in ("cpu", "cuda") and gradient.dtype == parameter.dtype


def _choose_kernels(
    optimizer: FusedMaskedAdamW, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    closure: Callable[[], Any] | None = options.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        optimizer._choose()
        return None

    def then_choose() -> Any:  # the gradients are the closure's
        loss = closure()
        optimizer._choose()
        return loss

    return (optimizer, then_choose), {}


def _count_versions(optimizer: FusedMaskedAdamW, *_: object) -> None:
    """Tell autograd what torch's fused kernel has changed: by itself it does not, and who saved a parameter would not notice."""
    increment_version(
        [
            parameter
            for group in optimizer._groups
            if group["fused"]
            for parameter in group["params"]
            if parameter.grad is not None and not parameter.is_inference()
        ]
    )
