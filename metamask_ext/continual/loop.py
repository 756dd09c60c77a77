"""The training loop of the proposal: Blum and Law, EE5239 project proposal (2020), section 2.1, steps 1 to 6."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import products
from ..files.atomic import output_errors, prepare_folder, sweep
from ..files.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from ..files.errors import CheckpointError, OutputError
from ..files.lock import locked_run
from ..files.metrics import METRICS, MetricsFile
from ..nn import MaskedLayer
from ..nn.context import blocks_closed_on_error
from ..nn.names import DEFAULT_TASK, check_name, describe, escape, plain
from ..nn.paths import own_state, plain_path, plain_state
from ..nn.structure import structure
from ..nn.task_dict import TaskDict
from ..nn.tasks import add_task, masked_layers, remove_task
from ..nn.tasks import tasks as model_tasks
from ..nn.using_task import using_task
from ..nn.wrappers import check_may_grow, is_sharded
from .config import Batch, LoopConfig, TaskData, describe_data_and_model
from .progress import progress_bar
from .state import Checks, LoopState

Line = dict[str, str | float]
"""A line of metrics: ``round``, ``step``, ``task``, ``loss`` and the numbers of ``evaluate``."""


class TaskLoop:
    """Train one network on many tasks, a mask for each: ``theta = W * g(M_task)``.

    A *round*: draw a task uniformly; if it was not seen before, draw a new mask for it; take ``steps`` steps of gradient descent
    on the shared parameters ``W`` and on that task's masks, minimising
    ``loss + weight_decay / 2 * |W|^2 + mask_weight_decay / 2 * |M_task|^2``. Source: Blum and Law, section 2.1 (steps 1 to 6,
    and the L2 regulariser on W). Masks of other tasks get no gradient and do not move; each task's masks have an optimiser of
    their own, made when the task is first drawn, so a step costs the same for any number of tasks.

    Tasks of the model: those named in ``tasks`` keep their masks. A lone ``"default"`` that is not among them (a new model's) is
    replaced by the first task drawn. Others stay as they are.

    Given ``out``, the run can be killed at any moment and continued: the same call resumes at the last checkpoint and ends with
    the same parameters and metrics, bit for bit, as if it had not been killed (on the same machine, with as many threads).
    Random numbers come from the loop's own generator; the global one is seeded from it for each round (mask init, dropout) and
    given back afterwards.

    Under ``DistributedDataParallel`` gradients are averaged over the processes; each draws the same tasks. Add all of them
    (:func:`metamask_ext.add_task`) before the model is wrapped: a mask that a wrapper does not know would differ between processes.
    Give data that differ by process as functions, and each process an ``out`` of its own.

    Args:
        model: any module; with masked layers unless ``per_task_masks=False``. Changed in place.
        tasks: from task name to its data: a pair ``(x, y)`` of tensors, ``[n, ...]`` each, or a function of a
            ``torch.Generator`` that returns such a pair, a fresh batch.
        loss: ``loss(model(x), y)``, a scalar.
        config: the settings; None: the defaults of :class:`LoopConfig`.
        changes: fields of :class:`LoopConfig` by name, in place of those of ``config``.

    Attributes:
        config: the settings, with the changes.
        round, step: rounds and gradient steps done.
        steps_of: gradient steps for each task seen, in the order of first sight.
        seconds: time spent in rounds, also before a resumption.
        resumed: the round at which this object took up a checkpoint; None if it did not.

    Raises:
        TypeError, ValueError: an argument that cannot be; the message names it. Also a model that is sharded (``fully_shard``).
        RuntimeError: the model is wrapped in ``DistributedDataParallel`` without a mask for each task.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, TaskData],
        loss: Callable[[Any, Tensor], Tensor],
        config: LoopConfig | None = None,
        **changes: Any,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.config = config = replace(config or LoopConfig(), **changes)
        config.check_tasks(tasks)
        self.model, self.tasks, self.loss = model, {check_name(name): data for name, data in tasks.items()}, loss
        self._names = list(self.tasks)
        self._order = None if config.order is None else list(config.order)

        self._masked = any(isinstance(module, MaskedLayer) for module in model.modules())
        # The masks that every task uses, if not its own: the model's only ones, or none at all.
        self._common: str | None = None
        self._replaces_default = False
        if config.per_task_masks:
            self._replaces_default = model_tasks(model) == [DEFAULT_TASK] and DEFAULT_TASK not in self.tasks
        elif self._masked:
            names = model_tasks(model)
            if len(names) != 1:
                raise ValueError(f"per_task_masks=False takes a model with one task at most, got one with {len(names)}")
            self._common = names[0]
        self._replaces_default_at_first = self._replaces_default
        if is_sharded(model.modules()):
            raise ValueError("model must not be sharded by fully_shard: the loop adds tasks and their optimisers as it goes")
        self._check_tasks_can_be_added()

        self._shared = _shared_parameters(model)
        self._optimizer = config.new_optimizer(self._shared.values(), of_masks=False)
        self._mask_optimizers: dict[str, Optimizer] = {}
        devices = {parameter.device for parameter in model.parameters()}
        self._cuda = sorted(device.index for device in devices if device.type == "cuda")
        self._generator = torch.Generator().manual_seed(config.seed)
        self.round = self.step = 0
        self.steps_of: dict[str, int] = {}
        self.seconds = 0.0
        self.resumed: int | None = None

        self.out = None if config.out is None else Path(config.out)
        wanted = _has_tensorboard() if config.tensorboard is None else config.tensorboard
        self._tensorboard = self.out is not None and wanted
        self._metrics_length = 0
        self._metrics_sha256: str | None = hashlib.sha256().hexdigest()
        # Whether this object is where its last checkpoint is; without ``out``, at the end of a round.
        self._whole = self.out is None
        self._described = False
        self._settings = config.compared(loss, self._names)

    def run(self, rounds: int) -> TaskLoop:
        """Train until ``rounds`` rounds are done in all, those before a resumption included.

        Called again after an exception, or an interruption from the keyboard, it resumes at the last checkpoint in ``out``.

        Returns:
            self.

        Raises:
            ValueError: ``rounds`` are more than ``order`` has.
            RuntimeError: an exception ended an earlier call within a round, and without ``out`` there is nothing to go back to.
            OutputError: ``out`` cannot be written, another process is writing to it, or it holds another program's metrics.
            CheckpointError: the checkpoint in ``out`` is damaged, of other settings or data, or past ``rounds``.
            FloatingPointError: the loss is not finite any more.
        """
        if self._order is not None and rounds > len(self._order):
            raise ValueError(f"rounds must be at most the {len(self._order)} of order, got {rounds}")
        self._check_tasks_can_be_added()
        with blocks_closed_on_error(), ExitStack() as stack:
            record = self._open(stack, rounds)
            if self.round == rounds:
                return self
            advance = stack.enter_context(progress_bar(self.config.label, self.round, rounds))
            self.model.train()
            saved = time.monotonic()
            while self.round < rounds:
                started = time.monotonic()
                self._whole = False
                line = self._run_round()
                now = time.monotonic()
                self.seconds += now - started
                record(line)
                advance(self.round)
                if self.out is None:
                    self._whole = True
                elif self.round == rounds or now - saved >= self.config.checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
        return self

    def _check_tasks_can_be_added(self) -> None:
        """Raise RuntimeError if a task of the loop has no masks yet and can get none: before a round, not in it."""
        if not self._masked or self._common is not None:
            return
        present = model_tasks(self.model)
        for name in self._names:
            if name not in present:
                check_may_grow((layer for _, layer in masked_layers(self.model)), f"task {name!r} cannot be added")

    def using(self, name: str) -> AbstractContextManager[object]:
        """Open a block in which ``model`` computes task ``name``: with its masks, or as it is if it has none of its own.

        Raises:
            ValueError: the task has no masks yet, because it was not seen, or is unknown.
        """
        name = plain(name)
        if name not in self.tasks:
            raise ValueError(f"task must be one of the loop's, {describe(self.tasks)}, got {name!r}")
        return using_task(self.model, self._common or name) if self._masked else nullcontext()

    def _run_round(self) -> Line:
        """Run one round; return its line of metrics."""
        config = self.config
        name = self._names[self._draw(len(self._names))] if self._order is None else self._order[self.round]
        with torch.random.fork_rng(self._cuda):
            self._seed_global(self._draw(2**63 - 1))
            mask = self._mask_of(name)
            loss = self._descend(name, mask)
            self.round += 1
            self.step += config.steps
            self.steps_of[name] = self.steps_of.get(name, 0) + config.steps
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the mean loss of round {self.round}, task {name!r}, is {loss}: try smaller learning rates than "
                    f"lr={self._settings['lr']}, mask_lr={self._settings['mask_lr']}"
                )
            line: Line = {"round": self.round, "step": self.step, "task": name, "loss": loss}
            if config.evaluate is not None and self.round % config.evaluate_every == 0:
                with torch.no_grad():
                    scores = config.evaluate(self)
                for key, score in scores.items():
                    if not isinstance(score, (int, float)):
                        raise TypeError(f"evaluate must return numbers, got {key!r}: {type(score).__name__}")
                line.update(scores)
                self.model.train()
        return line

    def _descend(self, name: str, mask: str | None) -> float:
        """Take a round's steps on the shared parameters and the masks of task ``mask``; return the mean loss."""
        model, loss_function, sample, steps = self.model, self.loss, self._sampler(name), self.config.steps
        optimizers: list[Optimizer] = [self._optimizer]
        if mask is not None:
            optimizers.append(self._mask_optimizers[mask])
        parameters = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
        total: Tensor | float = 0.0
        for parameter in parameters:
            parameter.grad = None
        with self.using(name):
            for _ in range(steps):
                x, y = sample()
                loss = loss_function(model(x), y)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                # What optimizer.zero_grad does, without its bookkeeping.
                for parameter in parameters:
                    parameter.grad = None
                total += loss.detach()
        return float(total) / steps

    def _mask_of(self, name: str) -> str | None:
        """Return the task whose masks ``name`` trains, made with their optimiser in its first round; None: no masks."""
        if not self._masked:
            return None
        mask = self._common or name
        if mask not in self._mask_optimizers:
            if mask not in model_tasks(self.model):
                add_task(self.model, mask)
                if self._replaces_default:
                    remove_task(self.model, DEFAULT_TASK)
            self._replaces_default = False
            self._mask_optimizers[mask] = self._new_mask_optimizer(mask)
        return mask

    def _new_mask_optimizer(self, task: str) -> Optimizer:
        return self.config.new_optimizer(_mask_parameters(self.model, task), of_masks=True)

    def _sampler(self, name: str) -> Callable[[], Batch]:
        """Return a function that draws a batch of the task's data."""
        data, generator, size = self.tasks[name], self._generator, self.config.batch_size
        if callable(data):
            return lambda: data(generator)
        if size is None:
            return lambda: data
        x, y = data

        def sample() -> Batch:
            chosen = torch.randint(len(x), (size,), generator=generator).to(x.device)
            return x[chosen], y[chosen]

        return sample

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self._generator))

    def _seed_global(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        for index in self._cuda:
            torch.cuda.default_generators[index].manual_seed(seed)

    # Files

    def _open(self, stack: ExitStack, rounds: int) -> Callable[[Line], None]:
        """Take the folder, resume if it holds a checkpoint, and return the function that writes a line of metrics."""
        if self.out is None:
            _check_not_past(self.round, rounds)
            if not self._whole:
                raise RuntimeError(
                    f"an exception ended an earlier run within round {self.round + 1}, and with out=None there is no checkpoint "
                    "to go back to: make a new TaskLoop"
                )
            return lambda line: None
        prepare_folder(self.out)
        stack.enter_context(locked_run(self.out))
        if not self._whole and not self._described:  # once: what is annealed during the run is no other setting
            self._settings.update(describe_data_and_model(self.tasks, self._shared, self.model))
            self._described = True
        path, state = self.out / CHECKPOINT, None
        with output_errors(self.out):
            sweep(self.out, lambda name: name == CHECKPOINT)
            there, metrics = (os.path.lexists(file) for file in (path, self.out / METRICS))
        if not self._whole and there:
            state = self._checked_state(path)
        elif not self._whole and metrics:
            raise OutputError(f"{str(self.out / METRICS)!r} exists without a checkpoint beside it: use another folder")
        _check_not_past(self.round if state is None else state["round"], rounds)
        if state is None and not self._whole:
            save_checkpoint(path, self._state())
        length, sha256 = self._metrics_length, self._metrics_sha256
        if state is not None:
            length, sha256 = state["metrics_length"], state.get("metrics_sha256")
        self._metrics = stack.enter_context(MetricsFile(self.out / METRICS, length, sha256))
        if state is not None:
            self._take_over(state)
        self._whole = True
        self._metrics.cut()
        if not self._tensorboard:
            return self._metrics.write
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboard=True needs TensorBoard: pip install tensorboard") from error
        with output_errors(self.out / "tensorboard"):
            writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.round + 1)
        stack.callback(writer.close)

        def record(line: Line) -> None:
            self._metrics.write(line)
            for key, value in line.items():
                if key not in ("round", "step", "task"):
                    writer.add_scalar(f"loss/{line['task']}" if key == "loss" else key, value, line["round"])

        return record

    def _save(self) -> None:
        assert self.out is not None
        self._metrics_length, self._metrics_sha256 = self._metrics.sync(), self._metrics.sha256
        save_checkpoint(self.out / CHECKPOINT, self._state())
        self._whole = True

    def _state(self) -> LoopState:
        with structure():  # other threads may add and remove tasks
            tasks, model = model_tasks(self.model) if self._masked else [], plain_state(self.model)
        return {
            "settings": self._settings,
            "round": self.round,
            "step": self.step,
            "steps_of": self.steps_of,
            "seconds": self.seconds,
            "metrics_length": self._metrics_length,
            "metrics_sha256": self._metrics_sha256,
            "products": products.current().digest,
            "generator": self._generator.get_state(),
            "tasks": tasks,
            "model": model,
            "optimizer": self._optimizer.state_dict(),
            "mask_optimizers": {name: optimizer.state_dict() for name, optimizer in self._mask_optimizers.items()},
        }

    def _checked_state(self, path: Path) -> LoopState:
        """Read a checkpoint. CheckpointError if this loop cannot go on with it; nothing has changed."""

        def new_optimizer(parameters: Iterable[nn.Parameter], of_masks: bool) -> Optimizer:
            return self.config.new_optimizer(parameters, of_masks=of_masks)

        checks = Checks(path, self.model, self._settings, self._common, self._masked, new_optimizer)
        state = load_checkpoint(path)
        model = state.get("model")
        if isinstance(model, dict) and all(isinstance(key, str) for key in model):
            state["model"] = own_state(self.model, model)
        return checks.checked(state, self._shared.values())

    def _take_over(self, state: LoopState) -> None:
        """Become what the loop was whose checkpoint has this state, which was checked."""
        if self._masked:
            with torch.random.fork_rng(self._cuda):
                present = model_tasks(self.model)
                for name in state["tasks"]:
                    if name not in present:
                        add_task(self.model, name)
                for name in present:
                    if name not in state["tasks"]:
                        remove_task(self.model, name)
            self._replaces_default = self._replaces_default_at_first and DEFAULT_TASK in state["tasks"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._mask_optimizers.clear()
        for name, optimizer_state in state["mask_optimizers"].items():
            optimizer = self._new_mask_optimizer(name)
            optimizer.load_state_dict(optimizer_state)
            self._mask_optimizers[name] = optimizer
        self._generator.set_state(state["generator"])
        self.round, self.step, self.steps_of = state["round"], state["step"], state["steps_of"]
        self.seconds = state["seconds"]
        self._metrics_length, self._metrics_sha256 = state["metrics_length"], state.get("metrics_sha256")
        self.resumed = self.round


def _check_not_past(done: int, rounds: int) -> None:
    if done > rounds:
        raise CheckpointError(f"rounds must be at least the {done} that are done, got {rounds}")


def _task_dicts(model: nn.Module) -> list[TaskDict]:
    return [module for module in model.modules() if isinstance(module, TaskDict)]


def _mask_parameters(model: nn.Module, task: str) -> list[nn.Parameter]:
    """Collect the masks of one task, and what else belongs to it, each once."""
    if any(layer._task_dict()._is_bits(escape(task)) for _, layer in masked_layers(model)):
        raise ValueError(f"task {task!r} is packed: its mask cannot be trained")
    found = (tensors._parameters.get(escape(task)) for tensors in _task_dicts(model))
    return list(dict.fromkeys(parameter for parameter in found if parameter is not None))


def _shared_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Collect every parameter that belongs to no task, by plain path."""
    of_tasks = {id(parameter) for tensors in _task_dicts(model) for parameter in tensors.parameters()}
    named = ((plain_path(model, name), parameter) for name, parameter in model.named_parameters())
    return {name: parameter for name, parameter in named if id(parameter) not in of_tasks}


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None
