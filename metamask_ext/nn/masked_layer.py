"""The base of masked layers: a mask for each task, and the choice of the one that a forward uses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from ..ops.checks import DTYPES, check_layer_input, has_values
from ..ops.dispatch import check_input_dtype
from ..ops.gate import compute_dtype, gate_values, resolve_gate
from ..ops.geometry import packed_shape
from ..ops.packed.functional import pack_mask, unpack_mask
from ..ops.weight.functional import masked_weight
from ..torch_private import disable_dynamo, fx_trace, traced_attribute
from .context import LIVE, AmbiguousTaskError, Key, active_key, only_key
from .given import GivenTasks, Logits, given_to
from .guarded import raise_folded
from .names import DEFAULT_TASK, escape, plain
from .selection import GivenMasks, ObservedSuperposition, Superposition, TaskBatch, along, check_samples
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


class MaskedLayer(TaskLayer):
    """The base of masked layers: a mask for each task, in ``masks`` and, with a bias, in ``bias_masks``.

    Both are ParameterDicts by task name, one tensor per task: a task's gradient and optimiser state exist only when it was used.
    While a layer has one task, that one is active; with several, :func:`metamask_ext.using_task` says which. A finished task may
    be packed (:class:`metamask_ext.MaskBank`): its masks are then uint8 buffers of one bit a weight, as
    :func:`metamask_ext.pack_mask` gives them, under the same keys; the gate is then 0 or 1, whatever ``gate`` says.

    State dicts are loaded as :class:`TaskLayer` says; a uint8 mask makes the task a packed one, another makes it one with logits.
    ``gate``, ``temperature`` and ``threshold`` are in the state, as they are when it is made, and a layer takes them over: it
    computes what the saved one did, however it was built. A state with masks and without them, of an older version, leaves the
    layer's own, and a warning names them.
    """

    if TYPE_CHECKING:
        weight: Tensor
        bias: Any  # torch's layers declare it in different ways
    masks: TaskMasks
    bias_masks: TaskMasks | None
    mask_dtype: torch.dtype | None = None

    def _init_masked(
        self,
        gate: str,
        temperature: float,
        threshold: float,
        mask_init: MaskInit,
        mask_dtype: torch.dtype | None = None,
        tasks: list[str] | None = None,
    ) -> None:
        """Make a torch layer into a masked one: its attributes and the masks of ``tasks``."""
        resolve_gate(gate, temperature, threshold)
        weight, bias = self._shared()
        if weight.dtype not in DTYPES:
            raise TypeError(f"weight must be float64, float32, bfloat16 or float16, got {weight.dtype}")
        check_mask_dtype(mask_dtype, weight.dtype)
        self.gate, self.temperature, self.threshold, self.mask_init = plain(gate), temperature, threshold, mask_init
        self.mask_dtype = mask_dtype
        check_mask_init(mask_init)
        self.masks = TaskMasks(mask_dtype).train(self.training)
        self.bias_masks = None if bias is None else TaskMasks(mask_dtype).train(self.training)
        for task in [DEFAULT_TASK] if tasks is None else tasks:
            self._new_task(task)

    @property
    def _is_fsdp_managed_module(self) -> bool:
        return bool(self.__dict__.get("_is_fsdp_managed_module", False))

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, value: bool) -> None:
        if value:
            check_one_dtype(self, self._shared()[0].dtype, self._logits_dtype())
        self.__dict__["_is_fsdp_managed_module"] = value

    def _groups(self) -> list[tuple[Tensor, TaskMasks]]:
        """The weight and the bias with their masks."""
        weight, bias = self._shared()
        groups = [(weight, self.masks)]
        if bias is not None and self.bias_masks is not None:
            groups.append((bias, self.bias_masks))
        return groups

    def _shared(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias that all tasks share."""
        return self.weight, self.bias

    def _dicts(self) -> dict[str, TaskDict]:
        return {"masks": self.masks} if self.bias_masks is None else {"masks": self.masks, "bias_masks": self.bias_masks}

    def _kinds(self) -> Iterable[str]:
        return "masks", "bias_masks"

    def _task_dict(self) -> TaskDict:
        masks: TaskDict = self._modules["masks"]
        return masks

    def _new_tensors(self, init: Init | None = None) -> list[tuple[TaskDict, Tensor]]:
        new: list[tuple[TaskDict, Tensor]] = []
        for parameter, masks in self._groups():
            logits = self._empty_logits(parameter)
            with torch.no_grad():
                if init is None:
                    self._init_logits(logits)
                else:
                    init(self, masks, logits)
            new.append((masks, logits))
        return new

    def _logits_dtype(self) -> torch.dtype:
        """The dtype of a new task's logits."""
        return logits_dtype(self._shared()[0].dtype, self.mask_dtype)

    def _dtypes_of_logits(self) -> tuple[torch.dtype, ...]:
        """Those that fit the weight, that of a new task first."""
        own = self._logits_dtype()
        return tuple(dict.fromkeys((own, logits_dtype(self._shared()[0].dtype, None), self._shared()[0].dtype)))

    def _empty_logits(self, parameter: Tensor) -> Tensor:
        """New logits for the weight or the bias, in its order in memory."""
        return torch.empty_like(parameter, dtype=self._logits_dtype(), requires_grad=False)

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
        if "masks" in self._modules:  # torch's constructor calls this before there are any
            self._reset_masks()

    def _reset_masks(self) -> None:
        with torch.no_grad():
            for _, masks in self._groups():
                for _, logits in masks._logits():
                    self._init_logits(logits)

    def _active(self) -> Logits | Key | GivenTasks | None:
        """The active task's logits of the weight and of the bias; where there are none, the key of a packed task, or a selection.

        None: under torch.compile, which must leave those to eager mode. GivenTasks: only there.
        """
        masks: TaskMasks = self._modules["masks"]
        key: Key
        if torch.compiler.is_dynamo_compiling():
            given: Logits | GivenTasks | None = given_to(self)
            if given is not None:
                return given
            # What is read here becomes a guard: first what changes least.
            if not masks._single or LIVE.selections:
                return _active_in_eager(self)
            (key,) = masks._slots
            if key not in masks._parameters:
                return None
        elif len(masks._slots) == 1:
            key = only_key(self, next(iter(masks._slots)))
        else:
            key = active_key(self)
        if isinstance(key, str):
            logits = masks._parameters.get(key)
            if logits is not None:
                bias_masks: TaskMasks | None = self._modules.get("bias_masks")
                return logits, None if bias_masks is None else bias_masks._parameters[key]
        return key

    def _active_logits(self) -> tuple[Tensor, Tensor | None]:
        active = self._active()
        if isinstance(active, tuple):
            return active
        if isinstance(active, TaskBatch):
            self._read("mask_logits", active)
        if isinstance(active, str) and not self._task_dict()._is_bits(active):  # of a replica
            (mask,), bias_masks = self._masks_of([active])
            return mask, None if bias_masks is None else bias_masks[0]
        what = "the active task is packed: its mask has bits" if isinstance(active, str) else "tasks are superposed"
        raise RuntimeError(f"mask_logits of {type(self).__name__} cannot be read: {what}")

    def _forward_selected(self, input: Tensor, active: Key | GivenTasks | None) -> Tensor:
        """The output where the active masks are no logits of one task."""
        if active is None:
            return _forward_in_eager(self, input)
        if not isinstance(input, Tensor) or input.is_nested or input.layout is not torch.strided:
            check_layer_input(input, self._shared()[0].device)
        if isinstance(active, str):
            return self._one_task(input, active)
        if isinstance(active, TaskBatch):
            return self._forward_batch(input, active)
        if isinstance(active, GivenTasks):
            return self._forward_given_tasks(input, active)
        if isinstance(active, GivenMasks):
            return self._forward_given(input, active)
        shared, _ = self._shared()
        check_layer_input(input, shared.device)
        check_input_dtype(input, shared)
        weight = self._read("weight", active)
        assert weight is not None
        output = self._plain(input, weight, self._read("bias", active))
        return active.observe(self, input, output) if isinstance(active, ObservedSuperposition) else output

    def _forward_batch(self, input: Tensor, batch: TaskBatch) -> Tensor:
        output: Tensor = batch.run(self, input, self.sample_dim, self._forward_known)
        return output

    def _forward_known(self, input: Tensor, batch: TaskBatch) -> Tensor:
        keys = batch.keys
        if len(keys) == 1:
            return self._one_task(input, keys[0])
        weight, bias = self._shared()
        if not keys:
            return self._plain(input, weight, bias)  # of no sample
        return along(batch.dim, partial(self._forward_tasks, batch=batch), input)

    def _forward_given_tasks(self, input: Tensor, given: GivenTasks) -> Tensor:
        masks, bias_masks, slots = given.masks, given.bias_masks, given.slots
        if slots is not None:
            check_samples(self, input, self.sample_dim, slots.shape[0], given.dim, given.guessed and given.several)
        if slots is None or not given.several:
            return self._with_one(input, given.packed, masks[0], None if bias_masks is None else bias_masks[0])
        run = self._packed if given.packed else self._mixed_task
        return along(given.dim, partial(run, slots=slots, masks=masks, bias_masks=bias_masks), input)

    def _forward_tasks(self, input: Tensor, batch: TaskBatch) -> Tensor:
        """The output for an input whose first dimension is that of samples of several tasks."""
        keys, device = batch.keys, self._shared()[0].device
        packed = tuple(self._task_dict()._is_bits(key) for key in keys)
        if not any(packed) or all(packed):
            run = self._packed if packed[0] else self._mixed_task
            return run(input, batch.positions(device), *self._masks_of(keys))
        rows, slots, other_rows, other_slots, back = batch.split(packed, device)
        bits = [key for key, is_packed in zip(keys, packed) if is_packed]
        logits = [key for key, is_packed in zip(keys, packed) if not is_packed]
        parts = [
            self._packed(input.index_select(0, rows), slots, *self._masks_of(bits)),
            self._mixed_task(input.index_select(0, other_rows), other_slots, *self._masks_of(logits)),
        ]
        return torch.cat(parts).index_select(0, back)

    def _masks_of(self, keys: Sequence[str]) -> tuple[list[Tensor], list[Tensor] | None]:
        masks, bias_masks = self._task_dict(), self.bias_masks
        of_bias = None if bias_masks is None else [bias_masks._tensor(key) for key in keys]
        return [masks._tensor(key) for key in keys], of_bias

    def _forward_given(self, input: Tensor, given: GivenMasks) -> Tensor:
        masks = given.masks.get(self)
        if masks is None:
            return self._forward_selected(input, given.selected)
        if given.slots is None:
            return self._masked(input, *masks)
        given.check_size(self, self._samples(input))
        return self._stacked_tasks(input, given.slots, *masks)

    def _one_task(self, input: Tensor, key: str) -> Tensor:
        masks, bias_masks = self._task_dict(), self.bias_masks
        mask, bias_mask = masks._tensor(key), None if bias_masks is None else bias_masks._tensor(key)
        return self._with_one(input, masks._is_bits(key), mask, bias_mask)

    def _with_one(self, input: Tensor, packed: bool, mask: Tensor, bias_mask: Tensor | None) -> Tensor:
        """The output with these logits, or bits, for all samples."""
        if not packed:
            return self._masked(input, mask, bias_mask)
        batched = input.dim() > self.sample_dim
        rows = input if batched else input[None]
        slots = torch.zeros(len(rows), dtype=torch.int64, device=input.device)
        output = self._packed(rows, slots, [mask], None if bias_mask is None else [bias_mask])
        return output if batched else output[0].clone()

    def _samples(self, input: Tensor) -> int:
        return input.shape[0] if input.dim() > self.sample_dim else 1

    sample_dim: int
    """The dimensions of the input of one sample."""

    def _masked(self, input: Tensor, mask_logits: Tensor, bias_mask_logits: Tensor | None) -> Tensor:
        """The output with these logits."""
        raise NotImplementedError

    def _plain(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of torch's layer with these parameters."""
        raise NotImplementedError

    def _mixed_task(self, input: Tensor, slots: Tensor, masks: list[Tensor], bias_masks: list[Tensor] | None) -> Tensor:
        """The output with the logits ``masks[slots[b]]`` for sample ``b``."""
        raise NotImplementedError

    def _stacked_tasks(self, input: Tensor, slots: Tensor, masks: Tensor, bias_masks: Tensor | None) -> Tensor:
        """The same with logits ``[T, *shape]`` where every task has as many samples, in the order of a meta-learner."""
        return self._mixed_task(input, slots, [masks], None if bias_masks is None else [bias_masks])

    def _packed(self, input: Tensor, slots: Tensor, masks: list[Tensor], bias_masks: list[Tensor] | None) -> Tensor:
        """The output with the bits ``masks[slots[b]]`` for sample ``b``."""
        raise NotImplementedError

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
        return self._with_mask(what, masks[what == "bias"])

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

    def _group(self, what: str) -> tuple[Tensor | None, TaskDict | None]:
        weight, bias = self._shared()
        return (weight, self.masks) if what == "weight" else (bias, self.bias_masks)

    @property
    def mask_logits(self) -> Tensor:
        """The active task's mask logits ``M``, of the shape of ``weight``."""
        if fx_trace._is_fx_tracing_flag and (traced := traced_attribute(self, "mask_logits")) is not None:
            return traced
        return self._active_logits()[0]

    @property
    def bias_mask_logits(self) -> Tensor | None:
        """The active task's logits of the bias, ``M_b``; None without a bias."""
        if fx_trace._is_fx_tracing_flag and (traced := traced_attribute(self, "bias_mask_logits")) is not None:
            return traced
        return self._active_logits()[1]

    def _gate(self) -> Gate:
        return {"gate": self.gate, "temperature": self.temperature, "threshold": self.threshold}

    def _resolved(self) -> tuple[int, float]:
        return resolve_gate(self.gate, self.temperature, self.threshold)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._mask_repr()}"

    def _mask_repr(self) -> str:
        parameter = f"temperature={self.temperature}" if self.gate == "sigmoid" else f"threshold={self.threshold}"
        return f"gate={self.gate}, {parameter}, tasks={len(self.masks)}"

    def _fit_forms(self, state_dict: StateDict, prefix: str) -> str | None:
        for shared, (kind, masks) in zip(self._shared(), self._dicts().items()):
            assert shared is not None
            for task in masks:
                key = escape(task)
                saved = state_dict.get(f"{prefix}{kind}.{key}")
                if not isinstance(saved, Tensor) or (saved.dtype == torch.uint8) == masks._is_bits(key):
                    continue
                if saved.dtype == torch.uint8:
                    masks[task] = torch.empty(packed_shape(shared.shape), dtype=torch.uint8, device=shared.device)
                else:
                    masks[task] = self._empty_logits(shared)
        forms = [{key for key in masks._slots if masks._is_bits(key)} for masks in self._dicts().values()]
        if any(form != forms[0] for form in forms):
            return f"{prefix}masks and {prefix}bias_masks must both be bits (uint8) for a task or both logits"
        return None


@disable_dynamo
def _active_in_eager(layer: MaskedLayer) -> tuple[Tensor, Tensor | None] | None:
    """For torch.compile, which cannot read a context variable: one graph break, and the masks are inputs of what follows."""
    active = layer._active()
    return active if isinstance(active, tuple) else None


@disable_dynamo
def _forward_in_eager(layer: MaskedLayer, input: Tensor) -> Tensor:
    """For torch.compile, where a layer's masks are many, or bits that may have to be fetched."""
    output: Tensor = layer.forward(input)
    return output
