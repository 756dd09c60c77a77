"""What is active where it is not one task: a task for each sample, a mixture of tasks, or masks that are no task's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .context import describe
from .names import escape

if TYPE_CHECKING:
    from .masked_layer import MaskedLayer
    from .per_task import PerTask
    from .task_dict import TaskDict
    from .task_layer import TaskLayer


class Selection:
    """Several tasks at once: what an open block holds in the place of a task's key. It does not change."""

    def __init__(self, names: Iterable[str]):
        self.names = tuple(names)
        self.keys = tuple(escape(name) for name in self.names)
        self.key_set = frozenset(self.keys)

    def forward(self, layer: MaskedLayer, input: Tensor) -> Tensor:
        """What the layer computes."""
        raise NotImplementedError

    def forward_per_task(self, layer: PerTask, input: Tensor) -> Tensor:
        raise NotImplementedError

    def read(self, layer: TaskLayer, what: str) -> Any:
        """What reading the layer's tensor ``what`` gives."""
        raise NotImplementedError


class TaskBatch(Selection):
    """A task for each sample of a batch.

    What layers need is computed once for all of them: the distinct tasks, in the order of their first samples, and each sample's
    position among them.
    """

    def __init__(self, names: Sequence[str]):
        index: dict[str, int] = {}
        positions = [index.setdefault(name, len(index)) for name in names]
        super().__init__(index)
        self.size = len(positions)
        self._positions = torch.tensor(positions, dtype=torch.int64)
        self._on_device: dict[torch.device, Tensor] = {}
        self._groups: dict[torch.device, tuple[list[Tensor], Tensor]] = {}
        self._splits: dict[tuple[torch.device, tuple[bool, ...]], tuple[Tensor, ...]] = {}

    def positions(self, device: torch.device) -> Tensor:
        """int64 ``[B]``: for each sample the position of its task in ``names``."""
        found = self._on_device.get(device)
        if found is None:
            found = self._on_device[device] = self._positions.to(device)
        return found

    def split(self, first: tuple[bool, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The rows of the tasks that ``first`` marks with positions among those, the same of the others, and the way back."""
        found: Any = self._splits.get((device, first))
        if found is None:
            marked = torch.tensor(first)
            within = torch.where(marked, marked.cumsum(0), (~marked).cumsum(0)) - 1
            mine = marked[self._positions]
            parts = [rows.nonzero().flatten() for rows in (mine, ~mine)]
            slots = [within[self._positions[rows]] for rows in parts]
            back = torch.cat(parts).argsort()
            found = tuple(tensor.to(device) for tensor in (parts[0], slots[0], parts[1], slots[1], back))
            self._splits[device, first] = found
        return found

    def groups(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """For each of ``names`` its rows; and the way back from those rows one after another."""
        found = self._groups.get(device)
        if found is None:
            order = self._positions.argsort(stable=True)
            rows = order.split(torch.bincount(self._positions, minlength=len(self.names)).tolist())
            found = self._groups[device] = [part.to(device) for part in rows], order.argsort().to(device)
        return found

    def check_size(self, layer: nn.Module, samples: int) -> None:
        if samples != self.size:
            raise RuntimeError(
                f"{type(layer).__name__} was called with {samples} samples inside a using_task block that names a task for each of "
                f"{self.size}: the first dimension of its input must be the batch's"
            )

    def forward(self, layer: MaskedLayer, input: Tensor) -> Tensor:
        self.check_size(layer, layer._samples(input))
        keys = self.keys
        if len(keys) == 1:
            return layer._one_task(input, keys[0])
        weight, bias = layer._shared()
        if not keys:
            return layer._plain(input, weight, bias)  # of no sample
        masks, bias_masks = layer._task_dict(), layer.bias_masks
        device = weight.device
        packed = tuple(masks._is_bits(key) for key in keys)
        if not any(packed) or all(packed):
            run = layer._packed if packed[0] else layer._by_task
            return run(input, self.positions(device), *_of(keys, masks, bias_masks))
        rows, slots, other_rows, other_slots, back = self.split(packed, device)
        bits = [key for key, is_packed in zip(keys, packed) if is_packed]
        logits = [key for key, is_packed in zip(keys, packed) if not is_packed]
        parts = [
            layer._packed(input.index_select(0, rows), slots, *_of(bits, masks, bias_masks)),
            layer._by_task(input.index_select(0, other_rows), other_slots, *_of(logits, masks, bias_masks)),
        ]
        return torch.cat(parts).index_select(0, back)

    def forward_per_task(self, layer: PerTask, input: Tensor) -> Tensor:
        self.check_size(layer, len(input))
        return layer._forward_batch(input, self)

    def read(self, layer: TaskLayer, what: str) -> Any:
        raise RuntimeError(
            f"{what} of {type(layer).__name__} was read inside a using_task block that names a task for each sample, where "
            "there is not one of it: call the layer, or run the samples of each task in a block of their own"
        )


def _of(keys: Sequence[str], masks: TaskDict, bias_masks: TaskDict | None) -> tuple[list[Tensor], list[Tensor] | None]:
    return [masks._tensor(key) for key in keys], None if bias_masks is None else [bias_masks._tensor(key) for key in keys]


def batch_of(model: nn.Module, given: Any) -> TaskBatch:
    """The tasks that a user named for each sample, by name or slot; TypeError or ValueError if that cannot be."""
    if isinstance(given, Tensor):
        if given.dtype != torch.int64:
            raise TypeError(f"task must be int64 where it is a tensor of slots, got {given.dtype}")
        if given.dim() != 1:
            raise ValueError(f"task must be [B], a slot for each sample, got shape {list(given.shape)}")
        given = given.tolist()
    elif not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray)):
        raise TypeError(
            f"task must be a name, or for each sample a name or a slot in a sequence or an int64 tensor, got {type(given).__name__}"
        )
    slots: list[str | None] | None = None
    names = []
    for position, entry in enumerate(given):
        if not isinstance(entry, str):
            if slots is None:
                slots = _slots_of(model)
            entry = _name_of(slots, entry, position)
        names.append(entry)
    batch = TaskBatch(names)
    if slots is not None:
        _check_same_slots(model, batch)
    return batch


def _slots_of(model: nn.Module) -> list[str | None]:
    from .tasks import task_layers

    return task_layers(model)[0][1]._task_dict()._names


def _name_of(slots: list[str | None], entry: Any, position: int) -> str:
    if isinstance(entry, bool) or not hasattr(entry, "__index__"):
        raise TypeError(f"task[{position}] must be a name or a slot, got {type(entry).__name__}")
    try:
        slot = operator.index(entry)
    except TypeError:  # a tensor or an array of several
        raise TypeError(f"task[{position}] must be a name or a slot, got {type(entry).__name__}") from None
    if not 0 <= slot < len(slots):
        raise ValueError(f"task[{position}] must be a slot in 0 to {len(slots) - 1}, got {slot}")
    name = slots[slot]
    if name is None:
        known = describe(name for name in slots if name is not None)
        raise ValueError(f"task[{position}] is slot {slot}, whose task was removed; the model has {known}")
    return name


def _check_same_slots(model: nn.Module, batch: TaskBatch) -> None:
    from .tasks import task_layers

    (first_name, first), *others = task_layers(model)
    numbers = first._task_dict()._slots
    for name, layer in others:
        slots = layer._task_dict()._slots
        for task, key in zip(batch.names, batch.keys):
            if slots.get(key) != numbers[key]:
                raise ValueError(
                    f"the layers of the model count their tasks differently: task {task!r} is slot {numbers[key]} of "
                    f"{first_name or 'the model'!r} and {slots.get(key)} of {name or 'the model'!r}. Give names"
                )


class Superposition(Selection):
    """A mixture of tasks: ``theta = W * sum_t alpha_t g(M_t)``, for all samples alike.

    What belongs to tasks in other layers (heads, batch-norm statistics) is mixed with the same ``alpha``.
    """

    def __init__(self, amounts: Mapping[str, float | Tensor]):
        super().__init__(amounts)
        self.amounts = tuple(amounts.values())

    def mix(self, tensors: Iterable[Tensor]) -> Any:
        total: Any = 0.0
        for amount, tensor in zip(self.amounts, tensors, strict=True):
            total = total + amount * tensor
        return total

    def forward(self, layer: MaskedLayer, input: Tensor) -> Tensor:
        return layer._plain(input, self.read(layer, "weight"), self.read(layer, "bias"))

    def forward_per_task(self, layer: PerTask, input: Tensor) -> Tensor:
        if layer.training and layer._has_buffers_of_tasks():
            raise RuntimeError(
                f"{type(layer).__name__} has statistics of tasks, and a superposition has none to update: call the "
                "model in eval mode"
            )
        return layer._plain_forward(input)

    def read(self, layer: TaskLayer, what: str) -> Any:
        return layer._mixed(self, what)


class GivenMasks(Selection):
    """Masks that are no task's: those that tasks have while a meta-learner adapts them (:mod:`metamask_ext.meta`).

    Args:
        start: what the layers use that get no mask here, and what else belongs to tasks: the name of a task, or a superposition.
        masks: for a layer the logits of weight and bias: tensors ``[*shape]`` for all samples, or with ``slots`` ``[T, *shape]``.
        slots: int64 ``[B]``, which of ``T`` masks a sample uses; None: all samples use the same.
        normalise: what a batch norm computes in the place of its own forward.
    """

    def __init__(
        self,
        start: str | Superposition,
        masks: Mapping[nn.Module, tuple[Tensor, Tensor | None]],
        slots: Tensor | None,
        normalise: Callable[[Any, Tensor], Tensor],
    ):
        super().__init__((start,) if isinstance(start, str) else start.names)
        self.start, self.masks, self.slots, self.normalise = start, masks, slots, normalise

    def forward(self, layer: MaskedLayer, input: Tensor) -> Tensor:
        given = self.masks.get(layer)
        if given is None:
            return layer._one_task(input, self.keys[0]) if isinstance(self.start, str) else self.start.forward(layer, input)
        mask, bias_mask = given
        if self.slots is None:
            return layer._masked(input, mask, bias_mask)
        samples = layer._samples(input)
        if samples != len(self.slots):
            raise RuntimeError(
                f"{type(layer).__name__} was called with {samples} samples while {len(self.slots)} of several tasks are run as one "
                "batch: the first dimension of its input must be the batch's"
            )
        return layer._of_tasks(input, self.slots, mask, bias_mask)

    def forward_per_task(self, layer: PerTask, input: Tensor) -> Tensor:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            return self.normalise(layer, input)
        return layer._plain_forward(input)

    def read(self, layer: TaskLayer, what: str) -> Any:
        from .masked_layer import MaskedLayer

        if isinstance(layer, MaskedLayer) and layer in self.masks:
            if self.slots is not None:
                raise RuntimeError(
                    f"{what} of {type(layer).__name__} was read while several tasks are run as one batch, where there is not one "
                    "of it: call the layer"
                )
            return layer._with_mask(what, self.masks[layer][what == "bias"])
        return layer._theta(what, self.keys[0]) if isinstance(self.start, str) else self.start.read(layer, what)
