"""Selections: what is active where it is not one task. They are data; the layers decide what to compute for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.gate import compute_dtype
from ..torch_private import BatchNorm
from .names import escape_all


class Selection:
    """Several tasks at once: stands in an open block in the place of a task's key. It does not change."""

    def __init__(self, names: Iterable[str]):
        self.names = tuple(names)
        self.keys = escape_all(self.names)
        self.key_set = frozenset(self.keys)


class TaskBatch(Selection):
    """A task for each sample of a mixed-task batch.

    Layers share what they need of it, computed once: the distinct tasks, in the order of their first samples, and each sample's
    position among them.

    Attributes:
        dim: the dimension of a layer's input along which the samples lie, 0 or 1.
        guessed: whether ``dim`` is 0 for want of a better guess: some of the model's modules take the batch as dimension 1. An
            input that may be either is refused.
    """

    dim = 0
    guessed = False
    stated = False
    """True if who runs the batch said along which dimension it lies."""
    _copies: TaskBatch | None = None
    """The batch with every sample repeated, where inputs may have that too."""

    def __init__(self, names: Sequence[str]):
        super().__init__(dict.fromkeys(names))
        self.size = len(names)
        self._of_samples: Sequence[str | None] = names
        self._on_device: dict[torch.device, Tensor] = {}
        self._groups: dict[torch.device, tuple[list[Tensor], Tensor]] = {}
        self._splits: dict[tuple[torch.device, tuple[bool, ...]], list[Tensor]] = {}

    def along(self, dim: int, guessed: bool = False, stated: bool = False) -> TaskBatch:
        """The same batch for layers that have it as dimension ``dim``; both share what is computed of it."""
        view = copy.copy(self)
        view.dim, view.guessed, view.stated = dim, guessed, stated or self.stated
        return view

    @property
    def repeats(self) -> bool:
        """True if inputs may have every sample several times."""
        return self._copies is not None

    def repeated(self, times: int) -> TaskBatch:
        """The same batch for inputs that may also have every sample ``times`` times, one after another."""
        if times == 1:
            return self
        view = copy.copy(self)
        make: Callable[[Sequence[str | None]], TaskBatch] = type(self)
        view._copies = make([name for name in self._of_samples for _ in range(times)])
        return view

    def positions(self, device: torch.device) -> Tensor:
        """int64 ``[B]``: for each sample the position of its task in ``names``."""
        found = self._on_device.get(device)
        if found is None:
            places: dict[str | None, int] = {name: index for index, name in enumerate(self.names)}
            with torch.inference_mode(False):  # a block may be entered again, to train
                positions = torch.tensor([places[name] for name in self._of_samples], dtype=torch.int64)
                found = self._on_device[device] = positions.to(device)
        return found

    @property
    def _positions(self) -> Tensor:
        return self.positions(torch.device("cpu"))

    def split(self, first: tuple[bool, ...], device: torch.device) -> list[Tensor]:
        """The rows of the tasks that ``first`` marks with positions among those, the same of the others, and the way back."""
        found = self._splits.get((device, first))
        if found is None:
            with torch.inference_mode(False):
                marked = torch.tensor(first)
                within = torch.where(marked, marked.cumsum(0), (~marked).cumsum(0)) - 1
                mine = marked[self._positions]
                parts = [rows.nonzero().flatten() for rows in (mine, ~mine)]
                slots = [within[self._positions[rows]] for rows in parts]
                back = torch.cat(parts).argsort()
                found = [tensor.to(device) for tensor in (parts[0], slots[0], parts[1], slots[1], back)]
            self._splits[device, first] = found
        return found

    def groups(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """For each of ``names`` its rows; and the way back from those rows one after another."""
        found = self._groups.get(device)
        if found is None:
            with torch.inference_mode(False):
                order = self._positions.argsort(stable=True)
                rows = torch.split(order, torch.bincount(self._positions, minlength=len(self.names)).tolist())
                found = self._groups[device] = [part.to(device) for part in rows], order.argsort().to(device)
        return found

    def fitting(self, layer: nn.Module, input: Tensor, sample_dim: int) -> TaskBatch:
        """The batch of the samples of ``input``: this one, or with every sample repeated.

        RuntimeError unless ``input`` has a sample, of ``sample_dim`` dimensions, for each entry.
        """
        copies = self._copies
        if copies is not None and input.dim() > sample_dim + self.dim and input.shape[self.dim] == copies.size != self.size:
            return copies.along(self.dim, self.guessed).fitting(layer, input, sample_dim)
        check_samples(layer, input, sample_dim, self.size, self.dim, self.guessed and self.differs)
        return self

    @property
    def differs(self) -> bool:
        """True if not all samples are computed alike: it then counts which dimension is theirs."""
        return len(self.keys) > 1

    def run(self, layer: nn.Module, input: Tensor, sample_dim: int, function: Callable[[Tensor, TaskBatch], Any]) -> Any:
        """``function`` of ``input`` and of the batch that fits it."""
        return function(input, self.fitting(layer, input, sample_dim))


class MarkedBatch(TaskBatch):
    """A mixed-task batch in which some samples, or all, name no task: they are not computed, and their outputs are NaN.

    Args:
        names: a task for each sample, or None. None: no sample has a task, however many come.
    """

    def __init__(self, names: Sequence[str | None] | None):
        known = [] if names is None else [name for name in names if name is not None]
        super().__init__(known)
        self.known = TaskBatch(known)
        """The batch of the other samples."""
        self._any_size = names is None
        self._of_samples = names or ()
        self.size = len(self._of_samples)
        self._rows_of_known = [row for row, name in enumerate(names or ()) if name is not None]

    def along(self, dim: int, guessed: bool = False, stated: bool = False) -> MarkedBatch:
        view = super().along(dim, guessed, stated)
        assert isinstance(view, MarkedBatch)
        view.known = self.known.along(dim, stated=view.stated)  # what is guessed is checked where all samples are there
        return view

    @property
    def differs(self) -> bool:
        return not self._any_size

    def rows(self, device: torch.device) -> Tensor:
        """int64: the positions of the samples that have a task."""
        return torch.tensor(self._rows_of_known, dtype=torch.int64, device=device)

    def repeated(self, times: int) -> TaskBatch:
        return self if self._any_size else super().repeated(times)

    def fitting(self, layer: nn.Module, input: Tensor, sample_dim: int) -> TaskBatch:
        if not self._any_size:
            return super().fitting(layer, input, sample_dim)
        dim = self.dim if input.dim() > sample_dim + self.dim else 0
        return MarkedBatch([None] * (input.shape[dim] if input.dim() > sample_dim + dim else 1)).along(dim, stated=self.stated)

    def run(self, layer: nn.Module, input: Tensor, sample_dim: int, function: Callable[[Tensor, TaskBatch], Any]) -> Any:
        """``function`` of the samples that have a task, in their places among NaN."""
        batch = self.fitting(layer, input, sample_dim)
        if batch is not self:
            assert isinstance(batch, MarkedBatch)
            return batch._run(layer, input, sample_dim, function)
        return self._run(layer, input, sample_dim, function)

    def _run(self, layer: nn.Module, input: Tensor, sample_dim: int, function: Callable[[Tensor, TaskBatch], Any]) -> Any:
        batched, dim = input.dim() > sample_dim + self.dim, self.dim
        samples = input if batched else input.unsqueeze(dim)
        output = function(samples.index_select(dim, self.rows(input.device)), self.known)
        marked = self.marked(layer, output, dim)
        return marked if batched else marked.squeeze(dim)

    def marked(self, layer: nn.Module, output: object, dim: int) -> Tensor:
        """``output`` of the samples that have a task, along ``dim``, in their places among NaN. RuntimeError if it is no such."""
        rows = self._rows_of_known
        if not isinstance(output, Tensor) or not (output.is_floating_point() or output.is_complex()):
            got = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise RuntimeError(f"{type(layer).__name__} must give a floating-point tensor, for unknown='mark' NaN, got {got}")
        if output.dim() <= dim or output.shape[dim] != len(rows):
            raise RuntimeError(
                f"{type(layer).__name__} gave shape {list(output.shape)} for {len(rows)} samples: unknown='mark' needs one of each"
            )
        shape = [*output.shape[:dim], self.size, *output.shape[dim + 1 :]]
        return output.new_full(shape, torch.nan).index_copy(dim, self.rows(output.device), output)


def along(dim: int, function: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """``function``, which has the samples first, of an input whose samples lie along ``dim``."""
    if dim == 0:
        return function(input)
    # A copy even where it is in order: no output is a view, an activation may write to it.
    return function(input.transpose(0, 1)).transpose(0, 1).clone(memory_format=torch.contiguous_format)


def check_samples(layer: nn.Module, input: Tensor, sample_dim: int, size: int, dim: int, guessed: bool) -> None:
    """RuntimeError unless ``input`` has, along ``dim``, a sample of ``sample_dim`` dimensions for each of ``size`` entries."""
    which = ("first", "second")[dim]
    batched = input.dim() > sample_dim + dim
    if dim and not batched:
        raise RuntimeError(
            f"{type(layer).__name__} was called inside a using_task block whose batch is the second dimension of its input: the "
            f"input must have at least {sample_dim + 2} dimensions, got shape {list(input.shape)}. {_ADVICE}"
        )
    samples = input.shape[dim] if batched else 1
    if samples != size:
        raise RuntimeError(
            f"{type(layer).__name__} was called with {samples} samples inside a using_task block that names a task for each of "
            f"{size}: the {which} dimension of its input must be the batch's, got shape {list(input.shape)}. "
            + (_rows_each(samples // size) if size and samples > size and samples % size == 0 else _ADVICE)
        )
    if guessed and input.dim() > sample_dim + 1 and input.shape[1] == samples:
        raise RuntimeError(
            f"{type(layer).__name__} was called with an input of shape {list(input.shape)}: the first or the second dimension "
            f"may be the batch's, since other modules of the model have batch_first=False, or torch.fx traced it and left out "
            f"those that may have had it. {_ADVICE}"
        )


def _rows_each(count: int) -> str:
    return (
        f"If every sample has {count} rows, as in a beam search, name its task {count} times: "
        f"using_task(model, tasks, repeat={count})"
    )


_ADVICE = "Another dimension: using_task(..., batch_dim=0) or batch_dim=1, for the model or in a block of its own around one module"


class Superposition(Selection):
    """A superposition of tasks: ``theta = W * sum_t alpha_t g(M_t)``, the same for all samples.

    Tensors of tasks in other layers (heads, batch-norm statistics) are combined with the same ``alpha``.
    """

    def __init__(self, amounts: Mapping[str, float | Tensor]):
        super().__init__(amounts)
        self.amounts = tuple(amounts.values())

    def mix(self, tensors: Iterable[Tensor]) -> Tensor:
        """``sum_t alpha_t x_t``, for tensors in the order of the tasks, in their dtype. The sum is in float32 or float64.

        Counts are rounded to whole ones.
        """
        total: float | Tensor = 0.0
        dtype = torch.float32
        for amount, tensor in zip(self.amounts, tensors, strict=True):
            dtype = tensor.dtype
            total = total + amount * tensor.to(compute_dtype(dtype) if dtype.is_floating_point else torch.float64)
        assert isinstance(total, Tensor)  # a superposition has at least one task
        return total.to(dtype) if dtype.is_floating_point else total.round().to(dtype)


class ObservedSuperposition(Superposition):
    """A superposition whose maker combines the masks itself, and sees the input and output of every masked layer.

    Args:
        amounts: the coefficients ``alpha_t`` by task.
        mixed: gives the mixed tensor of a layer, by its name there.
        observe: takes a masked layer, its input and its output, and gives what the layer returns.
    """

    def __init__(
        self,
        amounts: Mapping[str, float | Tensor],
        mixed: Callable[[nn.Module, str], Tensor | None],
        observe: Callable[[nn.Module, Tensor, Tensor], Tensor],
    ):
        super().__init__(amounts)
        self.mixed, self.observe = mixed, observe


class GivenMasks(Selection):
    """Masks that are no task's: those that tasks have while a meta-learner adapts them (:mod:`metamask_ext.meta`).

    Args:
        start: stands for the layers that get no mask here, and for what else belongs to tasks: the name of a task, or a
            superposition.
        masks: for a layer the logits of its masked parameters (of weight and bias): tensors ``[*shape]`` for all samples, or with
            ``slots`` ``[T, *shape]``.
        slots: int64 ``[B]``, which of ``T`` masks a sample uses; None: all samples use the same.
        normalise: computes a batch norm in the place of its own forward.
    """

    def __init__(
        self,
        start: str | Superposition,
        masks: Mapping[nn.Module, tuple[Tensor | None, ...]],
        slots: Tensor | None,
        normalise: Callable[[BatchNorm, Tensor], Tensor],
    ):
        super().__init__((start,) if isinstance(start, str) else start.names)
        self.masks, self.slots, self.normalise = masks, slots, normalise
        self.start = start
        self.selected: str | Superposition = self.keys[0] if isinstance(start, str) else start
        """``start`` as a block holds it: the key of a task, or the superposition."""

    def check_size(self, layer: nn.Module, samples: int) -> None:
        """RuntimeError unless ``layer`` is called with a sample for each slot."""
        if self.slots is not None and samples != len(self.slots):
            raise RuntimeError(
                f"{type(layer).__name__} was called with {samples} samples while {len(self.slots)} of several tasks are run as one "
                "batch: the first dimension of its input must be the batch's"
            )
