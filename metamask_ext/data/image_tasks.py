"""Tasks made of one set of images: a permutation of the pixels for each, a rotation, or a colour of the background.

The images stay as they are; a task is applied to a batch when it is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_at_least_one


class PermutedImages:
    """Permuted MNIST: task ``t`` is a fixed permutation ``p_t`` of the pixels, ``y[b, k] = x[b, p_t[k]]``.

    Source: Goodfellow et al., An Empirical Investigation of Catastrophic Forgetting, arXiv:1312.6211; as in Wortsman et
    al., Supermasks in Superposition, arXiv:2006.14769, section 4.2. All permutations are drawn, that of task 0 too.

    Args:
        tasks: how many.
        pixels: of an image; 784 for digits.
        seed: of a generator of its own. The first permutations do not depend on how many follow.

    Attributes:
        names: ``"permutation-0"``, ...
        permutations: int64 ``[tasks, pixels]``.

    Raises:
        ValueError: ``tasks`` or ``pixels`` is less than 1.
    """

    def __init__(self, tasks: int, pixels: int = 784, seed: int = 0):
        check_at_least_one(tasks=tasks, pixels=pixels)
        generator = torch.Generator().manual_seed(seed)
        self.names = [f"permutation-{task}" for task in range(tasks)]
        self.permutations = torch.stack([torch.randperm(pixels, generator=generator) for _ in range(tasks)])

    def __call__(self, images: Tensor, task: int | Tensor) -> Tensor:
        """Show the images as the task, or each image's task, does.

        Args:
            images: ``[B, ...]``, ``pixels`` numbers each; of any dtype.
            task: an index into ``names``, or int64 ``[B]``, one for each image.

        Returns:
            Images of the same shape and dtype.

        Raises:
            TypeError, ValueError: ``images`` are not of ``pixels`` numbers, ``task`` is no index, not int64, not of ``[B]``, or out
                of range.
        """
        task = _check_task(task, images, len(self.names))
        flat = images.flatten(1)
        if flat.shape[1] != self.permutations.shape[1]:
            raise ValueError(f"images must have {self.permutations.shape[1]} pixels each, got shape {list(images.shape)}")
        order = self.permutations[task].to(images.device)
        return (flat[:, order] if order.dim() == 1 else flat.gather(1, order)).view_as(images)


class RotatedImages:
    """Rotated MNIST: task ``t`` turns the images by ``degrees * t``, counter-clockwise; bilinear, zeros come in at the corners.

    Source: Wortsman et al., Supermasks in Superposition, arXiv:2006.14769, section 4.2: 36 tasks, 10 degrees apart.

    Args:
        tasks: how many.
        degrees: from a task to the next.

    Attributes:
        names: ``"rotation-0"``, ``"rotation-10"``, ...: the angles.
        angles: float64 ``[tasks]``, in degrees.

    Raises:
        ValueError: ``tasks`` is less than 1, or two tasks would be the same rotation.
    """

    def __init__(self, tasks: int = 36, degrees: float = 10.0):
        check_at_least_one(tasks=tasks)
        if not (degrees > 0 and degrees * (tasks - 1) < 360):
            raise ValueError(
                f"degrees must be positive, and tasks * degrees at most a full turn, got {tasks} tasks {degrees:g} degrees apart"
            )
        self.angles = degrees * torch.arange(tasks, dtype=torch.float64)
        self.names = [f"rotation-{angle:g}" for angle in self.angles.tolist()]

    def __call__(self, images: Tensor, task: int | Tensor) -> Tensor:
        """Show the images as the task, or each image's task, does.

        Args:
            images: floating point ``[B, C, height, width]``, square.
            task: an index into ``names``, or int64 ``[B]``, one for each image.

        Returns:
            Images of the same shape and dtype.

        Raises:
            TypeError, ValueError: ``images`` are no such tensor, ``task`` is no index, not int64, not of ``[B]``, or out of range.
        """
        task = _check_task(task, images, len(self.names))
        if images.dim() != 4 or images.shape[2] != images.shape[3] or not images.is_floating_point():
            raise ValueError(f"images must be floating point [B, C, n, n], got {images.dtype} {list(images.shape)}")
        if len(images) == 0:  # affine_grid refuses it
            return images.clone()
        angle = torch.deg2rad(self.angles[task]).expand(len(images))
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        # Each row maps an output pixel to where it comes from; y points down, hence the signs.
        rows = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
        grid = F.affine_grid(rows.to(images), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


class ColoredImages:
    """Colored MNIST: task ``t`` has white digits on a background of a colour, ``y[b, c] = x[b, 0] + (1 - x[b, 0]) * colour_t[c]``.

    Source: Blum and Law, EE5239 project proposal (2020), section 3.7.

    Args:
        tasks: how many.
        seed: of a generator of its own. The first colours do not depend on how many follow.

    Attributes:
        names: ``"color-0"``, ...
        colors: float32 ``[tasks, 3]``: red, green and blue, uniform in [0, 1).

    Raises:
        ValueError: ``tasks`` is less than 1.
    """

    def __init__(self, tasks: int, seed: int = 0):
        check_at_least_one(tasks=tasks)
        self.names = [f"color-{task}" for task in range(tasks)]
        self.colors = torch.rand(tasks, 3, generator=torch.Generator().manual_seed(seed))

    def __call__(self, images: Tensor, task: int | Tensor) -> Tensor:
        """Show the images as the task, or each image's task, does.

        Args:
            images: floating point ``[B, 1, height, width]`` in [0, 1], 1 where there is ink.
            task: an index into ``names``, or int64 ``[B]``, one for each image.

        Returns:
            Images ``[B, 3, height, width]`` of the same dtype.

        Raises:
            TypeError, ValueError: ``images`` are no such tensor, ``task`` is no index, not int64, not of ``[B]``, or out of range.
        """
        task = _check_task(task, images, len(self.names))
        if images.dim() != 4 or images.shape[1] != 1 or not images.is_floating_point():
            raise ValueError(f"images must be floating point [B, 1, height, width], got {images.dtype} {list(images.shape)}")
        color = self.colors[task].to(images).expand(len(images), 3)[:, :, None, None]
        return images + (1 - images) * color


def _check_task(task: int | Tensor, images: Tensor, tasks: int) -> int | Tensor:
    """Return ``task`` if it is an index for all images, or one for each. TypeError or ValueError otherwise."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if isinstance(task, Tensor):
        if task.dtype != torch.int64:
            raise TypeError(f"task must be int64 where it is a tensor, got {task.dtype}")
        if task.shape != images.shape[:1]:
            raise ValueError(f"task must be [{len(images)}], one for each image, got shape {list(task.shape)}")
        if len(task) == 0:
            return task
        low, high = int(task.min()), int(task.max())
    elif isinstance(task, int):
        low = high = task
    else:
        raise TypeError(f"task must be an integer or an int64 tensor, got {type(task).__name__}")
    if low < 0 or high >= tasks:
        raise ValueError(f"task must be in 0..{tasks - 1}, got {low if low < 0 else high}")
    return task
