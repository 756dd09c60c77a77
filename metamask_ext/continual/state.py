"""The contents of a checkpoint, and the checks before a loop takes them over."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..files.checkpoint import check_same_settings, is_plain, not_ours
from ..nn import MaskedLayer
from ..nn.names import describe, escape, unescape
from ..nn.settings import decoded
from ..nn.task_dict import TaskDict
from ..ops.geometry import packed_shape
from ..products import current
from ..torch_private import EXTRA_STATE

_Form = tuple[torch.dtype, torch.Size]


class LoopState(TypedDict):
    """The contents of a checkpoint."""

    settings: dict[str, object]
    round: int
    step: int
    steps_of: dict[str, int]
    seconds: float
    metrics_length: int
    metrics_sha256: str | None
    products: str
    generator: Tensor
    tasks: list[str]
    model: dict[str, object]
    optimizer: dict[str, object]
    mask_optimizers: dict[str, dict[str, object]]


@dataclass(frozen=True)
class Checks:
    """Checks that a checkpoint, whose bytes are whole, is one that a loop with this model and these settings wrote.

    Attributes:
        path: of the checkpoint, for messages.
        model: the loop's.
        settings: the loop's, as its checkpoints hold them.
        common: the task whose masks all tasks use, if there is one.
        masked: whether the model has masked layers.
        new_optimizer: makes an optimiser as the loop does, of parameters of the masks or not.
    """

    path: Path
    model: nn.Module
    settings: Mapping[str, object]
    common: str | None
    masked: bool
    new_optimizer: Callable[[Iterable[nn.Parameter], bool], Optimizer]

    def checked(self, state: Mapping[str, object], shared: Iterable[nn.Parameter]) -> LoopState:
        """Return ``state`` if a loop can go on with it. CheckpointError that names what cannot be."""
        wanted = LoopState.__annotations__.keys() - {"metrics_sha256", "products"}  # earlier versions wrote none
        if missing := sorted(wanted - state.keys()):
            self._refuse(f"it lacks {missing[0]!r}")
        self._check_settings(state["settings"])
        found = cast(LoopState, state)
        self._check_numbers(found)
        tasks = self._checked_tasks(found)
        forms = self._forms(tasks)
        model = self._checked_model(found["model"], forms, found["steps_of"].keys() | found["mask_optimizers"].keys())
        self._check_optimizer("optimizer", found["optimizer"], [(p.dtype, p.shape) for p in shared], of_masks=False)
        for task, optimizer in found["mask_optimizers"].items():
            self._check_optimizer(f"mask_optimizers[{task!r}]", optimizer, self._mask_forms(task, model), of_masks=True)
        self._check_products(found.get("products"))
        return found

    def _refuse(self, why: str) -> NoReturn:
        raise not_ours(self.path, why)

    def _check_settings(self, settings: object) -> None:
        if not isinstance(settings, dict):
            self._refuse(f"settings must be a dict, got {type(settings).__name__}")
        check_same_settings(self.path, settings, self.settings)

    def _check_numbers(self, state: LoopState) -> None:
        for name in ("round", "step", "metrics_length"):
            self._check_count(name, cast(Mapping[str, object], state)[name])
        seconds, sha256 = state["seconds"], state.get("metrics_sha256")
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            self._refuse(f"seconds must be a number of seconds, got {seconds!r}")
        if sha256 is not None and not isinstance(sha256, str):
            self._refuse(f"metrics_sha256 must be a string, got {sha256!r}")
        try:
            torch.Generator().set_state(state["generator"])
        except (TypeError, RuntimeError) as error:
            self._refuse(f"generator is no state of one ({error})")

    def _check_products(self, digest: object) -> None:
        if digest is not None and not isinstance(digest, str):
            self._refuse(f"products must be a string, got {digest!r:.100}")
        if digest not in (None, current().digest):
            warnings.warn(
                f"{str(self.path)!r} was written under the table of products {digest!r:.20}, this process uses "
                f"{current().digest} ({current().source}): large batches may differ from an unbroken run in the last bits. "
                "METAMASK_PRODUCTS names the file of the table to use",
                stacklevel=2,
            )

    def _check_count(self, name: str, value: object) -> None:
        if type(value) is not int or not 0 <= value < 2**63:
            self._refuse(f"{name} must be an integer, at least 0, got {value!r:.100}")

    def _checked_tasks(self, state: LoopState) -> list[str]:
        """Check the names of tasks, and their steps; return the tasks of the model."""
        steps_of, tasks, optimizers = state["steps_of"], state["tasks"], state["mask_optimizers"]
        known, steps = cast(Sequence[str], self.settings["tasks"]), cast(int, self.settings["steps"])
        if not isinstance(steps_of, dict) or not all(name in known for name in steps_of):
            self._refuse(f"steps_of must be of tasks of the loop, got {steps_of!r:.100}")
        for name, count in steps_of.items():
            self._check_count(f"steps_of[{name!r}]", count)
        if state["step"] != state["round"] * steps or sum(steps_of.values()) != state["step"]:
            self._refuse(f"{state['round']} rounds of {steps} steps cannot be {state['step']} steps, by task {steps_of!r:.100}")
        names = isinstance(tasks, list) and all(isinstance(name, str) and name for name in tasks)
        if not names or len(set(tasks)) != len(tasks) or bool(tasks) != self.masked:
            self._refuse(f"tasks must be the names of the model's tasks, got {tasks!r:.100}")
        trained = set(steps_of) if self.common is None else {self.common}
        if not isinstance(optimizers, dict) or optimizers.keys() != (trained if self.masked and steps_of else set()):
            self._refuse(f"mask_optimizers must be of the tasks that were trained, {describe(steps_of)}")
        if missing := sorted(optimizers.keys() - set(tasks)):
            self._refuse(f"tasks must have the trained task {missing[0]!r}, got {describe(tasks)}")
        return tasks

    def _forms(self, tasks: Sequence[str]) -> dict[str, list[_Form]]:
        """List the forms that each tensor of the model's state may have, once it has these tasks."""
        own = self.model.state_dict()
        dicts = _dicts(self.model)
        forms: dict[str, list[_Form]] = {}
        for key, tensor in own.items():
            if key.rpartition(".")[0] not in dicts and not _is_extra(key, own):
                assert isinstance(tensor, Tensor)
                forms[key] = [(tensor.dtype, tensor.shape)]
        for path, tensors in dicts.items():
            of_masks = _forms_of(self.model, tensors)
            for task in tasks if self.masked else tensors:
                forms[f"{path}.{escape(task)}"] = of_masks
        return forms

    def _checked_model(self, model: object, forms: Mapping[str, Sequence[_Form]], trained: Collection[str]) -> dict[str, Tensor]:
        """Check the model's state; return its tensors by their keys in this torch. NaN is refused in what was trained."""
        if not isinstance(model, dict) or not all(isinstance(key, str) for key in model):
            self._refuse(f"model must be a state dict, got {type(model).__name__}")
        dicts = _dicts(self.model)
        own = self.model.state_dict()
        self._check_gates(model)
        given = {_key(key, dicts): tensor for key, tensor in model.items() if not _is_extra(key, own)}
        if given.keys() != forms.keys():
            lacks, more = sorted(forms.keys() - given.keys()), sorted(given.keys() - forms.keys())
            self._refuse_model(
                "; ".join(f"{what} {describe(keys)}" for what, keys in (("it lacks", lacks), ("it has", more)) if keys)
            )
        finite = {name for name, each in self.model.named_parameters(remove_duplicate=False) if each.requires_grad}
        finite = {name for name in finite if name.rpartition(".")[0] not in dicts}
        finite |= {f"{path}.{escape(task)}" for path in dicts for task in trained}
        for key, allowed in forms.items():
            tensor = given[key]
            like = own.get(key)
            self._check_tensor(key, tensor, allowed, like if isinstance(like, Tensor) else None)
            assert isinstance(tensor, Tensor)
            if key in finite and bool(tensor.isnan().any()):
                self._refuse(f"{key} holds NaN: the training had diverged")
        return cast(dict[str, Tensor], given)

    def _check_gates(self, model: Mapping[str, object]) -> None:
        for path, layer in self.model.named_modules(remove_duplicate=False):
            key = f"{path}.{EXTRA_STATE}" if path else EXTRA_STATE
            if isinstance(layer, MaskedLayer) and key in model:
                try:
                    decoded(model[key])
                except ValueError as error:
                    self._refuse_model(f"{key} {error}")

    def _refuse_model(self, why: str) -> NoReturn:
        self._refuse(f"the model does not fit the checkpoint: {why}")

    def _check_tensor(self, name: str, tensor: object, allowed: Sequence[_Form], like: Tensor | None = None) -> None:
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) not in allowed:
            got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            wanted = " or ".join(f"{dtype} {list(shape)}" for dtype, shape in allowed)
            self._refuse_model(f"{name} must be {wanted}, got {got}")
        if not is_plain(tensor, like):
            self._refuse_model(f"{name} must be a dense tensor on the CPU")

    def _mask_forms(self, task: str, model: Mapping[str, Tensor]) -> list[_Form]:
        """List the parameters of one task's masks, in the order of the loop."""
        found = []
        for path, tensors in _dicts(self.model, once=True).items():
            if not tensors._only_buffers:
                tensor = model[f"{path}.{escape(task)}"]
                if tensor.dtype == torch.uint8:
                    self._refuse(f"task {task!r} was trained, and {path} has bits of it")
                found.append((tensor.dtype, tensor.shape))
        return found

    def _check_optimizer(self, name: str, given: object, forms: Sequence[_Form], of_masks: bool) -> None:
        like = self.new_optimizer([nn.Parameter(torch.empty(0)) for _ in forms], of_masks)
        groups = like.state_dict()["param_groups"]
        if not isinstance(given, dict) or not isinstance(given.get("state"), dict):
            self._refuse(f"{name} must be the state of an optimiser, got {type(given).__name__}")
        # repr tells 1 from True and 1.0, and compares no tensors.
        if (was := repr(given.get("param_groups"))) != (wanted := repr(groups)):
            self._refuse(f"{name} has the groups {was:.500}, the loop's settings give {wanted:.500}")
        for index, entries in given["state"].items():
            if type(index) is not int or not 0 <= index < len(forms) or not isinstance(entries, dict):
                self._refuse(f"{name} has a state of {index!r:.100}, which is none of its {len(forms)} parameters")
            self._check_entries(f"{name} of parameter {index}", entries, forms[index])

    def _check_entries(self, name: str, entries: Mapping[object, object], form: _Form) -> None:
        adam = self.settings["optimizer"] == "adam"
        wanted = {"step", "exp_avg", "exp_avg_sq"} if adam else {"momentum_buffer"}
        if entries.keys() != wanted:
            self._refuse(f"{name} must have {sorted(wanted)}, got {describe(map(str, entries))}")
        for key, value in entries.items():
            if key == "step":
                self._check_tensor(f"{name}, {key},", value, [(dtype, torch.Size()) for dtype in (torch.float32, torch.float64)])
                if not 0 <= float(cast(Tensor, value)) < math.inf:
                    self._refuse(f"{name}: step must be a number of steps, got {value!r}")
            elif value is not None or adam:
                self._check_tensor(f"{name}, {key},", value, [form])
                tensor = cast(Tensor, value)
                if not bool(tensor.isfinite().all()) or (key == "exp_avg_sq" and bool((tensor < 0).any())):
                    wanted_values = "numbers, at least 0" if key == "exp_avg_sq" else "numbers"
                    self._refuse(f"{name}: {key} must hold finite {wanted_values}: the training had diverged")


def _dicts(model: nn.Module, once: bool = False) -> dict[str, TaskDict]:
    """Map the paths of the model's TaskDicts to them; ``once``: of one that several layers share only the first."""
    return {path: module for path, module in model.named_modules(remove_duplicate=once) if isinstance(module, TaskDict)}


def _is_extra(key: str, own: Mapping[str, object]) -> bool:
    """Return whether modules save something beside parameters and buffers under this key."""
    return key.rpartition(".")[2] == EXTRA_STATE or not isinstance(own.get(key, torch.Tensor()), Tensor)


def _key(key: str, dicts: Iterable[str]) -> str:
    """Return the key that this torch gives to what has ``key``: which first characters are escaped differs between versions."""
    path, _, last = key.rpartition(".")
    task = unescape(last) if path in dicts else None
    return f"{path}.{escape(task)}" if task else key


def _forms_of(model: nn.Module, tensors: TaskDict) -> list[_Form]:
    """List the forms that a task's tensor may have in a TaskDict: logits or bits, or what the others have."""
    for layer in model.modules():
        if isinstance(layer, MaskedLayer):
            for shared, masks in layer._groups():
                if masks is tensors:
                    logits = [(dtype, shared.shape) for dtype in layer._dtypes_of_logits(shared)]
                    return [*logits, (torch.uint8, torch.Size(packed_shape(shared.shape)))]
    like = tensors[next(iter(tensors))]
    return [(like.dtype, like.shape)]
