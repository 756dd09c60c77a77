"""Nets that are chains of known layers: linear ones, and others that treat every row by itself. All tasks run as one batch of rows.

Whatever is adapted of the linear layers may differ by task, masks and weights: both go through the kernel of mixed-task batches. No
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
from ..ops.gate import IDENTITY, SIGMOID, compute_dtype, gate_values
from ..ops.mixed_task.functional import task_linear
from ..ops.packed.functional import unpack_mask
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
"""The places among the adapted tensors of those of a linear layer: ``weight`` and ``bias``, and of a masked one ``masks`` and
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
                x = self._linear(module, parameters, slots, x)
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

    def _linear(self, module: nn.Linear, parameters: Sequence[Tensor], slots: Tensor, x: Tensor) -> Tensor:
        weight, bias = (self._of(module, what, parameters) for what in ("weight", "bias"))
        if weight is None and bias is None:
            return F.linear(x, module.weight, module.bias)
        bias = module.bias if bias is None else bias
        return _by_task(x, slots, len(parameters[0]), (module.weight if weight is None else weight, None), (bias, None))

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
            masks, bias_masks = _expanded(mask, 2, tasks), None if bias_mask is None else _expanded(bias_mask, 1, tasks)
            return task_linear(x, slots, shared, masks, shared_bias, bias_masks, *layer._resolved())
        check_input_dtype(x, shared)
        check_linear(x, shared, None, None)
        of_weight = shared if weight is None else weight, _gate_of(layer, mask, shared)
        gate = None if shared_bias is None or bias_mask is None else _gate_of(layer, bias_mask, shared_bias)
        return _by_task(x, slots, tasks, of_weight, (shared_bias if bias is None else bias, gate))


def _gate_of(layer: MaskedLayer, mask: Tensor, shared: Tensor) -> Tensor:
    """The gate of bits or logits, or of logits of several tasks, in plain torch; in the dtype of the arithmetic."""
    wide = compute_dtype(shared.dtype)
    if mask.dtype == torch.uint8:
        return unpack_mask(mask, shared.shape).to(wide)
    mask = mask if mask.dtype == wide else mask.to(wide)
    gate_id, gate_param = layer._resolved()
    if gate_id != SIGMOID:
        return gate_values(mask, gate_id, gate_param)[0]
    return torch.sigmoid(mask if gate_param == 1 else mask / gate_param)


def _expanded(tensor: Tensor, dims: int, tasks: int) -> Tensor:
    return tensor.expand(tasks, *tensor.shape) if tensor.dim() == dims else tensor


Factors = tuple[Tensor, "Tensor | None"]
"""A weight or bias, of all tasks or ``[T, ...]``, and its gate, likewise; None: it has none."""


def _by_task(x: Tensor, slots: Tensor, tasks: int, weight: Factors, bias: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """``x_t @ theta_t.T + beta_t`` for the rows ``x_t`` of each task, where ``theta`` and ``beta`` are the products of factors."""
    of_bias = None if bias[0] is None else (bias[0], bias[1])
    if x.is_cpu and weight[0].dtype in (torch.float32, torch.float64):
        weights, factor = _stack_and_factor(weight, 2, tasks)
        if of_bias is None:
            return task_linear(x, slots, factor, weights, None, None, IDENTITY, 0.0)
        if of_bias[0].dim() == 1 and (of_bias[1] is None or of_bias[1].dim() == 1):
            return task_linear(x, slots, factor, weights, _product(of_bias), None, IDENTITY, 0.0)
        biases, bias_factor = _stack_and_factor(of_bias, 1, tasks)
        return task_linear(x, slots, factor, weights, bias_factor, biases, IDENTITY, 0.0)
    rows, theta = x.reshape(tasks, -1, x.shape[-1]), _expanded(_product(weight), 2, tasks).transpose(1, 2)
    y = torch.bmm(rows, theta) if of_bias is None else torch.baddbmm(_product(of_bias).unsqueeze(-2), rows, theta)
    return y.reshape(*x.shape[:-1], theta.shape[2])


def _product(factors: Factors) -> Tensor:
    tensor, gate = factors
    if gate is None:
        return tensor
    product = tensor * gate
    return product if product.dtype == tensor.dtype else product.to(tensor.dtype)


def _stack_and_factor(factors: Factors, dims: int, tasks: int) -> tuple[Tensor, Tensor]:
    """A tensor of each task, ``[T, ...]``, and a factor of all tasks, whose products are those of ``factors``."""
    tensor, gate = factors
    if gate is not None and (tensor.dim() == dims) != (gate.dim() == dims):
        return (tensor, gate) if gate.dim() == dims else (gate, tensor)
    stack = _expanded(_product(factors), dims, tasks)
    return stack, stack.new_ones(stack.shape[1:])


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
