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
    parameters is stored. Every other parameter gets an ordinary gradient, and torch's fused AdamW steps those of a group in one
    call; so it does with all parameters on CUDA.

    ``a`` and ``b`` have the dtype of their parameter, as torch's: float32 for float32 masks beside 16-bit weights. A step is
    computed in float32 (float64 for float64) and rounded once. That loses small steps of 16-bit weights, and a ``b`` in bfloat16
    does not fall where ``beta2`` is above 0.998: to train the weights too, keep them in float32, under autocast.

    ``loss.backward()`` and ``step()``, ``param_groups``, schedulers, state dicts and wrappers work as with :class:`FusedMaskedSGD`.
    Each step chooses which of torch's kernels runs, and overwrites a group's ``fused`` and ``foreach``.

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
    _cpu_only = True
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

    def _numbers(self, group: StateDict) -> AdamWSettings | None:
        if not group["decoupled_weight_decay"] or any(group[option] for option in _PLAIN):
            return None
        beta1, beta2 = group["betas"]
        return float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"])

    def _kept(self, parameter: Tensor, group: StateDict) -> AdamWState:
        state = self.state[parameter]
        step = self._steps_of(state, parameter)
        return AdamWState(self._in_order(state, parameter, "exp_avg"), self._in_order(state, parameter, "exp_avg_sq"), step)

    def _steps_of(self, state: StateDict, parameter: Tensor) -> Tensor:
        """The number of a parameter's steps, where the kernels look for it: a checkpoint may have it elsewhere."""
        step: Tensor | None = state.get("step")
        if step is None:
            step = state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        elif step.dtype != torch.float32 or step.device != parameter.device:
            step = state["step"] = step.to(parameter.device, torch.float32)
        return step

    def _choose(self) -> None:
        """Choose torch's kernel for each group: one call for all parameters, or one after another.

        The fused one walks through memory, whatever the strides of what it is given; and it takes no tensors beside sharded ones.
        """
        for group in self._groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            one_kind = len({_is_sharded(parameter) for parameter in moving}) <= 1
            group["fused"] = one_kind and not group["differentiable"] and all(map(self._fits, moving))
            group["foreach"] = False

    def _fits(self, parameter: Tensor) -> bool:
        gradient = parameter.grad
        if gradient is None or gradient.layout != torch.strided or not parameter.is_floating_point():
            return False
        if _is_sharded(parameter):
            tensors: tuple[Any, ...] = parameter, gradient
            return _is_sharded(gradient) and all(tensor.to_local().is_contiguous() for tensor in tensors)
        walked = [gradient]
        state = self.state.get(parameter)
        if state:
            self._steps_of(state, parameter)
            walked += [
                self._in_order(state, parameter, name) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if name in state
            ]
        known = type(parameter) in (nn.Parameter, Tensor) and parameter.device.type in ("cpu", "cuda")
        return known and is_dense(parameter) and all(_walks_beside(tensor, parameter) for tensor in walked)


def _walks_beside(tensor: Tensor, parameter: Tensor) -> bool:
    """True if a walk through the memory of both meets the same elements. The stride of a size of 1 says nothing."""
    if tensor.dtype != parameter.dtype or tensor.shape != parameter.shape:
        return False
    strides = zip(tensor.stride(), parameter.stride(), parameter.shape)
    return tensor.stride() == parameter.stride() or all(one == other for one, other, size in strides if size > 1)


def _is_sharded(tensor: Any) -> bool:
    """True for a DTensor. Its module takes longer to import than all of torch that is needed here."""
    return hasattr(tensor, "to_local")


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
