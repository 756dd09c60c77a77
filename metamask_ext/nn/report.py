"""The account of a model's parameters: how many are masked, and which are not, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..torch_private import BatchNorm
from .convertible import (
    layer_type,
    left_embedding,
    maskable_parameters,
    unmasked,
    unsupported,
    unsupported_norm,
    unsupported_parameter,
)
from .masked_layer import MaskedLayer
from .paths import plain_modules
from .per_task import PerTask
from .task_dict import TaskDict


@dataclass(frozen=True)
class Left:
    """A module with parameters that no mask covers.

    Attributes:
        name: its name in the model; ``""``: the model itself.
        type: the name of its class.
        reason: why its parameters are not masked.
        parameters: the number of their elements.
    """

    name: str
    type: str
    reason: str
    parameters: int


@dataclass(frozen=True)
class ConversionReport:
    """The parameters of a model that have masks, and those that do not; ``print`` shows a table.

    Attributes:
        masked: the number of parameters (elements) that have masks.
        per_task: the number of those of which every task has its own, as statistics and heads; of one task.
        total: the number of all parameters, each once, without the masks.
        left: the modules whose parameters are not masked.
    """

    masked: int
    per_task: int
    total: int
    left: tuple[Left, ...]

    @property
    def share(self) -> float:
        """``masked / total``; 0 in a model without parameters."""
        return self.masked / self.total if self.total else 0.0

    def __str__(self) -> str:
        own = f", {self.per_task:,} of each task" if self.per_task else ""
        head = f"{self.masked:,} of {self.total:,} parameters are masked ({self.share:.1%}){own}"
        if not self.left:
            return f"{head}. Nothing was left."
        rows = [("left", "type", "parameters", "reason")]
        rows += [(one.name or "(the model)", one.type, f"{one.parameters:,}", one.reason) for one in self.left]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows]
        return "\n".join([head, *lines])


def conversion_report(model: nn.Module) -> ConversionReport:
    """Count the parameters of ``model`` that have masks, and list the modules whose parameters have none, with the reason.

    Args:
        model: any module; it is not changed. Names are those of the plain model, without the prefixes of wrappers.

    Returns:
        A :class:`~metamask_ext.nn.report.ConversionReport`. ``left`` lists a module if a parameter of its own is not masked:
        subclasses that convert cannot mask, layers that it was not asked to (``exclude``), and what is no layer:
        embeddings, normalisations, parameters of a model's own (:func:`metamask_ext.mask_parameter` masks those).

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = plain_modules(model)
    masked: dict[Tensor, str] = {}
    for name, module in modules:
        if isinstance(module, MaskedLayer):
            for tensor, _ in module._groups():
                masked.setdefault(tensor, name)
    per_task = sum(_numel(tensors[next(iter(tensors))]) for tensors in _per_task(modules))
    others: set[Tensor] = set()
    left = []
    for name, module in modules:
        found = unmasked(module)
        if found:
            left.append(Left(name, type(module).__name__, _reason(name, module, found, masked), sum(map(_numel, found.values()))))
            others.update(found.values())
    count = sum(map(_numel, masked))
    total = count + per_task + sum(_numel(tensor) for tensor in others if tensor not in masked)
    return ConversionReport(count, per_task, total, tuple(left))


def _per_task(modules: list[tuple[str, nn.Module]]) -> set[TaskDict]:
    """The tensors of tasks that would be parameters in the plain model."""
    own = [tensors for _, module in modules if isinstance(module, PerTask) for tensors in module._own().values()]
    return {tensors for tensors in own if not tensors._only_buffers}


def _numel(tensor: Tensor) -> int:
    return 0 if isinstance(tensor, nn.UninitializedParameter) else tensor.numel()


def _reason(name: str, module: nn.Module, found: dict[str, Tensor], masked: dict[Tensor, str]) -> str:
    names = ", ".join(found)
    if isinstance(module, MaskedLayer):
        return f"{names} of its own: only {' and '.join(module._masked_names)} are masked"
    if layer_type(module) not in (None, nn.Embedding):
        return unsupported(module) or "convert can mask it, and was not asked to"
    if (parameters := maskable_parameters(module)) and not isinstance(module, PerTask):
        reasons = [unsupported_parameter(module, name) for name in parameters]
        return next((reason for reason in reasons if reason is not None), "convert can mask it, and was not asked to")
    ties = sorted({masked[tensor] for tensor in found.values() if tensor in masked})
    if ties:
        return f"it shares its parameter with {', '.join(map(repr, ties))}, which masks it; here it is used as it is"
    if isinstance(module, nn.BatchNorm2d) and not isinstance(module, PerTask) and unsupported_norm(module) is None:
        return "a normalisation, shared by all tasks: batch_norm='task' gives each its own"
    if isinstance(module, (BatchNorm, nn.LayerNorm, nn.GroupNorm)) or _is_norm(type(module)):
        return "a normalisation, shared by all tasks"
    if isinstance(module, nn.Embedding):
        return unsupported(module) or left_embedding(module, [name], False) or ""
    return f"{names}: neither Linear nor Conv2d"


def _is_norm(kind: type[nn.Module]) -> bool:
    return "norm" in kind.__name__.lower()
