"""Modules that keep some of their parameters and buffers for each task: heads, normalisation layers."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..ops.gate import compute_dtype
from ..ops.shards import is_distributed, whole
from ..torch_private import BatchNorm, disable_dynamo, fx_trace, synchronises, traced_attribute, traced_call
from ..torch_private_distributed import distributes
from .context import AmbiguousTaskError
from .each_task import Call, run_each_task
from .given import GivenNorm, GivenRows, given_to
from .guarded import AmbiguousTensor, raise_taken
from .names import DEFAULT_TASK
from .pairing import Memo, NamedModules
from .ranks import groups_of, of_first, placed_as
from .rows import formula_of
from .selection import GivenMasks, MarkedBatch, Selection, Superposition, TaskBatch, along, check_samples
from .task_dict import TaskDict
from .task_layer import Init, StateDict, TaskLayer
from .using_task import using_task

_TAKEN = re.compile(r"_(orig|g|v)$")
"""The end of the names that torch's tools give to what they put in the place of a parameter."""

Output = Any
"""A module's output: torch leaves its type open."""

_TYPES: dict[type[nn.Module], type[PerTask]] = {}
"""By the class of a plain module the class that keeps tensors of it per task; subclasses enter themselves."""


class PerTask(TaskLayer):
    """A torch module of which ``per_task`` holds some parameters and buffers by their name there, a tensor for each task.

    ``module.weight`` is then the active task's ``weight``. In a mixed-task batch the samples of each task run through the module by
    themselves, one task after another.

    A new task begins as ``reset_parameters`` of the plain module leaves it or, without such a method, as a copy of the oldest task.
    The state dict of the plain module gives its values to every task.
    """

    per_task: nn.ModuleDict

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "plain_type" in cls.__dict__:
            _TYPES.setdefault(cls.plain_type, cls)

    def _dicts(self) -> dict[str, TaskDict]:
        return {f"per_task.{name}": tensors for name, tensors in self._own().items()}

    def _own(self) -> dict[str, TaskDict]:
        own: dict[str, TaskDict] = self._modules["per_task"]._modules
        return own

    def _kinds(self) -> Iterable[str]:
        return self._dicts()

    def _keep_per_task(self, names: Iterable[str], tasks: list[str | None]) -> None:
        """Let tensors of this module, by name, be those of the first task, and copies of them the other tasks'."""
        own = nn.ModuleDict().train(self.training)
        for name in names:
            is_parameter = name in self._parameters
            tensors = own[name] = TaskDict(buffers=not is_parameter).train(self.training)
            value = self._parameters[name] if is_parameter else self._buffers[name]
            for task in tasks:
                if task is not None:
                    tensors[task] = value
                    copied = tensors[task].detach().clone()
                    value = nn.Parameter(copied) if is_parameter else copied
            tensors._renumber(tasks)
            if is_parameter:
                self._parameters[name] = None
            else:
                self._buffers[name] = None
        self._modules["per_task"] = own

    def __getattr__(self, name: str) -> Any:
        own: nn.ModuleDict | None = self.__dict__.get("_modules", {}).get("per_task")
        if own is None or name not in own._modules:
            return super().__getattr__(name)
        if fx_trace._is_fx_tracing_flag and (traced := traced_attribute(self, name)) is not None:
            return traced
        if torch.compiler.is_dynamo_compiling():
            given = given_to(self)
            if isinstance(given, GivenNorm):
                return given.tensors[name]
            return _read_in_eager(self, name) if given is None or isinstance(given, GivenRows) else given[name]
        try:
            return self._read(name, self._selected())
        except AmbiguousTaskError as error:
            if synchronises(sys._getframe(1)):
                _raise_synchronised()
            return AmbiguousTensor.like(_first(self._own()[name]), str(error))

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            self._write(name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            raise_taken(self, name)
        super().__delattr__(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if self._is_own(name):
            self._write(name, tensor)
        else:
            super().register_buffer(name, tensor, persistent)

    def named_modules(self, memo: Memo | None = None, prefix: str = "", remove_duplicate: bool = True) -> NamedModules:
        if not torch.compiler.is_dynamo_compiling() and distributes(sys._getframe(1)):
            self._refuse_distribution()
        return super().named_modules(memo, prefix, remove_duplicate)

    def _refuse_distribution(self) -> NoReturn:
        raise RuntimeError(
            f"a {type(self).__name__}, with {', '.join(self._own())} for each task, cannot be distributed: leave it out of the "
            "plan of parallelize_module"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith("per_task.") or (self._is_own(name) and is_distributed(param)):
            self._refuse_distribution()
        if self._is_own(name):
            self._write(name, param)
            return
        taken = _TAKEN.sub("", name)
        if taken != name and self._is_own(taken):
            if not self._own()[taken]._only_buffers:
                self._parameters.setdefault(taken, None)  # weight_norm has deleted it
            raise_taken(self, taken)
        super().register_parameter(name, param)

    def _is_own(self, name: str) -> bool:
        """True if a tensor for each task has this name."""
        own = self.__dict__.get("_modules", {}).get("per_task")
        return own is not None and name in own._modules

    def _write(self, name: str, value: object) -> None:
        """Give the active task another tensor ``name``, as an assignment to a plain module's attribute does."""
        tensors = self._own()[name]
        selected = self._selected()
        if not isinstance(selected, str):
            raise RuntimeError(f"{name} of {type(self).__name__} belongs to tasks, and several are active: it cannot be set")
        wanted = Tensor if tensors._only_buffers else nn.Parameter
        if not isinstance(value, wanted):
            raise TypeError(f"{name} of {type(self).__name__}, a task's, must be a {wanted.__name__}, got {type(value).__name__}")
        task = tensors._names[tensors._slots[selected]]
        assert task is not None
        tensors[task] = value

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        # The class is made at run time.
        return _new, (self.plain_type,), self.__dict__

    def forward(self, *inputs: Any, **options: Any) -> Output:
        if fx_trace._is_fx_tracing_flag and (traced := traced_call(self, *inputs, **options)) is not None:
            return traced
        if torch.compiler.is_dynamo_compiling():
            given = given_to(self)
            if isinstance(given, GivenNorm):
                return given.normalise(self, *inputs, **options)
            if isinstance(given, GivenRows):
                return self._forward_rows(given, *inputs, **options)
            run = _forward_in_eager if given is None else type(self)._plain_forward
            return run(self, *inputs, **options)
        selected = self._selected()
        if isinstance(selected, str):
            return self._plain_forward(*inputs, **options)
        if len(inputs) != 1 or options or not isinstance(inputs[0], Tensor):
            raise RuntimeError(f"{type(self).__name__} must be called with one tensor where several tasks are active")
        return self._forward_selected(inputs[0], selected)

    def _forward_selected(self, input: Tensor, active: Selection) -> Output:
        if isinstance(active, TaskBatch):
            sample_dim = self._sample_dim(input)
            sample_dim = sample_dim if active.dim else min(sample_dim, max(0, input.dim() - 1))
            if isinstance(active, MarkedBatch) and not active.keys and isinstance(self, BatchNorm):
                self._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch's
                active.fitting(self, input, sample_dim)
                return torch.full_like(input, torch.nan)  # torch's trains on no batch without a sample
            return active.run(self, input, sample_dim, self._forward_batch)
        if isinstance(active, GivenMasks) and isinstance(self, BatchNorm):
            return active.normalise(self, input)
        if isinstance(active, Superposition) and self.training and self._has_buffers():
            raise RuntimeError(
                f"{type(self).__name__} has statistics of tasks, and a superposition has none to update: call the "
                "model in eval mode"
            )
        return self._plain_forward(input)

    def _takes_rows(self) -> bool:
        """True if a mixed-task batch can be a part of a compiled graph."""
        return formula_of(self, self.plain_type) is not None

    def _forward_rows(self, given: GivenRows, input: Tensor) -> Output:
        sample_dim = self._sample_dim(input)
        least = sample_dim if given.dim else min(sample_dim, max(0, input.dim() - 1))
        check_samples(self, input, least, given.slots.shape[0], given.dim, given.guessed and given.several)
        formula = formula_of(self, self.plain_type)
        assert formula is not None  # the call asked _takes_rows
        own = {name: tensor[given.slots] for name, tensor in given.tensors.items()}
        return along(given.dim, lambda rows: formula(self, rows, own), input)

    def _plain_forward(self, *inputs: object, **options: object) -> Output:
        return super().forward(*inputs, **options)

    def _forward_batch(self, input: Tensor, batch: TaskBatch) -> Output:
        return run_each_task(self, batch, Call([input], {}, {0: batch.dim}, batch.dim), self._plain_forward)

    def _sample_dim(self, input: Tensor) -> int:
        """The number of dimensions of one sample, at least: one of features, none where they are integers (tokens)."""
        return 1 if input.is_floating_point() else 0

    def _theta(self, what: str, key: str) -> Tensor:
        return self._own()[what]._tensor(key)

    def _mixed(self, superposition: Superposition, what: str) -> Tensor:
        return superposition.mix(self._own()[what]._tensor(key) for key in superposition.keys)

    def _has_buffers(self) -> bool:
        return any(tensors._only_buffers for tensors in self._own().values())

    def reset_parameters(self) -> None:
        """Reset every task's."""
        if "per_task" not in self._modules:  # torch's constructor calls this before there are any
            super().reset_parameters()
            return
        for task in self._task_dict():
            with using_task(self, task):
                super().reset_parameters()

    def _new_tensors(self, init: Init | None = None) -> list[tuple[TaskDict, Tensor]]:
        own = self._own()
        with torch.no_grad():
            if init is None:
                values = self._fresh()
            else:
                values = {name: torch.empty_like(_first(tensors), requires_grad=False) for name, tensors in own.items()}
                for name, tensors in own.items():
                    init(self, tensors, values[name])
        return [(tensors, values[name]) for name, tensors in own.items()]

    def _fresh(self) -> dict[str, Tensor]:
        values = {name: whole(_first(tensors)).detach().clone() for name, tensors in self._own().items()}
        reset: Callable[[nn.Module], None] | None = getattr(self.plain_type, "reset_parameters", None)
        if reset is not None:
            reset(
                self._as_plain({name: whole(tensor).detach().clone() for name, tensor in self._tensors(self._parameters)}, values)
            )
        if not self._is_fsdp_managed_module:  # which shards them in its own way
            values = {name: self._placed(values[name], _first(tensors)) for name, tensors in self._own().items()}
        return values

    @staticmethod
    def _placed(value: Tensor, like: Tensor) -> Tensor:
        return placed_as(of_first(value, groups_of(like)), like) if is_distributed(like) else value

    def _as_plain(self, parameters: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> nn.Module:
        """A module of the plain type with these tensors, ``own`` in the place of the tasks'."""
        plain = self.plain_type.__new__(self.plain_type)
        plain.__dict__.update(self.__dict__)
        given = {**parameters, **own}
        plain._parameters = {name: _parameter(given.get(name)) for name in self._parameters}
        plain._buffers = {name: own.get(name, buffer) for name, buffer in self._buffers.items()}
        plain._modules = {name: child for name, child in self._modules.items() if name != "per_task"}
        return plain

    @staticmethod
    def _tensors(kept: Mapping[str, Tensor | None]) -> list[tuple[str, Tensor]]:
        return [(name, tensor) for name, tensor in kept.items() if tensor is not None]

    def _combine(self, tensors: TaskDict, amounts: Mapping[str, float | Tensor], out: Tensor) -> None:
        if out.is_floating_point():
            total = torch.zeros_like(out, dtype=compute_dtype(out.dtype))
            for task, amount in amounts.items():
                total += amount * tensors[task].to(total.dtype)
            out.copy_(total)
        else:
            out.zero_()  # a count

    def _load_plain(self, state_dict: StateDict, prefix: str) -> None:
        for name, tensors in self._own().items():
            plain = state_dict.pop(f"{prefix}{name}", None)
            if plain is not None:
                for key in tensors._slots:
                    state_dict[f"{prefix}per_task.{name}.{key}"] = plain.clone()


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def _first(tensors: TaskDict) -> Tensor:
    return tensors[next(iter(tensors))]


def per_task_type(kind: type[nn.Module]) -> type[PerTask]:
    """The class that a module of class ``kind`` gets when tensors of it belong to tasks."""
    if kind not in _TYPES:
        type(f"PerTask{kind.__name__}", (PerTask, kind), {"plain_type": kind})
    return _TYPES[kind]


def _new(kind: type[nn.Module]) -> PerTask:
    made = per_task_type(kind)
    return made.__new__(made)


def keep_per_task(module: nn.Module, names: Iterable[str], tasks: list[str | None] | None = None) -> None:
    """Let parameters and buffers of ``module``, in place, belong to tasks (by slot; None: a new model's).

    The tensors that are there become those of the first task; the others begin with copies.
    """
    module.__class__ = per_task_type(type(module))
    assert isinstance(module, PerTask)
    module._keep_per_task(names, [DEFAULT_TASK] if tasks is None else tasks)


def plain_copy(module: PerTask, task: str, plain: nn.Module, memo: dict[int, object]) -> None:
    """Fill ``plain``, of the plain type, with a copy of ``module`` as it is for one task."""
    own = {name: tensors[task] for name, tensors in module._own().items()}
    state = {key: value for key, value in module.__dict__.items() if key not in ("_parameters", "_buffers", "_modules")}
    plain.__dict__.update(copy.deepcopy(state, memo))
    for kind in ("_parameters", "_buffers"):
        kept = {name: own.get(name, tensor) for name, tensor in getattr(module, kind).items()}
        plain.__dict__[kind] = copy.deepcopy(kept, memo)
    children = {name: child for name, child in module._modules.items() if name != "per_task"}
    plain.__dict__["_modules"] = copy.deepcopy(children, memo)


@disable_dynamo
def _forward_in_eager(module: PerTask, *inputs: object, **options: object) -> Output:
    """For torch.compile, which cannot read a context variable."""
    return module.forward(*inputs, **options)


@disable_dynamo
def _read_in_eager(module: PerTask, name: str) -> object:
    return getattr(module, name)


def _raise_synchronised() -> NoReturn:
    raise RuntimeError(
        "a batch norm with tensors for each task cannot become a SyncBatchNorm, or another class, which would keep those of one. "
        "It computes the statistics of each process by itself: leave it as it is, and convert the other batch norms one by one, "
        "setattr(parent, name, torch.nn.SyncBatchNorm.convert_sync_batchnorm(module))"
    )


def _refuse_taken(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Keep tools that replace a module by another class, and move its children there, from dropping what belongs to tasks."""
    # Dynamo cannot look at a module that is half made.
    if torch.compiler.is_dynamo_compiling() or name != "per_task":
        return
    if isinstance(module, PerTask) or not isinstance(child, nn.ModuleDict):
        return
    if any(isinstance(tensors, TaskDict) for tensors in child._modules.values()):
        _raise_synchronised()


register_module_module_registration_hook(_refuse_taken)
