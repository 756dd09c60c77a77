"""Numbers and pictures of a model's masks, for the loggers of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from metamask_ext.nn.masked_layer import MaskedLayer
from metamask_ext.nn.tasks import masked_layers
from metamask_ext.nn.tasks import tasks as model_tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def gates(layer: MaskedLayer, task: str) -> Tensor:
    """The values ``g(M)`` of a task's masks of a layer, float, flat: of the weight, then of the bias. Bits are 0 and 1.

    ValueError if the layer does not know the task.
    """
    parts = [layer._masked_by(torch.ones_like(shared), masks[task]) for shared, masks in layer._groups()]
    return torch.cat([part.flatten().float() for part in parts])


@torch.no_grad()
def mask_overlap(model: nn.Module) -> tuple[list[str], Tensor]:
    """Says how much the masks of two tasks have in common: ``|A & B| / |A | B|`` of the gates above 1/2, over all masked layers.

    Returns:
        The names of the tasks, and a float64 tensor ``[T, T]`` in their order: 1 for the same open gates (two tasks without any
        among them), 0 for none in common.

    Raises:
        ValueError: the model has no masked layer, or its layers have different tasks.
    """
    names = model_tasks(model)
    both = torch.zeros(len(names), len(names), dtype=torch.float64)
    for _, layer in masked_layers(model):
        on = torch.stack([gates(layer, name) > 0.5 for name in names]).float()
        both += (on @ on.T).double().cpu()
    count = both.diagonal()
    either = count[:, None] + count - both
    return names, torch.where(either > 0, both / either.clamp(min=1), 1.0)


def overlap_figure(names: list[str], overlap: Tensor) -> Figure:
    """The overlap of tasks as a picture: a square for each pair, with its number where there are few.

    ImportError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is not installed: pip install "metamask_ext[lightning]"') from error
    size = 2.0 + 0.35 * min(len(names), 40)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(overlap.numpy(), vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, label="open gates in common / open in either")
    if len(names) <= 40:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 12:
        for row, values in enumerate(overlap.tolist()):
            for column, value in enumerate(values):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    axes.set_title("Overlap of the tasks' masks")
    return figure
