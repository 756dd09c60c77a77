"""The tasks of a whole model."""

from __future__ import annotations

from torch import Tensor, nn

from .active import describe, is_active
from .layers import MaskedLayer, TaskMasks
from .names import check_name


def masked_layers(model: nn.Module) -> list[tuple[str, MaskedLayer]]:
    """The masked layers of ``model`` with their names, each once. ValueError if there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, MaskedLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no masked layer: build it with metamask_ext.nn, or metamask_ext.convert it")
    return layers


def tasks(model: nn.Module) -> list[str]:
    """The names of the model's tasks, oldest first.

    Raises:
        ValueError: ``model`` has no masked layer, or its layers have different tasks.
    """
    layers = masked_layers(model)
    first_name, first = layers[0]
    names = list(first.masks)
    known = set(names)
    for name, layer in layers:
        for _, masks in layer._groups():
            if masks.keys() != known:
                raise ValueError(
                    f"the masks of the model have different tasks: those of {first_name or 'the model'!r} {describe(names)}, "
                    f"those of {name or 'the model'!r} {describe(masks)}"
                )
    return names


def add_task(model: nn.Module, name: str, init: str = "random") -> None:
    """Give every masked layer of ``model`` a mask for a new task. Masks that exist are not moved.

    An optimiser built before does not know the new parameters: add them to it (``metamask_ext.continual.TaskLoop`` does).

    Args:
        model: a module with masked layers.
        name: the new task; any non-empty string.
        init: ``"random"``: by each layer's ``mask_init`` (for a new layer a normal distribution; for a converted one +4
            everywhere); ``"mean"``: the mean of the logits of the tasks that exist; ``"copy:<task>"``: those of that task.

    Raises:
        ValueError: the task exists, ``init`` is unknown or names an unknown task, or ``model`` has no masked layer.
    """
    known = tasks(model)
    if check_name(name) in known:
        raise ValueError(f"task {name!r} exists; the model has {describe(known)}")
    if not isinstance(init, str):
        raise TypeError(f"init must be a string, got {type(init).__name__}")
    source = init[len("copy:") :] if init.startswith("copy:") else None
    if source is not None and source not in known:
        raise ValueError(f"init must copy one of {describe(known)}, got {init!r}")
    if source is None and init not in ("random", "mean"):
        raise ValueError(f"init must be 'random', 'mean' or 'copy:<task>', got {init!r}")

    def mean(masks: TaskMasks, logits: Tensor) -> None:
        for given in masks.values():
            logits += given / len(masks)

    def fill(masks: TaskMasks, logits: Tensor) -> None:
        if source is None:
            mean(masks, logits.zero_())
        else:
            logits.copy_(masks[source])

    layers = masked_layers(model)
    new = [mask for _, layer in layers for mask in layer._new_masks(None if init == "random" else fill)]
    for masks, logits in new:
        masks[name] = logits


def remove_task(model: nn.Module, name: str) -> None:
    """Remove a task's masks from every masked layer of ``model``.

    Raises:
        ValueError: the task is unknown, or the last one.
        RuntimeError: the task is active in an open ``using_task`` block.
    """
    known = tasks(model)
    if name not in known:
        raise ValueError(f"task must be one of {describe(known)}, got {name!r}")
    if len(known) == 1:
        raise ValueError(f"task {name!r} is the model's last one: a masked layer needs a mask")
    layers = [layer for _, layer in masked_layers(model)]
    if is_active(layers, name):
        raise RuntimeError(f"task {name!r} is active: leave its using_task block before removing it")
    for layer in layers:
        layer._remove_task(name)
