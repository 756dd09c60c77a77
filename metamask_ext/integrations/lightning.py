"""Lightning: a callback that opens the block of the right task around each batch, cools the gates and draws the masks."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import torch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
except ImportError as error:
    raise ImportError('lightning is not installed: pip install "metamask_ext[lightning]"') from error
from torch.nn.parallel import DistributedDataParallel

from metamask_ext.nn.names import check_name
from metamask_ext.nn.tasks import masked_layers
from metamask_ext.nn.tasks import tasks as model_tasks
from metamask_ext.nn.using_task import using_task

from .schedules import Annealing, Tasks, TaskSchedule
from .views import gates, mask_overlap, overlap_figure


class MetamaskCallback(Callback):
    """Trains the tasks of a masked model with a :class:`lightning.pytorch.Trainer`.

    Around each training batch (``training_step``, the backward and the optimiser's step, automatic or manual) the block
    ``using_task(module, task)`` is open. Tasks of the schedule that the model lacks are added before optimisers are made and before
    the model is wrapped: ``module.parameters()`` in ``configure_optimizers`` has all masks. Strategies that start their processes
    from the trainer (``ddp_spawn``, ``ddp_notebook``) load the trained state into the first process's model: add the tasks before.

    Under ``ddp`` each batch leaves the masks of other tasks without a gradient, which DistributedDataParallel must be told: with
    several tasks the strategy is ``"ddp_find_unused_parameters_true"``. Every process trains the same task at a time, unless
    ``tasks`` is a function that knows its process.

    Args:
        tasks: the task of each epoch, or of each batch: see :class:`metamask_ext.integrations.schedules.TaskSchedule`. None: the
            module opens its blocks itself.
        every: ``"epoch"`` or ``"step"`` (a training batch, counted over all epochs).
        evaluate: the task of each dataloader for validation, test and prediction, in their order. None: the module opens blocks
            itself.
        temperature: ``(start, end)``: the temperature of sigmoid gates falls from one to the other by the same factor each batch,
            ``start`` in the first and ``end`` in the last. It is logged as ``temperature``. Needs a trainer that ends
            (``max_epochs`` or ``max_steps``).
        histograms: log the gates' values each so many epochs: as ``gates/<layer>/<task>``, a histogram on TensorBoard and W&B;
            on every logger the part of the gates above 1/2, as ``open/<layer>/<task>``.
        overlap: log how much the tasks' masks have in common each so many epochs: the mean over pairs as ``overlap``, and the
            table of :func:`metamask_ext.integrations.views.mask_overlap` as a picture on TensorBoard and W&B.

    Raises:
        TypeError, ValueError: an argument that cannot be; also when the fit begins: no masked layer, no sigmoid gate to cool, a
            training without an end.
        RuntimeError: when the fit begins, of a DistributedDataParallel that is not told to find unused parameters.
    """

    def __init__(
        self,
        tasks: Tasks | None = None,
        *,
        every: str = "epoch",
        evaluate: Sequence[str] | None = None,
        temperature: tuple[float, float] | None = None,
        histograms: int | None = None,
        overlap: int | None = None,
    ):
        super().__init__()
        self.schedule = None if tasks is None else TaskSchedule(tasks, every)
        if isinstance(evaluate, str):
            raise TypeError(f"evaluate must be a sequence of names, one for each dataloader, got {evaluate!r}")
        self.evaluate = None if evaluate is None else [check_name(name) for name in evaluate]
        self.annealing = None if temperature is None else Annealing(temperature)
        for name, epochs in (("histograms", histograms), ("overlap", overlap)):
            if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1):
                raise ValueError(f"{name} must be a number of epochs of at least 1, got {epochs!r}")
        self.histograms, self.overlap = histograms, overlap
        self._block: using_task | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add the tasks that are missing."""
        masked_layers(pl_module)  # ValueError if there are none
        if stage == "fit":
            if self.schedule is not None:
                self.schedule.add_missing(pl_module)
            if self.annealing is not None:
                self.annealing.check(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what would go wrong later."""
        if self.annealing is not None and math.isinf(self._batches(trainer)) and trainer.max_steps == -1:
            raise ValueError("temperature must not be given for a training without an end: set max_epochs or max_steps")
        wrapped = trainer.model
        count = 0 if self.schedule is None else len(model_tasks(pl_module))
        if count > 1 and isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters:
            raise RuntimeError(
                f"strategy must be 'ddp_find_unused_parameters_true': the model has {count} tasks, and a batch of one leaves the "
                "masks of the others without a gradient"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the block of the batch's task, and cool the gates."""
        number = trainer.fit_loop.total_batch_idx
        if self.annealing is not None:
            part = number / max(1, self._batches(trainer) - 1)
            if trainer.max_steps != -1:
                part = max(part, trainer.global_step / max(1, trainer.max_steps - 1))
            temperature = self.annealing.apply(pl_module, part)
            pl_module.log("temperature", temperature, on_step=True, batch_size=1)
        if self.schedule is not None:
            self._open(pl_module, self.schedule.task(trainer.current_epoch if self.schedule.every == "epoch" else number))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Close the block."""
        self._close()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is wanted of the masks."""
        self._close()  # of a batch that another callback skipped
        if not trainer.is_global_zero:
            return
        done = trainer.current_epoch + 1
        if self.histograms is not None and done % self.histograms == 0:
            self._log_gates(trainer, pl_module)
        if self.overlap is not None and done % self.overlap == 0:
            self._log_overlap(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Open the block of the dataloader's task."""
        if self.evaluate is not None:
            if dataloader_idx >= len(self.evaluate):
                raise ValueError(
                    f"evaluate must name a task for each dataloader, got {len(self.evaluate)} for {dataloader_idx + 1}"
                )
            self._open(pl_module, self.evaluate[dataloader_idx])

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Close the block."""
        self._close()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the block."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the block."""
        self._close()

    def _open(self, module: LightningModule, task: str) -> None:
        self._close()
        block = using_task(module, task)
        block.__enter__()
        self._block = block

    def _close(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)

    @staticmethod
    def _batches(trainer: Trainer) -> float:
        """The number of batches of all epochs; infinite if nothing says how many."""
        epochs = trainer.max_epochs
        return math.inf if epochs is None or epochs < 0 else float(epochs * trainer.num_training_batches)

    def _log_gates(self, trainer: Trainer, module: LightningModule) -> None:
        shares: dict[str, float] = {}
        for path, layer in masked_layers(module):
            for task in model_tasks(module):
                values, name = gates(layer, task).cpu(), f"{path or 'model'}/{task}"
                shares[f"open/{name}"] = float((values > 0.5).float().mean())
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.add_histogram(f"gates/{name}", values, trainer.global_step)
                    elif isinstance(logger, WandbLogger):
                        from wandb import Histogram

                        logger.experiment.log({f"gates/{name}": Histogram(values.numpy(), num_bins=64)})
        for logger in trainer.loggers:
            logger.log_metrics(shares, trainer.global_step)

    def _log_overlap(self, trainer: Trainer, module: LightningModule) -> None:
        names, found = mask_overlap(module)
        pairs = ~torch.eye(len(names), dtype=torch.bool)
        mean = float(found[pairs].mean()) if len(names) > 1 else 1.0
        for logger in trainer.loggers:
            logger.log_metrics({"overlap": mean}, trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("overlap", overlap_figure(names, found), trainer.global_step)
            elif isinstance(logger, WandbLogger):
                from PIL import Image

                data = io.BytesIO()
                overlap_figure(names, found).savefig(data, format="png", dpi=120)
                logger.log_image("overlap-picture", [Image.open(data)])
