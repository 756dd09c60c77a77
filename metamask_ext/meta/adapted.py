"""The tensors that a meta-learner adapts, and the model with them: as one mixed-task batch, by torch.func, or for one task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..nn.context import run_selected
from ..nn.grouped import GroupedLayer
from ..nn.layers import MaskedConv2d
from ..nn.masked_layer import MaskedLayer
from ..nn.names import describe, escape, plain
from ..nn.paths import plain_path
from ..nn.read_through import ReadThrough
from ..nn.selection import GivenMasks, Superposition
from ..nn.task_dict import TaskDict
from ..nn.task_layer import TaskLayer
from ..nn.task_masks import TaskMasks
from ..nn.tasks import check_amounts, refuse_nan, tasks
from ..ops.streams import current_stream
from . import batch_norm
from .batch_norm import Normalisation, Statistics

Start = str | Mapping[str, "float | Tensor"]
Adapt = str | Callable[[str], bool]
Output = Any
"""A model's output: torch leaves its type open."""

R = TypeVar("R")


class _Stored(NamedTuple):
    """A tensor of the model from which adaptation starts."""

    module: nn.Module
    key: str


class _Combined(NamedTuple):
    """A layer's mask from which adaptation starts, combined of several tasks' ones; ``kind`` is weight's or bias's."""

    layer: MaskedLayer
    kind: str


Place = Callable[[str, bool, object, "_Stored | _Combined"], "int | None"]


class AdaptedModel:
    """A model, the names of what is adapted in it (``names``), and where that lies.

    The masks of masked layers reach them through a selection, all other parameters through ``torch.func.functional_call``.
    ``mixed``: only masks are adapted, so that all tasks can run as one batch through the kernels.
    """

    def __init__(self, model: nn.Module, adapt: Adapt, start: Start | None, policy: str):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model, self.policy = model, policy
        self.layers = [layer for layer in model.modules() if isinstance(layer, TaskLayer)]
        self.start = self._checked_start(start)
        self.names: list[str] = []
        self._sources: list[_Stored | _Combined] = []
        """The tensors from which adaptation starts."""
        self._masks: dict[MaskedLayer, list[int | None]] = {}
        """For each layer with an adapted mask the positions of its parameters' masks among the adapted tensors."""
        self._others: dict[str, int] = {}
        """By the name in ``named_parameters()``."""
        self._choose(adapt)
        self.norms = batch_norm.prepare(model, policy)
        self._norms_in = [
            (holder, attribute, module)
            for holder in model.modules()
            for attribute, module in holder._modules.items()
            if module is not None and module in self.norms
        ]
        """The places of the batch norms."""
        self.mixed = not self._others and all(map(_takes_tasks, self._masks))
        # Sample by sample, the tasks of one beside each other: they are then groups of channels of convolutions and batch norms,
        # without a copy. Task by task: the rows of a task are one matrix of linear layers.
        self._by_sample = bool(self.norms) or any(isinstance(layer, MaskedConv2d) for layer in self._masks)
        self._active = list(dict.fromkeys([*self.layers, *self.norms]))
        self._slots: tuple[tuple[int, int, torch.device, int | None], Tensor] | None = None

    def _checked_start(self, start: Start | None) -> str | Superposition:
        if not self.layers:
            if start is not None:
                raise ValueError(f"start needs a model with masked layers, got {type(self.model).__name__}")
            return Superposition({})
        known = tasks(self.model)
        if start is None and len(known) == 1:
            return known[0]
        if isinstance(start, Mapping):
            amounts = check_amounts(known, start, "start")
            refuse_nan(self.model, amounts, "combined")
            return Superposition(amounts)
        start = plain(start)
        if start not in known:
            raise ValueError(f"start must be one of the tasks {describe(known)}, or several with coefficients, got {start!r}")
        return start

    def _choose(self, adapt: Adapt) -> None:
        """Find the tensors that ``adapt`` selects."""
        kinds = {"masks": (True, False), "weights": (False, True), "all": (True, True)}
        if not callable(adapt) and adapt not in kinds:
            raise ValueError(f"adapt must be 'masks', 'weights', 'all' or a function of a parameter's name, got {adapt!r}")
        places: dict[int, int] = {}

        def place(name: str, is_mask: bool, same: object, source: _Stored | _Combined) -> int | None:
            """The position of a tensor; None if it is not to be adapted. Layers may share one: ``same`` is what they share."""
            if id(same) not in places and (adapt(name) if callable(adapt) else kinds[adapt][not is_mask]):
                places[id(same)] = len(self.names)
                self.names.append(name)
                self._sources.append(source)
            return places.get(id(same))

        for path, module in self.model.named_modules():
            if isinstance(module, MaskedLayer):
                own = module._dicts()
                found = [
                    self._place_mask(place, plain_path(self.model, path), module, kind) if kind in own else None
                    for kind in module._kinds()
                ]
                if any(position is not None for position in found):
                    self._masks[module] = found
        for path, module in self.model.named_modules():
            if isinstance(module, TaskMasks):
                continue
            for key, parameter in module._parameters.items():
                if parameter is None or (isinstance(module, TaskDict) and key not in self._keys()):
                    continue
                before = len(self.names)
                name = _joined(path, key)
                place(plain_path(self.model, name), False, parameter, _Stored(module, key))
                if len(self.names) > before:
                    self._others[name] = before
                    if isinstance(module, TaskDict) and not isinstance(self.start, str):
                        selected = self.names[before]
                        raise ValueError(f"adapt must not select what start combines from several tasks, got {selected!r}")
        if not self.names:
            raise ValueError(f"adapt selects no parameter of {type(self.model).__name__}, got {adapt!r}")

    def _place_mask(self, place: Place, path: str, layer: MaskedLayer, kind: str) -> int | None:
        tensors = layer._dicts()[kind]
        name = _joined(path, kind)
        if not isinstance(self.start, str):
            return place(name, True, tensors, _Combined(layer, kind))
        key = layer._task_key(self.start)
        position = place(f"{name}.{key}", True, tensors._tensor(key), _Stored(tensors, key))
        if position is not None and tensors._is_bits(key):
            raise ValueError(
                f"the masks of task {self.start!r} are packed, and bits cannot be adapted: use start={{{self.start!r}: 1.0}}"
            )
        return position

    def _keys(self) -> tuple[str, ...]:
        return (escape(self.start),) if isinstance(self.start, str) else self.start.keys

    def first(self) -> list[Tensor]:
        """The tensors from which adaptation starts, differentiable for the model's and for the coefficients."""
        return [self._first(source) for source in self._sources]

    def _first(self, source: _Stored | _Combined) -> Tensor:
        if isinstance(source, _Combined):
            return self._combined(source.layer, source.kind)
        tensor = source.module._parameters[source.key]
        assert tensor is not None
        return tensor

    def _combined(self, layer: MaskedLayer, kind: str) -> Tensor:
        assert isinstance(self.start, Superposition)
        shared = layer._shared_of(kind)
        like = shared.detach().to(layer._logits_dtype(shared))
        return layer._combined(layer._dicts()[kind], dict(zip(self.start.names, self.start.amounts)), like)

    def run(
        self,
        parameters: Sequence[Tensor],
        x: Tensor,
        weights: Tensor | None = None,
        statistics: Mapping[str, Statistics] | None = None,
        keep: bool = False,
    ) -> tuple[Output, dict[str, Statistics]]:
        """The model's output ``[T, K, ...]`` for ``x`` ``[T, K, ...]`` with parameters ``[T, ...]``; if wanted, its statistics."""
        if not self.mixed:
            # None has no dimension to map over: a list without an entry stands for it.
            weight_list = [] if weights is None else [weights]
            statistics_list = [] if statistics is None else [statistics]

            def one(
                parameters: list[Tensor], x: Tensor, weights: list[Tensor], statistics: list[Mapping[str, Statistics]]
            ) -> tuple[Output, dict[str, Statistics]]:
                return self.run_one(parameters, x, weights[0] if weights else None, statistics[0] if statistics else None, keep)

            run_each: Callable[..., tuple[Output, dict[str, Statistics]]] = torch.vmap(one, randomness="different")
            return run_each(list(parameters), x, weight_list, statistics_list)
        count, samples = x.shape[:2]
        normalise = Normalisation(self.policy, count, weights, statistics, self.norms, keep)
        x = x.transpose(0, 1) if self._by_sample else x
        y = self._call(parameters, self._slots_of(count, samples, x.device), normalise, self.model, x.flatten(0, 1))
        if not isinstance(y, Tensor) or y.dim() == 0 or len(y) != count * samples:
            got = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise RuntimeError(f"the model must give a tensor with an entry for each of its {count * samples} samples, got {got}")
        sizes = (samples, count) if self._by_sample else (count, samples)
        y = torch.unflatten(y, 0, sizes)
        y = y.transpose(0, 1) if self._by_sample else y
        return y, normalise.kept or {}

    def run_one(
        self,
        parameters: Sequence[Tensor],
        x: Tensor,
        weights: Tensor | None = None,
        statistics: Mapping[str, Statistics] | None = None,
        keep: bool = False,
    ) -> tuple[Output, dict[str, Statistics]]:
        """The same for one task: its output ``[K, ...]`` for ``x`` ``[K, ...]`` with parameters without the first dimension."""
        normalise = Normalisation(self.policy, None, weights, statistics, self.norms, keep)
        others = {name: parameters[place] for name, place in self._others.items()}
        if others:
            y = self._call(parameters, None, normalise, torch.func.functional_call, self.model, others, (x,))
        else:
            y = self._call(parameters, None, normalise, self.model, x)
        return y, normalise.kept or {}

    def _call(
        self,
        parameters: Sequence[Tensor],
        slots: Tensor | None,
        normalise: Normalisation,
        function: Callable[..., R],
        *arguments: object,
    ) -> R:
        for holder, attribute, norm in self._norms_in:
            if holder._modules.get(attribute) is not norm:
                raise RuntimeError(
                    f"batch norm {self.norms[norm]!r} was replaced after MAML was made, which does not know the one that is there: "
                    "make a MAML of the model as it is to be (it refuses a SyncBatchNorm, whose statistics are of several tasks)"
                )
        if not self._active:
            return function(*arguments)
        masks: dict[nn.Module, tuple[Tensor | None, ...]] = {
            layer: tuple(
                self._fixed(layer, kind, parameters) if position is None else parameters[position]
                for kind, position in zip(layer._kinds(), positions, strict=True)
            )
            for layer, positions in self._masks.items()
        }
        return run_selected(self._active, GivenMasks(self.start, masks, slots, normalise), function, *arguments)

    def _fixed(self, layer: MaskedLayer, kind: str, parameters: Sequence[Tensor]) -> Tensor | None:
        """A mask that is not adapted, of a layer whose other one is."""
        tensors = layer._dicts().get(kind)
        if tensors is None:
            return None
        mask = tensors._tensor(escape(self.start)) if isinstance(self.start, str) else self._combined(layer, kind)
        return mask.expand(len(parameters[0]), *mask.shape) if self.mixed else mask

    def _slots_of(self, count: int, samples: int, device: torch.device) -> Tensor:
        """``K`` samples of each of ``T`` tasks; kept for the next call, which mostly asks for the same."""
        # They are made on a stream: another has not waited for it.
        stream = current_stream(device)
        wanted = count, samples, device, None if stream is None else stream.stream_id
        found = self._slots
        if found is None or found[0] != wanted:
            with torch.inference_mode(False):
                tasks = torch.arange(count, device=device)
                found = wanted, tasks.repeat(samples) if self._by_sample else tasks.repeat_interleave(samples)
            self._slots = found  # whole: another thread may ask for other sizes
        return found[1]


def _takes_tasks(layer: MaskedLayer) -> bool:
    """True if a layer can run several tasks, each with logits of its own, as one batch."""
    return layer.stacks_tasks if isinstance(layer, GroupedLayer) else not isinstance(layer, ReadThrough)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
