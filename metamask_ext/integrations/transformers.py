"""transformers: a Trainer that runs each step in the block of its task."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("transformers is not installed: pip install transformers accelerate") from error

from metamask_ext.nn.names import check_name
from metamask_ext.nn.tasks import masked_layers
from metamask_ext.nn.using_task import using_task

from .schedules import Annealing, Tasks, TaskSchedule


class TaskTrainer(Trainer):
    """A :class:`transformers.Trainer` of a masked model: ``metamask_ext.convert(model)``, say.

    A training step, forward and backward, runs in the block ``using_task(model, task)``, and so does a step of evaluation or
    prediction. A TrainerCallback could not do that: Trainer tells it nothing of an error, and the block would stay open.

    Tasks of the schedule that the model lacks are added here, before the optimiser is made. Weight decay leaves masks alone, as it
    does biases: it would pull gates to 1/2.

    Args:
        arguments, options: of :class:`transformers.Trainer`.
        tasks: the task of each epoch, or of each step of the optimiser: see
            :class:`metamask_ext.integrations.schedules.TaskSchedule`.
        every: ``"epoch"`` or ``"step"``.
        task_column: in place of ``tasks``: the entry of a batch that holds each sample's task, its slot
            (:func:`metamask_ext.slots`), int64 ``[B]``; ``TrainingArguments`` then needs ``remove_unused_columns=False``.
        evaluate: the task of evaluation and prediction; None: as in training, the column or the task of the moment.
        temperature: ``(start, end)`` of sigmoid gates, falling by the same factor each step of the optimiser.

    Raises:
        TypeError, ValueError: an argument that cannot be, a model without masked layers, or without a gate that has a temperature.
            From a step: a batch without the column.
    """

    def __init__(
        self,
        *arguments: Any,
        tasks: Tasks | None = None,
        every: str = "epoch",
        task_column: str | None = None,
        evaluate: str | None = None,
        temperature: tuple[float, float] | None = None,
        **options: Any,
    ):
        if (tasks is None) == (task_column is None):
            raise ValueError(f"either tasks or task_column must be given, got tasks={tasks!r} and task_column={task_column!r}")
        self._schedule = None if tasks is None else TaskSchedule(tasks, every)
        self._column, self._evaluate = task_column, None if evaluate is None else check_name(evaluate)
        self._annealing = None if temperature is None else Annealing(temperature)
        super().__init__(*arguments, **options)
        masked_layers(self.model)  # ValueError if there are none
        if self._schedule is not None:
            self._schedule.add_missing(self.model)
        if self._annealing is not None:
            self._annealing.check(self.model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **options: Any) -> Tensor:
        """As of :class:`transformers.Trainer`, in the block of the step's task."""
        if self._annealing is not None:
            self._annealing.apply(self.model, self.state.global_step / max(1, self.state.max_steps - 1))
        block, inputs = self._block_of(inputs)
        with block:
            return super().training_step(model, inputs, *more, **options)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
        """As of :class:`transformers.Trainer`, in the block of the task that is evaluated."""
        block, inputs = self._block_of(inputs, self._evaluate)
        with block:
            return super().prediction_step(model, inputs, *more, **options)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Those that weight decay is applied to: as of :class:`transformers.Trainer`, without masks."""
        return [name for name in super().get_decay_parameter_names(model) if not {"masks", "bias_masks"} & {*name.split(".")}]

    def _block_of(self, inputs: Mapping[str, Any], task: str | None = None) -> tuple[AbstractContextManager[Any], dict[str, Any]]:
        """The block of a batch, and the batch without the column of tasks."""
        inputs = dict(inputs)
        slots = inputs.pop(self._column, None) if self._column is not None else None
        if task is not None:
            return using_task(self.model, task), inputs
        if self._schedule is not None:
            number = self.state.global_step if self._schedule.every == "step" else int(self.state.epoch or 0)
            return using_task(self.model, self._schedule.task(number)), inputs
        if slots is None:
            raise ValueError(
                f"task_column must be an entry of each batch, got {self._column!r} and a batch with {', '.join(inputs)}"
            )
        return using_task(self.model, slots), inputs
