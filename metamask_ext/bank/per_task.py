"""The tensors of a model that belong to its tasks beside the masks, chosen by patterns of names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import Tensor, nn

from ..nn.masked_layer import MaskedLayer
from ..nn.paths import plain_modules
from ..nn.per_task import PerTask, keep_per_task
from ..nn.structure import unchanged_on_error
from ..nn.task_dict import TaskDict
from ..nn.tasks import slots


def full_name(path: str, name: str) -> str:
    """Return the state_dict name of the tensor ``name`` of the module at ``path``, which is empty for the model itself."""
    return f"{path}.{name}" if path else name


def shared_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield every parameter and saved buffer that belongs to no task: plain path, module, name there, and the tensor."""
    inside = {tensor for module in model.modules() if isinstance(module, TaskDict) for tensor in module.modules()}
    for path, module in plain_modules(model, remove_duplicate=False):
        if module in inside:
            continue
        unsaved = module._non_persistent_buffers_set
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None and name not in unsaved:
                    yield full_name(path, name), module, name, tensor


def per_task_names(model: nn.Module) -> list[str]:
    """List what :func:`keep_matching` has made belong to tasks, and what does in layers made for it."""
    modules = [(path, module) for path, module in plain_modules(model) if isinstance(module, PerTask)]
    return [full_name(path, name) for path, module in modules for name in module._own()]


def keep_matching(model: nn.Module, patterns: str | Iterable[str]) -> None:
    """Make the tensors whose names match belong to tasks. Nothing is changed if a pattern is refused."""
    found: dict[nn.Module, dict[str, None]] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"per_task must be patterns of names, got {type(pattern).__name__}")
        matching = [(full, module, name) for full, module, name, _ in shared_tensors(model) if fnmatchcase(full, pattern)]
        if not matching:
            raise ValueError(f"per_task pattern {pattern!r} matches no parameter or buffer that the tasks share")
        for full, module, name in matching:
            if isinstance(module, MaskedLayer):
                raise ValueError(
                    f"per_task pattern {pattern!r} matches {full!r} of a masked layer, which its tasks share: each has its mask"
                )
            if isinstance(module, PerTask):
                raise ValueError(
                    f"per_task pattern {pattern!r} matches {full!r}, whose module keeps other tensors per task already"
                )
            found.setdefault(module, {})[name] = None
    by_slot = slots(model)
    with unchanged_on_error(found):
        for module, names in found.items():
            keep_per_task(module, names, by_slot)
