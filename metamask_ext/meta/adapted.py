"""What a meta-learner adapts, and how the model runs with it: as one mixed batch, by torch.func, or for one task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.context import run_selected
from ..nn.layers import MaskedConv2d
from ..nn.masked_layer import MaskedLayer, TaskMasks
from ..nn.names import describe, escape
from ..nn.read_through import ReadThroughConv2d, ReadThroughLinear
from ..nn.selection import GivenMasks, Superposition
from ..nn.task_dict import TaskDict
from ..nn.task_layer import TaskLayer
from ..nn.tasks import check_amounts, tasks
from . import batch_norm
from .batch_norm import Normalisation, Statistics

Start = str | Mapping[str, "float | Tensor"]
Adapt = str | Callable[[str], bool]


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
        self._sources: list[tuple[Any, ...]] = []
        """Where the adapted tensors start: a module and the key of its parameter; or what a layer's masks are combined of."""
        self._masks: dict[MaskedLayer, list[int | None]] = {}
        """For each layer with an adapted mask the positions of the weight's and of the bias's among the adapted tensors."""
        self._others: dict[str, int] = {}
        self._choose(adapt)
        self.norms = batch_norm.prepare(model, policy)
        read_through = any(isinstance(layer, (ReadThroughLinear, ReadThroughConv2d)) for layer in self._masks)
        self.mixed = not self._others and not read_through
        # Sample by sample, the tasks of one beside each other: they are then groups of channels of convolutions and batch norms,
        # without a copy. Task by task: the rows of a task are one matrix of linear layers.
        self._by_sample = bool(self.norms) or any(isinstance(layer, MaskedConv2d) for layer in self._masks)
        self._active = list(dict.fromkeys([*self.layers, *self.norms]))
        self._slots: tuple[Any, Tensor] | None = None

    def _checked_start(self, start: Start | None) -> str | Superposition:
        if not self.layers:
            if start is not None:
                raise ValueError(f"start needs a model with masked layers, got {type(self.model).__name__}")
            return Superposition({})
        known = tasks(self.model)
        if start is None and len(known) == 1:
            return known[0]
        if isinstance(start, Mapping):
            return Superposition(check_amounts(known, start, "start"))
        if start not in known:
            raise ValueError(f"start must be one of the tasks {describe(known)}, or several with coefficients, got {start!r}")
        return start

    def _choose(self, adapt: Adapt) -> None:
        """Find what ``adapt`` means."""
        kinds = {"masks": (True, False), "weights": (False, True), "all": (True, True)}
        if not callable(adapt) and adapt not in kinds:
            raise ValueError(f"adapt must be 'masks', 'weights', 'all' or a function of a parameter's name, got {adapt!r}")
        places: dict[int, int] = {}

        def place(name: str, is_mask: bool, same: Any, *source: Any) -> int | None:
            """The position of a tensor; None if it is not to be adapted. Layers may share one: ``same`` is what they share."""
            if id(same) not in places and (adapt(name) if callable(adapt) else kinds[adapt][not is_mask]):
                places[id(same)] = len(self.names)
                self.names.append(name)
                self._sources.append(source)
            return places.get(id(same))

        for path, module in self.model.named_modules():
            if isinstance(module, MaskedLayer):
                found = [self._place_mask(place, path, module, kind) for kind in module._dicts()]
                if any(position is not None for position in found):
                    self._masks[module] = [*found, None][:2]
        for path, module in self.model.named_modules():
            if isinstance(module, TaskMasks):
                continue
            for key, parameter in module._parameters.items():
                if parameter is None or (isinstance(module, TaskDict) and key not in self._keys()):
                    continue
                before = len(self.names)
                place(_joined(path, key), False, parameter, module, key)
                if len(self.names) > before:
                    self._others[self.names[before]] = before
                    if isinstance(module, TaskDict) and not isinstance(self.start, str):
                        raise ValueError(f"adapt selects {self.names[before]!r}, of which a start from several tasks has a mixture")
        if not self.names:
            raise ValueError(f"adapt selects no parameter of {type(self.model).__name__}, got {adapt!r}")

    def _place_mask(self, place: Callable[..., int | None], path: str, layer: MaskedLayer, kind: str) -> int | None:
        tensors = layer._dicts()[kind]
        name = _joined(path, kind)
        if not isinstance(self.start, str):
            return place(name, True, tensors, layer, kind, None)
        key = layer._task_key(self.start)
        position = place(f"{name}.{key}", True, tensors._tensor(key), tensors, key)
        if position is not None and tensors._is_bits(key):
            raise ValueError(
                f"the masks of task {self.start!r} are packed, and bits cannot be adapted: use start={{{self.start!r}: 1.0}}"
            )
        return position

    def _keys(self) -> tuple[str, ...]:
        return (escape(self.start),) if isinstance(self.start, str) else self.start.keys

    def first(self) -> list[Tensor]:
        """The tensors from which adaptation starts, differentiable for the model's and for the coefficients."""
        return [source[0]._parameters[source[1]] if len(source) == 2 else self._combined(*source[:2]) for source in self._sources]

    def _combined(self, layer: MaskedLayer, kind: str) -> Tensor:
        assert isinstance(self.start, Superposition)
        shared = layer._shared()[kind == "bias_masks"]
        assert shared is not None
        return layer._combined(layer._dicts()[kind], dict(zip(self.start.names, self.start.amounts)), shared)

    def run(
        self,
        parameters: Sequence[Tensor],
        x: Tensor,
        weights: Tensor | None = None,
        statistics: Mapping[str, Statistics] | None = None,
        keep: bool = False,
    ) -> tuple[Any, dict[str, Statistics]]:
        """The model's output ``[T, K, ...]`` for ``x`` ``[T, K, ...]`` with parameters ``[T, ...]``; if wanted, its statistics."""
        if not self.mixed:
            given = {"weights": weights, "statistics": statistics}

            def one(parameters: list[Tensor], x: Tensor, given: dict[str, Any]) -> Any:
                return self.run_one(parameters, x, given.get("weights"), given.get("statistics"), keep)

            # None has no dimension to map over.
            present = {key: value for key, value in given.items() if value is not None}
            return torch.vmap(one, randomness="different")(list(parameters), x, present)
        count, samples = x.shape[:2]
        normalise = Normalisation(self.policy, count, weights, statistics, self.norms, keep)
        x = x.transpose(0, 1) if self._by_sample else x
        y = self._call(parameters, self._slots_of(count, samples, x.device), normalise, self.model, x.flatten(0, 1))
        if not isinstance(y, Tensor) or y.dim() == 0 or len(y) != count * samples:
            got = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise RuntimeError(f"the model must give a tensor with an entry for each of its {count * samples} samples, got {got}")
        y = y.unflatten(0, (samples, count)).transpose(0, 1) if self._by_sample else y.unflatten(0, (count, samples))
        return y, normalise.kept or {}

    def run_one(
        self,
        parameters: Sequence[Tensor],
        x: Tensor,
        weights: Tensor | None = None,
        statistics: Mapping[str, Statistics] | None = None,
        keep: bool = False,
    ) -> tuple[Any, dict[str, Statistics]]:
        """The same for one task: its output ``[K, ...]`` for ``x`` ``[K, ...]`` with parameters without the first dimension."""
        normalise = Normalisation(self.policy, None, weights, statistics, self.norms, keep)
        others = {name: parameters[place] for name, place in self._others.items()}
        if others:
            y = self._call(parameters, None, normalise, torch.func.functional_call, self.model, others, (x,))
        else:
            y = self._call(parameters, None, normalise, self.model, x)
        return y, normalise.kept or {}

    def _call(
        self, parameters: Sequence[Tensor], slots: Tensor | None, normalise: Normalisation, function: Any, *arguments: Any
    ) -> Any:
        if not self._active:
            return function(*arguments)
        masks: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        for layer, (of_weight, of_bias) in self._masks.items():
            mask = self._fixed(layer, "masks", parameters) if of_weight is None else parameters[of_weight]
            bias_mask = self._fixed(layer, "bias_masks", parameters) if of_bias is None else parameters[of_bias]
            masks[layer] = mask, bias_mask
        return run_selected(self._active, GivenMasks(self.start, masks, slots, normalise), function, *arguments)

    def _fixed(self, layer: MaskedLayer, kind: str, parameters: Sequence[Tensor]) -> Any:
        """A mask that is not adapted, of a layer whose other one is."""
        tensors = layer._dicts().get(kind)
        if tensors is None:
            return None
        mask = tensors._tensor(escape(self.start)) if isinstance(self.start, str) else self._combined(layer, kind)
        return mask.expand(len(parameters[0]), *mask.shape) if self.mixed else mask

    def _slots_of(self, count: int, samples: int, device: torch.device) -> Tensor:
        """``K`` samples of each of ``T`` tasks; kept for the next call, which mostly asks for the same."""
        wanted = count, samples, device
        if self._slots is None or self._slots[0] != wanted:
            tasks = torch.arange(count, device=device)
            self._slots = wanted, tasks.repeat(samples) if self._by_sample else tasks.repeat_interleave(samples)
        return self._slots[1]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
