"""The settings of a training loop, and what of them a run and its checkpoint must agree on."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from ..nn import MaskedLayer
from ..nn.names import check_name, describe, plain
from ..nn.paths import plain_modules

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]
TaskData = Batch | Callable[[torch.Generator], Batch]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The settings of a :class:`metamask_ext.continual.TaskLoop`, checked when they are made.

    Args:
        steps: gradient steps in a round, the proposal's ``N``.
        lr: learning rate of the shared parameters.
        mask_lr: learning rate of the masks; None: ``lr``.
        weight_decay, mask_weight_decay: factors of the L2 terms of the loss, added to the gradients.
        optimizer: ``"sgd"`` (the proposal's steepest descent) or ``"adam"``.
        momentum: of ``"sgd"``.
        batch_size: samples a step, drawn with replacement from a task's pair; None: all of them. Not for functions.
        per_task_masks: False trains one network for all tasks: a model without masks, or with the masks of one task. It is a
            baseline.
        order: the task of each round; None: drawn uniformly, as the proposal does. ``run`` then goes no further than it.
        seed: of the loop's generator.
        out: folder for ``checkpoint.pt`` and ``metrics.jsonl`` (a line for each round: ``round``, ``step``, ``task``, the mean
            ``loss``, and what ``evaluate`` returned); None: write nothing.
        settings: more settings (numbers and strings) that a checkpoint must agree on; the loop's own and the data are always
            compared.
        evaluate: called without gradients, with the loop, after every ``evaluate_every`` rounds; returns numbers by name.
            :meth:`~metamask_ext.continual.TaskLoop.using` selects a task there.
        checkpoint_seconds: time between checkpoints; 0: after every round. One is written before the first round and after the
            last.
        tensorboard: also write the metrics to ``out/tensorboard``; None: if there is an ``out`` and TensorBoard is installed.
        label: the name of the run beside the progress bar.

    Raises:
        TypeError, ValueError: a setting that cannot be; the message names it.
    """

    steps: int = 10
    lr: float = 0.1
    mask_lr: float | None = None
    weight_decay: float = 0.0
    mask_weight_decay: float = 0.0
    optimizer: str = "sgd"
    momentum: float = 0.0
    batch_size: int | None = None
    per_task_masks: bool = True
    order: Sequence[str] | None = None
    seed: int = 0
    out: str | Path | None = None
    settings: Mapping[str, object] | None = None
    evaluate: Callable[[Any], Mapping[str, float]] | None = None  # of the TaskLoop, whose module imports this one
    evaluate_every: int = 1
    checkpoint_seconds: float = 10.0
    tensorboard: bool | None = None
    label: str = "training"

    def __post_init__(self) -> None:
        # Numbers and strings of other libraries would not come back from a checkpoint.
        for field in fields(self):
            object.__setattr__(self, field.name, _builtin(getattr(self, field.name)))
        if self.order is not None and not isinstance(self.order, str):
            object.__setattr__(self, "order", [plain(name) for name in self.order])
        if self.settings is not None:
            object.__setattr__(self, "settings", {plain(key): _builtin(value) for key, value in self.settings.items()})
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam', got {self.optimizer!r}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum must be 0 with optimizer={self.optimizer!r}, got {self.momentum}")
        for name, count in (
            ("steps", self.steps),
            ("evaluate_every", self.evaluate_every),
            ("batch_size", self.batch_size),
        ):
            if count is not None and _integer(name, count) < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if self.tensorboard and self.out is None:
            raise ValueError("tensorboard=True needs out, got out=None")

    def check_tasks(self, tasks: Mapping[str, TaskData]) -> None:
        """Raise TypeError or ValueError unless a loop with this config can train these tasks."""
        if not tasks:
            raise ValueError("tasks must name at least one task, got none")
        for name, data in tasks.items():
            _check_data(check_name(name), data, self.batch_size)
        names = [check_name(name) for name in tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks must have different names, got {describe(names)}")
        for name in self.order or ():
            if name not in names:
                raise ValueError(f"order must name tasks of the loop, {describe(tasks)}, got {name!r}")

    def new_optimizer(self, parameters: Iterable[nn.Parameter], *, of_masks: bool) -> Optimizer:
        """Make the optimiser of the shared parameters, or of one task's masks."""
        lr = self.lr if self.mask_lr is None or not of_masks else self.mask_lr
        decay = self.mask_weight_decay if of_masks else self.weight_decay
        if self.optimizer == "sgd":
            return SGD(list(parameters), lr=lr, weight_decay=decay, momentum=self.momentum)
        return Adam(list(parameters), lr=lr, weight_decay=decay)

    def compared(self, loss: object, tasks: Iterable[str]) -> dict[str, object]:
        """Collect what a checkpoint must agree on, without the data and the model."""
        return {
            "loss": name_of(loss),
            "optimizer": self.optimizer,
            "lr": self.lr,
            "mask_lr": self.lr if self.mask_lr is None else self.mask_lr,
            "weight_decay": self.weight_decay,
            "mask_weight_decay": self.mask_weight_decay,
            "momentum": self.momentum,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "per_task_masks": self.per_task_masks,
            "tasks": list(tasks),
            "seed": self.seed,
            "evaluate_every": None if self.evaluate is None else self.evaluate_every,
            **({} if self.order is None else {"order": list(self.order)}),
            **(self.settings or {}),
        }


def name_of(function: object) -> str:
    """Return a function's name, or the type of a module or another object that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__qualname__)


def describe_data_and_model(tasks: Mapping[str, TaskData], shared: Mapping[str, nn.Parameter], model: nn.Module) -> dict[str, str]:
    """Describe the shared parameters by their shapes, the layers by their gates, the data by their checksums."""
    described = {f"shape of {name}": f"{list(parameter.shape)} {parameter.dtype}" for name, parameter in shared.items()}
    for name, module in plain_modules(model):
        if isinstance(module, MaskedLayer):
            described[f"gate of {name or 'the model'}"] = f"{module.gate}, {module.temperature:g}, {module.threshold:g}"
    for name, data in tasks.items():
        if callable(data):
            digest = f"a function, {name_of(data)}"
        else:
            checksum = hashlib.sha256()
            for tensor in data:
                checksum.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
                checksum.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            digest = checksum.hexdigest()
        described[f"data of task {name!r}"] = digest
    return described


def _check_data(name: str, data: TaskData, batch_size: int | None) -> None:
    if callable(data):
        if batch_size is not None:
            raise ValueError(f"batch_size must be None for task {name!r}, whose data is a function, got {batch_size}")
        return
    if not (isinstance(data, tuple) and len(data) == 2 and all(isinstance(tensor, Tensor) for tensor in data)):
        raise TypeError(f"tasks[{name!r}] must be a pair of tensors or a function of a generator, got {type(data).__name__}")
    x, y = data
    if not len(x) or len(x) != len(y):
        raise ValueError(f"tasks[{name!r}] must have as many x as y, at least one, got {list(x.shape)} and {list(y.shape)}")


def _builtin(value: T) -> T | str | float | int | bool:
    """A string, or a number of any class, as Python's own; anything else as it is."""
    if isinstance(value, (Tensor, bool)) or value is None or type(value) in (str, int, float):
        return value
    if isinstance(value, str):
        return plain(value)
    item = getattr(value, "item", None)  # numpy's
    if item is not None and getattr(value, "ndim", None) == 0:
        number: float | int | bool = item()
        return number
    return float(value) if isinstance(value, float) else int(value) if isinstance(value, int) else value


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
