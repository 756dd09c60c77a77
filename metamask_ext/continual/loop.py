"""The training loop of the proposal: Blum and Law, EE5239 project proposal (2020), section 2.1, steps 1 to 6."""

from __future__ import annotations

import importlib.util
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from ..files.checkpoint import (
    CHECKPOINT,
    METRICS,
    CheckpointError,
    MetricsFile,
    OutputError,
    check_same_settings,
    describe_settings,
    load_checkpoint,
    locked,
    name_of,
    prepare_folder,
    save_checkpoint,
)
from ..nn import MaskedLayer
from ..nn.names import DEFAULT_TASK, check_name, describe, escape
from ..nn.task_dict import TaskDict
from ..nn.tasks import add_task, masked_layers, remove_task
from ..nn.tasks import tasks as model_tasks
from ..nn.using_task import using_task

Batch = tuple[Tensor, Tensor]
TaskData = Batch | Callable[[torch.Generator], Batch]


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

    Args:
        model: any module; with masked layers unless ``per_task_masks=False``. Changed in place.
        tasks: from task name to its data: a pair ``(x, y)`` of tensors, ``[n, ...]`` each, or a function of a
            ``torch.Generator`` that returns such a pair, a fresh batch.
        loss: ``loss(model(x), y)``, a scalar.
        steps: gradient steps in a round, the proposal's ``N``.
        lr: learning rate of the shared parameters.
        mask_lr: learning rate of the masks; None: ``lr``.
        weight_decay, mask_weight_decay: the L2 factors above, added to the gradients.
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
            :meth:`using` selects a task there.
        checkpoint_seconds: time between checkpoints; 0: after every round. One is written before the first round and after the
            last.
        tensorboard: also write the metrics to ``out/tensorboard``; None: if there is an ``out`` and TensorBoard is installed.
        label: what the progress bar calls the run.

    Attributes:
        round, step: rounds and gradient steps done.
        steps_of: gradient steps for each task seen, in the order of first sight.
        seconds: time spent in rounds, also before a resumption.
        resumed: the round at which this object took up a checkpoint; None if it did not.

    Raises:
        TypeError, ValueError: an argument that cannot be; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, TaskData],
        loss: Callable[[Any, Tensor], Tensor],
        *,
        steps: int = 10,
        lr: float = 0.1,
        mask_lr: float | None = None,
        weight_decay: float = 0.0,
        mask_weight_decay: float = 0.0,
        optimizer: str = "sgd",
        momentum: float = 0.0,
        batch_size: int | None = None,
        per_task_masks: bool = True,
        order: Sequence[str] | None = None,
        seed: int = 0,
        out: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        evaluate: Callable[[TaskLoop], Mapping[str, float]] | None = None,
        evaluate_every: int = 1,
        checkpoint_seconds: float = 10.0,
        tensorboard: bool | None = None,
        label: str = "training",
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not tasks:
            raise ValueError("tasks must name at least one task, got none")
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam', got {optimizer!r}")
        if momentum and optimizer != "sgd":
            raise ValueError(f"momentum is of optimizer='sgd', got momentum={momentum} with optimizer={optimizer!r}")
        for name, count in (("steps", steps), ("evaluate_every", evaluate_every), ("batch_size", batch_size)):
            if count is not None and _integer(name, count) < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if tensorboard and out is None:
            raise ValueError("tensorboard=True needs out, got out=None")
        self.model, self.tasks, self.loss, self.steps, self.label = model, dict(tasks), loss, steps, label
        for name, data in self.tasks.items():
            _check_data(check_name(name), data, batch_size)

        self._order = None if order is None else list(order)
        for name in self._order or []:
            if name not in self.tasks:
                raise ValueError(f"order must name tasks of the loop, {describe(self.tasks)}, got {name!r}")

        # The masks that every task uses, if not its own: the model's only ones, or none at all.
        self._common: str | None = None
        masked = any(isinstance(module, MaskedLayer) for module in model.modules())
        if per_task_masks:
            self._replaces_default = model_tasks(model) == [DEFAULT_TASK] and DEFAULT_TASK not in self.tasks
        else:
            self._replaces_default = False
            if masked:
                names = model_tasks(model)
                if len(names) != 1:
                    raise ValueError(f"per_task_masks=False takes a model with one task at most, got one with {len(names)}")
                self._common = names[0]
        self._masked = masked
        self._replaces_default_at_first = self._replaces_default

        mask_lr = lr if mask_lr is None else mask_lr
        extra: dict[str, Any] = {"momentum": momentum} if optimizer == "sgd" else {}
        self._optimizer_type: Any = SGD if optimizer == "sgd" else Adam
        self._mask_options: dict[str, Any] = {"lr": mask_lr, "weight_decay": mask_weight_decay, **extra}
        self._shared = _shared_parameters(model)
        self._optimizer = self._optimizer_type(list(self._shared.values()), lr=lr, weight_decay=weight_decay, **extra)
        self._mask_optimizers: dict[str, Optimizer] = {}
        devices = {parameter.device for parameter in model.parameters()}
        self._cuda = sorted(device.index for device in devices if device.type == "cuda")

        self._names = list(self.tasks)
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self.round = self.step = 0
        self.steps_of: dict[str, int] = {}
        self.seconds = 0.0
        self.resumed: int | None = None

        self.out = None if out is None else Path(out)
        self._evaluate, self._evaluate_every = evaluate, evaluate_every
        self._checkpoint_seconds = checkpoint_seconds
        self._tensorboard = self.out is not None and (_has_tensorboard() if tensorboard is None else tensorboard)
        self._metrics_length = 0
        # Whether this object is where its last checkpoint is; without ``out``, at the end of a round.
        self._whole = self.out is None
        self._described = False
        self._settings: dict[str, Any] = {
            "loss": name_of(loss),
            "optimizer": optimizer,
            "lr": lr,
            "mask_lr": mask_lr,
            "weight_decay": weight_decay,
            "mask_weight_decay": mask_weight_decay,
            "momentum": momentum,
            "steps": steps,
            "batch_size": batch_size,
            "per_task_masks": per_task_masks,
            "tasks": self._names,
            "seed": seed,
            "evaluate_every": None if evaluate is None else evaluate_every,
            **({} if self._order is None else {"order": self._order}),
            **(settings or {}),
        }

    def run(self, rounds: int) -> TaskLoop:
        """Train until ``rounds`` rounds are done in all, those before a resumption included.

        Called again after an exception, or an interruption from the keyboard, it goes back to the last checkpoint in ``out``.

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
        with ExitStack() as stack:
            record = self._open(stack)
            if self.round > rounds:
                raise CheckpointError(f"rounds must be at least the {self.round} that are done, got {rounds}")
            if self.round == rounds:
                return self
            advance = stack.enter_context(_progress(self.label, self.round, rounds))
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
                elif self.round == rounds or now - saved >= self._checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
        return self

    def using(self, name: str) -> AbstractContextManager[Any]:
        """A block in which ``model`` computes task ``name``: with its masks, or as it is if it has none of its own.

        Raises:
            ValueError: the task has no masks yet, because it was not seen, or is unknown.
        """
        if name not in self.tasks:
            raise ValueError(f"task must be one of the loop's, {describe(self.tasks)}, got {name!r}")
        return using_task(self.model, self._common or name) if self._masked else nullcontext()

    def _run_round(self) -> dict[str, Any]:
        """One round, and its line of metrics."""
        name = self._names[self._draw(len(self._names))] if self._order is None else self._order[self.round]
        with torch.random.fork_rng(self._cuda):
            self._seed_global(self._draw(2**63 - 1))
            mask = self._mask_of(name)
            loss = self._descend(name, mask)
            self.round += 1
            self.step += self.steps
            self.steps_of[name] = self.steps_of.get(name, 0) + self.steps
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the mean loss of round {self.round}, task {name!r}, is {loss}: try smaller learning rates than "
                    f"lr={self._settings['lr']}, mask_lr={self._settings['mask_lr']}"
                )
            line = {"round": self.round, "step": self.step, "task": name, "loss": loss}
            if self._evaluate is not None and self.round % self._evaluate_every == 0:
                with torch.no_grad():
                    scores = self._evaluate(self)
                for key, score in scores.items():
                    if not isinstance(score, (int, float)):
                        raise TypeError(f"evaluate must return numbers, got {key!r}: {type(score).__name__}")
                line.update(scores)
                self.model.train()
        return line

    def _descend(self, name: str, mask: str | None) -> float:
        """``steps`` gradient steps on the shared parameters and the masks of task ``mask``; the mean loss."""
        model, loss_function, sample = self.model, self.loss, self._sampler(name)
        optimizers: list[Optimizer] = [self._optimizer]
        if mask is not None:
            optimizers.append(self._mask_optimizers[mask])
        parameters = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
        total: Any = 0.0
        for parameter in parameters:
            parameter.grad = None
        with self.using(name):
            for _ in range(self.steps):
                x, y = sample()
                loss = loss_function(model(x), y)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                # What optimizer.zero_grad does, without its bookkeeping.
                for parameter in parameters:
                    parameter.grad = None
                total += loss.detach()
        return float(total) / self.steps

    def _mask_of(self, name: str) -> str | None:
        """The task whose masks ``name`` trains; they and their optimiser are made in its first round. None: no masks."""
        if not self._masked:
            return None
        mask = self._common or name
        if mask not in self._mask_optimizers:
            if mask not in model_tasks(self.model):
                add_task(self.model, mask)
                if self._replaces_default:
                    remove_task(self.model, DEFAULT_TASK)
            self._replaces_default = False
            self._mask_optimizers[mask] = self._optimizer_type(_mask_parameters(self.model, mask), **self._mask_options)
        return mask

    def _sampler(self, name: str) -> Callable[[], Batch]:
        """A function that draws a batch of the task's data."""
        data, generator, size = self.tasks[name], self._generator, self._batch_size
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

    def _open(self, stack: ExitStack) -> Callable[[dict[str, Any]], None]:
        """Take the folder, resume if it holds a checkpoint, and return the function that writes a line of metrics."""
        if self.out is None:
            if not self._whole:
                raise RuntimeError(
                    f"an exception ended an earlier run within round {self.round + 1}, and with out=None there is no checkpoint "
                    "to go back to: make a new TaskLoop"
                )
            return lambda line: None
        prepare_folder(self.out)
        stack.enter_context(locked(self.out))
        if not self._whole:
            if not self._described:  # once: what is annealed during the run is no other setting
                self._settings.update(describe_settings(self.tasks, self._shared, self.model))
                self._described = True
            path = self.out / CHECKPOINT
            if path.exists():
                self._load(path)
            elif (self.out / METRICS).exists():
                raise OutputError(f"{str(self.out / METRICS)!r} exists without a checkpoint beside it: use another folder")
            else:
                save_checkpoint(path, self._state())
            self._whole = True
        self._metrics = MetricsFile(self.out / METRICS, self._metrics_length)
        stack.callback(self._metrics.close)
        if not self._tensorboard:
            return self._metrics.write
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboard=True needs TensorBoard: pip install tensorboard") from error
        writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.round + 1)
        stack.callback(writer.close)

        def record(line: dict[str, Any]) -> None:
            self._metrics.write(line)
            for key, value in line.items():
                if key not in ("round", "step", "task"):
                    writer.add_scalar(f"loss/{line['task']}" if key == "loss" else key, value, line["round"])

        return record

    def _save(self) -> None:
        assert self.out is not None
        self._metrics_length = self._metrics.sync()
        save_checkpoint(self.out / CHECKPOINT, self._state())
        self._whole = True

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self._settings,
            "round": self.round,
            "step": self.step,
            "steps_of": self.steps_of,
            "seconds": self.seconds,
            "metrics_length": self._metrics_length,
            "generator": self._generator.get_state(),
            "tasks": model_tasks(self.model) if self._masked else [],
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "mask_optimizers": {name: optimizer.state_dict() for name, optimizer in self._mask_optimizers.items()},
        }

    def _load(self, path: Path) -> None:
        state = load_checkpoint(path)
        check_same_settings(path, state["settings"], self._settings)
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
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the model does not fit the checkpoint {str(path)!r}: {reason}") from error
        self._optimizer.load_state_dict(state["optimizer"])
        self._mask_optimizers.clear()
        for name, optimizer_state in state["mask_optimizers"].items():
            optimizer = self._optimizer_type(_mask_parameters(self.model, name), **self._mask_options)
            optimizer.load_state_dict(optimizer_state)
            self._mask_optimizers[name] = optimizer
        self._generator.set_state(state["generator"])
        self.round, self.step, self.steps_of = state["round"], state["step"], state["steps_of"]
        self.seconds, self._metrics_length = state["seconds"], state["metrics_length"]
        self.resumed = self.round


def _task_dicts(model: nn.Module) -> list[TaskDict]:
    return [module for module in model.modules() if isinstance(module, TaskDict)]


def _mask_parameters(model: nn.Module, task: str) -> list[nn.Parameter]:
    """The masks of one task, and what else belongs to it, each once."""
    if any(layer._task_dict()._is_bits(escape(task)) for _, layer in masked_layers(model)):
        raise ValueError(f"task {task!r} is packed: its mask cannot be trained")
    found = (tensors._parameters.get(escape(task)) for tensors in _task_dicts(model))
    return list(dict.fromkeys(parameter for parameter in found if parameter is not None))


def _shared_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that belongs to no task."""
    of_tasks = {id(parameter) for tensors in _task_dicts(model) for parameter in tensors.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in of_tasks}


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


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


@contextmanager
def _progress(label: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal, if there is one; gives the function that moves it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done)
        shown = 0.0

        def advance(completed: int) -> None:
            nonlocal shown
            # A round can be shorter than what a redraw costs.
            if console.is_terminal and time.monotonic() - shown > 0.1:
                bar.update(task, completed=completed)
                shown = time.monotonic()

        yield advance
