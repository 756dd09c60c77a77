"""The base of layers with tensors of tasks: the tasks themselves, their slots, and the state dict."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from ..torch_private import loads_strictly
from .agreement import agree_in_forward
from .context import LIVE, AmbiguousTaskError, Key, active_key, only_key
from .names import check_name, describe, escape, unescape
from .pairing import Memo, NamedModules, is_noted, noted_layer
from .paths import plain_path
from .replicas import as_replica
from .selection import GivenMasks, MarkedBatch, ObservedSuperposition, Superposition, TaskBatch
from .task_dict import TaskDict
from .wrappers import may_have_missed

SLOTS = "task_slots"
"""The entry of a layer's metadata in a state dict: its tasks by slot, None where one was removed."""

StateDict = dict[str, Any]
"""torch's state dicts and their metadata: tensors, and whatever modules save beside them."""

Init = Callable[["TaskLayer", TaskDict, Tensor], object]


class TaskLayer(nn.Module):
    """A layer some of whose tensors belong to tasks.

    A state dict with no such tensor of this layer (that of the plain torch layer) leaves them as they are; one that has some but
    not all of them is an error under ``strict``, which says what to call; tasks that the layer lacks are created. ``strict=False``
    takes what is there.

    Slots are saved in the state dict's metadata, where torch keeps the versions of modules: ``torch.save`` takes it along, a plain
    dictionary made of the tensors does not. A state with slots and every task of the layer brings them along; else the layer's
    stay, and new tasks get new ones in the order of the keys.
    """

    plain_type: type[nn.Module]
    """The class of the torch layer that :func:`metamask_ext.merge` makes of this one."""

    if TYPE_CHECKING:
        _modules: dict[str, Any]  # the children are known by their names

        def reset_parameters(self) -> None: ...  # of the torch layer beside this class

    def _dicts(self) -> dict[str, TaskDict]:
        """The layer's TaskDicts by path."""
        raise NotImplementedError

    def _kinds(self) -> Iterable[str]:
        """Their paths, whether this layer has them or not (as bias masks without a bias)."""
        raise NotImplementedError

    def _task_dict(self) -> TaskDict:
        """The one whose tasks and slots are the layer's."""
        return next(iter(self._dicts().values()))

    def _new_tensors(self, init: Init | None = None) -> list[tuple[TaskDict, Tensor]]:
        """The tensors of one more task with their TaskDicts; all layers of a model make theirs before any is changed."""
        raise NotImplementedError

    def _beside(self) -> Iterable[tuple[TaskDict, tuple[nn.Module, str]]]:
        """The TaskDicts, each with the module and the name of the parameter that its tensors belong to."""
        return [(tensors, (self, path.rpartition(".")[2])) for path, tensors in self._dicts().items()]

    def _combine(self, tensors: TaskDict, amounts: Mapping[str, float | Tensor], out: Tensor) -> None:
        """Fill ``out`` for a new task that begins as this linear combination of tasks."""
        raise NotImplementedError

    def _theta(self, what: str, key: str) -> Tensor | None:
        """The tensor ``what`` that forward uses for one task."""
        raise NotImplementedError

    def _mixed(self, superposition: Superposition, what: str) -> Tensor | None:
        """The tensor ``what`` that forward uses under a superposition."""
        raise NotImplementedError

    def _read(self, what: str, active: Key) -> Tensor | None:
        """The tensor ``what`` that forward uses under this task or selection; AmbiguousTaskError where there are several."""
        if isinstance(active, str):
            return self._theta(what, active)
        if isinstance(active, ObservedSuperposition):
            return active.mixed(self, what)
        if isinstance(active, Superposition):
            return self._mixed(active, what)
        if isinstance(active, GivenMasks):
            return self._read_given(what, active)
        raise AmbiguousTaskError(
            f"{what} of {type(self).__name__} is ambiguous in a mixed-task batch: call the layer instead, or run the samples of "
            "each task in a block of their own"
        )

    def _read_given(self, what: str, given: GivenMasks) -> Tensor | None:
        return self._read(what, given.selected)

    def named_modules(self, memo: Memo | None = None, prefix: str = "", remove_duplicate: bool = True) -> NamedModules:
        memo = set() if memo is None else memo
        modules: NamedModules = super().named_modules(memo, prefix, remove_duplicate)
        return noted_layer(self, memo, modules) if is_noted() else modules

    @property
    def _is_fsdp_managed_module(self) -> bool:
        return bool(self.__dict__.get("_is_fsdp_managed_module", False))

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, value: bool) -> None:
        # fully_shard sets it, once it has the parameters.
        if value:
            self._check_shardable()
            agree_in_forward(self)
        self.__dict__["_is_fsdp_managed_module"] = value

    def _check_shardable(self) -> None:
        """Refuse to be a part of a model that fully_shard holds."""

    def _new_task(self, task: str) -> None:
        check_name(task)
        for tensors, tensor in self._new_tensors():
            tensors[task] = tensor

    def _remove_task(self, task: str) -> None:
        for tensors in self._dicts().values():
            if task in tensors:  # layers may share their masks
                tensors._contested = tensors._contested or LIVE.contexts
                del tensors[task]

    def _task_key(self, task: str) -> str:
        key = escape(task)
        if key not in self._task_dict()._slots:
            raise ValueError(f"task must be one of {describe(self._task_dict())}, got {task!r}")
        return key

    def _selected(self) -> Key:
        """The key of the active task, or the selection."""
        slots = self._task_dict()._slots
        if len(slots) == 1:
            return only_key(self, next(iter(slots)))
        return active_key(self)

    def _replicate_for_data_parallel(self) -> nn.Module:
        """A copy that ``torch.nn.DataParallel`` runs in another thread, with the task that is active here and now."""
        replicate: Callable[[], TaskLayer] = super()._replicate_for_data_parallel
        replica = replicate()
        as_replica(replica)
        selected: Key | AmbiguousTaskError
        try:
            selected = self._selected()
        except AmbiguousTaskError as error:
            selected = error
        # In the place of the methods: for layers that are no copies they take no longer.
        replica.__dict__["_selected"] = replica.__dict__["_active"] = partial(_selected_of_replica, type(self).__name__, selected)
        return replica

    def __setstate__(self, state: StateDict) -> None:
        set_state: Callable[[StateDict], None] = super().__setstate__
        set_state(state)
        may_have_missed()  # the model, and a wrapper around it, may be copied or unpickled

    def _save_to_state_dict(self, destination: StateDict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})[SLOTS] = list(self._task_dict()._names)

    def _load_from_state_dict(
        self,
        state_dict: StateDict,
        prefix: str,
        local_metadata: StateDict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for tensors in self._dicts().values():
            tensors._fetch_all()
        given, saved = self._saved_tasks(state_dict, prefix)
        count = self._load_settings(state_dict, prefix, given, error_msgs)
        if given:
            self._check_tasks(saved, count, error_msgs)
            for task in saved:
                if task not in self._task_dict():
                    self._new_task(task)
            error = self._fit_forms(state_dict, prefix)
            if error is not None:
                error_msgs.append(error)
            for tensors in self._dicts().values():
                tensors._renumber(local_metadata.get(SLOTS, []))
        else:
            self._load_plain(state_dict, prefix)
        # Not BatchNorm's own, which fills up states of old torch versions and reads its buffers for it.
        load = nn.Module._load_from_state_dict
        load(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _saved_tasks(self, state_dict: StateDict, prefix: str) -> tuple[bool, list[str]]:
        """Tells if the state has an entry of a task, and lists its tasks; their keys become those of this torch."""
        given, names = False, dict[str, None]()
        for start in (f"{prefix}{kind}." for kind in self._kinds()):
            for key in [key for key in state_dict if key.startswith(start)]:
                given = True
                task = unescape(key[len(start) :])
                if task:
                    names[task] = None
                    # A torch with other attributes may have escaped another first character.
                    now = start + escape(task)
                    if now not in state_dict:
                        state_dict[now] = state_dict.pop(key)
        return given, list(names)

    def _load_settings(self, state_dict: StateDict, prefix: str, given: bool, error_msgs: list[str]) -> int | None:
        """Make the layer's settings those of the state, for who has any; return how many tasks it was saved with, if it says so.

        ``given``: the state has an entry of a task.
        """
        return None

    def _check_tasks(self, saved: list[str], count: int | None, error_msgs: list[str]) -> None:
        """Note in words where the state and the layer have different tasks; a strict load fails for it."""
        messages = []
        present = set(saved)
        lacking = [task for task in self._task_dict() if task not in present]
        if lacking:
            messages.append(
                f"the state has no masks for {describe(lacking)}, of the model's tasks. Load with strict=False, which leaves them "
                "as they are; metamask_ext.remove_task(model, name) removes a task"
            )
        if count is not None and len(saved) < count:
            messages.append(
                f"the state was saved with {count} tasks and has masks for {describe(saved)} alone. torch.distributed.checkpoint "
                "reads those that the model has: metamask_ext.add_task(model, name) the others first, and read again. Or load "
                "with strict=False to do without them"
            )
        if messages and loads_strictly(sys._getframe()):
            error_msgs += [message for message in messages if message not in error_msgs]

    def _load_plain(self, state_dict: StateDict, prefix: str) -> None:
        # Children are loaded next, from the same dictionary: they find what they have.
        for kind, tensors in self._dicts().items():
            for key, tensor in _entries(tensors):
                state_dict[f"{prefix}{kind}.{key}"] = tensor

    def _fit_forms(self, state_dict: StateDict, prefix: str) -> str | None:
        """Make room for what the state holds in another form, bits for logits; the error message if it cannot be."""
        return None


def _selected_of_replica(name: str, selected: Key | AmbiguousTaskError) -> Key:
    if isinstance(selected, AmbiguousTaskError):
        raise selected
    if isinstance(selected, TaskBatch) and len(selected.keys) == 1 and not isinstance(selected, MarkedBatch):
        return selected.keys[0]
    if isinstance(selected, (GivenMasks, ObservedSuperposition)) or not isinstance(selected, (str, Superposition)):
        raise RuntimeError(
            f"{name} runs in a copy that torch.nn.DataParallel made, which has a part of the batch and does not know which: it "
            "takes one task for the whole batch. Use DistributedDataParallel, or call the model with the samples of each task"
        )
    return selected


def _entries(tensors: TaskDict) -> Iterator[tuple[str, Tensor | None]]:
    yield from tensors._parameters.items()
    yield from tensors._buffers.items()


def task_layers(model: nn.Module) -> list[tuple[str, TaskLayer]]:
    """The layers of ``model`` with tensors of tasks, masked ones and others, by plain paths, each once. ValueError if none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = [(plain_path(model, name), layer) for name, layer in model.named_modules() if isinstance(layer, TaskLayer)]
    return layers or raise_no_layer(model)


def same_tasks(layers: Iterable[tuple[str, TaskLayer]]) -> list[str]:
    """The tasks of these layers, oldest first. ValueError, which says how to repair it, where they have different ones."""
    dicts = [(name or "the model", tensors) for name, layer in layers for tensors in layer._dicts().values()]
    first_name, first = dicts[0]
    for name, tensors in dicts:
        if tensors.keys() != first.keys():
            known = dict.fromkeys(task for _, each in dicts for task in each)
            partial = [task for task in known if not all(task in each for _, each in dicts)]
            raise ValueError(
                f"the masks of the model have different tasks: those of {first_name!r} {describe(first)}, those of {name!r} "
                f"{describe(tensors)}. After a part of a state was loaded, metamask_ext.add_task(model, name) gives the layers "
                f"that lack a task theirs: for {describe(partial)}"
            )
    return list(first)


def task_keys(layers: Iterable[tuple[str, TaskLayer]], task: str) -> dict[nn.Module, str]:
    """The key of a task in each of these layers. ValueError if it is unknown to one of them."""
    layers = list(layers)
    try:
        return {layer: layer._task_key(task) for _, layer in layers}
    except ValueError:
        same_tasks(layers)  # says more where one layer knows it and another does not
        raise


def raise_no_layer(model: nn.Module) -> NoReturn:
    raise ValueError(f"{type(model).__name__} has no masked layer: build it with metamask_ext.nn, or metamask_ext.convert it")
