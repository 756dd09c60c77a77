"""Linear tasks that share their weights: Blum and Law, EE5239 project proposal (2020), sections 3.1 and 3.5."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_at_least_one


@dataclass(frozen=True)
class LinearTasks:
    """Tasks with the score ``z_t = (w * m_t)^T x + b * m_bt``; :func:`linear_tasks` draws them.

    Attributes:
        parameters: ``[variables + 1]``: the shared ``w``, then ``b``.
        support: bool ``[tasks, variables + 1]``: which of ``parameters`` are on in each task (``m_t``, then ``m_bt``).
        train, test: from task name (``"task-0"``, ...) to ``(x, y)``, ``[n, variables]`` and ``[n, 1]``, float32.
    """

    parameters: Tensor
    support: Tensor
    train: dict[str, tuple[Tensor, Tensor]]
    test: dict[str, tuple[Tensor, Tensor]]

    def score(self, task: int, x: Tensor) -> Tensor:
        """Compute the true ``z_t``, ``[n, 1]``, for ``x`` ``[n, variables]``."""
        theta = self.parameters * self.support[task]
        return (x @ theta[:-1] + theta[-1])[:, None]


def linear_tasks(
    tasks: int, train_samples: int, test_samples: int, *, variables: int = 5, labels: str = "score", seed: int = 0
) -> LinearTasks:
    """Draw tasks in which every weight, and the bias, is the shared one or 0, with probability 1/2 each.

    ``x ~ N(0, I)``; ``|w_k|`` and ``|b|`` are uniform in [1, 3], their signs random. No noise is added.

    Args:
        tasks: how many.
        train_samples, test_samples: samples of each task.
        variables: inputs of each task; 5 in section 3.1.
        labels: ``"score"``: ``y = z`` (section 3.1); ``"binary"``: ``y`` is 1 with probability ``sigmoid(z)``, else 0, the model
            of logistic regression (section 3.5), so no classifier can be right about every label.
        seed: of a generator of its own.

    Raises:
        ValueError: ``labels`` is neither, or a number is less than 1.
    """
    if labels not in ("score", "binary"):
        raise ValueError(f"labels must be 'score' or 'binary', got {labels!r}")
    check_at_least_one(tasks=tasks, train_samples=train_samples, test_samples=test_samples, variables=variables)
    generator = torch.Generator().manual_seed(seed)
    size = variables + 1
    sign = 1 - 2 * torch.randint(2, (size,), generator=generator)
    parameters = sign * (1 + 2 * torch.rand(size, generator=generator))
    support = torch.randint(2, (tasks, size), generator=generator).bool()
    drawn = LinearTasks(parameters, support, {}, {})
    for task in range(tasks):
        for split, samples in ((drawn.train, train_samples), (drawn.test, test_samples)):
            x = torch.randn(samples, variables, generator=generator)
            y = drawn.score(task, x)
            if labels == "binary":
                y = torch.bernoulli(torch.sigmoid(y), generator=generator)
            split[f"task-{task}"] = x, y
    return drawn
