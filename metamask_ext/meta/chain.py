"""Nets that are chains of known layers: linear ones, and others that treat every row by itself. All tasks run as one batch of rows.

Whatever is adapted of the linear layers may differ by task: masks go through the kernel, weights through a batched product. No
linear layer is called by torch, or looks for what is active: in nets of small layers that takes as long as the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.layers import MaskedLinear
from ..nn.masked_layer import MaskedLayer
from ..nn.task_dict import TaskDict
from ..ops.checks import check_linear
from ..ops.dispatch import check_input_dtype
from ..ops.packed.functional import unpack_mask
from ..ops.weight import reference
from ..torch_private import has_hooks

_BY_ROW: frozenset[type[nn.Module]] = frozenset(
    (
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
        *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Tanhshrink, nn.Identity),
        *(nn.Dropout, nn.AlphaDropout, nn.LayerNorm, nn.RMSNorm),
    )
)
"""Modules that treat every row, of the last dimension or more, by itself. Exactly these: a subclass may do something else."""
LINEAR = (MaskedLinear, nn.Linear)

Positions = Mapping[tuple[nn.Module, str], int]
"""Where among the adapted tensors those of a linear layer are: ``weight`` and ``bias``, and of a masked one ``masks`` and
``bias_masks``."""


class Chain:
    """The steps of a net, each a linear layer or a module of :data:`_BY_ROW`.

    Args:
        modules: in their order.
        positions: of what is adapted, all of it in linear layers.
        key: of the task whose masks those layers use that adapt none.
    """

    def __init__(self, modules: Sequence[nn.Module], positions: Positions, key: str | None):
        self.modules, self.positions, self.key = modules, positions, key

    def run(self, parameters: Sequence[Tensor], slots: Tensor, x: Tensor) -> Tensor:
        """The output ``[T * K, ...]`` for ``x`` ``[T * K, ...]``, task by task, with parameters ``[T, ...]``."""
        for module in self.modules:
            if isinstance(module, MaskedLinear):
                x = self._masked(module, parameters, slots, x)
            elif isinstance(module, nn.Linear):
                x = self._linear(module, parameters, x)
            else:
                x = module(x)
        return x

    def _of(self, module: nn.Module, what: str, parameters: Sequence[Tensor]) -> Tensor | None:
        position = self.positions.get((module, what))
        return None if position is None else parameters[position]

    def _fixed(self, tensors: TaskDict | None) -> Tensor | None:
        if tensors is None:
            return None
        assert self.key is not None  # chain_of asks for one where a mask is not adapted
        return tensors._tensor(self.key)

    def _linear(self, module: nn.Linear, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        weight, bias = (self._of(module, what, parameters) for what in ("weight", "bias"))
        if weight is None and bias is None:
            return F.linear(x, module.weight, module.bias)
        tasks = len(parameters[0])
        return _by_task(x, _expanded(module.weight if weight is None else weight, 2, tasks), module.bias if bias is None else bias)

    def _masked(self, layer: MaskedLinear, parameters: Sequence[Tensor], slots: Tensor, x: Tensor) -> Tensor:
        weight, bias, mask, bias_mask = (self._of(layer, what, parameters) for what in ("weight", "bias", "masks", "bias_masks"))
        if weight is None and bias is None and mask is None and bias_mask is None:
            assert self.key is not None
            return layer._one_task(x, self.key)
        tasks = len(parameters[0])
        mask = self._fixed(layer.masks) if mask is None else mask
        bias_mask = self._fixed(layer.bias_masks) if bias_mask is None else bias_mask
        assert mask is not None
        shared, shared_bias = layer._shared()
        if weight is None and bias is None:
            masks = _expanded(mask, 2, tasks)
            return layer._stacked_tasks(x, slots, masks, None if bias_mask is None else _expanded(bias_mask, 1, tasks))
        check_input_dtype(x, shared)
        check_linear(x, shared, None, None)
        theta = _theta(layer, shared if weight is None else weight, mask, shared.shape)
        if shared_bias is not None and bias_mask is not None:
            bias = _theta(layer, shared_bias if bias is None else bias, bias_mask, shared_bias.shape)
        return _by_task(x, _expanded(theta, 2, tasks), bias)


def _theta(layer: MaskedLayer, shared: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    """``shared``, of ``shape`` or one for each task, masked by bits or logits, which may be one for each task; plain torch."""
    if mask.dtype == torch.uint8:
        return shared * unpack_mask(mask, shape)
    return reference.masked_weight(shared, mask, *layer._resolved())


def _expanded(tensor: Tensor, dims: int, tasks: int) -> Tensor:
    return tensor.expand(tasks, *tensor.shape) if tensor.dim() == dims else tensor


def _by_task(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x_t @ W_t.T + b_t`` for the rows ``x_t`` of each task; ``weight`` ``[T, out, in]``, ``bias`` ``[T, out]`` or ``[out]``."""
    rows = x.reshape(len(weight), -1, x.shape[-1])
    theta = weight.transpose(1, 2)
    y = torch.bmm(rows, theta) if bias is None else torch.baddbmm(bias.unsqueeze(-2), rows, theta)
    return y.reshape(*x.shape[:-1], weight.shape[1])


def chain_of(model: nn.Module, positions: Positions, key: str | None) -> Chain | None:
    """The steps of ``model``; None if it is no such net, or if a call of it may do more: it has hooks, or is compiled.

    ``key``: None where a layer that adapts no mask would use those of several tasks.
    """
    modules: list[nn.Module] = []
    for module in _flat(model):
        kind = type(module)
        if (kind not in LINEAR and kind not in _BY_ROW) or has_hooks(module):
            return None
        if key is None and isinstance(module, MaskedLinear):
            wanted = ("masks",) if module.bias_masks is None else ("masks", "bias_masks")
            if not all((module, what) in positions for what in wanted):
                return None
        modules.append(module)
    return Chain(modules, positions, key)


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of nested ``nn.Sequential``, in the order in which they run."""
    if type(module) is nn.Sequential and not has_hooks(module):
        for child in module._modules.values():
            yield from _flat(child)
    else:
        yield module


def positions_of(
    model: nn.Module, masks: Mapping[MaskedLayer, Sequence[int | None]], others: Mapping[str, int]
) -> Positions | None:
    """The places of all adapted tensors in linear layers; None if another module has one.

    Args:
        masks: for each layer the positions of the masks of weight and bias.
        others: by the names of parameters.
    """
    found: dict[tuple[nn.Module, str], int] = {}
    for layer, its in masks.items():
        if type(layer) is not MaskedLinear:
            return None
        found |= {(layer, what): place for what, place in zip(("masks", "bias_masks"), its) if place is not None}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = {parameters[name]: place for name, place in others.items()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            place = None if parameter is None else places.get(parameter)
            if place is not None and type(module) not in LINEAR:
                return None
            if place is not None:
                found[module, name] = place
    return found
