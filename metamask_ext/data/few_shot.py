"""Few-shot classification tasks: a few classes, a few images of each."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_at_least_one

Samples = tuple[Tensor, Tensor]


def few_shot_tasks(
    drawings: Tensor, tasks: int, ways: int, shots: int, queries: int, generator: torch.Generator
) -> tuple[Samples, Samples]:
    """Draw ``tasks`` tasks, each of ``ways`` classes; a class is a character turned by a multiple of 90 degrees.

    Source: Santoro et al., Meta-Learning with Memory-Augmented Neural Networks, ICML 2016; Finn, Abbeel and Levine,
    arXiv:1703.03400, section 5.2.

    Args:
        drawings: uint8 ``[characters, n, height, width]``, square.
        ways, shots, queries: classes of a task, and of each class the images to learn from and to be judged by; these are
            different drawings.

    Returns:
        Support and query set, ``(x, y)`` each: ``x`` float32 ``[tasks, ways * shots, 1, height, width]`` in [0, 1] (query:
        ``ways * queries``), ``y`` int64 ``[tasks, ways * shots]`` in ``0..ways - 1``.

    Raises:
        ValueError: a number is less than 1, or more than there are classes or drawings.
    """
    characters, each = drawings.shape[:2]
    check_at_least_one(tasks=tasks, ways=ways, shots=shots, queries=queries)
    if ways > 4 * characters:
        raise ValueError(f"ways must be at most 4 * characters = {4 * characters}, got {ways}")
    if shots + queries > each:
        raise ValueError(f"shots + queries must be at most the drawings of a character, {each}, got {shots} + {queries}")
    # The places of the largest random numbers are a draw without replacement, for all tasks at once.
    classes = torch.rand(tasks, 4 * characters, generator=generator).topk(ways).indices
    chosen = torch.rand(tasks, ways, each, generator=generator).topk(shots + queries).indices
    images = drawings[(classes // 4)[..., None], chosen].float() / 255  # [tasks, ways, shots + queries, height, width]
    turns = (classes % 4)[..., None, None, None]
    for number in range(1, 4):
        images = torch.where(turns == number, torch.rot90(images, number, (3, 4)), images)
    labels = torch.arange(ways)[:, None].expand(tasks, ways, shots + queries)

    def part(begin: int, end: int) -> Samples:
        return images[:, :, begin:end].flatten(1, 2)[:, :, None], labels[:, :, begin:end].flatten(1)

    return part(0, shots), part(shots, shots + queries)
