"""The base of masked layers: a mask for each task, and the choice of the one that a forward uses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from ..ops.checks import DTYPES, has_values
from ..ops.gate import compute_dtype, gate_values, resolve_gate
from ..ops.geometry import packed_shape
from ..ops.packed.functional import pack_mask, unpack_mask
from ..ops.weight.functional import masked_weight
from ..torch_private import disable_dynamo, fx_trace, traced_attribute
from .context import LIVE, AmbiguousTaskError, Key
from .given import GivenTasks, given_to
from .guarded import raise_folded
from .names import DEFAULT_TASK, escape, plain
from .selection import GivenMasks, Superposition, TaskBatch
from .settings import Settings, decoded, settings_in
from .task_dict import TaskDict
from .task_layer import Init, StateDict, TaskLayer
from .task_masks import MaskInit, TaskMasks, check_mask_dtype, check_mask_init, logits_dtype
from .wrappers import check_one_dtype


class Gate(TypedDict):
    """A gate as the ops' functions take it."""

    gate: str
    temperature: float
    threshold: float


LARGEST_COMBINED = 4.0
"""The bound, in units of the temperature, of a sigmoid gate's logits that a combination of masks gives (of bits, say):
sigmoid(4) = 0.982, near on and with a gradient still, as where convert begins."""


MaskLogits = tuple["Tensor | None", ...]
"""The logits of one task, of each masked parameter in the order of their names; None for one that the layer lacks."""


def masks_name(parameter: str) -> str:
    """The name of the dictionary of a parameter's masks: ``masks`` for ``weight``, ``bias_masks`` for ``bias``, and so on."""
    return "masks" if parameter == "weight" else f"{parameter}_masks"


class MaskedLayer(TaskLayer):
    """The base of masked layers: a mask for each task, in ``masks`` and, with a bias, in ``bias_masks``.

    A module of which other parameters are masked (:func:`metamask_ext.mask_parameter`) has the masks of ``name`` in ``name_masks``.
    All are ParameterDicts by task name, one tensor per task: a task has a gradient and optimiser state only once it was used.
    While a layer has one task, that one is active; with several, :func:`metamask_ext.using_task` says which. A finished task may
    be packed (:class:`metamask_ext.MaskBank`): its masks are then uint8 buffers of one bit a weight, as
    :func:`metamask_ext.pack_mask` gives them, under the same keys; the gate is then 0 or 1, whatever ``gate`` says.

    State dicts are loaded as :class:`TaskLayer` says; a uint8 mask makes the task a packed one, another makes it one with logits.
    A state dict holds ``gate``, ``temperature`` and ``threshold`` of the moment when it was made. A layer that loads it takes them
    over: it computes what the saved one did, however it was built. A state of an older version has masks and not these three: the
    layer keeps its own, and a warning names them.
    """

    if TYPE_CHECKING:
        weight: Tensor
        bias: Any  # torch's layers declare it in different ways
        masks: TaskMasks
        bias_masks: TaskMasks | None
    mask_dtype: torch.dtype | None = None
    _masked_names: tuple[str, ...] = ("weight", "bias")
    """The parameters that have masks, where the layer has them. The first one is always there."""

    def _init_masked(
        self,
        gate: str,
        temperature: float,
        threshold: float,
        mask_init: MaskInit,
        mask_dtype: torch.dtype | None = None,
        tasks: Sequence[str | None] = (DEFAULT_TASK,),
        names: Sequence[str] | None = None,
    ) -> None:
        """Make a torch layer into a masked one: its attributes, and masks of ``tasks`` (by slot) for its parameters ``names``."""
        resolve_gate(gate, temperature, threshold)
        shared = {name: self._parameter(name) for name in (self._masked_names if names is None else names)}
        for name, parameter in shared.items():
            if parameter is not None:
                if parameter.dtype not in DTYPES:
                    raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {parameter.dtype}")
                check_mask_dtype(mask_dtype, parameter.dtype)
        self.gate, self.temperature, self.threshold, self.mask_init = plain(gate), temperature, threshold, mask_init
        self.mask_dtype = mask_dtype
        check_mask_init(mask_init)
        for name, parameter in shared.items():
            masks = None if parameter is None else TaskMasks(mask_dtype).train(self.training)
            setattr(self, masks_name(name), masks)
            if parameter is not None and masks is not None:
                for task in tasks:
                    if task is not None:
                        masks[task] = self._new_logits(parameter)
                masks._renumber(tasks)

    @property
    def _is_fsdp_managed_module(self) -> bool:
        return bool(self.__dict__.get("_is_fsdp_managed_module", False))

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, value: bool) -> None:
        if value:
            first, _ = self._groups()[0]
            check_one_dtype(self, first.dtype, self._logits_dtype(first))
        self.__dict__["_is_fsdp_managed_module"] = value

    def _parameter(self, name: str) -> Tensor | None:
        """The parameter that all tasks share."""
        parameter: Tensor | None = getattr(self, name)
        return parameter

    def _group(self, what: str) -> tuple[Tensor | None, TaskMasks | None]:
        """A parameter with its masks."""
        return self._parameter(what), self._modules.get(masks_name(what))

    def _named_groups(self) -> dict[str, tuple[Tensor, TaskMasks]]:
        """The parameters that have masks, with those."""
        found = {}
        for name in self._masked_names:
            shared, masks = self._group(name)
            if shared is not None and masks is not None:
                found[name] = shared, masks
        return found

    def _groups(self) -> list[tuple[Tensor, TaskMasks]]:
        return list(self._named_groups().values())

    def _dicts(self) -> dict[str, TaskDict]:
        found = ((kind, self._modules.get(kind)) for kind in self._kinds())
        return {kind: masks for kind, masks in found if masks is not None}

    def _kinds(self) -> list[str]:
        return [masks_name(name) for name in self._masked_names]

    def _task_dict(self) -> TaskDict:
        masks: TaskDict = self._modules[masks_name(self._masked_names[0])]
        return masks

    def _shared_of(self, kind: str) -> Tensor:
        """The parameter of the masks with this name."""
        shared = self._parameter(self._masked_names[self._kinds().index(kind)])
        assert shared is not None
        return shared

    def _new_tensors(self, init: Init | None = None) -> list[tuple[TaskDict, Tensor]]:
        new: list[tuple[TaskDict, Tensor]] = []
        for parameter, masks in self._groups():
            new.append((masks, self._new_logits(parameter, None if init is None else partial(init, self, masks))))
        return new

    def _new_logits(self, parameter: Tensor, init: Callable[[Tensor], object] | None = None) -> Tensor:
        logits = self._empty_logits(parameter)
        with torch.no_grad():
            (self._init_logits if init is None else init)(logits)
        return logits

    def _logits_dtype(self, parameter: Tensor) -> torch.dtype:
        """The dtype of a new task's logits of this parameter."""
        return logits_dtype(parameter.dtype, self.mask_dtype)

    def _dtypes_of_logits(self, parameter: Tensor) -> tuple[torch.dtype, ...]:
        """Those that fit the parameter, that of a new task first."""
        return tuple(dict.fromkeys((self._logits_dtype(parameter), logits_dtype(parameter.dtype, None), parameter.dtype)))

    def _empty_logits(self, parameter: Tensor) -> Tensor:
        """New logits for a parameter, in its order in memory."""
        return torch.empty_like(parameter, dtype=self._logits_dtype(parameter), requires_grad=False)

    def _combine(self, tensors: TaskDict, amounts: Mapping[str, float | Tensor], out: Tensor) -> None:
        out.copy_(self._combined(tensors, amounts, out))

    def _combined(self, tensors: TaskDict, amounts: Mapping[str, float | Tensor], like: Tensor) -> Tensor:
        """Logits of the shape of ``like`` whose gate is this combination of the tasks' gates, differentiable for all of it.

        The sum over tasks is in float32 or float64, and its logits are rounded once to the dtype of ``like``.
        """
        total: Tensor | float = 0.0
        wide = compute_dtype(like.dtype)
        for task, amount in amounts.items():
            mask = tensors[task]
            if mask.dtype == torch.uint8:
                gate = unpack_mask(mask, like.shape).to(wide)
            else:
                gate = gate_values(mask.to(wide), *self._resolved())[0]
            total = total + amount * gate
        assert isinstance(total, Tensor)  # a combination has at least one task
        if self.gate == "hard":
            return (total - 0.5 + self.threshold).to(like.dtype)
        bound = torch.tensor(LARGEST_COMBINED, dtype=wide).sigmoid().item()
        return (torch.logit(total.clamp(1 - bound, bound)) * self.temperature).to(like.dtype)

    def _init_logits(self, logits: Tensor) -> None:
        if self.mask_init == "normal":
            nn.init.normal_(logits)
        elif callable(self.mask_init):
            self.mask_init(logits)
        else:
            nn.init.constant_(logits, float(self.mask_init))

    _copied_alone = False

    def __deepcopy__(self, memo: dict[int, object]) -> MaskedLayer:
        alone = not memo
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        set_state: Callable[[dict[str, object]], None] = made.__setstate__
        set_state(copy.deepcopy(self.__dict__, memo))
        if alone:
            made._copied_alone = True
        return made

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Assigning an attribute comes here too.
        if self._copied_alone and name == "bias" and self._modules.get("bias_masks") is not None:
            self._refuse_folding(name, param)
        super().register_parameter(name, param)

    def get_extra_state(self) -> Tensor:
        """The gate, its parameters and the number of tasks: float64 ``[4]`` (:mod:`metamask_ext.nn.settings`)."""
        return self._settings().encoded()

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the gate and its parameters. ValueError, and nothing has changed, if there are none in ``state``."""
        if isinstance(state, Tensor) and not has_values(state):
            return  # on meta, or fake
        self.gate, self.temperature, self.threshold, _ = decoded(state)

    def _settings(self) -> Settings:
        return Settings(plain(self.gate), self.temperature, self.threshold, len(self._task_dict()))

    def _load_settings(self, state_dict: StateDict, prefix: str, given: bool, error_msgs: list[str]) -> int | None:
        found = settings_in(state_dict, prefix, self._settings(), given, type(self).__name__, error_msgs)
        return None if found is None else found.tasks

    def _load_from_state_dict(self, *arguments: Any) -> None:
        # With assign=True the state's tensors take the places of the parameters.
        self.__dict__.pop("_copied_alone", None)
        super()._load_from_state_dict(*arguments)

    def _refuse_folding(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse another Parameter in a copy of this layer alone: so do tools that fold a normalisation into a layer.

        They take ``weight`` and ``bias`` for the effective ones, and the masks would apply to what they write.
        """
        now = self._parameters.get(name)
        if now is not None and param is not now:
            raise_folded(self, name)

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch's layer does, and every task's mask by ``mask_init``."""
        super().reset_parameters()
        if masks_name(self._masked_names[0]) in self._modules:  # torch's constructor calls this before there are any
            self._reset_masks()

    def _reset_masks(self) -> None:
        with torch.no_grad():
            for _, masks in self._groups():
                for _, logits in masks._logits():
                    self._init_logits(logits)

    def _active(self) -> MaskLogits | Key | GivenTasks | None:
        """The active task's logits; where there are none, the key of a packed task, or a selection.

        None: under torch.compile, which must leave those to eager mode. GivenTasks: only there.
        """
        if torch.compiler.is_dynamo_compiling():
            given: MaskLogits | GivenTasks | None = given_to(self)
            if given is not None:
                return given
            masks = self._task_dict()
            # What is read here becomes a guard: first what changes least.
            if not masks._single or LIVE.selections:
                return _active_in_eager(self)
            (key,) = masks._slots
            return self._logits_of(key) if key in masks._parameters else None
        selected = self._selected()
        if isinstance(selected, str) and selected in self._task_dict()._parameters:
            return self._logits_of(selected)
        return selected

    def _logits_of(self, key: str) -> MaskLogits:
        of_each = [self._modules.get(masks_name(name)) for name in self._masked_names]
        return tuple(None if masks is None else masks._parameters.get(key) for masks in of_each)

    def _active_mask(self, name: str) -> Tensor | None:
        """The active task's logits of one parameter. RuntimeError where there are none, or several."""
        if name not in self._masked_names:
            raise AttributeError(f"{name} of {type(self).__name__} is not masked: {', '.join(self._masked_names)}")
        active = self._active()
        if isinstance(active, tuple):
            return active[self._masked_names.index(name)]
        if isinstance(active, TaskBatch):
            self._read("mask_logits", active)
        if isinstance(active, str) and not self._task_dict()._is_bits(active):  # of a replica
            _, masks = self._group(name)
            return None if masks is None else masks._tensor(active)
        what = "the active task is packed: its mask has bits" if isinstance(active, str) else "tasks are superposed"
        raise RuntimeError(f"mask_logits of {type(self).__name__} cannot be read: {what}")

    def _bits(self, task: str) -> list[tuple[TaskDict, Tensor]]:
        """The bits of a task that has logits, and where they belong."""
        key = escape(task)
        threshold = self.threshold if self.gate == "hard" else 0.0
        found = [masks for masks in self._dicts().values() if not masks._is_bits(key)]
        return [(masks, pack_mask(masks._tensor(key).detach(), threshold=threshold)) for masks in found]

    def _theta(self, what: str, key: str) -> Tensor | None:
        """The masked ``weight`` or ``bias`` of one task."""
        shared, masks = self._group(what)
        return shared if shared is None or masks is None else self._theta_of(shared, masks, key)

    def _theta_of(self, shared: Tensor, masks: TaskDict, key: str) -> Tensor:
        """``shared``, the weight or bias, with the mask of one task."""
        if masks._is_bits(key):
            return shared * unpack_mask(masks._tensor(key), shared.shape)
        return masked_weight(shared, masks._tensor(key), **self._gate())

    def _with_mask(self, what: str, mask: Tensor | None) -> Tensor | None:
        """The masked ``weight`` or ``bias`` with these logits."""
        shared, _ = self._group(what)
        return shared if shared is None or mask is None else masked_weight(shared, mask, **self._gate())

    def _read_given(self, what: str, given: GivenMasks) -> Tensor | None:
        masks = given.masks.get(self)
        if masks is None:
            return super()._read_given(what, given)
        if given.slots is not None:
            raise AmbiguousTaskError(
                f"{what} of {type(self).__name__} is ambiguous while several tasks are run as one batch: call the layer instead"
            )
        return self._with_mask(what, masks[self._masked_names.index(what)])

    def _mixed(self, superposition: Superposition, what: str) -> Tensor | None:
        shared, masks = self._group(what)
        if shared is None or masks is None:
            return shared
        # What each task gives is not rounded to 16 bits before the sum.
        wide = shared.to(compute_dtype(shared.dtype))
        thetas = (self._masked_by(wide, masks._tensor(key)) for key in superposition.keys)
        return superposition.mix(thetas).to(shared.dtype)

    def _masked_by(self, shared: Tensor, mask: Tensor) -> Tensor:
        """Return ``shared`` masked by bits, or by the gate of logits in its dtype."""
        if mask.dtype == torch.uint8:
            return shared * unpack_mask(mask, shared.shape)
        return masked_weight(shared, mask.to(shared.dtype), **self._gate())

    @property
    def mask_logits(self) -> Tensor:
        """The active task's mask logits ``M``, of the shape of ``weight``."""
        if fx_trace._is_fx_tracing_flag and (traced := traced_attribute(self, "mask_logits")) is not None:
            return traced
        logits = self._active_mask("weight")
        assert logits is not None
        return logits

    @property
    def bias_mask_logits(self) -> Tensor | None:
        """The active task's logits of the bias, ``M_b``; None without a bias."""
        if fx_trace._is_fx_tracing_flag and (traced := traced_attribute(self, "bias_mask_logits")) is not None:
            return traced
        return self._active_mask("bias")

    def _gate(self) -> Gate:
        return {"gate": self.gate, "temperature": self.temperature, "threshold": self.threshold}

    def _resolved(self) -> tuple[int, float]:
        return resolve_gate(self.gate, self.temperature, self.threshold)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), self._mask_repr())))

    def _mask_repr(self) -> str:
        parameter = f"temperature={self.temperature}" if self.gate == "sigmoid" else f"threshold={self.threshold}"
        return f"gate={self.gate}, {parameter}, tasks={len(self._task_dict())}"

    def _fit_forms(self, state_dict: StateDict, prefix: str) -> str | None:
        groups = self._named_groups()
        for name, (shared, masks) in groups.items():
            for task in masks:
                key = escape(task)
                saved = state_dict.get(f"{prefix}{masks_name(name)}.{key}")
                if not isinstance(saved, Tensor) or (saved.dtype == torch.uint8) == masks._is_bits(key):
                    continue
                if saved.dtype == torch.uint8:
                    masks[task] = torch.empty(packed_shape(shared.shape), dtype=torch.uint8, device=shared.device)
                else:
                    masks[task] = self._empty_logits(shared)
        forms = [{key for key in masks._slots if masks._is_bits(key)} for _, masks in groups.values()]
        if any(form != forms[0] for form in forms):
            names, every = " and ".join(prefix + masks_name(name) for name in groups), "both" if len(groups) == 2 else "all"
            return f"{names} must {every} be bits (uint8) for a task or {every} logits"
        return None


@disable_dynamo
def _active_in_eager(layer: MaskedLayer) -> MaskLogits | None:
    """For torch.compile, which cannot read a context variable: one graph break, and the masks are inputs of what follows."""
    active = layer._active()
    return active if isinstance(active, tuple) else None


def masked_value(layer: MaskedLayer, what: str) -> Tensor | None:
    """A parameter as what is active masks it. AmbiguousTaskError where that is several tasks."""
    active = layer._active()
    if active is None:
        return _value_in_eager(layer, what)
    if isinstance(active, tuple):
        shared, logits = layer._parameter(what), active[layer._masked_names.index(what)]
        return shared if shared is None or logits is None else masked_weight(shared, logits, **layer._gate())
    assert not isinstance(active, GivenTasks)  # only layers that take several tasks at once are given some
    return layer._read(what, active)


@disable_dynamo
def _value_in_eager(layer: MaskedLayer, what: str) -> Tensor | None:
    """For torch.compile, which cannot read a context variable."""
    return masked_value(layer, what)
