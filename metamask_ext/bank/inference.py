"""Task inference from the entropy of the output, in one forward and one backward for all tasks.

Source: Wortsman et al., Supermasks in Superposition, arXiv:2006.14769, sections 3.3 and 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.layers import MaskedConv2d
from ..nn.masked_layer import MaskedLayer
from ..nn.selection import ObservedSuperposition
from ..nn.task_dict import TaskDict
from ..nn.task_layer import TaskLayer
from ..nn.using_task import using_task
from ..ops.gate import gate_values
from ..ops.packed.functional import superposition_gradient, unpack_mask

METHODS = ("one_shot", "binary")


@dataclass
class _Sum:
    """The sum of the bits of packed masks, kept between calls: adding up thousands of masks takes longer than the forward."""

    bits: dict[str, Tensor] = field(default_factory=dict)
    total: Tensor | None = None

    def of(self, bits: dict[str, Tensor], like: Tensor) -> Tensor:
        """Return the sum of ``bits``, of the shape, dtype and device of ``like``."""
        gone = [key for key, mask in self.bits.items() if bits.get(key) is not mask]
        new = [key for key, mask in bits.items() if self.bits.get(key) is not mask]
        total = self.total
        if total is None or (total.dtype, total.device) != (like.dtype, like.device) or len(gone) + len(new) >= len(bits):
            self.bits, gone, new = {}, [], list(bits)
            total = torch.zeros_like(like, requires_grad=False)
        for key in gone:
            total -= unpack_mask(self.bits[key], like.shape).to(total.dtype)
        for key in new:
            total += unpack_mask(bits[key], like.shape)
        self.bits, self.total = dict(bits), total
        return total


class Sums:
    """Keeps for each TaskDict of masks the sum of all that are bits."""

    def __init__(self) -> None:
        self._sums: WeakKeyDictionary[nn.Module, _Sum] = WeakKeyDictionary()

    def mean_gate(self, layer: MaskedLayer, masks: TaskDict, keys: Sequence[str], like: Tensor) -> Tensor:
        """Return ``1/T sum_t g(M_t)`` over the tasks with these keys."""
        bits = masks._bits_of(keys)
        # A part of the tasks does not take the place of the sum over all.
        kept = self._sums.setdefault(masks, _Sum()) if len(keys) == len(masks) else _Sum()
        total = kept.of(bits, like).clone() if bits else torch.zeros_like(like, requires_grad=False)
        for key in keys:
            if key not in bits:
                total += gate_values(masks._tensor(key), *layer._resolved())[0]
        return total / len(keys)


class _Probe:
    """The mean of some tasks, ``theta = W * 1/T sum_t g(M_t)``, that remembers what every masked layer got and gave."""

    def __init__(self, names: Sequence[str], sums: Sums):
        amounts = dict.fromkeys(names, 1.0 / len(names))
        self.selection = ObservedSuperposition(amounts, self._mixed, self._observe)
        self.sums = sums
        self.seen: list[tuple[MaskedLayer, Tensor, Tensor]] = []

    def _mixed(self, layer: nn.Module, what: str) -> Tensor | None:
        if not isinstance(layer, MaskedLayer):
            assert isinstance(layer, TaskLayer)
            mixed = layer._mixed(self.selection, what)
            return None if mixed is None else mixed.detach()
        shared, masks = layer._group(what)
        if shared is None or masks is None:
            return shared
        return shared.detach() * self.sums.mean_gate(layer, masks, self.selection.keys, shared.detach())

    def _observe(self, layer: nn.Module, input: Tensor, output: Tensor) -> Tensor:
        assert isinstance(layer, MaskedLayer)
        if not output.requires_grad:
            output.requires_grad_()
        self.seen.append((layer, input.detach(), output))
        return output.clone()  # what comes next may write in place, as ReLU(inplace=True) does


def infer(model: nn.Module, names: list[str], x: Tensor, method: str, per_sample: bool, sums: Sums) -> list[str] | str:
    """See :meth:`metamask_ext.MaskBank.infer_task`."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"x must be [B, ...] with at least one sample, got shape {list(x.shape)}")
    with torch.inference_mode(False), torch.enable_grad():
        if method == "one_shot":
            gradient = entropy_gradient(model, names, x, per_sample, sums)
            found = [names[index] for index in gradient.argmin(1).tolist()]
        else:
            found = _halve(model, names, x, per_sample, sums)
    return found if per_sample else found[0]


def _halve(model: nn.Module, names: list[str], x: Tensor, per_sample: bool, sums: Sums) -> list[str]:
    """Find each sample's task (or the batch's): half of the candidates stay at every step. Samples of one opinion go together."""
    found: dict[int, str] = {}
    groups: dict[tuple[str, ...], list[int]] = {tuple(names): list(range(len(x) if per_sample else 1))}
    while groups:
        split: dict[tuple[str, ...], list[int]] = {}
        for candidates, rows in groups.items():
            if len(candidates) == 1:
                found.update(dict.fromkeys(rows, candidates[0]))
                continue
            gradient = entropy_gradient(model, candidates, x[rows] if per_sample else x, per_sample, sums)
            half = (len(candidates) + 1) // 2
            best = gradient.topk(half, 1, largest=False).indices.sort(1).values
            for row, kept in zip(rows, best.tolist(), strict=True):
                split.setdefault(tuple(candidates[index] for index in kept), []).append(row)
        groups = split
    return [found[row] for row in sorted(found)]


def entropy_gradient(model: nn.Module, names: Sequence[str], x: Tensor, per_sample: bool, sums: Sums) -> Tensor:
    """Return ``dH_b/dalpha_t`` at ``alpha = 1/T``, ``[B, T]`` (``[1, T]``: its sum over b), H the entropy of ``softmax(model(x))``.

    Section 3.3: ``theta = W * sum_t alpha_t g(M_t)``. With ``x_l, dy_l`` a masked layer's input and its output's gradient it is
    ``sum_l dy_l . (W_l * g(M_lt)) x_l``: one forward and one backward of the mean of the masks, whatever T is. What else belongs to
    tasks (heads, batch-norm statistics) is averaged and held fixed.
    """
    probe = _Probe(names, sums)
    with using_task(model, probe.selection):
        output = model(x)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(x):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the model must give logits [B, classes] with B = {len(x)} to infer a task, got {got}")
    log_p = torch.log_softmax(output, 1)
    entropy = -(log_p.exp() * log_p).sum()
    gradients = torch.autograd.grad(entropy, [seen[2] for seen in probe.seen], allow_unused=True)
    total = x.new_zeros(len(x) if per_sample else 1, len(names), dtype=output.dtype)
    with torch.no_grad():
        for (layer, given, _), gradient in zip(probe.seen, gradients, strict=True):
            if gradient is None:
                continue
            if per_sample and len(given) != len(x):
                raise RuntimeError(
                    f"{type(layer).__name__} was called with {len(given)} samples, x has {len(x)}: only "
                    "per_sample=False is possible"
                )
            total += _layer_gradient(layer, given, gradient, probe.selection.keys, per_sample)
    return total


def _layer_gradient(layer: MaskedLayer, input: Tensor, gradient: Tensor, keys: Sequence[str], per_sample: bool) -> Tensor:
    """Return the derivative of the entropy by the amount of each task in this layer: ``[B, T]``, or ``[1, T]``, its sum over b."""
    masks, bias_masks = layer._task_dict(), layer.bias_masks
    weight, bias = layer._shared()
    found = gradient.new_empty(len(input) if per_sample else 1, len(keys))
    bits = masks._bits_of(keys)
    if bits:
        rows, gradient_rows, groups = _rows(layer, input, gradient)
        if not per_sample:
            # The masks are gone through once, not once for each sample.
            rows, gradient_rows = rows.flatten(0, 1)[None], gradient_rows.flatten(0, 1)[None]
        part = superposition_gradient(gradient_rows, rows, weight.flatten(1), list(bits.values()), groups)
        if bias is not None and bias_masks is not None:
            # A layer of one row, whose weight is the bias and whose input the gradient.
            of_bias = gradient_rows.flatten(1, -2).sum(1)
            rows_of_bits = torch.cat([*bias_masks._bits_of(bits).values()]).view(len(bits), 1, -1)
            part = part + superposition_gradient(torch.ones_like(of_bias[:, :1]), of_bias, bias[None], rows_of_bits)
        if len(bits) == len(keys):
            return part
        found[:, [index for index, key in enumerate(keys) if key in bits]] = part.to(found.dtype)
    for index, key in enumerate(keys):
        if key in bits:
            continue
        bias_mask = None if bias_masks is None else bias_masks._tensor(key)
        change = (layer._masked(input, masks._tensor(key), bias_mask) * gradient).flatten(1).sum(1)
        found[:, index] = change if per_sample else change.sum()
    return found


def _rows(layer: MaskedLayer, input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, int]:
    """View the layer as a linear one: ``[B, rows, groups * in]``, the gradient ``[B, rows, out]``, and the groups."""
    if not isinstance(layer, MaskedConv2d):
        return input.reshape(len(input), -1, input.shape[-1]), gradient.reshape(len(input), -1, gradient.shape[-1]), 1
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    return columns.transpose(1, 2), gradient.flatten(2).transpose(1, 2), layer.groups
