"""Task inference from the entropy of the output, in one forward and one backward for all tasks.

Source: Wortsman et al., Supermasks in Superposition, arXiv:2006.14769, sections 3.3 and 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.layers import MaskedConv2d
from ..nn.masked_layer import MaskedLayer
from ..nn.names import describe, escape
from ..nn.selection import ObservedSuperposition
from ..nn.sequence_first import batch_first_layers
from ..nn.structure import structure
from ..nn.task_dict import TaskDict
from ..nn.task_layer import TaskLayer
from ..nn.tasks import masked_layers, refuse_nan, tasks
from ..nn.using_task import using_task
from ..nn.weight_layer import WeightLayer
from ..ops.gate import compute_dtype, gate_values
from ..ops.packed.functional import superposition_gradient
from ..ops.weight.functional import masked_weight
from .counts import Sums, count_bits

METHODS = ("one_shot", "binary")


@dataclass(frozen=True)
class Masks:
    """The masks of some tasks of one TaskDict, at one moment."""

    keys: tuple[str, ...]
    packed: list[int]
    """The positions among ``keys`` of the tasks that are bits."""
    bits: Tensor | None
    """Their bits, ``[P, ...]``, a copy; None where there are none."""
    logits: dict[int, Tensor]
    """The logits of the other tasks, by position."""

    def part(self, keys: tuple[str, ...]) -> Masks:
        """Return those of some of the tasks, in this order."""
        if keys == self.keys:
            return self
        places = {key: index for index, key in enumerate(self.keys)}
        rows = {index: row for row, index in enumerate(self.packed)}
        chosen = [places[key] for key in keys]
        packed = [index for index, place in enumerate(chosen) if place in rows]
        bits = None if self.bits is None or not packed else self.bits[[rows[chosen[index]] for index in packed]]
        return Masks(keys, packed, bits, {index: self.logits[place] for index, place in enumerate(chosen) if place in self.logits})


class Snapshot:
    """The masks of all tasks of a model at one moment, so that one inference sees the same ones from its beginning to its end.

    Other threads may add, pack and remove tasks meanwhile.

    Args:
        model: has masked layers.
        sums: keeps sums of bits from one inference to the next.

    Raises:
        ValueError: a task's logits hold NaN.
    """

    def __init__(self, model: nn.Module, sums: Sums | None = None):
        sums = Sums() if sums is None else sums
        self._masks: dict[TaskDict, Masks] = {}
        self._totals: dict[TaskDict, Tensor] = {}
        with structure():
            self.names = tasks(model)
            refuse_nan(model, self.names, "inferred")
            keys = tuple(escape(name) for name in self.names)
            groups = [group for _, layer in masked_layers(model) for group in layer._groups()]
            found = {tensors: (_held(tensors, keys), like) for like, tensors in groups}
        for tensors, (masks, like) in found.items():
            packed = [index for index, mask in enumerate(masks) if mask.dtype == torch.uint8]
            logits = (
                {index: mask for index, mask in enumerate(masks) if mask.dtype != torch.uint8} if len(packed) < len(keys) else {}
            )
            summed = sums.of(tensors, [masks[index] for index in packed], like) if packed else None
            self._masks[tensors] = Masks(keys, packed, None if summed is None else summed.bits, logits)
            if summed is not None:
                self._totals[tensors] = summed.total

    def of(self, tensors: TaskDict, keys: tuple[str, ...]) -> Masks:
        """Return the masks of the tasks with these keys."""
        return self._masks[tensors].part(keys)

    def mean_gate(self, layer: MaskedLayer, tensors: TaskDict, keys: tuple[str, ...], like: Tensor) -> Tensor:
        """Return ``1/T sum_t g(M_t)`` of these tasks, for ``like`` what they mask; the sum is in float32 or float64."""
        masks, wide = self.of(tensors, keys), compute_dtype(like.dtype)
        if masks.bits is None:
            total = torch.zeros_like(like, dtype=wide, requires_grad=False)
        elif masks is self._masks[tensors]:
            total = self._totals[tensors].to(wide, copy=True)
        else:
            total = count_bits(masks.bits, like).to(wide)
        for mask in masks.logits.values():
            total += gate_values(mask.detach().to(wide), *layer._resolved())[0]
        return total / len(keys)


def _held(tensors: TaskDict, keys: tuple[str, ...]) -> list[Tensor]:
    buffers = tensors._buffers
    return [tensors._tensor(key) if mask is None else mask for key, mask in ((key, buffers.get(key)) for key in keys)]


class _Probe:
    """The mean of some tasks, ``theta = W * 1/T sum_t g(M_t)``, that remembers what every masked layer got and gave.

    Attributes:
        seen: of each call of a layer the layer, its input and its output.
        read: of each theta that other code has read past a layer's forward, or that a layer has which is no product with a matrix,
            the layer, the parameter's name, and the theta.
    """

    def __init__(self, names: Sequence[str], snapshot: Snapshot):
        amounts = dict.fromkeys(names, 1.0 / len(names))
        self.selection = ObservedSuperposition(amounts, self._mixed, self._observe)
        self.snapshot = snapshot
        self.seen: list[tuple[WeightLayer, Tensor, Tensor]] = []
        self.read: list[tuple[MaskedLayer, str, Tensor]] = []

    def _mixed(self, layer: nn.Module, what: str) -> Tensor | None:
        if not isinstance(layer, MaskedLayer):
            assert isinstance(layer, TaskLayer)
            mixed = layer._mixed(self.selection, what)
            return None if mixed is None else mixed.detach()
        shared, masks = layer._group(what)
        if shared is None or masks is None:
            return shared
        mean = self.snapshot.mean_gate(layer, masks, self.selection.keys, shared)
        theta = (shared.detach().to(mean.dtype) * mean).to(shared.dtype).requires_grad_()
        self.read.append((layer, what, theta))
        return theta

    def _observe(self, layer: nn.Module, input: Tensor, output: Tensor) -> Tensor:
        assert isinstance(layer, WeightLayer)
        del self.read[len(self.read) - len(layer._dicts()) :]  # what the layer itself has just read
        if not output.requires_grad:
            output.requires_grad_()
        self.seen.append((layer, input.detach(), output))
        return output.clone()  # what comes next may write in place, as ReLU(inplace=True) does


def infer(model: nn.Module, x: Tensor, method: str, per_sample: bool, sums: Sums) -> list[str] | str:
    """See :meth:`metamask_ext.MaskBank.infer_task`."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"x must be [B, ...] with at least one sample, got shape {list(x.shape)}")
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone() if x.is_inference() else x
        snapshot = Snapshot(model, sums)
        names = snapshot.names
        try:
            if method == "one_shot":
                gradient = entropy_gradient(model, names, x, per_sample, snapshot)
                found = [names[index] for index in gradient.argmin(1).tolist()]
            else:
                found = _halve(model, names, x, per_sample, snapshot)
        except (RuntimeError, ValueError) as error:
            gone = set(names) - set(tasks(model))
            if gone:
                raise RuntimeError(f"tasks were removed while they were inferred, {describe(sorted(gone))}: call again") from error
            raise
    return found if per_sample else found[0]


def _halve(model: nn.Module, names: list[str], x: Tensor, per_sample: bool, snapshot: Snapshot) -> list[str]:
    """Find each sample's task (or the batch's): half of the candidates stay at every step. Samples of one opinion go together."""
    found: dict[int, str] = {}
    groups: dict[tuple[str, ...], list[int]] = {tuple(names): list(range(len(x) if per_sample else 1))}
    while groups:
        split: dict[tuple[str, ...], list[int]] = {}
        for candidates, rows in groups.items():
            if len(candidates) == 1:
                found.update(dict.fromkeys(rows, candidates[0]))
                continue
            gradient = entropy_gradient(model, candidates, x[rows] if per_sample else x, per_sample, snapshot)
            half = (len(candidates) + 1) // 2
            best = gradient.topk(half, 1, largest=False).indices.sort(1).values
            for row, kept in zip(rows, best.tolist(), strict=True):
                split.setdefault(tuple(candidates[index] for index in kept), []).append(row)
        groups = split
    return [found[row] for row in sorted(found)]


def entropy_gradient(model: nn.Module, names: Sequence[str], x: Tensor, per_sample: bool, snapshot: Snapshot) -> Tensor:
    """Return ``dH_b/dalpha_t`` at ``alpha = 1/T``, ``[B, T]`` (``[1, T]``: its sum over b), H the entropy of ``softmax(model(x))``.

    Section 3.3: ``theta = W * sum_t alpha_t g(M_t)``. With ``x_l, dy_l`` a masked layer's input and its output's gradient it is
    ``sum_l dy_l . (W_l * g(M_lt)) x_l``: one forward and one backward of the mean of the masks, whatever T is. What else belongs to
    tasks (heads, batch-norm statistics) is averaged and held fixed. Where other code reads a layer's theta (attention does), it is
    ``sum dtheta . (W_l * g(M_lt))``, with a backward for each sample.
    """
    probe = _Probe(names, snapshot)
    with using_task(model, probe.selection):
        output = model(x)
    entropies = _entropy(output, len(x), len(names))
    if not entropies.requires_grad:
        raise RuntimeError(f"the output of {type(model).__name__} depends on no masked layer: nothing tells its tasks apart")
    outputs, thetas = [seen[2] for seen in probe.seen], [read[2] for read in probe.read]
    gradients = torch.autograd.grad(entropies.sum(), [*outputs, *thetas], allow_unused=True, retain_graph=bool(thetas))
    total = entropies.new_zeros(len(x) if per_sample else 1, len(names))
    read = [(*entry, gradient) for entry, gradient in zip(probe.read, gradients[len(outputs) :]) if gradient is not None]
    if read:
        _add_of_read(total, read, entropies, snapshot, probe.selection.keys)
    batch_first = batch_first_layers(model) if per_sample else {}
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for (layer, given, _), gradient in zip(probe.seen, gradients):
            if gradient is None:
                continue
            if per_sample and _samples_dim(layer, given, len(x), batch_first) == 1:
                given, gradient = given.transpose(0, 1), gradient.transpose(0, 1)
            masks, *bias_masks = (snapshot.of(tensors, probe.selection.keys) for tensors in layer._dicts().values())
            wide = torch.promote_types(compute_dtype(given.dtype), gradient.dtype)
            total += _layer_gradient(layer, given.to(wide), gradient.to(wide), masks, *bias_masks, per_sample=per_sample)
    if not bool(total.isfinite().all()):
        raise ValueError(
            f"the derivative of the entropy must be finite to infer a task, got NaN or infinity{_where(total.isfinite())}"
        )
    return total


def _samples_dim(layer: WeightLayer, input: Tensor, samples: int, batch_first: Mapping[nn.Module, bool | None]) -> int:
    """Return the dimension of ``input`` along which the samples lie, as in a mixed-task batch. RuntimeError if it is not known."""
    is_first = batch_first.get(layer, True)
    dim = 1 if is_first is False else 0
    has_second = input.dim() > layer.sample_dim + 1
    either = has_second and layer in batch_first and is_first is not False and input.shape[1] == samples
    if is_first is None or either:
        raise RuntimeError(
            f"{type(layer).__name__} was called with an input of shape {list(input.shape)}: the samples may lie along the first or "
            "the second dimension, since modules of the model have batch_first=False: only per_sample=False is possible"
        )
    got = input.shape[dim] if dim == 0 or has_second else 1
    if got != samples:
        raise RuntimeError(
            f"{type(layer).__name__} was called with {got} samples, x has {samples}: only per_sample=False is possible"
        )
    return dim


def _entropy(output: object, samples: int, tasks: int) -> Tensor:
    """Return the samples' entropies. A class of logit -inf has probability 0: 0 log 0 is 0, and so is its derivative."""
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != samples:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the model must give logits [B, classes] with B = {samples} to infer a task, got {got}")
    if output.shape[1] < 2 and tasks > 1:
        raise ValueError(f"the model must give logits of at least two classes to infer a task, got {list(output.shape)}")
    log_p = torch.log_softmax(output.to(torch.promote_types(output.dtype, torch.float32)), 1)
    if bool(log_p.isnan().any()):
        raise ValueError(
            f"the model must give logits without NaN or +inf, one of them above -inf, to infer a task{_where(~log_p.isnan())}"
        )
    # xlogy has no such derivative: that by p is infinite at 0.
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)


def _where(right: Tensor) -> str:
    wrong = (~right.all(1)).nonzero().flatten().tolist()
    return f" (samples {describe(wrong)})" if len(right) > 1 else ""


def _add_of_read(
    total: Tensor,
    read: Sequence[tuple[MaskedLayer, str, Tensor, Tensor]],
    entropies: Tensor,
    snapshot: Snapshot,
    keys: tuple[str, ...],
) -> None:
    """Add to ``total`` the derivatives by way of thetas that were read past a forward, given with the gradient of their sum."""
    rows: list[Sequence[Tensor | None]] = [[gradient for *_, gradient in read]]
    if len(total) > 1:
        thetas = [theta for _, _, theta, _ in read]
        rows = [torch.autograd.grad(entropy, thetas, allow_unused=True, retain_graph=True) for entropy in entropies.unbind()]
    with torch.no_grad(), torch.autocast(total.device.type, enabled=False):
        for row, gradients in zip(total, rows, strict=True):
            for (layer, what, _, _), gradient in zip(read, gradients, strict=True):
                shared, tensors = layer._group(what)
                if gradient is not None and shared is not None and tensors is not None:
                    row += _theta_gradient(layer, shared, snapshot.of(tensors, keys), gradient)


def _theta_gradient(layer: MaskedLayer, shared: Tensor, masks: Masks, gradient: Tensor) -> Tensor:
    """Return ``sum dtheta . (W * g(M_t))``, ``[T]``."""
    wide = compute_dtype(gradient.dtype)
    product = gradient.to(wide) * shared.to(wide)
    found = product.new_empty(len(masks.keys))
    if masks.bits is not None:
        # The product as a layer's weight, for ones; a bias is a layer of one row.
        weight, bits = (product.flatten(1), masks.bits) if product.dim() > 1 else (product[None], masks.bits[:, None])
        ones = product.new_ones(1, sum(weight.shape))
        found[masks.packed] = superposition_gradient(ones[:, : len(weight)], ones[:, len(weight) :], weight, bits)[0]
    for index, mask in masks.logits.items():
        found[index] = (product * gate_values(mask.to(wide), *layer._resolved())[0]).sum()
    return found


def _layer_gradient(
    layer: WeightLayer, input: Tensor, gradient: Tensor, masks: Masks, bias_masks: Masks | None = None, *, per_sample: bool
) -> Tensor:
    """Return the derivative of the entropy by the amount of each task in this layer: ``[B, T]``, or ``[1, T]``, its sum over b.

    Computed in the dtype of ``input`` and ``gradient``, float32 or float64.
    """
    wide = gradient.dtype
    weight, bias = (None if shared is None else shared.to(wide) for shared in layer._shared())
    assert weight is not None
    found = gradient.new_empty(len(input) if per_sample else 1, len(masks.keys))
    if masks.bits is not None:
        rows, gradient_rows, groups = _rows(layer, input, gradient)
        if not per_sample:
            # The masks are gone through once, not once for each sample.
            rows, gradient_rows = rows.flatten(0, 1)[None], gradient_rows.flatten(0, 1)[None]
        part = superposition_gradient(gradient_rows, rows, weight.flatten(1), masks.bits, groups)
        if bias is not None and bias_masks is not None and bias_masks.bits is not None:
            # A layer of one row, whose weight is the bias and whose input the gradient.
            of_bias = gradient_rows.flatten(1, -2).sum(1)
            part = part + superposition_gradient(torch.ones_like(of_bias[:, :1]), of_bias, bias[None], bias_masks.bits[:, None])
        if not masks.logits:
            return part
        found[:, masks.packed] = part
    for index, mask in masks.logits.items():
        theta = masked_weight(weight, mask.to(wide), **layer._gate())
        bias_mask = None if bias_masks is None else bias_masks.logits[index]
        own_bias = bias if bias is None or bias_mask is None else masked_weight(bias, bias_mask.to(wide), **layer._gate())
        change = (layer._plain(input, theta, own_bias) * gradient).flatten(1).sum(1)
        found[:, index] = change if per_sample else change.sum()
    return found


def _rows(layer: WeightLayer, input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, int]:
    """View the layer as a linear one: ``[B, rows, groups * in]``, the gradient ``[B, rows, out]``, and the groups."""
    if not isinstance(layer, MaskedConv2d):
        return input.reshape(len(input), -1, input.shape[-1]), gradient.reshape(len(input), -1, gradient.shape[-1]), 1
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    return columns.transpose(1, 2), gradient.flatten(2).transpose(1, 2), layer.groups
