"""Gradient descent whose update of masked layers happens inside the backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.optimizer import StateDict

from metamask_ext.ops.weight.raw import SgdSettings

from .fused import FusedOptimizer

_PLAIN = ("nesterov", "dampening", "maximize", "differentiable")


class FusedMaskedSGD(FusedOptimizer, torch.optim.SGD):
    """:class:`torch.optim.SGD` for a model with masked layers, in one pass over ``W`` and the used masks.

    ``optimizer.backward(loss)`` takes the place of ``loss.backward(); optimizer.step(); optimizer.zero_grad()``. For each parameter
    ``p`` with gradient ``g``: ``v = momentum * v + g + weight_decay * p`` and ``p = p - lr * v``. Where it can, a masked layer's
    backward does that itself, a panel of the weight at a time: no gradient of the layer's weight, mask, bias or bias mask is ever
    stored. The numbers are those of ``torch.optim.SGD`` with two parameter groups: what all tasks share, with ``weight_decay``, and
    the masks, with ``mask_weight_decay``.

    A parameter is updated inside the backward if exactly one masked layer's node of the graph uses it and nothing else does. Else
    it gets an ordinary gradient and the step that ``torch.optim.SGD`` takes, with the same numbers: a layer that is used twice, a
    penalty on ``layer.weight``, tied weights, a gradient of a gradient, a compiled model, a reentrant checkpoint anywhere in the
    graph, a parameter that has a ``.grad`` already (accumulation) or a hook on its gradient, one whose saved tensor is a copy
    (hooks as ``save_on_cpu``), one whose gradient ``DistributedDataParallel`` averages, a model under ``fully_shard``, and every
    plain layer. Masks of tasks that the loss does not use do not move.

    ``loss.backward()`` and ``step()`` work as with ``torch.optim.SGD``; so do ``param_groups``, schedulers and state dicts, whose
    momentum buffers have torch's names. Tasks that are added to the model later are picked up.

    The optimiser cannot see two things: hooks on autograd's own nodes (``AccumulateGrad``), and functions of other packages whose
    backward runs a backward of its own over the same parameters. A hook on its gradient gives such a parameter ordinary steps.

    To clip or scale gradients, use ``loss.backward()`` and ``step()``. ``torch.amp.GradScaler`` scales them, and ``backward``
    refuses a loss that it scaled; bfloat16 needs no scaling.

    Args:
        model: has at least one masked layer.
        lr: learning rate.
        weight_decay: L2 factor of what all tasks share (``W``, biases, plain layers).
        mask_weight_decay: L2 factor of the masks.
        momentum: of all parameters.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` has no masked layer, or holds a DistributedDataParallel (give the module that it wraps), or a number
            is negative.
        RuntimeError: ``model`` is a part of one that ``fully_shard`` holds, with gathered parameters; or FullyShardedDataParallel
            holds it.
    """

    _rule = "sgd"
    _no_step = (0.0,) * 3
    _cpu_only = False
    _options = ("lr", "weight_decay", "momentum")

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        mask_weight_decay: float = 0.0,
        momentum: float = 0.0,
    ):
        groups = self._groups_of(model, weight_decay, mask_weight_decay, lr=lr, momentum=momentum)
        super().__init__(groups, lr=lr, momentum=momentum)
        self._begin()

    def _numbers(self, group: StateDict) -> SgdSettings | None:
        if any(group[option] for option in _PLAIN):
            return None
        return float(group["lr"]), float(group["weight_decay"]), float(group["momentum"])

    def _kept(self, parameter: Tensor, group: StateDict) -> Tensor | None:
        # From zeros, the first step's v is the gradient, as torch begins.
        return self._in_order(self.state[parameter], parameter, "momentum_buffer") if group["momentum"] else None
