"""Avalanche 0.6: a masked model as a multi-task module, a plugin, and a strategy of both."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

try:
    from avalanche.core import SupervisedPlugin
    from avalanche.models import MultiTaskModule
    from avalanche.training.templates import SupervisedTemplate
except ImportError as error:
    raise ImportError("avalanche is not installed: pip install avalanche-lib") from error

from metamask_ext.nn.names import DEFAULT_TASK
from metamask_ext.nn.task_dict import TaskDict
from metamask_ext.nn.tasks import add_task, masked_layers, remove_task
from metamask_ext.nn.tasks import tasks as model_tasks
from metamask_ext.nn.using_task import using_task

from .schedules import Annealing

SHARED = ("frozen", "first", "trained")


class MaskedTasks(MultiTaskModule):
    """A masked model whose task labels choose the masks, of each sample its own: ``theta = W * g(M_label)``.

    A label that is first seen in training gets new masks, before Avalanche hands the new parameters to the optimiser. The task
    ``"default"``, which a new model has, becomes the first label's. Labels that were never trained are refused in evaluation.

    Args:
        model: with masked layers; samples lie along the first dimension.

    Raises:
        ValueError: the model has no masked layer.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        masked_layers(model)
        self.model = model

    def adaptation(self, experience: Any) -> None:
        """Add the masks of labels that are new."""
        if not self.training:
            return
        for label in experience.task_labels:
            known, name = model_tasks(self.model), task_name(label)
            if name in known:
                continue
            if known == [DEFAULT_TASK]:
                add_task(self.model, name, f"copy:{DEFAULT_TASK}")
                remove_task(self.model, DEFAULT_TASK)
            else:
                add_task(self.model, name)
        self.known_train_tasks_labels.update(experience.task_labels)

    def forward(self, x: Tensor, task_labels: Tensor | int) -> Tensor:
        """The output ``[B, ...]`` for ``x`` ``[B, ...]`` and its task labels: int64 ``[B]``, or one of all samples."""
        labels = [int(task_labels)] * len(x) if isinstance(task_labels, int) else task_labels.tolist()
        names = task_name(labels[0]) if len({*labels}) == 1 else [task_name(label) for label in labels]
        with using_task(self.model, names):
            output: Tensor = self.model(x)
            return output


def task_name(label: int) -> str:
    """The name of the task with this label of Avalanche's."""
    return f"task-{int(label)}"


class MetamaskPlugin(SupervisedPlugin):
    """Says when the shared weights W of a :class:`MaskedTasks` are trained, and cools the gates in every experience.

    Args:
        shared: ``"first"``: with the first experience, frozen from then on, so that no later one can harm it; ``"frozen"``: never
            (Wortsman et al., arXiv:2006.14769, Supermasks in Superposition); ``"trained"``: always, and earlier tasks change.
        temperature: ``(start, end)`` of sigmoid gates, falling over the epochs of each experience, ``end`` in the last one; None:
            left as it is.

    Raises:
        TypeError, ValueError: an argument that cannot be. When training begins: the strategy's model is no MaskedTasks, or has no
            gate with a temperature.
    """

    def __init__(self, shared: str = "first", temperature: tuple[float, float] | None = None):
        super().__init__()
        if shared not in SHARED:
            raise ValueError(f"shared must be one of {', '.join(SHARED)}, got {shared!r}")
        self.shared, self.annealing = shared, None if temperature is None else Annealing(temperature)

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse another model."""
        if not isinstance(strategy.model, MaskedTasks):
            raise TypeError(f"model must be a MaskedTasks, got {type(strategy.model).__name__}")
        if self.annealing is not None:
            self.annealing.check(strategy.model)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Let the shared weights be trained, or freeze them."""
        trained = self.shared == "trained" or (self.shared == "first" and strategy.clock.train_exp_counter == 0)
        for parameter in shared_parameters(strategy.model):
            parameter.requires_grad_(trained)
            if not trained:
                parameter.grad = None  # Else the optimiser would go on by momentum.

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Cool the gates."""
        if self.annealing is not None:
            self.annealing.apply(strategy.model, strategy.clock.train_exp_epochs / max(1, strategy.train_epochs - 1))


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that belong to no task."""
    own = {parameter for module in model.modules() if isinstance(module, TaskDict) for parameter in module.parameters()}
    return [parameter for parameter in model.parameters() if parameter not in own]


class Metamask(SupervisedTemplate):
    """Masks for each task over shared weights, as a strategy: :class:`MaskedTasks` with :class:`MetamaskPlugin`.

    Needs task labels, in training and in evaluation.

    Args:
        model: with masked layers, or a :class:`MaskedTasks`.
        optimizer: of its parameters; those of later tasks are added.
        shared, temperature: of the plugin.
        options: of Avalanche's ``SupervisedTemplate``.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        shared: str = "first",
        temperature: tuple[float, float] | None = None,
        **options: Any,
    ):
        plugins = [MetamaskPlugin(shared, temperature), *(options.pop("plugins", None) or [])]
        wrapped = model if isinstance(model, MaskedTasks) else MaskedTasks(model)
        super().__init__(model=wrapped, optimizer=optimizer, plugins=plugins, **options)
